"""Whole Flower apps, as strangers write them."""
import json
import logging
import random
import sys
import textwrap

import numpy as np
import pytest
import torch

from fedcore.errors import (
    AllNodesFailed,
    AppFailed,
    BadExperiment,
    BadInput,
    InvalidSetting,
    NothingCanHappen,
    UnusableApp,
)
from fedcore.simulations.flower_app import simulate_app

PYPROJECT = """
[project]
name = "{name}"
version = "1.0.0"

[tool.flwr.app]
publisher = "somebody"

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"

[tool.flwr.app.config]
{config}
"""

# A regression with one weight per client's mean: averaging the clients' models must find the mean of their targets.
CLIENT = """
    import numpy as np
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        weights = message.content["arrays"].to_numpy_ndarrays()[0]
        target = float(context.node_config["partition-id"])
        for _ in range(int(context.run_config["steps"])):
            weights = weights - 0.5 * (weights - target)
        metrics = MetricRecord({"num-examples": 10, "train_loss": float(((weights - target) ** 2).mean()),
                                "work-steps": int(context.run_config["steps"])})
        return Message(RecordDict({"arrays": ArrayRecord([weights]), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        weights = message.content["arrays"].to_numpy_ndarrays()[0]
        loss = float(((weights - context.node_config["partition-id"]) ** 2).mean())
        metrics = MetricRecord({"num-examples": 10, "eval_loss": loss, "eval_acc": 1 / (1 + loss)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)
"""
SERVER = """
    import numpy as np
    from flwr.app import ArrayRecord, Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        arrays = ArrayRecord([np.zeros(3)])
        FedAvg().start(grid, arrays, num_rounds=int(context.run_config["num-server-rounds"]))
"""
CONFIG = "num-server-rounds = 3\nsteps = 4"
PUSHING = """
    import time

    from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.serverapp import Grid, ServerApp

    app = ServerApp()

    def ask(grid, action="train", ttl=None, nodes=None, content=None):
        return [Message(content or RecordDict({"config": ConfigRecord({})}), node, action, ttl=ttl)
                for node in (grid.get_node_ids() if nodes is None else nodes)]
"""
ECHO = """
    from flwr.app import Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    def answer(message, **metrics):
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
"""


@pytest.fixture
def make_app(tmp_path):
    """Write an app to a folder of its own, and return the folder."""
    def make(server=SERVER, client=CLIENT, config=CONFIG, name="some-app", pyproject=PYPROJECT):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "pyproject.toml").write_text(pyproject.format(name=name, config=config))
        for file, parts in (("server_app.py", server), ("client_app.py", client)):
            text = "".join(textwrap.dedent(part) for part in ([parts] if isinstance(parts, str) else parts))
            (folder / file).write_text(text)
        return folder

    return make


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


def main_of(body, *more):
    """Return a ServerApp that pushes and pulls by hand."""
    lines = textwrap.indent(textwrap.dedent(body).strip(), "    ")
    return PUSHING, *more, f"\n@app.main()\ndef main(grid: Grid, context: Context) -> None:\n{lines}\n"


def train_of(body, decorator="@app.train()"):
    lines = textwrap.indent(textwrap.dedent(body).strip(), "    ")
    return ECHO, f"\n{decorator}\ndef train(message: Message, context: Context) -> Message:\n{lines}\n"


def rows(run, event):
    return [row for row in run.metrics if row["event"] == event]


# ---- an ordinary app ------------------------------------------------------------------------------------------------


