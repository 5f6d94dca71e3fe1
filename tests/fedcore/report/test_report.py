import json
import re
import time
from html.parser import HTMLParser

import pytest
import yaml

from fedcore.report import write_report
from fedcore.runs import NotARun

HOSTILE = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)> & ünïcode \x1b[31m" + "long " * 400
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """A parsed report: refuses markup that does not nest, keeps text per section."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.ids = [], [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).replace("\u202f", " ").split())


def page_of(folder) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_a_report_tells_the_run_in_one_file(made_up_run):
    folder = made_up_run()
    path = write_report(folder)
    assert path == folder / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert "fedcompass reached 96 % accuracy on digits" in page.words
    assert re.search(r"10 clients sent \d+ updates \([\d.k ]+ local steps\) in 12\d s of virtual time", page.words)
    assert "The target, 90 % accuracy, was met after 43.9 s." in page.words
    assert re.search(r"Clients spent [\d.]+ % of their time training, [\d.]+ % sending and receiving, "
                     r"and [\d.]+ % waiting", page.words)
    assert {"learning", "timeline", "staleness", "contributions", "data", "settings"} <= set(page.ids)


def test_a_report_reaches_for_nothing_outside_itself(made_up_run):
    html = write_report(made_up_run()).read_text(encoding="utf-8")
    page = Page(html)
    assert not {"link", "iframe", "img", "object", "embed"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "srcset", "data", "action")]
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttpRequest|import\(", html)


def test_the_same_run_gives_the_same_bytes(made_up_run):
    folder = made_up_run()
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


@pytest.mark.parametrize("where", ["reason", "strategy", "stop_reason", "label", "group", "outcome", "figure"])
def test_no_string_from_anywhere_becomes_markup(made_up_run, where):
    folder = made_up_run(failing=(("failure", HOSTILE if where == "reason" else "x"),))
    summary = json.loads((folder / "summary.json").read_text())
    if where in ("strategy", "stop_reason"):
        (folder / "summary.json").write_text(json.dumps(summary | {where: HOSTILE}))
    if where in ("group", "outcome"):
        rows = [json.loads(line) | {where: HOSTILE} for line in (folder / "timeline.jsonl").read_text().splitlines()]
        (folder / "timeline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if where == "figure":
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = [row | ({HOSTILE: index} if row["event"] == "update" else {}) for index, row in enumerate(rows)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if where == "label":
        (folder / "config.yaml").write_text(yaml.safe_dump({"task": {"name": HOSTILE}, HOSTILE: [HOSTILE]}))
    html = write_report(folder).read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags.count("script") == 1 + html.count('<script type="application/json">')
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_failures_are_grouped_with_their_reasons_readable(made_up_run):
    page = page_of(made_up_run(failing=(("failure", HOSTILE), ("refused", "NaN in <w>"), ("failure", "gone"))))
    assert "<script>alert('x')</script>" in page.words
    assert "NaN in <w>" in page.words
    assert "2 tasks failed and 1 reply refused as malformed" in page.words
    assert page.words.count("long ") < 100      # cut, not spilled over the page


@pytest.mark.parametrize("settings, section, reason", [
    ({"evaluations": False}, "learning", "The run has no evaluations."),
    ({"timeline": False}, "timeline", "No task of any client was recorded."),
    ({"strategy": "fedavg"}, "staleness", "were fresh"),
    ({}, "failures", "None: every task was answered"),
    ({}, "figures", "recorded no figures of its own"),
])
def test_a_section_without_data_is_left_out_with_a_reason(made_up_run, settings, section, reason):
    page = page_of(made_up_run(**settings))
    assert section not in page.ids
    assert reason in page.words


def test_a_regression_task_is_told_by_its_loss(made_up_run):
    page = page_of(made_up_run(labels=0, target=None))
    assert "brought the loss on housing down to" in page.words
    assert "best accuracy" not in page.words.replace("best_accuracy", "")
    assert "no labels to count" in page.words


def test_a_run_that_diverged_says_so_and_has_gaps(made_up_run):
    page = page_of(made_up_run(nan_from=60.0))
    assert "not a finite number" in page.words
    assert "not finite final loss" in page.words


def test_figures_of_one_method_only_are_shown_when_present(made_up_run):
    page = page_of(made_up_run(figures={"epsilon": 0.02, "drift": 0.5}))
    assert "privacy spent (ε)" in page.words
    assert "Drift" in page.words
    assert "figures" in page.ids


def test_a_killed_run_has_a_report_of_what_it_did(made_up_run):
    folder = made_up_run()
    (folder / "summary.json").unlink()
    for name in ("metrics.jsonl", "timeline.jsonl"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:len(content) // 2])
    page = page_of(folder)
    assert "it was killed or is still going" in page.words
    assert {"learning", "timeline", "contributions"} <= set(page.ids)


def test_a_run_killed_before_anything_happened_has_a_report(tmp_path):
    (tmp_path / "config.yaml").write_text("task: digits\nstrategy: fedavg\n")
    page = page_of(tmp_path)
    assert "fedavg ran digits for 0 s of virtual time" in page.words
    assert "Nothing was evaluated" in page.words


def test_one_client_is_enough(made_up_run):
    page = page_of(made_up_run(clients=1))
    assert "1 client sent" in page.words
    assert "waited the most" not in page.words


def test_very_many_clients_and_tasks_are_sampled_and_the_page_says_so(made_up_run):
    folder = made_up_run(clients=200, strategy="fedasync", seconds=100.0)
    started = time.process_time()
    path = write_report(folder)
    assert time.process_time() - started < 5
    assert path.stat().st_size < 2_000_000
    page = Page(path.read_text(encoding="utf-8"))
    assert "40 of the 200 clients that were given work are drawn" in page.words
    assert "tasks are too many to tell apart" in page.words
    assert "160 clients between these are not shown" in page.words
    assert "The busiest tenth of the clients did" in page.words


def test_a_straggler_shows_in_the_time_spent_waiting(made_up_run):
    synchronous = page_of(made_up_run("avg", strategy="fedavg")).words
    asynchronous = page_of(made_up_run("async", strategy="fedasync")).words
    waiting = [float(re.search(r"and ([\d.]+) % waiting", words)[1]) for words in (synchronous, asynchronous)]
    assert waiting[0] > 50 > 10 > waiting[1]
    assert re.search(r"client \d waited the most", synchronous)


def test_work_cut_off_by_the_end_is_not_called_lost(made_up_run):
    folder = made_up_run()
    with open(folder / "timeline.jsonl", "a") as file:
        file.write(json.dumps({"task": 9_999, "node": 0, "kind": "train", "start_s": 120.0, "end_s": 126.0,
                               "compute_s": None, "local_steps": 50, "outcome": "cancelled"}) + "\n")
    words = page_of(folder).words
    assert "called off unfinished" in words
    assert "work that was lost" not in words and "were lost to failures" not in words


@pytest.mark.parametrize("reason, words", [
    ("target", "The run stopped there."), ("seconds", "It stopped after 120 s of virtual time, as set."),
    ("interrupted", "It was interrupted."), ("error", "It ended with an error"), ("bored", "It stopped: bored.")])
def test_the_report_says_why_the_run_stopped(made_up_run, reason, words):
    folder = made_up_run()
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"stop_reason": reason}))
    assert words in page_of(folder).words


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(NotARun):
        write_report(tmp_path)


@pytest.mark.parametrize("strategy, grouped", [("fedcompass", True), ("fedavg", False)])
def test_the_legend_speaks_of_groups_only_where_there_are_some(made_up_run, strategy, grouped):
    html = write_report(made_up_run(strategy=strategy)).read_text(encoding="utf-8")
    assert ("coloured by arrival group" in html) is grouped
