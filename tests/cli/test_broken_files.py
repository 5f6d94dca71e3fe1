"""Experiment files with something wrong in them: one screen, exit status 2, and what to do about it."""
import sys
from pathlib import Path

import pytest

SCREEN, COLUMNS = 24, 80

# What is wrong: the file's content, then words that the message must hold.
BROKEN = {
    # not a file of settings
    "empty": ("", ["experiment.yaml is empty", "strategy: fedavg"]),
    "only comments": ("# strategy: fedavg\n", ["is empty"]),
    "a list": ("- strategy\n- fedavg\n", ["holds a list", "key: value"]),
    "a sentence": ("strategy is fedavg", ["holds only a text"]),
    "a number": ("42", ["holds only a number"]),
    "binary": (b"\x80\x04\x95\x00\xff", ["not a text file in UTF-8", "0x80", "position 0"]),
    "a null character": (b"strategy: fedavg\x00\n", ["not valid YAML", "'\\x00'"]),
    "latin-1": ("strategy: fedavg # für\n".encode("latin-1"), ["not a text file in UTF-8", "0xfc"]),
    "tabs": ("strategy:\n\tname: fedavg\n", ["line 2", "Indent with spaces"]),
    "an open bracket": ("strategy: {name: fedavg\nseed: 1\n", ["not valid YAML", "line"]),
    "a colon too many": ("strategy: fedavg: fast\n", ["line 1, column 17", "needs quotes"]),
    "uneven indentation": ("train:\n  lr: 0.1\n   batch_size: 3\n", ["line 3", "same indentation"]),
    "a key twice": ("strategy: fedavg\nseed: 1\nseed: 2\n", ["line 3", "'seed'", "twice"]),
    "a key twice below": ("strategy: fedavg\ntrain:\n  lr: 1\n  lr: 2\n", ["line 4", "'lr'", "twice"]),
    "two documents": ("strategy: fedavg\n---\nseed: 1\n", ["not valid YAML", "document"]),
    "a Python object": ("strategy: !!python/object:os.system fedavg\n", ["not valid YAML", "Tags"]),
    "an alias of itself": ("strategy: fedavg\ntrain: &t\n  optimizer: *t\n", ["alias", "itself"]),
    # misspelt
    "an unknown key": ("strategy: fedavg\ntraining: {lr: 1}\n", ["training={'lr': 1}", "Did you mean train?", "seed"]),
    "a misspelt key": ("strategy: fedavg\nclients: {cout: 5}\n", ["clients.cout=5", "Did you mean count?"]),
    "a misspelt key far down": (
        "strategy: fedavg\nsimulation: {network: {uplink_mpbs: 20}}\n",
        ["simulation.network.uplink_mpbs=20", "Did you mean uplink_mbps?", "latency_s"],
    ),
    "a key in the wrong section": ("strategy: fedavg\nlr: 0.1\n", ["lr=0.1", "Did you mean train.lr?"]),
    "a key that is no word": ("strategy: fedavg\n7: 1\n", ["7=1", "no such setting"]),
    "a misspelt strategy": ("strategy: fedcompas\n", ["strategy='fedcompas'", "Did you mean fedcompass?", "fedavg"]),
    "a strategy in other letters": ("strategy: FedAvg\n", ["strategy='FedAvg'", "Did you mean fedavg?"]),
    "a misspelt strategy setting": (
        "strategy: {name: fedcompass, min_local_step: 5}\n",
        ["strategy.min_local_step=5", "Did you mean min_local_steps?", "max_local_steps"],
    ),
    "a misspelt task": ("strategy: fedavg\ntask: digit\n", ["task='digit'", "Did you mean digits?", "mnist"]),
    "a misspelt partition": (
        "strategy: fedavg\nclients: {partition: {name: dirichelt, alpha: 1}}\n",
        ["clients.partition.name='dirichelt'", "Did you mean dirichlet?"],
    ),
    "a misspelt model": ("strategy: fedavg\ntask: {name: digits, model: mpl}\n", ["task.model", "'mpl'", "mlp"]),
    "a misspelt distribution": (
        "strategy: fedavg\nsimulation: {devices: {seconds_per_step: {name: exponental, mean: 1}}}\n",
        ["simulation.devices.seconds_per_step.name='exponental'", "Did you mean exponential?"],
    ),
    "a misspelt choice": (
        "strategy: {name: fedcompass, weights: num_example}\n",
        ["strategy.weights='num_example'", "equal, num_examples", "Did you mean num_examples?"],
    ),
    "a misspelt optimizer setting": (
        "strategy: fedavg\ntrain: {optimizer: {name: sgd, momentun: 0.9}}\n",
        ["train.optimizer.momentun=0.9", "Did you mean momentum?"],
    ),
    # missing
    "no strategy": ("task: digits\n", ["strategy is missing", "fedcompass, fedfix"]),
    "a plug-in without a name": (
        "strategy: {min_local_steps: 5}\n", ["strategy.name is missing", "Write a name, or {name: fedcompass, ...}"]
    ),
    "a setting that is required": (
        "strategy: fedavg\nclients: {partition: {name: dirichlet}}\n",
        ["clients.partition.alpha is missing", "a number", "no default"],
    ),
    "a data file that is not there": (
        "strategy: fedavg\ntask: {name: mnist, path: nowhere.npz}\n", ["task.path='nowhere.npz'", "there is no"]
    ),
    "a data file that is not named": ("strategy: fedavg\ntask: mnist\n", ["task.path", ".npz"]),
    "an initial model that is not there": (
        "strategy: fedavg\ninitial_model: nowhere.safetensors\n", ["initial_model='nowhere.safetensors'", "there is no"]
    ),
    # wrong type
    "text for a number": ("strategy: fedavg\ntrain: {lr: fast}\n", ["train.lr='fast'", "a number above 0"]),
    "a switch for a count": ("strategy: fedavg\nclients: {count: true}\n", ["clients.count=True", "a whole number"]),
    "half a client": ("strategy: fedavg\nclients: {count: 2.5}\n", ["clients.count=2.5", "a whole number"]),
    "a list for a number": ("strategy: fedavg\nseed: [1, 2]\n", ["seed=[1, 2]", "a whole number"]),
    "a number for a section": ("strategy: fedavg\ntrain: 5\n", ["train=5", "Write train: {optimizer: ...}"]),
    "a number for a strategy": ("strategy: 5\n", ["strategy=5", "text or a mapping"]),
    "text for a switch": (
        "strategy: {name: fedcompass, link_estimate: perhaps}\n", ["strategy.link_estimate='perhaps'", "true or false"]
    ),
    "text for a strategy's count": (
        "strategy: {name: fedbuff, buffer_size: many}\n", ["strategy.buffer_size='many'", "a whole number"]
    ),
    # out of range
    "no clients": ("strategy: fedavg\nclients: {count: 0}\n", ["clients.count=0", "at least 1"]),
    "a rate of zero": ("strategy: fedavg\ntrain: {lr: 0}\n", ["train.lr=0", "above 0"]),
    "a rate that is not a number": ("strategy: fedavg\ntrain: {lr: .nan}\n", ["train.lr=nan", "a finite number"]),
    "endless time": ("strategy: fedavg\nstop: {seconds: .inf}\n", ["stop.seconds=inf", "a finite number"]),
    "a probability above one": (
        "strategy: fedavg\nsimulation: {failures: {crash_probability: 1.5}}\n",
        ["simulation.failures.crash_probability=1.5", "at least 0 and below 1"],
    ),
    "a negative latency": (
        "strategy: fedavg\nsimulation: {network: {latency_s: -1}}\n", ["simulation.network.latency_s=-1", "at least 0"]
    ),
    "a strategy's setting out of range": (
        "strategy: {name: fedcompass, latest_time_factor: 0.5}\n",
        ["strategy.latest_time_factor=0.5", "above 1", "1.2 to 1.5"],
    ),
    "a distribution's setting out of range": (
        "strategy: fedavg\nsimulation: {devices: {seconds_per_step: {name: exponential, mean: 0}}}\n",
        ["simulation.devices.seconds_per_step.mean=0", "above 0"],
    ),
    "a partition's setting out of range": (
        "strategy: fedavg\nclients: {partition: {name: dirichlet, alpha: -1}}\n",
        ["clients.partition.alpha=-1", "above 0"],
    ),
    "a Flower strategy's setting out of range": (
        "strategy: {name: fedtrimmedavg, beta: 0.7}\n", ["strategy", "fedtrimmedavg", "[0, 0.5)"]
    ),
    "an unknown dtype": ("strategy: fedavg\ntrain: {dtype: float16}\n", ["train.dtype='float16'", "float32, float64"]),
    "an unknown device": ("strategy: fedavg\ntrain: {device: toaster}\n", ["train.device='toaster'", "device"]),
    "an accuracy in per cent": (
        "strategy: fedavg\nstop: {rounds: 5, target: {accuracy: 93}}\n", ["stop.target.accuracy=93", "0.93"]
    ),
    # contradictory
    "steps and epochs": (
        "strategy: fedavg\ntrain: {local_steps: 5, local_epochs: 1}\n",
        ["train.local_epochs=1", "train.local_steps=5", "left out"],
    ),
    "a target and no limit": (
        "strategy: fedavg\nstop: {target: {accuracy: 0.9}}\n", ["stop.target", "never end", "stop.rounds"]
    ),
    "a target that nobody measures": (
        "strategy: fedavg\nevaluate: {where: none}\nstop: {rounds: 9, target: {accuracy: 0.9}}\n",
        ["evaluate.where='none'", "server or clients"],
    ),
    "a target that the task does not report": (
        "strategy: fedavg\nstop: {rounds: 9, target: {acuracy: 0.9}}\n",
        ["stop.target.acuracy=0.9", "loss or accuracy", "Did you mean accuracy?"],
    ),
    "fewer steps at most than at least": (
        "strategy: {name: fedcompass, min_local_steps: 50, max_local_steps: 10}\n",
        ["strategy.min_local_steps=50", "from 1 to 10"],
    ),
    "more clients than examples": (
        "strategy: fedavg\nclients: {count: 5000}\n", ["clients.count=5000", "at most 1438"]
    ),
    "more classes than there are": (
        "strategy: fedavg\nclients: {partition: {name: classes, classes_per_client: 11}}\n",
        ["clients.partition.classes_per_client=11", "at most 10"],
    ),
    "a strategy that would wait forever": (
        "strategy: {name: fedavg, min_available_nodes: 20}\n",
        ["strategy.min_available_nodes=20", "at most 10", "wait forever"],
    ),
    "a share of replies without a deadline": (
        "strategy: fedavg\nround: {min_replies_share: 0.5}\n", ["round.min_replies_share=0.5", "round.deadline_s"]
    ),
    "half a version": ("strategy: fedavg\nevaluate: {every: 0.5}\n", ["evaluate.every=0.5", "unit: seconds"]),
    # plug-ins of one's own
    "a module that is not there": ("strategy: nowhere:Mine\n", ["strategy='nowhere:Mine'", "No module nowhere"]),
    "a class that is not there": (
        "strategy: fedcore.strategies.fedbuff:FedBuf\n", ["has no FedBuf", "Did you mean FedBuff?"]
    ),
    "a class that is no strategy": ("strategy: fedcore.clients.partitions:Iid\n", ["a Flower Strategy", "Iid"]),
}