def test_an_ordinary_app_leaves_a_complete_run_folder(make_app, out):
    run = simulate_app(make_app(), {"simulation": {"devices": {"seconds_per_step": 0.5}}}, num_nodes=4, out=out)
    summary = run.summary
    # Per round 4 steps of 0.5 s, and an evaluation, which does not say how much work it was: 1 s.
    assert summary["time_s"] == pytest.approx(3 * (4 * 0.5 + 1.0))
    assert (summary["strategy"], summary["task"], summary["stop_reason"]) == ("FedAvg", "some-app", "finished")
    assert (summary["versions"], summary["client_updates"], summary["client_steps"]) == (3, 12, 48)
    assert (summary["failures"], summary["lost"], summary["evaluations"], summary["num_params"]) == (0, 0, 3, 3)
    [weights] = run.model().values()
    # Each round moves every client by 1 - 0.5**4 of its way, and their mean to 1.5.
    assert weights.numpy() == pytest.approx(np.full(3, 1.5 * (1 - 0.5**12)))
    assert summary["final_loss"] == pytest.approx(np.mean([(1.5 * (1 - 0.5**12) - k) ** 2 for k in range(4)]))
    assert [row["event"] for row in run.metrics] == ["start", *["update", "evaluate"] * 3, "stop"]
    assert rows(run, "update")[0]["nodes"] == [0, 1, 2, 3]
    assert len(run.timeline) == 24 and {row["outcome"] for row in run.timeline} == {"ok"}
    for row in run.timeline:
        parts = row["download_s"] + row["queue_s"] + row["compute_s"] + row["upload_s"]
        assert row["start_s"] + parts == pytest.approx(row["end_s"])
    assert run.clients[3] == {"node": 3, "num_examples": 10, "labels": None, "seconds_per_step": 0.5}
    assert (out / "report.html").stat().st_size > 10_000
    assert run.config["run-config"] == {"num-server-rounds": 3, "steps": 4}


def test_devices_and_links_set_the_pace(make_app, out, tmp_path):
    settings = tmp_path / "world.yaml"
    settings.write_text(textwrap.dedent("""
        clients: {count: 2}
        simulation:
          devices: {seconds_per_step: {name: trace, values: [1.0, 2.5]}, seconds_per_task: 0.25}
          network: {latency_s: 0.1}
    """))
    run = simulate_app(make_app(), settings, out=out, overrides=["num-server-rounds=1"])
    assert run.summary["time_s"] == pytest.approx(0.2 + 4 * 2.5 + 0.2 + 0.25)


@pytest.mark.slow
def test_same_seed_same_run_on_any_number_of_workers(make_app, tmp_path):
    client = (ECHO, """
        import random
        import numpy as np
        import torch

        @app.train()
        def train(message, context):
            context.state["memory"] = MetricRecord({"draws": random.random()})
            return answer(message, drawn=random.random() + np.random.rand() + float(torch.rand(())))
    """)
    server = main_of("""
        import random
        for _ in range(3):
            nodes = random.sample(list(grid.get_node_ids()), 4)
            for reply in grid.send_and_receive(ask(grid, nodes=nodes)):
                print(reply.content["metrics"]["drawn"])
    """)
    folder = make_app(server, client)

    def history(seed, workers):
        out = tmp_path / f"{seed}-{workers}-{random.random()}"
        printed = []
        run = simulate_app(folder, {"seed": seed, "clients": {"count": 6}}, out=out, workers=workers,
                           on_row=printed.append)
        return (out / "timeline.jsonl").read_text(), run.metrics

    assert history(1, 0) == history(1, 0) == history(1, 2)
    assert history(1, 0) != history(2, 0)


def test_the_callers_generators_are_left_alone(make_app, out):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    simulate_app(make_app(), num_nodes=2, out=out)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected


def test_run_config_can_be_overridden_and_stays_the_apps_own(make_app, out):
    server = main_of("""
        assert dict(context.run_config) == {"num-server-rounds": 7, "rate": 2.0, "deep.name": "new", "seed": 4}
        [reply] = grid.send_and_receive(ask(grid, "query"))
        assert reply.content["metrics"]["rate"] == 2.0
    """)
    client = train_of("return answer(message, rate=context.run_config['rate'])", "@app.query()")
    config = 'num-server-rounds = 3\nrate = 1.5\ndeep.name = "old"\nseed = 0'
    overrides = ["num-server-rounds=7", "rate=2", "deep.name=new", "run-config.seed=4", "seed=9"]
    run = simulate_app(make_app(server, client, config), num_nodes=1, out=out, overrides=overrides)
    assert run.summary["seed"] == 9


