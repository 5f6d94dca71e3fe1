import pytest
import yaml

from fedcore.errors import InvalidSetting
from fedcore.report import comparison_rows, write_comparison


def rewrite_settings(folder, **changes):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | changes))
    return folder


def test_the_soonest_at_the_target_comes_first(made_up_run):
    rows = comparison_rows([made_up_run("a", strategy="fedavg", seconds=400.0, target=0.8),
                            made_up_run("c", target=0.8)])
    assert [row["label"] for row in rows] == ["fedcompass", "fedavg"]
    assert rows[0]["time_to_target_s"] < rows[1]["time_to_target_s"]
    assert rows[0]["target"].startswith("80")
    assert (rows[0]["runs"], rows[0]["reached"], rows[0]["seeds"]) == (1, 1, [0])
    assert rows[0]["best_accuracy_range"] is None


def test_seeds_of_one_experiment_become_one_row_with_median_and_range(made_up_run):
    folders = [made_up_run(f"s{seed}", seed=seed) for seed in (0, 1, 2)]
    times = sorted(comparison_rows([folder])[0]["time_to_target_s"] for folder in folders)
    [row] = comparison_rows(folders)
    assert (row["runs"], row["reached"], sorted(row["seeds"])) == (3, 3, [0, 1, 2])
    assert row["time_to_target_s"] == times[1]
    assert row["time_to_target_s_range"] == (times[0], times[2])


def test_a_seed_that_missed_the_target_counts_as_infinitely_late(made_up_run):
    folders = [made_up_run("long"), *(made_up_run(f"s{seed}", seed=seed, seconds=5.0) for seed in (1, 2))]
    for folder in folders:
        rewrite_settings(folder, stop={"target": {"accuracy": 0.9}})
    [row] = comparison_rows(folders)
    assert row["reached"] == 1
    assert row["time_to_target_s"] is None


def test_runs_of_one_strategy_are_told_apart_by_the_settings_that_differ(made_up_run):
    few, many = made_up_run("few", local_steps=5), made_up_run("many", local_steps=50)
    assert {row["label"] for row in comparison_rows([few, many])} == {
        "fedcompass (local_steps=5)", "fedcompass (local_steps=50)"}


def test_a_strategy_named_in_short_is_the_same_setting(made_up_run):
    short = rewrite_settings(made_up_run("short"), strategy="fedcompass")
    long = rewrite_settings(made_up_run("long", seed=1), strategy={"name": "fedcompass"})
    [row] = comparison_rows([short, long])
    assert row["runs"] == 2


def test_runs_that_differ_in_much_are_told_apart_by_their_folder(made_up_run):
    one = rewrite_settings(made_up_run("one"), a=1, b=1, c=1, d=1)
    two = rewrite_settings(made_up_run("two"), a=2, b=2, c=2, d=2)
    assert {row["label"] for row in comparison_rows([one, two])} == {"fedcompass (one)", "fedcompass (two)"}


def test_a_given_target_wins_over_the_experiments_own(made_up_run):
    [row] = comparison_rows([made_up_run()], {"accuracy": 0.5})
    [later] = comparison_rows([made_up_run("again")])
    assert row["time_to_target_s"] < later["time_to_target_s"]
    assert row["bytes_to_target"] < later["bytes_to_target"]


def test_without_a_common_target_the_best_that_all_reached_is_taken(made_up_run):
    folders = [made_up_run("a", target=None), made_up_run("b", strategy="fedavg", seconds=60.0, target=None)]
    rows = comparison_rows(folders)
    worst = min(row["best_accuracy"] for row in rows)
    assert rows[0]["target"].split()[0].rstrip("%\u202f") == str(int(worst * 100))
    assert all(row["reached"] == 1 for row in rows)


def test_a_regression_is_timed_by_its_loss(made_up_run):
    rows = comparison_rows([made_up_run("a", labels=0, target=None),
                            made_up_run("b", labels=0, target=None, strategy="fedavg")])
    assert rows[0]["target"].startswith("a loss of")
    assert all(row["reached"] == 1 for row in rows)


def test_runs_without_evaluations_have_no_target_but_a_row_each(made_up_run):
    rows = comparison_rows([made_up_run("a", evaluations=False, target=None)])
    assert rows[0]["target"] is None
    assert rows[0]["time_to_target_s"] is None
    assert rows[0]["client_updates"] > 0


@pytest.mark.parametrize("folders, target", [([], None), (["run"], {"accuracy": 0.5, "loss": 1.0}), (["run"], {})])
def test_a_comparison_that_cannot_be_made_is_refused(made_up_run, folders, target):
    with pytest.raises(InvalidSetting):
        comparison_rows([made_up_run(name) for name in folders], target)


def test_the_page_overlays_runs_and_names_what_differs(made_up_run, tmp_path):
    folders = [made_up_run("c", target=0.8), *(made_up_run(f"a{seed}", strategy="fedavg", seconds=400.0, target=0.8,
                                                           seed=seed) for seed in (0, 1))]
    path = write_comparison(folders, tmp_path / "pages" / "compare.html")
    html = path.read_text(encoding="utf-8").replace("\u202f", " ")
    assert "fedcompass reached 80 % accuracy first" in html
    assert "times sooner than fedavg" in html
    assert html.count('data-label="fedavg"') == html.count('data-label="fedcompass"') * 2
    assert "strategy.name" in html and "Settings that differ" in html
    assert "http" not in html


def test_a_folder_gets_a_page_of_its_own_name(made_up_run, tmp_path):
    assert write_comparison([made_up_run()], tmp_path) == tmp_path / "comparison.html"


def test_hostile_names_are_escaped_in_a_comparison(made_up_run, tmp_path):
    folder = rewrite_settings(made_up_run(), note="<script>alert(1)</script>")
    other = rewrite_settings(made_up_run("other"), note="<b>")
    html = write_comparison([folder, other], tmp_path).read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
