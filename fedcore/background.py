"""Checkpoints written in a thread of their own, while the run goes on."""
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from fedcore.checkpoint import Checkpoints, Frozen


class BackgroundSaver:
    """Writes one checkpoint at a time from an immutable snapshot.

    Args:
        checkpoints: where to.
    """

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether the checkpoint before is still being written."""
        return self._writing is not None and not self._writing.done()

    def save(self, frozen: Frozen, on_end: Callable[[bool], None]) -> None:
        """Begin to write a checkpoint; `on_end` is told, in the writing thread, whether it is safe on the disk.

        Raises:
            UnusableCheckpoint: the checkpoint before could not be written.
        """
        self.wait()
        self._writing = self._thread.submit(self._write, frozen, on_end)

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            UnusableCheckpoint: the checkpoint could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, frozen: Frozen, on_end: Callable[[bool], None]) -> None:
        saved = False
        try:
            self.checkpoints.save(frozen)
            saved = True
        finally:
            on_end(saved)
