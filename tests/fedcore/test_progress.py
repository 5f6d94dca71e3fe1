"""What a run shows while it goes on."""
import io
from typing import Any

import pytest
from rich.console import Console

from fedcore import progress
from fedcore.config import load_experiment
from fedcore.progress import Figures, Progress

EVALUATION = {"time_s": 30.0, "event": "evaluate", "version": 6, "where": "server", "loss": 0.25, "accuracy": 0.912,
              "client_updates": 60, "client_steps": 600, "bytes_up": 2_000_000, "bytes_down": 3_000_000}
FAILURE = {"time_s": 31.0, "event": "failure", "version": 6, "node": 3, "code": 2, "reason": "it broke"}


def figures_after(*rows: dict[str, Any], limits: dict[str, float], updates_per_round: int | None = None) -> Figures:
    figures = Figures(limits, updates_per_round)
    for row in rows:
        figures.take(row)
    return figures


@pytest.mark.parametrize("limits, updates_per_round, share, words", [
    ({"seconds": 120.0}, None, 0.25, "120 s"),
    ({"client_updates": 600}, None, 0.1, "600 client updates"),
    ({"rounds": 12}, None, 0.5, "12 rounds"),
    ({"rounds": 12}, 20, 0.25, "12 rounds"),
    ({"seconds": 120.0, "rounds": 12}, None, 0.5, "12 rounds"),
    ({"seconds": 10.0}, None, 1.0, "10 s"),
    ({}, None, 0.0, ""),
])
def test_the_share_done_is_that_of_the_nearest_limit(limits, updates_per_round, share, words):
    figures = figures_after(EVALUATION, limits=limits, updates_per_round=updates_per_round)
    assert figures.share_done() == (share, words)


def test_the_figures_are_the_latest_of_each():
    figures = figures_after(EVALUATION, FAILURE, {"time_s": 32.0, "event": "log", "norm": 1.0}, limits={})
    assert figures.words() == ["t 32 s", "v 6", "loss 0.25", "accuracy 91.2 %", "60 updates", "2 MB up, 3 MB down",
                               "1 failures"]


def test_an_asynchronous_strategys_rounds_are_counted_in_client_updates():
    rounds = {name: Progress.of(Console(file=io.StringIO()), load_experiment({"strategy": name})).figures
              for name in ("fedavg", "fedbuff")}
    assert {name: figures.updates_per_round for name, figures in rounds.items()} == {"fedavg": None, "fedbuff": 10}


def test_plain_lines_come_every_few_seconds_and_at_the_end(monkeypatch):
    clock = iter([0.0, 0.5, 1.5, 1.5, 2.0, 7.0, 7.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    screen = io.StringIO()
    with Progress(Console(file=screen), "a run", Figures({"seconds": 100.0})) as shown:
        for second in range(1, 5):
            shown.on_row({"time_s": 10.0 * second, "event": "update", "version": second})
    lines = screen.getvalue().splitlines()
    assert [line.split("  ")[:2] for line in lines] == [[" 20 %", "t 20 s"], [" 40 %", "t 40 s"], [" 40 %", "t 40 s"]]


def test_a_run_that_never_began_prints_nothing():
    screen = io.StringIO()
    with pytest.raises(ValueError, match="no data"), Progress(Console(file=screen), "a run", Figures({})):
        raise ValueError("no data")
    assert screen.getvalue() == ""


def test_a_terminal_gets_a_live_bar_and_is_left_as_it_was():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with Progress(console, "fedavg on digits", Figures({"seconds": 60.0})) as shown:
        shown.on_row(EVALUATION)
    text = screen.getvalue()
    assert "fedavg on digits" in text
    assert "50 % of 60 s" in text
    assert "accuracy 91.2 %" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1     # the cursor is hidden once, and shown again
