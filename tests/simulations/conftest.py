"""Flower apps as strangers write them, for the tests that run them."""
import textwrap

import pytest

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


class AppMaker:
    """Writes an app to a folder of its own, and returns the folder."""

    pyproject, client, server = PYPROJECT, CLIENT, SERVER

    def __init__(self, place):
        self._place = place

    def __call__(self, server=SERVER, client=CLIENT, config=CONFIG, name="some-app", pyproject=PYPROJECT):
        folder = self._place / name
        folder.mkdir()
        (folder / "pyproject.toml").write_text(pyproject.format(name=name, config=config))
        for file, parts in (("server_app.py", server), ("client_app.py", client)):
            text = "".join(textwrap.dedent(part) for part in ([parts] if isinstance(parts, str) else parts))
            (folder / file).write_text(text)
        return folder

    @staticmethod
    def main_of(body):
        """Return a ServerApp that pushes and pulls by hand."""
        lines = textwrap.indent(textwrap.dedent(body).strip(), "    ")
        return PUSHING, f"\n@app.main()\ndef main(grid: Grid, context: Context) -> None:\n{lines}\n"

    @staticmethod
    def train_of(body, decorator="@app.train()"):
        """Return a ClientApp with one function, which may call `answer(message, name=figure)`."""
        lines = textwrap.indent(textwrap.dedent(body).strip(), "    ")
        return ECHO, f"\n{decorator}\ndef train(message: Message, context: Context) -> Message:\n{lines}\n"

    def echoing(self, body):
        """Return an app of a ServerApp with this body, and a ClientApp that answers every train message."""
        return self(self.main_of(body), self.train_of("return answer(message, x=1)"))

    @staticmethod
    def client_of(code):
        """Return a ClientApp made of this code, which may call `answer(message, name=figure)`."""
        return ECHO, code


@pytest.fixture
def make_app(tmp_path):
    return AppMaker(tmp_path)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"
