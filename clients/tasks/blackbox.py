"""A black box of one's own: a Python function, or a command that prints a number."""
import os
import shlex
import subprocess
from collections.abc import Sequence

import numpy as np

from fedcore.clients.blackbox import BlackBoxTask, as_number, with_site
from fedcore.clients.task import Site
from fedcore.errors import InvalidSetting
from fedcore.registry import resolve

SITE_VARIABLE = "FEDCORE_SITE"
LONGEST_SHOWN = 200     # characters of what a command wrote


class CommandFailed(Exception):
    """A command that ended with an error, or printed something else than numbers."""


class OwnFunction(BlackBoxTask):
    """Minimise what a function returns or a command prints; each client evaluates its own.

    A function takes a point, an array of `dimension` numbers, and if it wants to the client's number as a second
    argument. A command gets the numbers on one line of its standard input and the client's number in the environment
    variable FEDCORE_SITE; the last line that it prints is the value.

    Args:
        dimension: of a point, at least 1.
        function: `package.module:function`; modules beside the experiment file are found.
        command: a program and its arguments, run without a shell.
        box: [low, high] for all coordinates, or one such pair for each.
        start: a number for all coordinates, or one for each; None: the middle of the box.
        maximize: look for large values; figures named loss are their negatives then.
        batch: hand over all points of a moment at once: a function gets an array of shape (n, dimension) and returns n
            values, a command gets n lines and prints n.
        budget: queries that each client may make; None: as many as it likes.
        retries: further attempts at an evaluation that fails; each counts as a query.
        timeout_s: longest time for an attempt, seconds; None: no limit. A command is ended then; a function's thread is
            left behind.
    """

    def __init__(
        self, dimension: int, function: str | None = None, command: str | None = None,
        box: Sequence[float | Sequence[float]] = (0.0, 1.0), start: float | Sequence[float] | None = None,
        maximize: bool = False, batch: bool = False, budget: int | None = None, retries: int = 0,
        timeout_s: float | None = None, num_clients: int = 1,
    ):
        super().__init__(dimension, box, budget, retries, timeout_s)  # type: ignore[arg-type]
        if (function is None) == (command is None):
            raise InvalidSetting("function", function, "given, or command, and not both")
        self.num_clients, self.maximize, self.batched = num_clients, maximize, batch
        self._start = None if start is None else self._placed(start)
        self._function = None
        if function is not None:
            self._function = with_site(resolve("tasks", self._checked(function), "task.function"))
        else:
            self._arguments = self._split(str(command))
            self.stops_itself = True

    def start(self) -> np.ndarray:
        return super().start() if self._start is None else self._start

    def evaluate_many(self, points: np.ndarray, site: Site) -> np.ndarray:
        """Return the values at points of shape (n, dimension).

        Raises:
            CommandFailed: the command failed, or printed something else than n numbers.
            TimeoutExpired: it took too long.
            Exception: whatever the function raises.
        """
        if self._function is None:
            values = self._run(points, site)
        elif self.batched:
            values = np.asarray(self._function(points, site), dtype=float).reshape(len(points))
        else:
            values = np.array([as_number(self._function(point, site)) for point in points])
        return -values if self.maximize else values

    def _placed(self, start: float | Sequence[float]) -> np.ndarray:
        try:
            placed = np.broadcast_to(np.asarray(start, dtype=float), (self.dimension,)).copy()
        except ValueError as error:
            raise InvalidSetting("start", start, f"one number, or {self.dimension} of them") from error
        if not ((self.box.low <= placed) & (placed <= self.box.high)).all():
            raise InvalidSetting("start", start, "inside the box")
        return placed

    @staticmethod
    def _checked(function: str) -> str:
        if ":" not in function:
            raise InvalidSetting("function", function, "written package.module:function", "For example my_box:score.")
        return function

    @staticmethod
    def _split(command: str) -> list[str]:
        try:
            arguments = shlex.split(command)
        except ValueError as error:
            raise InvalidSetting("command", command, "a program and its arguments", f"{error}.") from error
        if not arguments:
            raise InvalidSetting("command", command, "a program and its arguments", "For example python score.py.")
        return arguments

    def _run(self, points: np.ndarray, site: Site) -> np.ndarray:
        lines = "".join(" ".join(map(repr, point.tolist())) + "\n" for point in points)
        done = subprocess.run(
            self._arguments, input=lines, capture_output=True, text=True, timeout=self.timeout_s,
            env={**os.environ, SITE_VARIABLE: str(site)}, check=False)
        if done.returncode:
            said = " ".join(done.stderr.split())[-LONGEST_SHOWN:]
            raise CommandFailed(f"{self._arguments[0]} ended with status {done.returncode}: {said}")
        printed = [line for line in done.stdout.splitlines() if line.strip()][-len(points):]
        try:
            values = np.array([float(line) for line in printed])
        except ValueError as error:
            raise CommandFailed(f"{self._arguments[0]} printed {printed[-1][:LONGEST_SHOWN]!r}, no number") from error
        if len(values) != len(points):
            raise CommandFailed(f"{self._arguments[0]} printed {len(values)} lines for {len(points)} points")
        return values
