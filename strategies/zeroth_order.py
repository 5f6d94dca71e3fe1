"""Federated descent along finite differences: what FZooS is measured against.

Every client descends from x_r along its own estimates of the gradient, x_i,t+1 = x_i,t - step(g_i(x_i,t) + corr), and
the server takes the mean of where they end. The methods differ in `corr`:

    fedzo           0
    fedprox_zo      lambda (x_i,t - x_r)
    scaffold_zo_1   c - c_i,  c_i = g_i(x_r), measured at the round's start in an exchange of its own
    scaffold_zo_2   c - c_i,  c_i = the mean of the previous round's uncorrected estimates

Queries of a client in a round: 1 + T (Q + 1); scaffold_zo_1: Q + 1 more.

Source: Fang et al., 2022, arXiv:2201.09531 (FedZO); Li et al., 2020, arXiv:1812.06127 (the proximal term); Karimireddy
et al., 2020, arXiv:1910.06378, options I and II (the control variates); all of them without gradients as in Shu et al.,
2023, arXiv:2308.04077.
"""
from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from fedcore.errors import MalformedReply
from fedcore.hub import Hub
from fedcore.payload import check_finite, read_arrays, single_record
from fedcore.strategies.black_box import PROBE, Arrival, BlackBoxRounds, Figures, mean, message_type
from fedcore.strategies.finite_differences import Differences
from fedcore.strategies.settings import check_number
from fedcore.tasks import Node

# The server holds no c_i of this client.
NEVER = -1


class ZerothOrder(BlackBoxRounds):
    """What the methods have in common.

    Args:
        settings: of the clients.
        server_lr: eta_g, above 0.
    """

    def __init__(self, settings: Differences, server_lr: float):
        super().__init__(server_lr)
        self.settings = settings
        self.controls: dict[int, Tensor] = {}           # c_i, by partition; those of absent clients too
        self.control_weights: dict[int, int] = {}
        self.control_rounds: dict[int, int] = {}        # in which round each was measured

    def check_dimension(self, dimension: int) -> None:
        """Raise `InvalidSetting` where the settings do not suit a task of this dimension."""
        self.settings.check_dimension(dimension)

    def round(self, hub: Hub, round_index: int) -> None:
        self.check_dimension(hub.model.layout.num_params)
        control, count = self.settings.control, hub.model.layout.num_params
        if control == "probe":
            self._probe(hub, round_index)
        mean_control = mean(self.controls, self.control_weights) if self.controls else None
        arrivals = self.search(
            hub, lambda node: self._request(hub, node, round_index, mean_control),
            count if control == "previous" else None)
        if not arrivals:
            self.note_failed_round(hub, round_index)
            return
        if control == "previous":
            for arrival in arrivals:
                assert arrival.extra is not None
                self._keep(arrival.reply.node.partition, arrival.extra, arrival.reply.num_examples, round_index)
        self.publish(hub, round_index, self.stepped(hub, arrivals), arrivals, start_value=self._start_value(arrivals))

    def _request(self, hub: Hub, node: Node, round_index: int, mean_control: Tensor | None) -> RecordDict:
        return self.request(hub, round_index, self.settings, mean_control,
                            control_round=self.control_rounds.get(node.partition, NEVER))

    def _probe(self, hub: Hub, round_index: int) -> None:
        """Learn every client's estimate at the present point."""
        content = self.request(hub, round_index, self.settings)
        for answer in hub.ask(hub.nodes, message_type(PROBE), lambda node: content).arrived:
            try:
                figures = Figures.of(answer.content)
                control = self._read_control(answer.content, hub)
            except MalformedReply as error:
                self.refuse(hub, answer, error)
                continue
            self.count(answer.node.partition, figures)
            assert answer.task is not None
            answer.task.local_steps = figures.queries    # for the timeline
            weight = int(figures.all["num-examples"])
            self._keep(answer.node.partition, control, weight, round_index)

    @staticmethod
    def _read_control(content: RecordDict, hub: Hub) -> Tensor:
        values, buffers = read_arrays(single_record(content, ArrayRecord, "arrays"), hub.model.layout)
        check_finite(values, buffers)
        return values

    def _keep(self, partition: int, control: Tensor, weight: int, round_index: int) -> None:
        self.controls[partition], self.control_weights[partition] = control, weight
        self.control_rounds[partition] = round_index

    @staticmethod
    def _start_value(arrivals: list[Arrival]) -> float | None:
        """Return F at the point that the round began with, over the clients that know it."""
        known = [(arrival.reply.num_examples, arrival.figures.value) for arrival in arrivals
                 if arrival.figures.value is not None]
        return sum(weight * value for weight, value in known) / sum(weight for weight, _ in known) if known else None

    # ---- what survives a restart ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "controls": dict(self.controls), "control_weights": dict(self.control_weights),
                "control_rounds": dict(self.control_rounds)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.controls, self.control_weights = dict(state["controls"]), dict(state["control_weights"])
        self.control_rounds = dict(state["control_rounds"])