def test_number_of_nodes_comes_from_the_nearest_source(make_app, tmp_path):
    pyproject = PYPROJECT + textwrap.dedent("""
        [tool.flwr.federations]
        default = "local"
        [tool.flwr.federations.local]
        options.num-supernodes = 3
    """)
    old, new = make_app(pyproject=pyproject, name="old"), make_app(name="new")

    def nodes(folder, name, **given):
        return simulate_app(folder, out=tmp_path / f"run-{name}", overrides=["num-server-rounds=1"], **given).config[
            "clients"]["count"]

    assert nodes(new, "a") == 10
    assert nodes(old, "b") == 3
    assert nodes(old, "c", settings={"clients": {"count": 4}}) == 4
    assert nodes(old, "d", settings={"clients": {"count": 4}}, num_nodes=5) == 5


def test_modules_of_two_apps_do_not_mix_and_nothing_stays_behind(make_app, tmp_path):
    path = list(sys.path)
    one = make_app(main_of("grid.send_and_receive(ask(grid))"), train_of("return answer(message, one=1)"), name="one")
    two = make_app(main_of("""
        assert "two" in grid.send_and_receive(ask(grid))[0].content["metrics"]
    """), train_of("return answer(message, two=2)"), name="two")
    for folder in (one, two, one):
        simulate_app(folder, num_nodes=1, out=tmp_path / f"run{random.random()}")
    assert sys.path == path
    assert not {"server_app", "client_app"} & sys.modules.keys()


def test_an_apps_own_evaluation_on_the_server_is_what_counts(make_app, out):
    server = SERVER.replace("FedAvg().start(grid, arrays,", """
        def evaluate(server_round, arrays):
            return MetricRecord({"loss": 1.0 / (1 + server_round), "accuracy": 0.1 * server_round, "version": 5})

        FedAvg().start(grid, arrays, evaluate_fn=evaluate,""")
    server = server.replace("import ArrayRecord,", "import ArrayRecord, MetricRecord,")
    run = simulate_app(make_app(server), num_nodes=2, out=out)
    assert [(row["version"], row["where"], row["accuracy"]) for row in rows(run, "evaluate")] == [
        (k, "server", pytest.approx(0.1 * k)) for k in range(4)]
    assert (run.summary["final_loss"], run.summary["best_accuracy"]) == (0.25, pytest.approx(0.3))
    assert rows(run, "evaluate")[0]["app_version"] == 5
    assert [row["where"] for row in rows(run, "log")] == ["clients"] * 3


# ---- strategies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [
        "FedAvg(fraction_train=0.5)", "FedProx(proximal_mu=0.1)", "FedAvgM(server_momentum=0.5)", "FedAdam(eta=0.1)",
        "FedYogi(eta=0.1)", "FedAdagrad(eta=0.1)", "FedMedian()", "FedTrimmedAvg(beta=0.2)",
        "Krum(num_malicious_nodes=1)", "QFedAvg(client_learning_rate=0.5)",
        "DifferentialPrivacyServerSideFixedClipping(FedAvg(), noise_multiplier=0.1, clipping_norm=1.0, "
        "num_sampled_clients=5)",
    ],
)
def test_flowers_strategies_run_and_learn_in_strangers_apps(make_app, out, strategy):
    name = strategy.split("(")[0]
    # From -1 every client has a way to go: Flower's clipping divides by zero where a client does not move.
    server = SERVER.replace("FedAvg()", strategy).replace("import FedAvg", f"import FedAvg, {name}").replace(
        "np.zeros(3)", "np.full(3, -1.0)")
    run = simulate_app(make_app(server), num_nodes=5, out=out)
    assert run.summary["strategy"] == name
    assert (run.summary["versions"], run.summary["failures"], run.summary["stop_reason"]) == (3, 0, "finished")
    losses = [row["loss"] for row in rows(run, "evaluate")]
    assert len(losses) == 3
    if name not in ("QFedAvg", "Krum", "DifferentialPrivacyServerSideFixedClipping"):
        assert losses[-1] < np.mean([(k + 1) ** 2 for k in range(5)])


