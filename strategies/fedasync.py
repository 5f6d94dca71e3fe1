"""FedAsync: every upload moves the global model at once, by less the staler it is.

Source: Xie, Koyejo, Gupta, 2019, "Asynchronous Federated Optimization", arXiv:1903.03934, Algorithm 1 (server).
`mixing: delta` adds the client's update instead of mixing in its model, which does not pull the global model back
towards an old version; `mixing: delta` with `weights: corrected` is the asynchronous FedAvg of Fraboni, Vidal, Kameni,
Lorenzi, 2023, "A General Theory for Federated Optimization with Asynchronous and Heterogeneous Clients Updates",
arXiv:2206.10189.
"""
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from fedcore.errors import InvalidSetting
from fedcore.events import EventStrategy
from fedcore.hub import Hub
from fedcore.strategies.buffers import blend_buffers
from fedcore.strategies.settings import check_choice, check_count, check_number
from fedcore.strategies.staleness import Staleness
from fedcore.tasks import Node, Reply

# A task that took no measurable time still has a rate; without this bound it would be infinite.
SHORTEST_TASK_S = 1e-9


def mix_model(params: Tensor, trained: Tensor, weight: float) -> Tensor:
    """Return (1 - a_u) w + a_u x: the model moved towards a client's trained one.

    Args:
        params: global parameters w, shape (d,).
        trained: the client's parameters x, shape (d,).
        weight: a_u = alpha s(u), in [0, 1].
    """
    return ((1.0 - weight) * params).add_(trained, alpha=weight)    # in place: one model in memory beside w and x


def add_update(params: Tensor, update: Tensor, weight: float) -> Tensor:
    """Return w + a_u D: the model moved by a client's update (trained minus received), both of shape (d,)."""
    return params.add(update, alpha=weight)


def running_mean(mean: float, count: int, value: float) -> float:
    """Return the mean of `count` values and one more."""
    return mean + (value - mean) / (count + 1)


def corrected_weight(task_time_s: float, task_times_s: Sequence[float]) -> float:
    """Return p_i tau_i sum_j 1/tau_j with p_i = 1/M: as much more per update as the client's updates are rarer.

    Args:
        task_time_s: tau_i, mean time of this client's tasks, seconds.
        task_times_s: tau_j of all clients, this one's among them.
    """
    rates = [1.0 / max(time_s, SHORTEST_TASK_S) for time_s in task_times_s]
    return max(task_time_s, SHORTEST_TASK_S) * sum(rates) / len(rates)


class FedAsync(EventStrategy):
    """Asynchronous federated optimization: no barrier, one new version per upload.

    Args:
        server_lr: mixing weight alpha, in (0, 1].
        staleness: s(u), a name or `{name, a, b}` (see `fedcore.strategies.staleness`).
        mixing: `model` mixes in the client's trained model, as published; `delta` adds its update.
        weights: `identical`, or `corrected` (`delta` only): each update times tau_i mean(1/tau), so that slow clients
            keep their share of the objective. Single weights then exceed 1, which is what makes it unstable.
        max_staleness: drop updates older than this many versions (the client gets new work all the same).
        proximal_mu: weight of the proximal term (mu/2)||x - received||^2 in the local objective.
    """

    def __init__(
        self,
        server_lr: float = 0.6,
        staleness: str | Mapping[str, Any] = "polynomial",
        mixing: Literal["model", "delta"] = "model",
        weights: Literal["identical", "corrected"] = "identical",
        max_staleness: int | None = None,
        proximal_mu: float = 0.0,
    ):
        check_number("server_lr", server_lr, above=0, at_most=1,
                     advice="It is a mixing weight: above 1 the server would extrapolate. 0.6 is a usual value.")
        check_choice("mixing", mixing, ("model", "delta"), "The published rule is model.")
        check_choice("weights", weights, ("identical", "corrected"))
        if weights == "corrected" and mixing == "model":
            raise InvalidSetting("weights", weights, "identical when mixing is model",
                                 "Corrected weights exceed 1; set mixing: delta.")
        if max_staleness is not None:
            check_count("max_staleness", max_staleness, at_least=0, advice="It counts server versions; null keeps all.")
        check_number("proximal_mu", proximal_mu, at_least=0, advice="0 trains without a proximal term.")
        self.server_lr, self.mixing, self.weights = float(server_lr), mixing, weights
        self.staleness, self.max_staleness = Staleness.of(staleness), max_staleness
        self.request: dict[str, Any] = {"reply": "model"} if mixing == "model" else {}
        if proximal_mu > 0:
            self.request["proximal-mu"] = float(proximal_mu)
        self.task_times: dict[int, tuple[float, int]] = {}    # partition -> (tau_i, measurements)
        self.applied = self.dropped = 0

    def hand_out(self, hub: Hub, node: Node) -> None:
        hub.train(node, config=self.request)

    def on_reply(self, hub: Hub, reply: Reply) -> None:
        if self.weights == "corrected":
            self._measure(reply)
        if self.max_staleness is not None and reply.staleness > self.max_staleness:
            self.dropped += 1
            hub.log(too_stale=reply.node.partition, staleness=reply.staleness)
        else:
            self._apply(hub, reply)
        self.hand_out(hub, reply.node)

    def _apply(self, hub: Hub, reply: Reply) -> None:
        weight = self.server_lr * self.staleness(reply.staleness) * self._correction(hub, reply)
        if self.mixing == "model":
            params = mix_model(hub.model.params, reply.model, weight)
        else:
            params = add_update(hub.model.params, reply.update, weight)
        self.applied += 1
        hub.publish(params, [reply], blend_buffers(hub.model.buffers, [reply.buffers], [weight]), [weight])

    def _measure(self, reply: Reply) -> None:
        mean, count = self.task_times.get(reply.node.partition, (0.0, 0))
        self.task_times[reply.node.partition] = running_mean(mean, count, reply.elapsed_s), count + 1

    def _correction(self, hub: Hub, reply: Reply) -> float:
        if self.weights == "identical":
            return 1.0
        # Clients that have not been heard from count as the mean of those that have.
        known = [self.task_times[node.partition][0] for node in hub.nodes if node.partition in self.task_times]
        own = self.task_times[reply.node.partition][0]
        return corrected_weight(own, known or [own])

    def on_stop(self, hub: Hub) -> None:
        hub.log(applied=self.applied, dropped=self.dropped)

    def state_dict(self) -> dict[str, Any]:
        times = {partition: list(entry) for partition, entry in self.task_times.items()}
        return {"task_times": times, "applied": self.applied, "dropped": self.dropped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.task_times = {partition: (mean, count) for partition, (mean, count) in state["task_times"].items()}
        self.applied, self.dropped = state["applied"], state["dropped"]