@pytest.mark.parametrize("command", ["simulate", "check"])
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_refused_on_one_screen(what, command, fedcore, tmp_path):
    content, fragments = BROKEN[what]
    file = tmp_path / "experiment.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    result = fedcore(command, file)
    assert result.exit_code == 2, result.output
    assert_one_screen(result.stderr, fragments)
    assert not (tmp_path / "runs").exists()


def assert_one_screen(text: str, fragments: list[str]) -> None:
    assert "Traceback" not in text
    assert sum(1 + len(line) // COLUMNS for line in text.splitlines()) < SCREEN
    joined = " ".join(text.split())
    for fragment in fragments:
        assert " ".join(fragment.split()) in joined, (fragment, text)


def test_a_file_that_does_not_exist_is_said_with_those_that_do(fedcore, tmp_path):
    (tmp_path / "experiment.yaml").write_text("strategy: fedavg\n")
    result = fedcore("simulate", tmp_path / "experimnt.yaml")
    assert result.exit_code == 2
    assert_one_screen(result.stderr, ["experimnt.yaml does not exist", "experiment.yaml"])


def test_a_folder_instead_of_a_file_is_said_with_the_file_in_it(fedcore, tmp_path):
    (tmp_path / "experiment.yaml").write_text("strategy: fedavg\n")
    result = fedcore("simulate", tmp_path)
    assert result.exit_code == 2
    assert_one_screen(result.stderr, ["is a folder", "Did you mean"])


def test_a_file_without_permission_to_read_is_said(fedcore, tmp_path, monkeypatch):
    def refuse(path: Path) -> bytes:
        # The superuser may read every file, so the system's answer is given here.
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    result = fedcore("simulate", tmp_path / "experiment.yaml")
    assert result.exit_code == 2
    assert_one_screen(result.stderr, ["experiment.yaml cannot be read: Permission denied"])


def test_all_problems_are_listed_at_once(fedcore, tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text("strategy: fedavgg\ntrain: {lr: -1}\nclients: {cout: 3}\nseed: x\n")
    result = fedcore("simulate", file)
    assert result.exit_code == 2
    assert_one_screen(result.stderr, ["4 problems", "strategy='fedavgg'", "train.lr=-1", "clients.cout=3", "seed='x'"])


def test_a_hundred_problems_still_fit_on_one_screen(fedcore, tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text("strategy: fedavg\n" + "".join(f"unknown_setting_{number}: 1\n" for number in range(100)))
    result = fedcore("simulate", file)
    assert result.exit_code == 2
    assert_one_screen(result.stderr, ["100 problems", "more."])


def test_a_value_as_long_as_a_book_still_fits_on_one_screen(fedcore, tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text(f"strategy: {'fedavg' * 10_000}\n")
    result = fedcore("simulate", file)
    assert result.exit_code == 2
    assert_one_screen(result.stderr, ["strategy='fedavgfedavg", "..."])


@pytest.mark.parametrize("override, fragments", [
    ("train.lr", ["--set 'train.lr'", "key.path=value"]),
    ("=3", ["--set '=3'", "key.path=value"]),
    ("train..lr=3", ["--set 'train..lr=3'", "key.path=value"]),
    ("train.lr={", ["--set 'train.lr={'", "not valid YAML"]),
    ("train.lr.x=3", ["train.lr=0.1", "a section or a plug-in"]),
    ("train.rate=3", ["train.rate=3", "no such setting"]),
    ("train.lr=-3", ["train.lr=-3", "above 0"]),
])
def test_a_broken_override_is_refused(override, fragments, fedcore, tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text("strategy: fedavg\ntrain: {lr: 0.1}\n")
    result = fedcore("simulate", file, "--set", override)
    assert result.exit_code == 2
    assert_one_screen(result.stderr, fragments)


@pytest.mark.parametrize("code, fragments", [
    ("class Mine(", ["cannot be imported", "broken_module.py", "line 1"]),
    ("raise ValueError('no luck')", ["cannot be imported", "ValueError: no luck", "line 1"]),
    ("import a_package_that_nobody_has", ["needs the module a_package_that_nobody_has", "not installed"]),
    ("Mine = 5", ["must be a class", "It is a int"]),
    ("class Mine:\n    def __init__(self):\n        raise ValueError('no luck')", ["does not accept", "no luck"]),
])
def test_a_broken_module_of_ones_own_is_refused(code, fragments, fedcore, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "broken_module", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "broken_module.py").write_text(code)
    file = tmp_path / "experiment.yaml"
    file.write_text("strategy: broken_module:Mine\n")
    result = fedcore("simulate", file)
    assert result.exit_code == 2
    assert_one_screen(result.stderr, fragments)


@pytest.mark.parametrize("what", ["tabs", "a misspelt strategy setting", "a data file that is not there"])
def test_a_real_process_says_the_same(what, process, tmp_path):
    content, fragments = BROKEN[what]
    file = Path(tmp_path / "experiment.yaml")
    file.write_text(content)
    result = process("simulate", file)
    assert result.returncode == 2
    assert result.stdout == ""
    assert_one_screen(result.stderr, fragments)