def test_a_fedcore_strategy_works_in_a_strangers_app_with_one_import(make_app, out):
    server = SERVER.replace("from flwr.serverapp.strategy import FedAvg",
                            "from fedcore.strategies.fedasync import FedAsync").replace("FedAvg()", "FedAsync()")
    client = CLIENT + """
    @app.query()
    def query(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 10, "partition-id": int(context.node_config["partition-id"])})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)
    """
    run = simulate_app(make_app(server, client), num_nodes=4, out=out)
    assert run.summary["strategy"] == "FedAsync"
    assert run.summary["client_updates"] >= 12


# ---- what clients may do --------------------------------------------------------------------------------------------


def test_actions_and_state_belong_to_each_node(make_app, out):
    client = (ECHO, """
        @app.train("custom")
        def custom(message, context):
            count = int(context.state["memory"]["count"]) + 1 if "memory" in context.state else 1
            context.state["memory"] = MetricRecord({"count": count})
            return answer(message, count=count, partition=context.node_config["partition-id"],
                          of=context.node_config["num-partitions"])
    """)
    server = main_of("""
        nodes = list(grid.get_node_ids())
        for asked in (nodes, nodes[:2], nodes):
            replies = grid.send_and_receive(ask(grid, "train.custom", nodes=asked))
        metrics = [reply.content["metrics"] for reply in replies]
        assert [(m["partition"], m["count"], m["of"]) for m in metrics] == [(0, 3, 4), (1, 3, 4), (2, 2, 4), (3, 2, 4)]
        [wrong] = grid.send_and_receive(ask(grid, "train.other", nodes=nodes[:1]))
        assert wrong.has_error() and "No train function registered with name 'other'" in wrong.error.reason
    """)
    run = simulate_app(make_app(server, client), num_nodes=4, out=out)
    assert {row["kind"] for row in run.timeline} == {"train.custom", "train.other"}


def test_client_mods_run(make_app, out, caplog):
    caplog.set_level(logging.INFO)
    client = CLIENT.replace("app = ClientApp()", """
    from flwr.clientapp.mod import fixedclipping_mod, message_size_mod

    def doubling(message, context, call_next):
        reply = call_next(message, context)
        if "train_loss" in reply.content.get("metrics", {}):
            reply.content["metrics"]["doubled"] = 2 * reply.content["metrics"]["train_loss"]
        return reply

    app = ClientApp(mods=[doubling, message_size_mod])
    """).replace("@app.train()", "@app.train(mods=[fixedclipping_mod])")
    server = SERVER.replace("FedAvg()", "DifferentialPrivacyClientSideFixedClipping(FedAvg(), noise_multiplier=0.01, "
                            "clipping_norm=0.5, num_sampled_clients=4)").replace(
        "import FedAvg", "import DifferentialPrivacyClientSideFixedClipping, FedAvg").replace(
        "np.zeros(3)", "np.full(3, -1.0)")
    run = simulate_app(make_app(server, client), num_nodes=4, out=out)
    update = rows(run, "update")[0]
    assert update["doubled"] == pytest.approx(2 * update["train_loss"])
    # No client moves further than the clipping norm in one of three rounds.
    [weights] = run.model().values()
    assert 0.5 < np.linalg.norm(weights.numpy() + 1) < 3 * 0.5 + 0.1


