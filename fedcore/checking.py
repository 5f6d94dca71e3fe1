"""Checks an experiment, and collects everything that is wrong with it."""
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic.fields import FieldInfo

from fedcore import registry
from fedcore.catalogue import (
    COMPRESSION_TRIAL,
    OPTIMIZER_TRIAL,
    SCHEDULE_TRIAL,
    SIMULATION_TRIALS,
    TASK_TRIAL,
    TRAIN_TRIAL,
)
from fedcore.config import ExistingFile, Experiment, Part, PlugIn, Section
from fedcore.consistency import contradictions, doubts
from fedcore.errors import BadExperiment, BadInput, InvalidSetting, MissingSetting, UnknownSetting
from fedcore.overrides import apply_overrides
from fedcore.schema import convert, describe, nearest
from fedcore.yaml_file import read_mapping

Found = TypeVar("Found", bound=Section)
DEFAULT_ROUNDS = 30
DEFAULT_LOCAL_STEPS = 10


def check_experiment(
    experiment: str | Path | Mapping[str, Any] | Experiment, overrides: Sequence[str] = (), part: Part = "all"
) -> Experiment:
    """See `fedcore.config.load_experiment`."""
    if isinstance(experiment, Experiment):
        if not overrides:
            return experiment
        experiment = experiment.resolved()
    folder: Path | None = None
    if isinstance(experiment, Mapping):
        source, settings = "The experiment", dict(experiment)
    else:
        path = Path(experiment)
        source, settings, folder = str(path), read_mapping(path), path.absolute().parent
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    settings, problems = apply_overrides(settings, overrides)
    reader = _Reader(folder)
    values = reader.section(Experiment, settings, "")
    problems += reader.problems
    if problems:
        raise BadExperiment(source, problems)
    checked = _with_defaults(Experiment(**values))
    checked._source = source
    task, strategy, problems = _try_out(checked)
    problems += contradictions(checked, task, strategy)
    if problems:
        raise BadExperiment(source, problems)
    try:
        # Data that are missing or unreadable, or too few for so many clients, show only when they are asked for.
        registry.load(TASK_TRIAL)(checked, strategy, part)
    except BadInput as error:
        raise BadExperiment(source, [error]) from error
    checked._warnings = tuple(doubts(checked, settings, task, strategy))
    return checked


