"""Clients for the benchmark, many in one process: they move bytes and compute nothing.

    python -m linkbench.clients ADDRESS COUNT [TLS-FOLDER]
"""
import asyncio
import logging
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedcore.payload import VectorRecord, read_arrays
from fedcore.tls import Credentials, load_credentials
from fedcore.transport.agent import ClientAgent
from fedcore.transport.loop import submit
from fedcore.vectors import Layout, TensorSpec
from linkbench import raw

TENSORS = 8


def layout_of(num_params: int) -> Layout:
    """Return the layout of a model of eight tensors of equal size."""
    shares = [num_params * (index + 1) // TENSORS - num_params * index // TENSORS for index in range(TENSORS)]
    params = tuple(TensorSpec(f"layer-{index}", (share,), "float32") for index, share in enumerate(shares))
    return Layout(params, (), tuple(spec.name for spec in params))


@cache
def reply_of(num_params: int) -> VectorRecord:
    """Return what a client answers with; made once."""
    return vector(num_params)


def vector(num_params: int, value: float = 1e-3) -> VectorRecord:
    """Return a model as a record."""
    return VectorRecord.of(torch.full((num_params,), value), {}, layout_of(num_params))


def make_app(credentials: Credentials | None) -> ClientApp:
    """Return an app that answers at once."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Answer like a training client: with an update, or a model."""
        arrays, config = message.content["arrays"], message.content["config"]
        size = sum(int(np.prod(array.shape)) for array in arrays.values())
        metrics = MetricRecord({"num-examples": 10, "work-steps": int(config.get("local-steps", 1)), "loss": 1.0})
        content = RecordDict({"arrays": reply_of(size), "metrics": metrics})
        if "task-id" in config:    # Flower's own strategies have none
            content["reply"] = ConfigRecord({"kind": config.get("reply", "model"), "task-id": config["task-id"],
                                             "version": config["version"]})
        return Message(content, reply_to=message)

    @app.train("noop")
    def noop(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    @app.train("down")
    def down(message: Message, context: Context) -> Message:
        """Take a model."""
        read_arrays(message.content["arrays"], message.content["arrays"].model.layout)
        return Message(RecordDict(), reply_to=message)

    @app.train("up")
    def up(message: Message, context: Context) -> Message:
        """Give a model."""
        size = int(message.content["config"]["size"])
        return Message(RecordDict({"arrays": reply_of(size)}), reply_to=message)

    @app.train("raw")
    def bare(message: Message, context: Context) -> Message:
        config = message.content["config"]
        seconds = raw.transfer(config["address"], credentials, config["chunks"], config["up"])
        return Message(RecordDict({"metrics": MetricRecord({"seconds": seconds})}), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        partition = context.node_config["partition-id"]
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 10, "partition-id": partition}),
                                   "info": ConfigRecord({"kinds": "update,model"})}), reply_to=message)

    return app


def main() -> None:
    """Run clients until the server says that the run is over."""
    logging.getLogger("fedcore").setLevel(logging.ERROR)
    address, count = sys.argv[1], int(sys.argv[2])
    folder = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    held = [None if folder is None else load_credentials(folder / f"node-{index}", "node") for index in range(count)]
    agents = [ClientAgent(make_app(credentials), address, f"node-{index}", node_config={"partition-id": index},
                          credentials=credentials) for index, credentials in enumerate(held)]

    async def run_all() -> None:
        await asyncio.gather(*[agent.serve() for agent in agents])

    submit(run_all()).result()


if __name__ == "__main__":
    main()
