"""What fedcore's own grids have in common: the part of Flower's `Grid` that carries no message."""
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedcore.flower import Run, empty_run


class OwnGrid(Grid):
    """Base of the virtual grid and of the one over gRPC."""

    def __init__(self) -> None:
        self._run = empty_run()

    def set_run(self, run: Run) -> None:
        """Set the run's description."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's description."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a new message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)
