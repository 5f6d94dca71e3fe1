"""Other places that a run's metrics go to, besides its folder."""
from pathlib import Path
from typing import Any

from fedcore.errors import BadInput
from fedcore.recorder import Listener, Row

# What identifies a row rather than measuring anything.
NOT_FIGURES = ("time_s", "event", "version", "nodes", "node", "staleness", "weights")


class MissingExtra(BadInput):
    """An optional dependency that is not installed."""


class TensorBoardWriter:
    """Writes every figure of a run for TensorBoard, by version: `tensorboard --logdir runs`.

    Args:
        folder: of the run; the files go below it.

    Raises:
        MissingExtra: TensorBoard is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra(
                "writers: tensorboard is not installed. Install it with: pip install 'fedcore[tensorboard]'."
            ) from error
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def __call__(self, row: Row) -> None:
        """Write the figures of one row of metrics."""
        version = row.get("version")
        for name, value in row.items():
            if name not in NOT_FIGURES and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(f"{row['event']}/{name}", value, global_step=version)
        if isinstance(staleness := row.get("staleness"), list) and staleness:
            self._writer.add_scalar("update/mean_staleness", sum(staleness) / len(staleness), global_step=version)
        if row["event"] == "evaluate":
            self._writer.add_scalar("evaluate/virtual_time_s", row["time_s"], global_step=version)
        if row["event"] == "stop":
            self._writer.close()


WRITERS = {"tensorboard": TensorBoardWriter}


def build_writer(name: str, folder: Path) -> Listener:
    """Return the writer of that name for a run's folder."""
    return WRITERS[name](folder)
