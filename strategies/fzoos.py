"""FZooS: federated descent on functions that can only be evaluated, along gradients that cost no queries of their own.

Every client keeps a Gaussian process on the queries it has made and descends along its gradient, corrected towards the
global one at every point by surrogates that are small enough to be exchanged. A round r is

    1. server -> client   x_r, and the mean weights w of the round before
       client             x_i,t+1 = x_i,t - step(g_i(x_i,t) + gamma_t (h(w, x_i,t) - h(w_i, x_i,t))), t = 0 .. T-1,
                          one query of each x_i,t+1 and some where the process is least sure
       client -> server   x_i,T
    2. server             x_{r+1} = x_r - eta_g (x_r - sum_i p_i x_i,T)
       server -> client   x_{r+1}
       client             queries of x_{r+1} and around it; w_i
       client -> server   w_i;  the server keeps w = sum_i p_i w_i

Source: Shu, Lin, Dai and Low, 2023, "Federated Zeroth-Order Optimization using Trajectory-Informed Surrogate
Gradients", arXiv:2308.04077, algorithms 1 and 2. The clients' side is `fedcore.strategies.surrogates`.

One kernel with one lengthscale serves gradients, uncertainties and features, as in the paper, and the weights are a
regularised fit. The point is sent twice (x_{r+1} ends one round and begins the next), so that a client that lost a
message still knows where to start.
"""
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from flwr.app import RecordDict
from torch import Tensor

from fedcore.errors import InvalidSetting, MalformedReply
from fedcore.hub import Hub
from fedcore.strategies.black_box import SURROGATE, Arrival, BlackBoxRounds, Figures, mean, message_type, read_extra
from fedcore.strategies.settings import check_choice, check_count, check_number
from fedcore.strategies.surrogates import Search

# Of the unit cube's sqrt(d): the lengthscale until clients agree on one, and where nothing else is said.
SCALE = 1 / 6
AGREED = ("median", "likelihood")
RULES = ("dimension", *AGREED)
ACCEPT = ("always", "improve")
# No round has left weights yet.
NEVER = -1


def decaying(t: int) -> float:
    """Return gamma_t = 1 / (t + 1)."""
    return 1 / (t + 1)


def correction_lengths(correction: Any, local_iterations: int) -> list[float]:
    """Return gamma_t for t = 0 .. T-1.

    Args:
        correction: `decay`, one number for all, or a function of t.

    Raises:
        InvalidSetting: one of them lies outside [0, 1].
    """
    if correction == "decay":
        correction = decaying
    lengths = [correction(t) if callable(correction) else correction for t in range(local_iterations)]
    for t, length in enumerate(lengths):
        name = f"correction(t={t})" if callable(correction) else "correction"
        check_number(name, length, at_least=0, at_most=1, advice="Or give decay: 1 / (t + 1).")
    return [float(length) for length in lengths]