class _Reader:
    """Walks through a file's sections and converts every value, noting what does not fit."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.problems: list[BadInput] = []

    def section(self, section: type[Section], settings: Any, path: str) -> dict[str, Any]:
        """Return the values of a section, as far as they are right."""
        if settings is None:        # a heading with nothing under it
            settings = {}
        known = section.model_fields
        if not isinstance(settings, Mapping):
            example = f"{{{next(iter(known))}: ...}}"
            self.problems.append(InvalidSetting(path, settings, "a mapping of settings", f"Write {path}: {example}."))
            return {}
        values: dict[str, Any] = {}
        for key, value in settings.items():
            where = f"{path}.{key}" if path else str(key)
            if key in known:
                try:
                    values[key] = self.value(known[key], value, where)
                except BadInput as error:
                    self.problems.append(error)
            else:
                self.problems.append(UnknownSetting(where, value, ", ".join(known), _hint(key, known)))
        for key, field in known.items():
            if field.is_required() and key not in settings:
                self.problems.append(_missing(key, field))
        return values

    def value(self, field: FieldInfo, value: Any, where: str) -> Any:
        """Return one setting, converted.

        Raises:
            BadInput: it does not fit.
        """
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            return annotation(**self.section(annotation, value, where))
        # pydantic takes the outermost `Annotated` apart; put together, it describes the whole setting.
        full = Annotated[(annotation, *field.metadata)] if field.metadata else annotation
        kind = _marked(full, PlugIn)
        if kind is not None and _is_number(full, value):
            value = float(value)        # in quotes, where a name could stand too
        if kind is not None and isinstance(value, (str, Mapping)):
            spec, problems = registry.check(kind, value, where, self.folder)
            self.problems += problems
            return spec if isinstance(value, Mapping) else value
        converted = convert(full, value, where)
        if _marked(full, ExistingFile) is not None and converted is not None:
            return str(registry.find_file(Path(converted), where, self.folder))
        return converted


def _marked(annotation: Any, marker: type[str]) -> str | None:
    """Return the marker of a kind that an annotation carries at any depth."""
    if get_origin(annotation) is Annotated:
        for item in get_args(annotation)[1:]:
            if isinstance(item, marker):
                return item
    found = (_marked(part, marker) for part in get_args(annotation))
    return next((item for item in found if item is not None), None)


def _is_number(annotation: Any, value: object) -> bool:
    """Say whether a text is a number written in quotes, where a number is allowed."""
    if not isinstance(value, str) or "a number" not in describe(annotation):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True


def _hint(key: object, known: Mapping[str, Any]) -> str:
    """Say where an unknown key belongs: a similar key of this section, or the same key of another."""
    if (similar := nearest(key, known)):
        return similar
    homes = [name for name, field in Experiment.model_fields.items()
             if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
             and key in field.annotation.model_fields]
    return f"Did you mean {homes[0]}.{key}?" if homes else ""


def _missing(key: str, field: FieldInfo) -> MissingSetting:
    marker = next((item for item in field.metadata if isinstance(item, PlugIn)), None)
    allowed = describe(field.annotation) if marker is None else f"one of {', '.join(registry.names(marker))}"
    return MissingSetting(key, None, allowed, "For example fedavg.")


def _with_defaults(experiment: Experiment) -> Experiment:
    """Fill in the defaults that depend on what else is given."""
    train, stop = experiment.train, experiment.stop
    if train.local_steps is None and train.local_epochs is None:
        train = train.model_copy(update={"local_steps": DEFAULT_LOCAL_STEPS})
    if not stop.has_limit and not stop.target:
        stop = stop.model_copy(update={"rounds": DEFAULT_ROUNDS})
    return experiment.model_copy(update={"train": train, "stop": stop})


def _try_out(experiment: Experiment) -> tuple[Any, Any, list[BadInput]]:
    """Build what can be built cheaply, because constructors know the ranges; returns the task and the strategy."""
    train, simulation = experiment.train, experiment.simulation
    seed, count = experiment.seed, experiment.clients.count
    attempts: dict[str, Callable[[], Any]] = {
        "task": lambda: registry.build("tasks", experiment.task, "task", num_clients=count, seed=seed),
        "strategy": experiment.build_strategy,
        "partition": lambda: registry.build("partitions", experiment.clients.partition, "clients.partition"),
        "device": lambda: registry.load(TRAIN_TRIAL)(device=train.device).torch_device,
        "optimizer": lambda: registry.load(OPTIMIZER_TRIAL)(train.optimizer),
        "schedule": lambda: registry.load(SCHEDULE_TRIAL)(train.schedule, train.lr),
    }
    if experiment.compression is not None:
        attempts["compression"] = partial(registry.load(COMPRESSION_TRIAL).of, experiment.compression)
    for name, target in SIMULATION_TRIALS.items():
        section = getattr(simulation, name)
        settings = section.model_dump() if isinstance(section, Section) else section
        attempts[name] = partial(_try_section, target, settings, seed, count)
    built, problems = {}, []
    for name, attempt in attempts.items():
        try:
            built[name] = attempt()
        except BadInput as error:
            problems.append(error)
    return built.get("task"), built.get("strategy"), problems


def _try_section(target: str, settings: Any, seed: int, count: int) -> None:
    registry.load(target).from_settings(settings, seed, count)


def check_settings(
    section: type[Found], settings: str | Path | Mapping[str, Any] | None, overrides: Sequence[str] = ()
) -> Found:
    """Return a section of its own: what a file holds that is no whole experiment.

    Args:
        settings: a YAML file, the mapping that one would hold, or None for the defaults.
        overrides: `key.path=value`, each on top of the file.

    Raises:
        UnreadableFile: the file is missing, or is not YAML.
        BadExperiment: something in it is wrong; all of it is listed.
    """
    folder: Path | None = None
    source, given = "The settings", dict(settings) if isinstance(settings, Mapping) else {}
    if isinstance(settings, (str, Path)):
        path = Path(settings)
        source, given, folder = str(path), read_mapping(path), path.absolute().parent
    given, problems = apply_overrides(given, overrides)
    reader = _Reader(folder)
    values = reader.section(section, given, "")
    if problems := problems + reader.problems:
        raise BadExperiment(source, problems)
    return section(**values)
