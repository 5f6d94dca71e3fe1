"""From an experiment to its task, its training settings, and the client that runs them."""
from typing import Any

from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import Mod

from fedcore.clients.apps import EstimatingApp
from fedcore.clients.blackbox import OwnBlackBox, is_black_box
from fedcore.clients.data import as_dataset
from fedcore.clients.modules import initial_model
from fedcore.clients.settings import TrainSettings
from fedcore.clients.task import PartitionedTask, Task
from fedcore.clients.torch_client import torch_client
from fedcore.config import Experiment, Part
from fedcore.errors import InvalidSetting
from fedcore.peers.strategy import PeerStrategy
from fedcore.registry import build, resolve

# Of each client's examples, when clients evaluate and the experiment does not say how much.
VALIDATION_SHARE = 0.1
# What Flower's strategies expect to run at the clients.
CLIENT_MODS: dict[str, Mod] = {
    "dp_client_fixed_clipping": fixedclipping_mod,
    "dp_client_adaptive_clipping": adaptiveclipping_mod,
}
METHODS = ("model", "loss", "data", "validation_data", "metrics")


def build_task(experiment: Experiment) -> Task:
    """Return the task of an experiment.

    A task whose constructor takes `num_clients` or `seed` is given them. One with `training_data` is a pool, and its
    examples are divided as `clients.partition` says; any other says itself which data each client has. One with
    `dimension` and `evaluate` is a black box. Where clients
    evaluate, a tenth of their examples is held back from training, unless `clients.validation_share` says otherwise.

    Raises:
        InvalidSetting: a setting of the task or of the partition is wrong, or the class is no task.
        MissingData: a data file is not there.
    """
    count, seed = experiment.clients.count, experiment.seed
    built: Any = build("tasks", experiment.task, "task", num_clients=count, seed=seed)
    task: Any = built
    if hasattr(built, "training_data"):
        share = experiment.clients.validation_share
        if not share and experiment.evaluate.where == "clients":
            share = VALIDATION_SHARE
        partitioner = build("partitions", experiment.clients.partition, "clients.partition")
        task = PartitionedTask(built, partitioner, count, seed, share)
    if is_black_box(built):
        task = OwnBlackBox(built, count)
    missing = [name for name in METHODS if not callable(getattr(task, name, None))]
    if missing and not hasattr(task, "client_app"):
        raise InvalidSetting(
            "task", experiment.task_name, "a task", f"{type(built).__name__} has no method {missing[0]}()."
        )
    return task


def try_task(experiment: Experiment, strategy: Any, part: Part = "all") -> None:
    """Look at the data that a part of an experiment needs, and ask a private strategy what it says of them.

    Raises:
        BadInput: data are missing, unreadable or too few, or nothing could be promised about them.
    """
    task = build_task(experiment)
    if part == "server" and experiment.evaluate.where == "server" and hasattr(task, "test_data"):
        task.test_data()
    if part != "all":
        return    # a client says itself which data are its own, when it starts
    task.data(0)
    check_data = getattr(strategy, "check_data", None)
    if check_data is None or hasattr(task, "client_app"):
        return
    layout = initial_model(task, experiment.seed).layout
    try:
        check_data(client_sizes(task, experiment.clients.count), layout)
    except InvalidSetting as error:
        raise error.under("strategy") from error


def client_sizes(task: Task, count: int) -> list[int]:
    """Return how many training examples each client has."""
    return [len(as_dataset(task.data(partition))) for partition in range(count)]


def train_settings(experiment: Experiment) -> TrainSettings:
    """Return an experiment's section `train`, checked."""
    return TrainSettings(**experiment.train.model_dump())


def build_client(experiment: Experiment, task: Task | None = None) -> EstimatingApp:
    """Return the ClientApp of an experiment, for any of its sites.

    Args:
        task: the experiment's, where it has been built already.
    """
    task = build_task(experiment) if task is None else task
    mods = [mod for name, mod in CLIENT_MODS.items() if experiment.strategy_name == name]
    kind = resolve("strategies", experiment.strategy_name)
    # A class of the user's own may say so too.
    private = bool(getattr(kind, "keeps_records_private", False))
    of_peers = issubclass(kind, PeerStrategy) if isinstance(kind, type) else False
    peers: Any = experiment.build_strategy() if of_peers else None
    return torch_client(task, train_settings(experiment), mods, private, peers)
