"""Plug-ins by name, and their settings against their constructors."""
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal

import pytest

from fedcore import registry
from fedcore.catalogue import CATALOGUE, PATHS
from fedcore.errors import BrokenPlugin, InvalidSetting, MissingData, MissingSetting, UnknownName, UnknownSetting
from fedcore.listing import summary_of
from fedcore.registry import build, check, names, resolve, signature


@dataclass(frozen=True)
class Splitter:
    """Stands for a partition of a user's own."""

    share: float
    parts: int = 2
    mode: Literal["even", "odd"] = "even"
    sizes: tuple[int, ...] = ()
    note: str | None = None
    key: Callable[[int], int] | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InvalidSetting("share", self.share, "in (0, 1]")


class Careless:
    """Has no annotations, takes anything, and dislikes zero."""

    def __init__(self, number=1, **others):
        self.ratio, self.others = 1 / number, others
        if number < 0:
            raise ValueError("negative")


SPLITTER, CARELESS = "splitter", "careless"


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Register the two classes as an installed package would."""
    entries = {SPLITTER: EntryPoint(SPLITTER, f"{__name__}:Splitter", "fedcore.partitions"),
               CARELESS: EntryPoint(CARELESS, f"{__name__}:Careless", "fedcore.partitions")}
    monkeypatch.setattr(registry, "_installed", lambda kind: entries if kind == "partitions" else {})


def problems_of(**settings: object) -> list[str]:
    return [str(problem) for problem in check("partitions", {"name": SPLITTER, **settings}, "here")[1]]


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in CATALOGUE for name in CATALOGUE[kind]])
def test_every_built_in_name_stands_for_something_with_a_description(kind, name):
    factory = resolve(kind, name)
    assert callable(factory)
    summary = summary_of(CATALOGUE[kind][name], factory)
    assert summary.endswith(".")
    assert "\n" not in summary


@pytest.mark.parametrize("name", CATALOGUE["strategies"])
def test_every_strategy_names_its_paper_and_kind(name):
    entry = CATALOGUE["strategies"][name]
    assert entry.paper
    assert entry.kind.startswith(("events", "rounds", "peers"))


def test_installed_packages_add_names():
    assert names("partitions")[-2:] == [CARELESS, SPLITTER]
    assert resolve("partitions", SPLITTER) is Splitter
    assert build("partitions", {"name": SPLITTER, "share": 1}).share == 1.0


def test_a_class_is_named_by_module_and_class():
    assert resolve("partitions", "fedcore.clients.partitions:Iid").__name__ == "Iid"


def test_an_unknown_name_gets_the_nearest_and_the_list():
    with pytest.raises(UnknownName, match="Did you mean dirichlet.*Allowed: iid, "):
        resolve("partitions", "Dirichlett")


def test_the_path_of_the_setting_is_in_the_error():
    with pytest.raises(UnknownName, match=r"^clients\.partition='nothing'"):
        resolve("partitions", "nothing")
    with pytest.raises(UnknownName, match=r"^some\.where\.name='nothing'"):
        build("partitions", {"name": "nothing"}, "some.where")


@pytest.mark.parametrize("target", ["nothing here:Class", ":Class", "module:", "module:1", "a..b:C"])
def test_a_target_that_is_not_module_and_class_is_refused(target):
    with pytest.raises(InvalidSetting, match="package.module:Class"):
        resolve("strategies", target)


def test_arguments_are_converted_as_annotated():
    checked, problems = check("partitions", {"name": SPLITTER, "share": "5e-1", "parts": 3.0, "sizes": [1, 2]}, "here")
    assert not problems
    assert checked == {"name": SPLITTER, "share": 0.5, "parts": 3, "sizes": [1, 2]}
    assert build("partitions", checked).sizes == (1, 2)


@pytest.mark.parametrize("settings, message", [
    ({"share": "half"}, "here.share='half', but it must be a number."),
    ({"share": True}, "here.share=True, but it must be a number."),
    ({"share": float("nan")}, "here.share=nan, but it must be a finite number."),
    ({"share": 1, "parts": 1.5}, "here.parts=1.5, but it must be a whole number."),
    ({"share": 1, "parts": True}, "here.parts=True, but it must be a whole number."),
    ({"share": 1, "mode": "evn"}, "here.mode='evn', but it must be one of even, odd. Did you mean even?"),
    ({"share": 1, "sizes": 3}, "here.sizes=3, but it must be a list of whole numbers."),
    ({"share": 1, "sizes": [1, True]}, "here.sizes=[1, True], but it must be a list of whole numbers."),
    ({"share": 1, "note": 3}, "here.note=3, but it must be text or null."),
    ({"share": 1, "part": 3}, "here.part=3, but there is no such setting. Did you mean parts? Allowed: share, parts,"),
    ({"share": 1, "key": "abs"}, "here.key='abs', but there is no such setting."),
    ({}, "here.share is missing; it must be a number."),
])
def test_what_does_not_fit_the_constructor_is_said(settings, message):
    found = problems_of(**settings)
    assert len(found) == 1
    assert found[0].startswith(message)


def test_every_problem_of_a_plug_in_is_found():
    kinds = [type(problem) for problem in check("partitions", {"name": SPLITTER, "prts": 1, "mode": 3}, "here")[1]]
    assert kinds == [UnknownSetting, InvalidSetting, MissingSetting]


def test_a_range_known_to_the_constructor_gets_the_full_path():
    with pytest.raises(InvalidSetting, match=r"^here\.share=2\.0, but it must be in \(0, 1\]"):
        build("partitions", {"name": SPLITTER, "share": 2}, "here")


def test_other_complaints_of_a_constructor_are_told():
    with pytest.raises(BrokenPlugin, match="here: careless does not accept its settings: negative"):
        build("partitions", {"name": CARELESS, "number": -1}, "here")


def test_a_constructor_without_annotations_takes_what_it_is_given():
    assert build("partitions", {"name": CARELESS, "number": 4, "colour": "red"}).others == {"colour": "red"}


def test_provided_arguments_reach_those_that_take_them_and_no_others():
    assert build("partitions", {"name": SPLITTER, "share": 1}, parts=5, seed=1).parts == 5
    assert build("partitions", CARELESS, seed=1).others == {"seed": 1}


def test_a_provided_argument_is_no_setting():
    problem = check("optimizers", {"name": "sgd", "lr": 0.1}, "train.optimizer")[1][0]
    assert str(problem).startswith("train.optimizer.lr=0.1, but there is no such setting. Give it as train.lr.")
    assert "input_shape" not in signature("models", resolve("models", "mlp")).settings


def test_a_path_must_exist(tmp_path):
    with pytest.raises(MissingData, match=r"here\.path='gone\.csv'.*there is no"):
        build("partitions", {"name": SPLITTER, "share": 1, "path": "gone.csv"}, "here")
    (tmp_path / "here.csv").touch()
    checked, problems = check("partitions", {"name": SPLITTER, "share": 1, "path": "here.csv"}, "here", tmp_path)
    assert not problems
    assert checked["path"] == str(tmp_path / "here.csv")


def test_a_strategy_inside_a_strategy_is_checked_and_built():
    spec: dict[str, Any] = {"name": "dp_server_fixed_clipping", "noise_multiplier": 1, "clipping_norm": 1,
                            "num_sampled_clients": 4, "strategy": {"name": "fedavgm", "server_momentum": 0.5}}
    assert build("strategies", spec).strategy.server_momentum == 0.5
    spec["strategy"] = {"name": "fedavgm", "server_momentun": 0.5}
    with pytest.raises(UnknownSetting, match=r"strategy\.strategy\.server_momentun=0\.5"):
        build("strategies", spec)
    with pytest.raises(UnknownName, match=r"strategy\.strategy='fedavgg'"):
        build("strategies", spec | {"strategy": "fedavgg"})


def test_a_class_that_is_no_strategy_is_refused():
    with pytest.raises(InvalidSetting, match="a Flower Strategy"):
        build("strategies", f"{Path.__module__}:Path")


@pytest.mark.parametrize("kind", PATHS)
def test_every_kind_has_a_path_and_a_table(kind):
    assert kind in CATALOGUE
