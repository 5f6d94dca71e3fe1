"""The report's section on black-box queries."""
import pytest

import fedcore
from fedcore.report.facts import facts_of
from fedcore.report.page import report_html
from fedcore.report.queries import queries

FZOOS = {"name": "fzoos", "local_iterations": 2, "features": 30, "nearest": 10, "feature_queries": 10,
         "active_queries": 1, "end_queries": 2, "memory": 50}


@pytest.fixture
def run(tmp_path):
    """Run FZooS on small quadratics."""

    def start(**changed):
        experiment = {"task": {"name": "blackbox_quadratics", "dimension": 4, "budget": 100}, "strategy": FZOOS,
                      "clients": {"count": 2}, "stop": {"rounds": 3}, **changed}
        return fedcore.simulate(experiment, out=tmp_path / "run")

    return start


def test_a_black_box_run_shows_what_its_queries_bought(run):
    found = run()
    section = queries(found, facts_of(found))
    made = found.summary["queries"]
    assert made == 2 * (11 + 3 * 6) and f"{made:,} evaluations" in section.intro and "29%" in section.intro
    for words in ("Objective over queries", "Objective over rounds", "Objective over bytes", "Queries of each client",
                  "Relative error of gradients"):
        assert words in section.body
    page = report_html(found)
    assert "Queries of each client" in page and "Surrogate error" not in page


@pytest.mark.parametrize("strategy", [FZOOS, {"name": "fedzo", "directions": 2, "local_iterations": 2}])
def test_without_evaluations_it_shows_what_the_clients_said(run, strategy):
    found = run(evaluate={"where": "none"}, strategy=strategy)
    assert "Objective over queries" in queries(found, facts_of(found)).body


def test_other_runs_have_no_such_section(tmp_path):
    found = fedcore.simulate({"task": "digits", "strategy": "fedavg", "stop": {"rounds": 1}, "clients": {"count": 2}},
                             out=tmp_path / "run")
    assert queries(found, facts_of(found)) is None