def test_a_numpy_client_and_a_server_fn_of_the_deprecated_kind_still_run(make_app, out):
    client = """
        import numpy as np
        from flwr.client import ClientApp, NumPyClient

        class Client(NumPyClient):
            def __init__(self, target):
                self.target = target

            def fit(self, parameters, config):
                return [parameters[0] + 0.5 * (self.target - parameters[0])], 10, {"target": self.target}

            def evaluate(self, parameters, config):
                return float(((parameters[0] - self.target) ** 2).mean()), 10, {"accuracy": 0.5}

        def client_fn(context):
            return Client(float(context.node_config["partition-id"])).to_client()

        app = ClientApp(client_fn=client_fn)
    """
    server = """
        import numpy as np
        from flwr.common import ndarrays_to_parameters
        from flwr.server import ServerApp, ServerAppComponents, ServerConfig
        from flwr.server.strategy import FedAvg

        def mean(metrics):
            return {"accuracy": sum(n * m["accuracy"] for n, m in metrics) / sum(n for n, _ in metrics)}

        def server_fn(context):
            strategy = FedAvg(initial_parameters=ndarrays_to_parameters([np.zeros(2)]), min_available_clients=4,
                              evaluate_metrics_aggregation_fn=mean)
            return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))

        app = ServerApp(server_fn=server_fn)
    """
    run = simulate_app(make_app(server, client), num_nodes=4, out=out)
    assert (run.summary["strategy"], run.summary["versions"], run.summary["client_updates"]) == ("FedAvg", 2, 8)
    # All clients of a round work at the same time: two rounds of one training and one evaluation each.
    assert run.summary["time_s"] == pytest.approx(4.0)
    weights = 1.5 * (1 - 0.5**2)
    assert run.summary["final_loss"] == pytest.approx(np.mean([(weights - k) ** 2 for k in range(4)]))
    assert run.summary["final_accuracy"] == 0.5


def test_a_deprecated_server_that_waits_for_too_many_nodes_does_not_hang(make_app, out):
    server = """
        from flwr.common import Parameters
        from flwr.server import ServerApp, ServerAppComponents, ServerConfig
        from flwr.server.strategy import FedAvg

        app = ServerApp(server_fn=lambda context: ServerAppComponents(
            strategy=FedAvg(min_available_clients=5, initial_parameters=Parameters([], "none")),
            config=ServerConfig(num_rounds=1)))
    """
    with pytest.raises(NothingCanHappen, match="than the 2 that are online"):
        simulate_app(make_app(server), num_nodes=2, out=out)


# ---- what servers may do --------------------------------------------------------------------------------------------


def test_pushing_and_pulling_by_hand_with_pauses(make_app, out):
    server = main_of("""
        ids = list(grid.push_messages(ask(grid)))
        assert len(ids) == 3 and all(ids)
        arrived = []
        while len(arrived) < 3:
            replies = list(grid.pull_messages(ids))
            assert replies, "a pull in virtual time waits for the first reply"
            arrived += [reply.metadata.reply_to_message_id for reply in replies]
            ids = [name for name in ids if name not in arrived]
            time.sleep(0.01)
        assert arrived == sorted(arrived, key=int)
        assert grid.pull_messages([]) == []
        [again] = grid.pull_messages(arrived[:1])
        assert again.has_error() and again.error.code == 4
        assert grid.push_messages(ask(grid, nodes=[99]))[0] is None
    """)
    settings = {"simulation": {"devices": {"seconds_per_task": {"name": "trace", "values": [1, 2, 3]}}}}
    run = simulate_app(make_app(server, train_of("return answer(message, x=1)")), settings, num_nodes=3, out=out)
    assert run.summary["time_s"] == 3.0


def test_asking_for_answered_messages_again_and_again_does_not_stop_the_clock(make_app, out):
    server = main_of("""
        ids, good = list(grid.push_messages(ask(grid))), set()
        while len(good) < len(ids):
            good |= {r.metadata.reply_to_message_id for r in grid.pull_messages(ids) if not r.has_error()}
    """)
    settings = {"simulation": {"devices": {"seconds_per_task": {"name": "exponential", "mean": 1}}}}
    run = simulate_app(make_app(server, train_of("return answer(message, x=1)")), settings, num_nodes=5, out=out)
    assert run.summary["client_updates"] == 5


@pytest.mark.parametrize("pause", ["time.sleep(0.15)", "pass"])
def test_waiting_for_nodes_moves_the_clock_to_their_coming(make_app, out, tmp_path, pause):
    (tmp_path / "trace.csv").write_text("partition,start_s,end_s\n0,0,1000\n1,50,1000\n2,70,1000\n")
    server = main_of(f"""
        while len(list(grid.get_node_ids())) < 3:
            {pause}
        assert len(grid.send_and_receive(ask(grid))) == 3
    """)
    settings = {"simulation": {"availability": {"name": "trace", "path": str(tmp_path / "trace.csv")}}}
    run = simulate_app(make_app(server, train_of("return answer(message, x=1)")), settings, num_nodes=3, out=out)
    assert run.summary["time_s"] == 71.0