class FedZo(ZerothOrder):
    """Descent on black boxes along finite differences, averaged every round.

    Args:
        local_iterations: T, at least 1.
        local_lr: step size in the unit cube, above 0.
        local_optimizer: `adam` or `sgd`, fresh in every round.
        server_lr: eta_g, above 0; 1 is the plain mean.
        directions: Q, at least 1; orthonormal ones at most d.
        difference: h, in the unit cube, above 0.
        kind: of directions: `orthonormal`, `gaussian` or `sphere`.
        project: keep points inside the box; otherwise only what is evaluated is clipped.
    """

    def __init__(
        self, local_iterations: int = 10, local_lr: float = 0.01, local_optimizer: str = "adam", server_lr: float = 1.0,
        directions: int = 20, difference: float = 0.01, kind: str = "orthonormal", project: bool = False,
    ):
        super().__init__(Differences(local_iterations, local_lr, local_optimizer, directions, difference, kind, 0.0,
                                     "none", project), server_lr)


class FedProxZo(ZerothOrder):
    """FedZO with clients that are pulled back towards the point they were given.

    Args:
        proximal: lambda, at least 0; 0 is FedZO. The estimates are of the gradient's own size, so tune it as there.
        local_iterations, local_lr, local_optimizer, server_lr, directions, difference, kind, project: as for FedZO.
    """

    def __init__(
        self, proximal: float = 0.01, local_iterations: int = 10, local_lr: float = 0.01,
        local_optimizer: str = "adam", server_lr: float = 1.0, directions: int = 20, difference: float = 0.01,
        kind: str = "orthonormal", project: bool = False,
    ):
        check_number("proximal", proximal, at_least=0)
        super().__init__(Differences(local_iterations, local_lr, local_optimizer, directions, difference, kind,
                                     float(proximal), "none", project), server_lr)


class ScaffoldZo1(ZerothOrder):
    """FedZO corrected by control variates that are measured at every round's start.

    Args:
        local_iterations, local_lr, local_optimizer, server_lr, directions, difference, kind, project: as for FedZO.
    """

    control_kind = "probe"    # where the control variates come from

    def __init__(
        self, local_iterations: int = 10, local_lr: float = 0.01, local_optimizer: str = "adam", server_lr: float = 1.0,
        directions: int = 20, difference: float = 0.01, kind: str = "orthonormal", project: bool = False,
    ):
        super().__init__(Differences(local_iterations, local_lr, local_optimizer, directions, difference, kind, 0.0,
                                     self.control_kind, project), server_lr)


class ScaffoldZo2(ScaffoldZo1):
    """FedZO corrected by control variates that are the means of the previous round's estimates.

    Args:
        local_iterations, local_lr, local_optimizer, server_lr, directions, difference, kind, project: as for FedZO.
    """

    control_kind = "previous"
