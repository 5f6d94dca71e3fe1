"""The report's section about compression: there where clients compress, and only there."""
import pytest

import fedcore
from fedcore.report import write_report
from fedcore.report.compression import compression
from fedcore.report.facts import facts_of
from fedcore.runs import Run

EXPERIMENT = {"task": "digits", "clients": {"count": 4}, "train": {"lr": 0.1, "local_steps": 2}, "stop": {"rounds": 3}}
TOP = {"name": "top_k", "fraction": 0.05}


def section_of(tmp_path, **changes):
    run = fedcore.simulate({**EXPERIMENT, **changes}, out=tmp_path / "run")
    return compression(run, facts_of(run)), (tmp_path / "run" / "report.html").read_text(encoding="utf-8"), run


def test_a_gradient_method_shows_bytes_errors_and_that_both_sides_agree(tmp_path):
    section, page, run = section_of(tmp_path, strategy={"name": "econtrol", "compressor": TOP})
    assert "h mismatch 0" in section.intro and run.summary["h_mismatch"] == 0
    assert f"{run.summary['bytes_up'] / 1e3:.4g} kB" in section.intro
    for title in ("Bytes over", "Accuracy over bytes up", "Loss over bytes up", "Compression error"):
        assert title in section.body
    assert page.count('<section id="compression">') == 1
    # What this section draws is not drawn again among other figures.
    assert page.count("Compression error") == 1 + section.body.count("Compression error: ")


def test_a_compressed_run_of_any_strategy_says_what_it_saved(tmp_path):
    section, _, run = section_of(tmp_path, strategy="fedavg", compression=TOP)
    whole = run.summary["num_params"] * 4 * run.summary["client_updates"]
    assert f"{whole / run.summary['bytes_up']:.3g} times" in section.intro and "mismatch" not in section.intro


def test_a_mismatch_is_said(tmp_path):
    _, _, run = section_of(tmp_path, strategy={"name": "ef21", "compressor": TOP})
    rows = run.folder / "metrics.jsonl"
    rows.write_text(rows.read_text().replace('"h_mismatch": 0', '"h_mismatch": 2', 1))
    (run.folder / "summary.json").unlink()
    again = Run(run.folder)
    assert "h mismatch 2" in compression(again, facts_of(again)).intro
    assert write_report(run.folder).is_file()


@pytest.mark.parametrize("strategy", ["fedavg", "fedbuff"])
def test_other_runs_have_no_such_section(tmp_path, strategy):
    section, page, _ = section_of(tmp_path, strategy=strategy)
    assert section is None and 'id="compression"' not in page
