"""The experiment file: every setting there is, its range and its default.

    experiment = load_experiment("experiment.yaml", overrides=["train.lr=0.1"])

A file is refused as a whole, with everything that is wrong with it in one `BadExperiment`.
"""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import DocInfo, Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, PrivateAttr

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

    from fedcore.recorder import Listener


class PlugIn(str):
    """Marks a setting that names a plug-in of this kind, alone or under `name` among its settings."""


class ExistingFile(str):
    """Marks a setting that names a file of the user's."""


Spec = str | dict[str, Any]
# Which part of an experiment runs on this machine, and so needs its data here.
Part = Literal["all", "server", "client"]
Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Probability = Annotated[float, Ge(0), Lt(1), DocInfo("a number of at least 0 and below 1")]
# One figure for all nodes, or a distribution from which each node's is drawn.
Drawn = Annotated[NotNegative | Spec, PlugIn("distributions"), DocInfo("a number of at least 0, or a distribution")]
Bandwidth = Annotated[Positive | Spec, PlugIn("distributions"), DocInfo("a number above 0, or a distribution")]


class Section(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Clients(Section):
    """Who takes part, and who has which data.

    Attributes:
        validation_share: share of each client's examples held back from training, for evaluation at the clients.
    """

    count: Count = 10
    partition: Annotated[Spec, PlugIn("partitions")] = "iid"
    validation_share: Probability = 0.0


class Train(Section):
    """How clients train. `local_steps` is 10 when neither it nor `local_epochs` is given."""

    optimizer: Annotated[Spec, PlugIn("optimizers")] = "sgd"
    lr: Positive = 0.05
    batch_size: Count = 32
    local_steps: Count | None = None
    local_epochs: Count | None = None
    schedule: Annotated[Spec, PlugIn("schedules")] | None = None
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "auto"
    clip_norm: Positive | None = None


class Stop(Section):
    """When the run ends: whichever comes first. `rounds` is 30 when no limit is given.

    Attributes:
        seconds: on the run's clock, which is virtual in a simulation.
        rounds: rounds; for asynchronous strategies as many client updates as there are clients count as one.
        target: metric -> value that an evaluation has to reach.
    """

    seconds: Positive | None = None
    rounds: Count | None = None
    client_updates: Count | None = None
    target: dict[str, float] = {}

    @property
    def has_limit(self) -> bool:
        """Whether the run ends even if no target is ever reached."""
        return any(limit is not None for limit in (self.seconds, self.rounds, self.client_updates))


class Evaluate(Section):
    """Who evaluates the model, and every how many versions or seconds."""

    where: Literal["server", "clients", "none"] = "server"
    every: Positive = 1
    unit: Literal["versions", "seconds"] = "versions"


class Round(Section):
    """How long a synchronous round waits.

    Attributes:
        deadline_s: for replies; null: for all of them; `adaptive`: `deadline_factor` times the median of what the
            latest answers took (the first round waits for all).
        min_replies_share: least share of the replies that is waited for beyond the deadline.
        task_timeout_s: a task without an answer for so long counts as lost.
    """

    deadline_s: Annotated[
        Positive | Literal["adaptive"] | None, DocInfo("a number above 0, adaptive, or null")
    ] = None
    deadline_factor: Annotated[float, Gt(1)] = 2.0
    min_replies_share: Annotated[float, Ge(0), Le(1), DocInfo("a number from 0 to 1")] = 1.0
    task_timeout_s: Positive = 43_200.0


class Peers(Section):
    """How a server hosts a strategy of peers, and when one of them counts as lost.

    Attributes:
        segment: how long peers are by themselves between two meetings with the server, which evaluates, saves, and lets
            others join: steps; seconds for strategies that stop by time.
        lost_after_s: a peer that the others could not reach for so long takes no further part in a segment; without a
            server, and in simulations, until it joins anew.
        relay: the server passes on, unread, what peers say to those who give no address; only `fedcore server` does.
    """

    segment: Positive = 10
    lost_after_s: Positive = 30.0
    relay: bool = False


class Checkpoint(Section):
    """How often a run is saved (wall-clock seconds; 0: whenever possible), and how many checkpoints are kept."""

    every_s: NotNegative = 30.0
    keep: Count = 2


class Devices(Section):
    """How fast the clients' computers are.

    Attributes:
        jitter: relative deviation of a task's time from its node's usual one.
        seconds_per_task: for work whose steps are not known.
    """

    seconds_per_step: Drawn = 0.1
    jitter: NotNegative = 0.0
    seconds_per_task: Drawn = 1.0


class Network(Section):
    """How slow the links are; null: infinitely fast. The server's links are shared by all clients."""

    latency_s: Drawn = 0.0
    uplink_mbps: Bandwidth | None = None
    downlink_mbps: Bandwidth | None = None
    server_uplink_mbps: Positive | None = None
    server_downlink_mbps: Positive | None = None
    jitter: NotNegative = 0.0


class Failures(Section):
    """What goes wrong, per task: the client crashes, the request or the reply is lost."""

    crash_probability: Probability = 0.0
    request_loss: Probability = 0.0
    reply_loss: Probability = 0.0


class Simulation(Section):
    """The world of the virtual engine."""

    devices: Devices = Devices()
    network: Network = Network()
    availability: Annotated[Spec, PlugIn("availability")] = "always"
    failures: Failures = Failures()


class Experiment(Section):
    """A whole experiment file, checked; `load_experiment` makes one."""

    task: Annotated[Spec, PlugIn("tasks")] = "digits"
    strategy: Annotated[Spec, PlugIn("strategies")]
    clients: Clients = Clients()
    train: Train = Train()
    compression: Annotated[Spec, PlugIn("compressors")] | None = None
    stop: Stop = Stop()
    evaluate: Evaluate = Evaluate()
    round: Round = Round()
    peers: Peers = Peers()
    seed: Annotated[int, Ge(0)] = 0
    initial_model: Annotated[str, ExistingFile(), DocInfo("the path of a .safetensors file")] | None = None
    checkpoint: Checkpoint = Checkpoint()
    writers: tuple[Literal["tensorboard"], ...] = ()
    simulation: Simulation = Simulation()

    _source: str = PrivateAttr(default="the experiment")
    _warnings: tuple[str, ...] = PrivateAttr(default=())

    @property
    def source(self) -> str:
        """The file it was read from, for messages."""
        return self._source

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed but probably not meant."""
        return self._warnings

    @property
    def task_name(self) -> str:
        """The task's name, or `module:Class`."""
        return name_of(self.task)

    @property
    def strategy_name(self) -> str:
        """The strategy's name, or `module:Class`."""
        return name_of(self.strategy)

    def resolved(self) -> dict[str, Any]:
        """Return every setting, defaults filled in, as plain values that `load_experiment` takes."""
        settings = self.model_dump()
        settings["writers"] = list(self.writers)
        return settings

    def build_strategy(self) -> "Strategy":
        """Return the strategy, Flower's or ours."""
        from fedcore.registry import build

        strategy: Strategy = build("strategies", self.strategy, "strategy")
        return strategy

    def build_writers(self, folder: Path) -> list["Listener"]:
        """Return the writers beside the run folder's own files."""
        from fedcore.writers import build_writer

        return [build_writer(name, folder) for name in self.writers]


def name_of(spec: Spec) -> str:
    """Return the name in what a file gives as `name` or `{name: ..., ...}`."""
    return spec if isinstance(spec, str) else str(spec["name"])


def load_experiment(
    experiment: "str | Path | Mapping[str, Any] | Experiment", overrides: Sequence[str] = (), part: Part = "all"
) -> Experiment:
    """Return a checked experiment.

    The folder of the file is put on `sys.path`, so that `package.module:Class` finds modules beside it.

    Args:
        experiment: a YAML file, or the mapping that one would hold.
        overrides: `key.path=value`, each on top of the file.
        part: which part runs on this machine: a server alone needs at most test data, a client its own.

    Raises:
        UnreadableFile: the file is missing, or is not YAML.
        BadExperiment: something in it is wrong; all of it is listed.
    """
    from fedcore.checking import check_experiment

    return check_experiment(experiment, overrides, part)
