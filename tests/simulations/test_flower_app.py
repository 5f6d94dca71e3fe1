"""Whole Flower apps, as strangers write them: what they may be, and what they leave."""
import logging
import random
import sys
import textwrap

import numpy as np
import pytest
import torch

from fedcore.errors import NothingCanHappen
from fedcore.simulations.flower_app import simulate_app


def rows(run, event):
    return [row for row in run.metrics if row["event"] == event]


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
    client = make_app.client_of("""
        import random
        import numpy as np
        import torch

        @app.train()
        def train(message, context):
            context.state["memory"] = MetricRecord({"draws": random.random()})
            return answer(message, drawn=random.random() + np.random.rand() + float(torch.rand(())))
    """)
    server = make_app.main_of("""
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
    server = make_app.main_of("""
        assert dict(context.run_config) == {"num-server-rounds": 7, "rate": 2.0, "deep.name": "new", "seed": 4}
        [reply] = grid.send_and_receive(ask(grid, "query"))
        assert reply.content["metrics"]["rate"] == 2.0
    """)
    client = make_app.train_of("return answer(message, rate=context.run_config['rate'])", "@app.query()")
    config = 'num-server-rounds = 3\nrate = 1.5\ndeep.name = "old"\nseed = 0'
    overrides = ["num-server-rounds=7", "rate=2", "deep.name=new", "run-config.seed=4", "seed=9"]
    run = simulate_app(make_app(server, client, config), num_nodes=1, out=out, overrides=overrides)
    assert run.summary["seed"] == 9


def test_number_of_nodes_comes_from_the_nearest_source(make_app, tmp_path):
    pyproject = make_app.pyproject + textwrap.dedent("""
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
    one = make_app(make_app.main_of("grid.send_and_receive(ask(grid))"),
                   make_app.train_of("return answer(message, one=1)"), name="one")
    two = make_app(make_app.main_of("""
        assert "two" in grid.send_and_receive(ask(grid))[0].content["metrics"]
    """), make_app.train_of("return answer(message, two=2)"), name="two")
    for folder in (one, two, one):
        simulate_app(folder, num_nodes=1, out=tmp_path / f"run{random.random()}")
    assert sys.path == path
    assert not {"server_app", "client_app"} & sys.modules.keys()


def test_an_apps_own_evaluation_on_the_server_is_what_counts(make_app, out):
    server = make_app.server.replace("FedAvg().start(grid, arrays,", """
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
    server = make_app.server.replace("FedAvg()", strategy).replace("import FedAvg", f"import FedAvg, {name}").replace(
        "np.zeros(3)", "np.full(3, -1.0)")
    run = simulate_app(make_app(server), num_nodes=5, out=out)
    assert run.summary["strategy"] == name
    assert (run.summary["versions"], run.summary["failures"], run.summary["stop_reason"]) == (3, 0, "finished")
    losses = [row["loss"] for row in rows(run, "evaluate")]
    assert len(losses) == 3
    if name not in ("QFedAvg", "Krum", "DifferentialPrivacyServerSideFixedClipping"):
        assert losses[-1] < np.mean([(k + 1) ** 2 for k in range(5)])


def test_a_fedcore_strategy_works_in_a_strangers_app_with_one_import(make_app, out):
    server = make_app.server.replace("from flwr.serverapp.strategy import FedAvg",
                            "from fedcore.strategies.fedasync import FedAsync").replace("FedAvg()", "FedAsync()")
    client = make_app.client + """
    @app.query()
    def query(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 10, "partition-id": int(context.node_config["partition-id"])})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)
    """
    run = simulate_app(make_app(server, client), num_nodes=4, out=out)
    assert run.summary["strategy"] == "FedAsync"
    assert run.summary["client_updates"] >= 12


def test_actions_and_state_belong_to_each_node(make_app, out):
    client = make_app.client_of("""
        @app.train("custom")
        def custom(message, context):
            count = int(context.state["memory"]["count"]) + 1 if "memory" in context.state else 1
            context.state["memory"] = MetricRecord({"count": count})
            return answer(message, count=count, partition=context.node_config["partition-id"],
                          of=context.node_config["num-partitions"])
    """)
    server = make_app.main_of("""
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
    client = make_app.client.replace("app = ClientApp()", """
    from flwr.clientapp.mod import fixedclipping_mod, message_size_mod

    def doubling(message, context, call_next):
        reply = call_next(message, context)
        if "train_loss" in reply.content.get("metrics", {}):
            reply.content["metrics"]["doubled"] = 2 * reply.content["metrics"]["train_loss"]
        return reply

    app = ClientApp(mods=[doubling, message_size_mod])
    """).replace("@app.train()", "@app.train(mods=[fixedclipping_mod])")
    strategy = ("DifferentialPrivacyClientSideFixedClipping(FedAvg(), noise_multiplier=0.01, clipping_norm=0.5, "
                "num_sampled_clients=4)")
    server = make_app.server.replace("FedAvg()", strategy).replace(
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
