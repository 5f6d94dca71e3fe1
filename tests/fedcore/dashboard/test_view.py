"""What the live page says."""
import math

import pytest

from fedcore.dashboard.feed import Feed
from fedcore.dashboard.view import page, pieces
from tests.fedcore.dashboard.conftest import link, node, rows_of_a_run

HOSTILE = '<script>alert("x")</script>&\x00\x1b[31m'


def drawn(feed, *nodes):
    seen, _ = feed.look()
    return pieces(seen, 0.0, link(*nodes))


@pytest.fixture
def feed(run_folder):
    feed = Feed(run_folder)
    metrics, tasks = rows_of_a_run()
    for row in metrics:
        feed.on_row(row)
    for row in tasks:
        feed.on_task(row)
    return feed


def test_before_the_run_it_says_who_is_missing(run_folder):
    found = drawn(Feed(run_folder), node(0, doing="idle"))
    assert found["title"] == "fedbuff on digits"
    assert found["state"] == "The run begins when its clients are here: 1 of 5 clients are connected."
    assert "No model has been evaluated yet." in found["learning"]


def test_without_a_folder_or_anybody_there_is_a_page_too():
    found = drawn(Feed())
    assert found["title"] == "A run that has not begun"
    assert "No client has connected yet." in found["clients"]


def test_a_running_one_shows_figures_curves_and_whom_it_waits_for(feed):
    found = drawn(feed, node(0, doing_s=9.0), node(1), node(2, doing="idle"), node(3, connected=False, away_s=30.0))
    assert "version 40; 3 of 5 clients are connected. site-0 has been at its work longest: 9" in found["state"]
    assert found["learning"].count("<figure") == 2 and found["bytes"].count("<figure") == 1
    for words in ("trains", "idle", "away", "30", "10.0.0.1:51234"):
        assert words in found["clients"]
    assert 'class="cancelled"' in found["timeline"]        # what goes on now
    assert "client 3" in found["timeline"]
    assert "the update holds NaN" in found["troubles"] and "1 refused" in found["cards"]


def test_the_end_is_said_with_its_reason(feed):
    feed.on_row({"time_s": 120.0, "event": "stop", "version": 40, "reason": "target"})
    assert drawn(feed)["state"] == "The run is over after 120\u202fs: target."


def test_everything_that_others_wrote_is_escaped(feed, run_folder):
    feed.on_row({"time_s": 120.0, "event": HOSTILE, "version": 1})
    feed.on_row({"time_s": 121.0, "event": "failure", "version": 1, "node": HOSTILE, "reason": HOSTILE * 50})
    feed.on_row({"time_s": 122.0, "event": "stop", "version": 1, "reason": HOSTILE})
    feed.on_task({"node": HOSTILE, "kind": HOSTILE, "start_s": 1.0, "end_s": 2.0, "outcome": HOSTILE, "group": HOSTILE})
    feed.on_task({"node": 1, "kind": HOSTILE, "start_s": 119.0, "end_s": 120.0, "outcome": HOSTILE, "group": HOSTILE})
    hostile = {name: HOSTILE for name in ("name", "doing", "action", "address", "version")}
    html = page(drawn(feed, node(0, **hostile), node(1, connected=False, **hostile)), "nonce")
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html


@pytest.mark.parametrize("strange", [
    {"nodes": [{}]}, {"nodes": [None, 3, "x"]}, {}, {"nodes": [{"name": None, "partition": "x", "connected": True,
                                                               "doing": "working", "doing_s": math.nan}]},
])
def test_a_strange_snapshot_is_shown_as_well_as_it_can_be(feed, strange):
    seen, _ = feed.look()
    assert "Clients" in page(pieces(seen, 0.0, strange), "nonce")


def test_a_thousand_clients_make_a_page_of_bounded_size(feed):
    for index in range(4000):
        feed.on_task({"node": index % 1000, "kind": "train", "start_s": 80.0, "end_s": 81.0 + index / 1000,
                      "outcome": "ok"})
    found = drawn(feed, *[node(index) for index in range(1000)])
    assert "960 more clients are not shown" in found["clients"]
    assert sum(map(len, found.values())) < 300_000


def test_nothing_on_the_page_comes_from_elsewhere(feed):
    html = page(drawn(feed, node(0)), "nonce")
    for foreign in ("http://", "https://", "src=", "@import", "//cdn"):
        assert foreign not in html
