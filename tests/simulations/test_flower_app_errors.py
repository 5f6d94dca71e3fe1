"""What goes wrong with strangers' Flower apps, and how they hear of it."""
import json

import pytest

from fedcore.errors import (
    AllNodesFailed,
    AppFailed,
    BadExperiment,
    BadInput,
    InvalidSetting,
    UnusableApp,
)
from fedcore.simulations.flower_app import simulate_app


def rows(run, event):
    return [row for row in run.metrics if row["event"] == event]


def test_a_clients_exception_is_shown_with_its_node_and_the_run_goes_on(make_app, out, caplog):
    client = make_app.client.replace('target = float(context.node_config["partition-id"])', """
        target = float(context.node_config["partition-id"])
        if target == 2:
            raise ValueError("bad sensor")""")
    run = simulate_app(make_app(client=client), num_nodes=4, out=out)
    assert (run.summary["failures"], run.summary["client_updates"], run.summary["versions"]) == (3, 9, 3)
    shown = [record.getMessage() for record in caplog.records if record.name == "fedcore"]
    assert len(shown) == 1, "the same mistake is shown once"
    assert "Node 2 failed at a train message" in shown[0]
    assert 'client_app.py", line 14, in train' in shown[0] and "ValueError: bad sensor" in shown[0]
    assert rows(run, "failure")[0]["reason"] == "ValueError: bad sensor"
    assert {(row["node"], row["outcome"]) for row in run.timeline if row["kind"] == "train"} == {
        (0, "ok"), (1, "ok"), (2, "failed"), (3, "ok")}


def test_a_round_without_a_reply_makes_no_version(make_app, out):
    client = make_app.client.replace('target = float(context.node_config["partition-id"])', "raise ValueError")
    run = simulate_app(make_app(client=client), num_nodes=2, out=out)
    assert (run.summary["versions"], run.summary["failures"], rows(run, "update")) == (0, 6, [])


def test_when_all_clients_fail_the_run_ends_with_an_error_and_a_folder(make_app, out):
    client = make_app.train_of("raise RuntimeError('no data')")
    with pytest.raises(AllNodesFailed, match="All 2 messages to clients failed.*RuntimeError: no data"):
        simulate_app(make_app(make_app.main_of("grid.send_and_receive(ask(grid))"), client), num_nodes=2, out=out)
    assert json.loads((out / "summary.json").read_text())["failures"] == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", "the ClientApp returned a NoneType to 'train', not a Message"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_clients_that_end_otherwise_are_error_replies_too(make_app, out, body, message):
    server = make_app.main_of("""
        [reply] = grid.send_and_receive(ask(grid))
        assert reply.has_error() and reply.error.code == 2
        print(reply.error.reason)
        grid.send_and_receive(ask(grid, "query"))
    """)
    query = "\n@app.query()\ndef query(message, context):\n    return answer(message, x=1)\n"
    client = (*make_app.train_of(body), query)
    run = simulate_app(make_app(server, client), num_nodes=1, out=out)
    assert message in rows(run, "failure")[0]["reason"]


def test_a_servers_exception_is_shown_with_its_place(make_app, out):
    message = r"(?s)ended 1 s into the run with ZeroDivisionError.*server_app.py.*1 / 0"
    with pytest.raises(AppFailed, match=message) as caught:
        simulate_app(make_app.echoing("grid.send_and_receive(ask(grid))\n1 / 0"), num_nodes=1, out=out)
    assert "flwr/serverapp" not in str(caught.value), "only the app's own code is shown"
    assert json.loads((out / "summary.json").read_text())["stop_reason"] == "error"
    assert (out / "report.html").exists()


def test_ctrl_c_leaves_a_complete_folder(make_app, out):
    app = make_app.echoing("grid.send_and_receive(ask(grid))\nraise KeyboardInterrupt")
    run = simulate_app(app, num_nodes=1, out=out)
    assert run.summary["stop_reason"] == "interrupted" and len(run.timeline) == 1


def test_an_app_may_exit_by_itself(make_app, out):
    assert simulate_app(make_app(make_app.main_of("raise SystemExit(0)")), num_nodes=1, out=out).finished


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pyproject": "[project]\nname = 'x'\n"}, "describes no Flower app.*version.*tool.flwr.app"),
        ({"pyproject": "[project\n"}, "describes no Flower app"),
        ({"pyproject": ('clientapp = "client_app:app"', "")}, 'Property "clientapp" missing'),
        ({"pyproject": ("server_app:app", "server_app")}, "cannot be loaded.*Missing attribute"),
        ({"pyproject": ("server_app:app", "no_such_module:app")},
         "cannot be loaded. There is no module no_such_module"),
        ({"pyproject": ("client_app:app", "client_app:application")},
         "clientapp .* cannot be loaded.*application"),
        ({"pyproject": ("server_app:app", "client_app:app")}, "is a ClientApp, not a ServerApp"),
        ({"config": "things = [1, 2]"}, "describes no Flower app.*things"),
        ({"client": "import not_installed_anywhere"}, "There is no module not_installed_anywhere: install it"),
        ({"client": "def broken(:\n    pass"}, "client_app.py.*SyntaxError"),
        ({"client": "value = {}\nvalue['missing']\n"}, "client_app.py\", line 2.*KeyError: 'missing'"),
        ({"server": "raise SystemExit('no licence')"}, "no licence"),
    ],
)
def test_apps_that_cannot_be_used_are_refused_before_anything_runs(make_app, out, change, message):
    if isinstance(replacement := change.get("pyproject"), tuple):
        change = {"pyproject": make_app.pyproject.replace(*replacement)}
    with pytest.raises(UnusableApp, match=f"(?s){message}"):
        simulate_app(make_app(**change), num_nodes=2, out=out)
    assert not out.exists()


def test_folders_without_an_app_are_refused(tmp_path):
    with pytest.raises(UnusableApp, match="is not a folder"):
        simulate_app(tmp_path / "absent")
    with pytest.raises(UnusableApp, match="has no pyproject.toml"):
        simulate_app(tmp_path)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"overrides": ["num-rounds=3"]}, InvalidSetting, "run-config.num-rounds=3.*Did you mean num-server-rounds"),
        ({"overrides": ["steps=many"]}, InvalidSetting, "run-config.steps='many', but it must be a whole number"),
        ({"overrides": ["steps"]}, InvalidSetting, "--set='steps'.*key=value"),
        ({"overrides": ["clients.count=0"]}, BadExperiment, "clients.count=0"),
        ({"settings": {"strategy": "fedavg"}}, BadExperiment, "strategy='fedavg'.*no such setting"),
        ({"settings": {"simulation": {"devices": {"jitter": -1}}}}, BadExperiment, "simulation.devices.jitter=-1"),
        ({"settings": {"simulation": {"network": {"uplink_mbps": {"name": "trace", "values": [1.0]}}}}},
         InvalidSetting, "uplink_mbps=.*at least 2"),
        ({"settings": "absent.yaml"}, BadInput, "absent.yaml does not exist"),
        ({"workers": -1}, BadInput, "workers=-1"),
    ],
)
def test_wrong_settings_are_refused_with_their_name(make_app, out, given, error, message):
    with pytest.raises(error, match=message):
        simulate_app(make_app(), num_nodes=2, out=out, **given)
    assert not out.exists()
