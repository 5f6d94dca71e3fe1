"""Federated averaging of 10 out of 100 clients a round, done in several ways.

Each function trains `rounds` rounds of a model and calls `stamp` when the first work is about to be handed out and
again after each round.
"""
import logging
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn
from torch.nn import functional

from simbench.workload import BATCH, CLIENTS, LOCAL_STEPS, LR, PER_ROUND, Shard, batches, build_net, shard

Stamp = Callable[[], None]
Contender = Callable[[str, int, Stamp], None]


# ---- no framework at all --------------------------------------------------------------------------------------------


def tuned_loop(size: str, rounds: int, stamp: Stamp) -> None:
    """A loop written for speed: no optimizer object, no `.grad`, one fused update per step."""
    _loop(size, rounds, stamp, _train_tuned)


def plain_loop(size: str, rounds: int, stamp: Stamp) -> None:
    """The loop of every tutorial: `zero_grad`, `backward`, `torch.optim.SGD`."""
    _loop(size, rounds, stamp, train_plain)


def _loop(size: str, rounds: int, stamp: Stamp, train: Callable[[nn.Module, Shard, torch.Generator], float]) -> None:
    torch.manual_seed(0)
    net, generator = build_net(size), torch.Generator().manual_seed(0)
    model = {name: values.clone() for name, values in net.state_dict().items()}
    stamp()
    for _ in range(rounds):
        trained, examples = [], []
        for client in random.sample(range(CLIENTS), PER_ROUND):
            net.load_state_dict(model)
            data = shard(client)
            train(net, data, generator)
            trained.append({name: values.clone() for name, values in net.state_dict().items()})
            examples.append(len(data))
        model = _average(trained, examples)
        stamp()


def _average(trained: list[dict[str, Tensor]], examples: list[int]) -> dict[str, Tensor]:
    mean = {name: torch.zeros_like(values) for name, values in trained[0].items()}
    for state, count in zip(trained, examples, strict=True):
        for name, values in state.items():
            mean[name].add_(values, alpha=count / sum(examples))
    return mean


def _train_tuned(net: nn.Module, data: Shard, generator: torch.Generator) -> float:
    parameters = list(net.parameters())
    values, order = [parameter.detach() for parameter in parameters], batches(len(data), generator)
    total = torch.zeros(())
    for _ in range(LOCAL_STEPS):
        inputs, targets = data.batch(next(order))
        loss = functional.cross_entropy(net(inputs), targets)
        torch._foreach_add_(values, torch.autograd.grad(loss, parameters), alpha=-LR)
        total += loss.detach()
    return total.item() / LOCAL_STEPS


def train_plain(net: nn.Module, data: Shard, generator: torch.Generator) -> float:
    """Train a model in place, and return its mean loss."""
    optimizer, order = torch.optim.SGD(net.parameters(), lr=LR), batches(len(data), generator)
    total = 0.0
    for _ in range(LOCAL_STEPS):
        inputs, targets = data.batch(next(order))
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(inputs), targets)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / LOCAL_STEPS


# ---- fedcore's client and driver ------------------------------------------------------------------------------------


def own_fedavg(size: str, rounds: int, stamp: Stamp) -> None:
    """`fedcore.simulate` with fedcore's client, and Flower's FedAvg under fedcore's driver."""
    _simulate(size, stamp, {"name": "fedavg", "fraction_train": PER_ROUND / CLIENTS}, {"rounds": rounds})


def own_fedbuff(size: str, rounds: int, stamp: Stamp) -> None:
    """`fedcore.simulate` with fedcore's client and an event strategy: 10 clients train at a time, 10 make a version."""
    strategy = {"name": "fedbuff", "buffer_size": PER_ROUND, "concurrency": PER_ROUND}
    _simulate(size, stamp, strategy, {"client_updates": rounds * PER_ROUND})


def _simulate(size: str, stamp: Stamp, strategy: dict[str, Any], stop: dict[str, int]) -> None:
    import fedcore

    experiment = {
        "task": {"name": "simbench.workload:BenchTask", "size": size}, "strategy": strategy, "stop": stop,
        "clients": {"count": CLIENTS}, "evaluate": {"where": "none"},
        "train": {"lr": LR, "batch_size": BATCH, "local_steps": LOCAL_STEPS, "device": "cpu"},
    }

    def on_row(row: dict[str, Any]) -> None:
        if row["event"] in ("start", "update"):
            stamp()

    with tempfile.TemporaryDirectory() as folder:
        fedcore.simulate(experiment, out=Path(folder) / "run", on_row=on_row)


# ---- a plain Flower app ---------------------------------------------------------------------------------------------


def flower_client(size: str) -> ClientApp:
    """Return a client as Flower's documentation writes one."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        net = build_net(size)
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        data = shard(int(context.node_config["partition-id"]))
        loss = train_plain(net, data, torch.Generator().manual_seed(0))
        metrics = MetricRecord({"train_loss": loss, "num-examples": len(data)})
        content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


def _flower_server(size: str, grid: Any, rounds: int, stamp: Stamp) -> None:
    logging.getLogger("flwr").setLevel(logging.ERROR)

    def after_round(server_round: int, arrays: ArrayRecord) -> None:
        stamp()

    strategy = FedAvg(fraction_train=PER_ROUND / CLIENTS, fraction_evaluate=0.0)
    strategy.start(
        grid, ArrayRecord(build_net(size).state_dict()), num_rounds=rounds, train_config=ConfigRecord({"lr": LR}),
        evaluate_fn=after_round,
    )


def flower_virtual(size: str, rounds: int, stamp: Stamp) -> None:
    """A plain Flower client and Flower's FedAvg, by its own `start`, on fedcore's VirtualGrid."""
    from fedcore.simulations.grid import VirtualGrid

    _flower_server(size, VirtualGrid(flower_client(size), CLIENTS), rounds, stamp)


def flower_ray(size: str, rounds: int, stamp: Stamp) -> None:
    """The same client and strategy in Flower's own simulation, which runs on Ray."""
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()
    def main(grid: Any, context: Context) -> None:
        _flower_server(size, grid, rounds, stamp)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, flower_client(size), CLIENTS, backend_config=resources)


CONTENDERS: dict[str, Contender] = {
    function.__name__: function
    for function in (tuned_loop, plain_loop, own_fedavg, own_fedbuff, flower_virtual, flower_ray)
}