@pytest.mark.parametrize(
    "body",
    [
        "while len(list(grid.get_node_ids())) < 3:\n    pass",
        "while not grid.send_and_receive(ask(grid, nodes=[77])):\n    pass",
    ],
)
def test_waiting_for_what_cannot_come_is_an_error_and_no_hang(make_app, out, body):
    with pytest.raises(NothingCanHappen, match="than the 2 that are online"):
        simulate_app(make_app(main_of(body)), num_nodes=2, out=out)
    assert json.loads((out / "summary.json").read_text())["stop_reason"] == "error"


def test_messages_expire_after_their_time_to_live(make_app, out):
    server = main_of("""
        replies = grid.send_and_receive(ask(grid, ttl=5.0))
        assert [reply.has_error() for reply in replies] == [False, True]
        assert replies[1].error.code == 3
    """)
    settings = {"simulation": {"devices": {"seconds_per_task": {"name": "trace", "values": [4, 6]}}}}
    run = simulate_app(make_app(server, train_of("return answer(message, x=1)")), settings, num_nodes=2, out=out)
    assert run.summary["time_s"] == 5.0
    assert [(row["node"], row["outcome"]) for row in run.timeline] == [(0, "ok"), (1, "lost")]
    assert (run.summary["lost"], run.summary["failures"]) == (1, 0)


def test_a_message_can_expire_while_it_waits_for_its_turn(make_app, out):
    server = main_of("""
        waiting = list(grid.push_messages([*ask(grid, ttl=100), *ask(grid, ttl=1.5), *ask(grid, ttl=100)]))
        order = []
        while waiting:
            for reply in grid.pull_messages(waiting):
                waiting.remove(reply.metadata.reply_to_message_id)
                order.append((reply.metadata.reply_to_message_id, reply.has_error()))
        assert order == [("1", True), ("0", False), ("2", False)], order
    """)
    settings = {"simulation": {"devices": {"seconds_per_task": 2}}}
    run = simulate_app(make_app(server, train_of("return answer(message, x=1)")), settings, num_nodes=1, out=out)
    # The expired message is never worked on: two tasks of 2 s.
    assert run.summary["time_s"] == 4.0


def test_replies_beyond_a_rounds_timeout_are_lost(make_app, out):
    server = main_of("""
        assert len(grid.send_and_receive(ask(grid), timeout=5)) == 1
        assert len(grid.send_and_receive(ask(grid, nodes=[list(grid.get_node_ids())[0]]))) == 1
    """)
    settings = {"simulation": {"devices": {"seconds_per_task": {"name": "trace", "values": [4, 6]}}}}
    run = simulate_app(make_app(server, train_of("return answer(message, x=1)")), settings, num_nodes=2, out=out)
    assert run.summary["time_s"] == 9.0
    assert {(row["node"], row["end_s"], row["outcome"]) for row in run.timeline} == {
        (0, 4.0, "ok"), (1, 6.0, "lost"), (0, 9.0, "ok")}


def test_work_under_way_at_the_end_is_in_the_timeline(make_app, out):
    run = simulate_app(make_app(main_of("grid.push_messages(ask(grid))"), train_of("return answer(message, x=1)")),
                       num_nodes=2, out=out)
    assert [row["outcome"] for row in run.timeline] == ["cancelled"] * 2