class FZooS(BlackBoxRounds):
    """Descent on black boxes along Gaussian-process gradients, corrected towards the global one.

    Args:
        local_iterations: T, at least 1.
        local_lr: step size in the unit cube, above 0.
        local_optimizer: `adam` or `sgd`, fresh in every round.
        server_lr: eta_g, above 0; 1 is the plain mean.
        features: M, length of the weights that are exchanged; the kernel's error is about 1 / sqrt(M).
        lengthscale: l in the unit cube; or `dimension`, which is sqrt(d) / 6; or what the clients agree on after the
            first round: `likelihood` or `median`, the weighted median of what fits each best.
        noise: s2, variance on values of unit span, at least 0.
        nearest: how many queries the gradient uses, at least 2.
        feature_queries: how many the weights use, at least 2.
        initial_queries: of each client, beside the start itself; at least 2.
        initial_radius: half the side of the box they are drawn from, in the unit cube.
        active_queries, active_candidates, active_radius: after a local iteration, the queries made where the process is
            least sure, among so many random points in a box around.
        end_queries, end_candidates: the same around the server's new point.
        correction: gamma_t: `decay`, 1 / (t + 1); a number in [0, 1]; 0: none. In Python also a function of t.
        accept: `always`, or `improve`: keep x_r unless the clients' values at x_{r+1} are better.
        exchanges: 2; or 1, where the correction uses weights that are a round old.
        project: keep points and candidates inside the box; otherwise only what is evaluated is clipped.
        memory: queries that a client keeps, the newest.
    """

    def __init__(
        self, local_iterations: int = 10, local_lr: float = 0.01, local_optimizer: str = "adam", server_lr: float = 1.0,
        features: int = 10_000, lengthscale: float | Literal["dimension", "likelihood", "median"] = "dimension",
        noise: float = 1e-6, nearest: int = 150, feature_queries: int = 500, initial_queries: int = 10,
        initial_radius: float = 0.01, active_queries: int = 5, active_candidates: int = 100,
        active_radius: float = 0.01, end_queries: int = 50, end_candidates: int = 200,
        correction: float | str | Callable[[int], float] = "decay", accept: str = "always", exchanges: int = 2,
        project: bool = False, memory: int = 2000,
    ):
        super().__init__(server_lr)
        self.settings = Search(
            local_iterations, local_lr, local_optimizer, features, noise, nearest, feature_queries, initial_queries,
            initial_radius, active_queries, active_candidates, active_radius, end_queries, end_candidates, memory,
            project)
        if isinstance(lengthscale, str):
            check_choice("lengthscale", lengthscale, RULES, "Or a number above 0.")
        else:
            check_number("lengthscale", lengthscale, above=0)
        if isinstance(correction, str):
            check_choice("correction", correction, ("decay",), "Or a number from 0 to 1.")
        check_choice("accept", accept, ACCEPT)
        check_count("exchanges", exchanges, 1, 2)
        if accept == "improve" and exchanges == 1:
            raise InvalidSetting("accept", accept, "always when exchanges is 1",
                                 "The second exchange is what brings the values at the new point.")
        self.correction_lengths = correction_lengths(correction, local_iterations)
        self.lengthscale_rule, self.accept, self.exchanges = lengthscale, accept, exchanges
        self.lengthscale: float | None = None if isinstance(lengthscale, str) else float(lengthscale)
        self.weights: Tensor | None = None      # w
        self.weights_round = NEVER              # of which round
        self.values: dict[int, float] = {}      # f_i at the present point, by partition

    @property
    def corrects(self) -> bool:
        """Whether weights are exchanged at all."""
        return any(self.correction_lengths)

    # ---- a round ----------------------------------------------------------------------------------------------------

    def round(self, hub: Hub, round_index: int) -> None:
        lengthscale = self._present_lengthscale(hub)
        if self.corrects and self.settings.features < 2 * self.settings.feature_queries and "few" not in self.told:
            self.told.add("few")
            hub.warn(f"features={self.settings.features} is less than twice feature_queries="
                     f"{self.settings.feature_queries}: the surrogates will be rough.")
        both = self.exchanges == 1
        content = self._request(hub, round_index, lengthscale, surrogate=both)
        arrivals = self.search(hub, lambda node: content, self.settings.features if both and self.corrects else None)
        if not arrivals:
            self.note_failed_round(hub, round_index)
            return
        params = self.stepped(hub, arrivals)
        self._agree(arrivals)
        if both:
            self.values = {arrival.reply.node.partition: arrival.figures.value for arrival in arrivals
                           if arrival.figures.value is not None}
            # Weights of a lengthscale that has just been given up mean nothing to the next round.
            if self.corrects and self._present_lengthscale(hub) == lengthscale:
                self._keep_weights({arrival.reply.node.partition: arrival.extra for arrival in arrivals
                                    if arrival.extra is not None}, arrivals, round_index)
            figures: dict[str, Any] = {"start_value": self._mean_value(self.values, arrivals)}
        else:
            params, figures = self._second_exchange(hub, round_index, params, arrivals)
        self.publish(hub, round_index, params, arrivals, lengthscale=lengthscale, **figures)

    def _request(
        self, hub: Hub, round_index: int, lengthscale: float, params: Tensor | None = None, surrogate: bool = False
    ) -> RecordDict:
        proposes = self.lengthscale is None and self.lengthscale_rule in AGREED
        return self.request(
            hub, round_index, self.settings, None if params is not None else self.weights, params,
            lengthscale=lengthscale, proposal=str(self.lengthscale_rule) if proposes else "",
            corrections=self.correction_lengths, weights_round=self.weights_round,
            surrogate=surrogate, weights=self.corrects)

    def _second_exchange(
        self, hub: Hub, round_index: int, params: Tensor, arrivals: list[Arrival]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Learn the surrogates around the new point, and what it is worth; returns the point that is kept."""
        content = self._request(hub, round_index, self._present_lengthscale(hub), params, surrogate=True)
        nodes = [arrival.reply.node for arrival in arrivals]
        weights: dict[int, Tensor] = {}
        values: dict[int, float] = {}
        for answer in hub.ask(nodes, message_type(SURROGATE), lambda node: content).arrived:
            partition = answer.node.partition
            try:
                figures = Figures.of(answer.content)
                if self.corrects:
                    weights[partition] = read_extra(answer.content, self.settings.features, hub.model.layout)
            except MalformedReply as error:
                self.refuse(hub, answer, error)
                continue
            self.count(partition, figures)
            assert answer.task is not None
            answer.task.local_steps = figures.queries    # for the timeline
            if figures.value is not None:
                values[partition] = figures.value
            if figures.spent:
                hub.stop("queries")
        if weights:
            self._keep_weights(weights, arrivals, round_index)
        figures_row: dict[str, Any] = {"value": self._mean_value(values, arrivals), "surrogates": len(weights)}
        if self.accept == "improve":
            if not self.values:
                self.values = {arrival.reply.node.partition: arrival.figures.value for arrival in arrivals
                               if arrival.figures.value is not None}
            accepted = self._improves(values, arrivals)
            figures_row["accepted"] = int(accepted)
            if not accepted:
                return hub.model.params, figures_row
        self.values = values
        return params, figures_row

    def _improves(self, values: Mapping[int, float], arrivals: list[Arrival]) -> bool:
        """Say whether F fell, as far as clients know it at both points."""
        common = self.values.keys() & values.keys()
        before, after = (self._mean_value({partition: known[partition] for partition in common}, arrivals)
                         for known in (self.values, values))
        return before is None or after is None or after < before

    def _keep_weights(self, weights: Mapping[int, Tensor], arrivals: list[Arrival], round_index: int) -> None:
        self.weights = mean(weights, {arrival.reply.node.partition: arrival.reply.num_examples for arrival in arrivals})
        self.weights_round = round_index

    @staticmethod
    def _mean_value(values: Mapping[int, float], arrivals: list[Arrival]) -> float | None:
        shares = {arrival.reply.node.partition: arrival.reply.num_examples for arrival in arrivals}
        known = [partition for partition in sorted(values) if partition in shares]
        if not known:
            return None
        return sum(shares[partition] * values[partition] for partition in known) / sum(map(shares.__getitem__, known))

    # ---- the common lengthscale -------------------------------------------------------------------------------------

    def _present_lengthscale(self, hub: Hub) -> float:
        return self.lengthscale or SCALE * hub.model.layout.num_params**0.5

    def _agree(self, arrivals: list[Arrival]) -> None:
        """Settle on the weighted median of what the clients propose, once and for all."""
        if self.lengthscale is not None or self.lengthscale_rule not in AGREED:
            return
        proposals = sorted((float(arrival.figures.all["lengthscale"]), arrival.reply.num_examples)
                           for arrival in arrivals if arrival.figures.all.get("lengthscale", 0) > 0)
        if proposals:
            total = np.cumsum([weight for _, weight in proposals])
            self.lengthscale = proposals[int(np.searchsorted(total, total[-1] / 2))][0]

    # ---- what survives a restart ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "weights": self.weights, "weights_round": self.weights_round,
                "lengthscale": self.lengthscale, "values": dict(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.weights, self.weights_round = state["weights"], state["weights_round"]
        self.lengthscale, self.values = state["lengthscale"], dict(state["values"])
