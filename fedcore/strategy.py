"""What our strategies have in common: each is a Flower `Strategy`, and runs through a hub."""
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedcore.clock import EventfulGrid, PolledGrid
from fedcore.compressing import CompressedGrid
from fedcore.hub import Hub
from fedcore.options import Evaluation, RunOptions, StopRule
from fedcore.payload import VectorRecord, model_from_arrays
from fedcore.recorder import Recorder, Row
from fedcore.session import Session
from fedcore.vectors import Model

logger = logging.getLogger("fedcore")


class OwnStrategy(Strategy):
    """Base of our strategies: each is a Flower `Strategy` that decides by itself what happens when.

    Attributes:
        no_compression: why an experiment's section `compression` does not suit this strategy; empty: it does.
    """

    no_compression = ""

    def check_clients(self, count: int) -> None:
        """Raise `InvalidSetting` where the settings do not suit so many clients; asked before a run begins."""

    def summary(self) -> None:
        """Log the strategy's name."""
        logger.info("Strategy %s", type(self).__name__)

    # Flower's driver calls these; ours does not. They exist because Flower's base class is abstract.

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not used: this strategy decides by itself."""
        raise self._no_hooks()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Not used: this strategy decides by itself."""
        raise self._no_hooks()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not used: this strategy decides by itself."""
        raise self._no_hooks()

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Not used: this strategy decides by itself."""
        raise self._no_hooks()

    def _no_hooks(self) -> TypeError:
        return TypeError(
            f"{type(self).__name__} is not a strategy of configure and aggregate calls, so it cannot be wrapped by "
            "one; call its start()."
        )


class HubStrategy(OwnStrategy):
    """Base of `EventStrategy` and `RoundStrategy`."""

    @abstractmethod
    def drive(self, session: Session) -> None:
        """Run to the end of the session."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return everything that must survive a restart."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""

    def summary_figures(self) -> dict[str, float | int | str | None]:
        """Return what the run's summary says of this method beyond what it says of every one, e.g. `epsilon`."""
        return {}

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the strategy in any Flower ServerApp.

        Args:
            grid: any Flower grid.
            initial_arrays: the model to start from, as a state dict. Floating-point entries are trained, except
                BatchNorm statistics.
            num_rounds: rounds; for asynchronous strategies one round is as many client updates as there are nodes.
            timeout: seconds that a task (or a round) may take.
            train_config: added to every training request.
            evaluate_config: not used: our strategies evaluate through `evaluate_fn`.
            evaluate_fn: called with the version and the arrays, after each new version.
        """
        result = Result()

        def evaluate(model: Model) -> Mapping[str, float]:
            assert evaluate_fn is not None
            metrics = evaluate_fn(hub.version, ArrayRecord(dict(VectorRecord(model))))
            if metrics is None:
                return {}
            result.evaluate_metrics_serverapp[hub.version] = metrics
            return {name: value for name, value in metrics.items() if not isinstance(value, list)}

        compression = None
        if isinstance(grid, CompressedGrid):    # the hub does itself what that does, and counts the bytes
            compression = grid.compression
            grid = grid.grid
        options = RunOptions(
            compression=compression,
            stop=StopRule(rounds=num_rounds),
            evaluation=Evaluation("server", fn=evaluate) if evaluate_fn else Evaluation(),
            round_deadline_s=timeout,
            task_timeout_s=timeout,
            train_config=dict(train_config or {}),
        )
        hub = Hub(
            grid if isinstance(grid, EventfulGrid) else PolledGrid(grid),
            model_from_arrays(initial_arrays), options, Recorder(listeners=(_log_row,)),
        )
        self.summary()
        self.drive(Session(hub, self))
        result.arrays = ArrayRecord(dict(VectorRecord(hub.model)))
        return result


def _log_row(row: Row) -> None:
    if row["event"] in ("evaluate", "failure", "refused", "stop"):
        logger.info("%s", ", ".join(f"{name} {value}" for name, value in row.items()))