def test_simulated_failures_reach_the_strategy_as_error_replies(make_app, out):
    settings = {"simulation": {"failures": {"crash_probability": 0.3}}, "seed": 1}
    run = simulate_app(make_app(), settings, num_nodes=8, out=out)
    assert run.summary["failures"] > 0 and run.summary["versions"] == 3
    assert {row["outcome"] for row in run.timeline} == {"ok", "failed"}


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_clients_exception_is_shown_with_its_node_and_the_run_goes_on(make_app, out, caplog):
    client = CLIENT.replace('target = float(context.node_config["partition-id"])', """
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
    client = CLIENT.replace('target = float(context.node_config["partition-id"])', "raise ValueError")
    run = simulate_app(make_app(client=client), num_nodes=2, out=out)
    assert (run.summary["versions"], run.summary["failures"], rows(run, "update")) == (0, 6, [])


def test_when_all_clients_fail_the_run_ends_with_an_error_and_a_folder(make_app, out):
    client = train_of("raise RuntimeError('no data')")
    with pytest.raises(AllNodesFailed, match="All 2 messages to clients failed.*RuntimeError: no data"):
        simulate_app(make_app(main_of("grid.send_and_receive(ask(grid))"), client), num_nodes=2, out=out)
    assert json.loads((out / "summary.json").read_text())["failures"] == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", "the ClientApp returned a NoneType to 'train', not a Message"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_clients_that_end_otherwise_are_error_replies_too(make_app, out, body, message):
    server = main_of("""
        [reply] = grid.send_and_receive(ask(grid))
        assert reply.has_error() and reply.error.code == 2
        print(reply.error.reason)
        grid.send_and_receive(ask(grid, "query"))
    """)
    client = (*train_of(body), "\n@app.query()\ndef query(message, context):\n    return answer(message, x=1)\n")
    run = simulate_app(make_app(server, client), num_nodes=1, out=out)
    assert message in rows(run, "failure")[0]["reason"]


def test_a_servers_exception_is_shown_with_its_place(make_app, out):
    message = r"(?s)ended 1 s into the run with ZeroDivisionError.*server_app.py.*1 / 0"
    with pytest.raises(AppFailed, match=message) as caught:
        simulate_app(make_app(main_of("grid.send_and_receive(ask(grid))\n1 / 0"),
                              train_of("return answer(message, x=1)")), num_nodes=1, out=out)
    assert "flwr/serverapp" not in str(caught.value), "only the app's own code is shown"
    assert json.loads((out / "summary.json").read_text())["stop_reason"] == "error"
    assert (out / "report.html").exists()


def test_ctrl_c_leaves_a_complete_folder(make_app, out):
    run = simulate_app(make_app(main_of("grid.send_and_receive(ask(grid))\nraise KeyboardInterrupt"),
                                train_of("return answer(message, x=1)")), num_nodes=1, out=out)
    assert run.summary["stop_reason"] == "interrupted" and len(run.timeline) == 1


def test_an_app_may_exit_by_itself(make_app, out):
    assert simulate_app(make_app(main_of("raise SystemExit(0)")), num_nodes=1, out=out).finished


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pyproject": "[project]\nname = 'x'\n"}, "describes no Flower app.*version.*tool.flwr.app"),
        ({"pyproject": "[project\n"}, "describes no Flower app"),
        ({"pyproject": PYPROJECT.replace('clientapp = "client_app:app"', "")}, 'Property "clientapp" missing'),
        ({"pyproject": PYPROJECT.replace("server_app:app", "server_app")}, "cannot be loaded.*Missing attribute"),
        ({"pyproject": PYPROJECT.replace("server_app:app", "other:app")}, "cannot be loaded. There is no module other"),
        ({"pyproject": PYPROJECT.replace("client_app:app", "client_app:application")},
         "clientapp .* cannot be loaded.*application"),
        ({"pyproject": PYPROJECT.replace("server_app:app", "client_app:app")}, "is a ClientApp, not a ServerApp"),
        ({"config": "things = [1, 2]"}, "describes no Flower app.*things"),
        ({"client": "import not_installed_anywhere"}, "There is no module not_installed_anywhere: install it"),
        ({"client": "def broken(:\n    pass"}, "client_app.py.*SyntaxError"),
        ({"client": "value = {}\nvalue['missing']\n"}, "client_app.py\", line 2.*KeyError: 'missing'"),
        ({"server": "raise SystemExit('no licence')"}, "no licence"),
    ],
)
def test_apps_that_cannot_be_used_are_refused_before_anything_runs(make_app, out, change, message):
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
