"""DADAO beside gradient tracking and ADOM+ on badly conditioned least squares; prints the tables of its page.

    python -m tests.paper.dadao_study

Peer i of n = 16 has f_i(x) = 1/(2m) |A_i (x - o_i)|^2 with m = 40 rows of normal numbers whose d = 8 columns are scaled
by logspace(0, -1.65), and an optimum o_i of its own. mu and L are the extreme eigenvalues over all peers. Everybody
starts at 0. The error is the mean of |x_i - x*|^2 over that at the start. Costs are gradients of one peer, and vectors
of length d sent. Peers are rows of a matrix; DADAO runs the equations that peers run, event by event.

Gradient tracking (ATC): X <- W (X - step Y), Y <- W Y + G(X+) - G(X), with Metropolis weights; its step is tuned.
ADOM+: Kovalev et al., 2021, arXiv:2106.04469, with the constants of its theory, as in the code of AdelNabli/DADAO; with
several consensus steps a round, as its analysis wants.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedcore.edge_rates import edge_shares, least_total_rate, required_rates
from fedcore.graphs import EdgeRates, Graph, laplacian, mixing_matrix
from fedcore.registry import build
from fedcore.seeds import numpy_generator
from fedcore.strategies.dadao_equations import (
    Constants,
    PeerState,
    advance,
    exchange_step,
    gradient_step,
    offer,
)

PEERS, DIMENSION, ROWS = 16, 8, 40
TARGET = 1e-6
# Step sizes of gradient tracking in units of 1/L; the best one is never at an end.
STEP_SIZES = [0.05, 0.07, 0.1, 0.14, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6]
DRAWN_AT_ONCE = 4096
NEWTON_STEPS = 30


@dataclass(frozen=True)
class Problem:
    """Quadratics f_i(x) = 1/2 x^T H_i x - c_i^T x.

    Attributes:
        hessians: H, shape (n, d, d).
        linear: c, shape (n, d).
    """

    hessians: Tensor
    linear: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Peers and dimension."""
        return self.linear.shape[0], self.linear.shape[1]

    @cached_property
    def optimum(self) -> Tensor:
        """x*, shape (d,)."""
        return torch.linalg.solve(self.hessians.sum(0), self.linear.sum(0))

    @cached_property
    def curvatures(self) -> tuple[float, float]:
        """mu of the worst peer, L of the worst peer."""
        values = torch.linalg.eigvalsh(self.hessians)
        return float(values.min()), float(values.max())

    def gradients(self, params: Tensor) -> Tensor:
        """Return every peer's gradient at its own row, shape (n, d)."""
        return torch.einsum("nij,nj->ni", self.hessians, params) - self.linear

    def gradient(self, peer: int, params: Tensor) -> Tensor:
        """Return one peer's gradient, shape (d,)."""
        return torch.addmv(-self.linear[peer], self.hessians[peer], params)

    def error(self, params: Tensor) -> float:
        """Return the mean squared distance to x*, over that of the origin."""
        return float((params - self.optimum).square().sum(1).mean() / self.optimum.square().sum())


@dataclass(frozen=True)
class LogisticProblem:
    """Logistic regression: f_i(x) = mean log(1 + exp(-a.x)) + l2/2 |x|^2; a, shape (n, m, d), has its label's sign."""

    features: Tensor
    l2: float
    error = Problem.error

    @property
    def shape(self) -> tuple[int, int]:
        """Peers and dimension."""
        return self.features.shape[0], self.features.shape[2]

    @cached_property
    def curvatures(self) -> tuple[float, float]:
        """mu and an upper bound on L of the worst peer."""
        squares = torch.linalg.matrix_norm(self.features, ord=2).square() / self.features.shape[1]
        return self.l2, float(squares.max()) / 4 + self.l2

    def gradients(self, params: Tensor) -> Tensor:
        """Return every peer's gradient at its own row, shape (n, d)."""
        wrong = torch.sigmoid(-torch.einsum("nmd,nd->nm", self.features, params))
        return self.l2 * params - torch.einsum("nm,nmd->nd", wrong, self.features) / wrong.shape[1]

    def gradient(self, peer: int, params: Tensor) -> Tensor:
        """Return one peer's gradient, shape (d,)."""
        features = self.features[peer]
        return self.l2 * params - torch.sigmoid(-(features @ params)) @ features / len(features)

    @cached_property
    def optimum(self) -> Tensor:
        """x*, shape (d,), by Newton's method."""
        point = torch.zeros(self.shape[1], dtype=torch.float64)
        rows = self.features.reshape(-1, self.shape[1])
        for _ in range(NEWTON_STEPS):
            wrong = torch.sigmoid(-(rows @ point))
            hessian = (rows.T * (wrong * (1 - wrong))) @ rows / len(rows) + self.l2 * torch.eye(len(point)).double()
            point = point - torch.linalg.solve(hessian, self.l2 * point - wrong @ rows / len(rows))
        return point


Either = Problem | LogisticProblem


def make_logistic(condition: float = 96.0, seed: int = 0) -> LogisticProblem:
    """Return logistic regression with normal features, and labels by each peer's own weights."""
    draws = numpy_generator(seed, "logistic regression")
    features = draws.standard_normal((PEERS, ROWS, DIMENSION))
    weights = draws.standard_normal(DIMENSION) + draws.standard_normal((PEERS, 1, DIMENSION))
    labels = np.sign((features * weights).sum(2) + draws.logistic(size=(PEERS, ROWS)))
    problem = LogisticProblem(torch.from_numpy(features * labels[:, :, None]), 0.0)
    return replace(problem, l2=problem.curvatures[1] / (condition - 1))


def make_problem(decay: float = 1.65, peers: int = PEERS, seed: int = 2) -> Problem:
    """Return the problem that the module describes."""
    draws = numpy_generator(seed, "least squares", peers)
    matrices = draws.standard_normal((peers, ROWS, DIMENSION)) * np.logspace(0, -decay, DIMENSION)
    optima = draws.standard_normal((peers, DIMENSION))
    hessians = np.einsum("nmi,nmj->nij", matrices, matrices) / ROWS
    linear = np.einsum("nij,nj->ni", hessians, optima)
    return Problem(torch.from_numpy(hessians), torch.from_numpy(linear))


@dataclass(frozen=True)
class Cost:
    """What a method needed to reach a target; `error` is where it ended, `time` in units of one gradient."""

    gradients: int
    vectors: int
    error: float
    time: float

    @property
    def reached(self) -> bool:
        return self.error <= TARGET


def graph_of(name: str, peers: int = PEERS) -> Graph:
    """Return a registered graph."""
    graph: Graph = build("graphs", name).graph(peers, 0)
    return graph


def run_dadao(
    problem: Either, rates: EdgeRates, until: float, target: float = TARGET, seed: int = 0, check_every: int = 500,
    watch: Callable[[float, Sequence[PeerState]], None] | None = None,
    failing: float = 0.0,
) -> Cost:
    """Run DADAO event by event: gradients at rate 1 per peer, exchanges at the edges' rates.

    Args:
        until: time at which to give up.
        check_every: events between two looks at the error.
        watch: called at every look with the time and all states, drifted to that time.
        failing: share of exchanges that fail half-way: both ends offer, and neither applies.
    """
    constants = Constants.of(*problem.curvatures, rates.chi1)
    size, dimension = problem.shape
    states = [PeerState.start(torch.zeros(dimension, dtype=torch.float64)) for _ in range(size)]
    draws = numpy_generator(seed, "events")
    chances = np.concatenate([np.ones(size), rates.rates]) / (size + rates.total)
    now, gradients, exchanges, error = 0.0, 0, 0, 1.0
    while now < until and target < error < 1e6:
        gaps = draws.exponential(1 / (size + rates.total), DRAWN_AT_ONCE).tolist()
        lost = (draws.random(DRAWN_AT_ONCE) < failing).tolist()
        for number, event in enumerate(draws.choice(len(chances), DRAWN_AT_ONCE, p=chances).tolist()):
            now += gaps[number]
            if now > until:
                break
            if event < size:
                state = advance(states[event], constants, now)
                states[event] = gradient_step(state, constants, problem.gradient(event, state.params))
                gradients += 1
            else:
                one, other = rates.graph.edges[event - size]
                first, second = advance(states[one], constants, now), advance(states[other], constants, now)
                mine, theirs = offer(first), offer(second)
                exchanges += 1
                if not lost[number]:
                    states[one] = exchange_step(first, constants, mine, theirs, now)
                    states[other] = exchange_step(second, constants, theirs, mine, now)
            if (gradients + exchanges) % check_every == 0:
                states = [advance(state, constants, now) for state in states]
                error = problem.error(torch.stack([state.params for state in states]))
                if watch is not None:
                    watch(now, states)
                if not target < error < 1e6:
                    break
    return Cost(gradients, 2 * exchanges, error, now)


def run_gradient_tracking(problem: Either, graph: Graph, step_size: float, most_rounds: int) -> Cost:
    """Run gradient tracking; two vectors each way on every edge and round.

    Args:
        step_size: in units of 1/L.
    """
    mixing, step = torch.from_numpy(mixing_matrix(graph)), step_size / problem.curvatures[1]
    params = torch.zeros(problem.shape, dtype=torch.float64)
    gradients = problem.gradients(params)
    tracked, error, rounds = gradients, 1.0, 0
    while TARGET < error < 1e6 and rounds < most_rounds:
        params = mixing @ (params - step * tracked)
        fresh = problem.gradients(params)
        tracked, gradients, rounds = mixing @ tracked + fresh - gradients, fresh, rounds + 1
        if rounds % 10 == 0:
            error = problem.error(params)
    return Cost(len(params) * (rounds + 1), 4 * len(graph.edges) * rounds, error, rounds)


def tuned_gradient_tracking(
    problem: Either, graph: Graph, most_rounds: int, steps: Sequence[float] = STEP_SIZES
) -> tuple[Cost, float]:
    """Return the cheapest run over the steps, and its step."""
    runs = {step: run_gradient_tracking(problem, graph, step, most_rounds) for step in steps}
    best = min((step for step in steps if runs[step].reached), key=lambda step: runs[step].gradients)
    return runs[best], best


def run_adom_plus(problem: Either, graph: Graph, most_rounds: int, multi_consensus: bool = True) -> Cost:
    """Run ADOM+ with the constants of its theory.

    Args:
        multi_consensus: take as many consensus steps a round as make the graph look well connected.
    """
    mu, largest = problem.curvatures
    size = problem.shape[0]
    matrix = laplacian(graph, [1.0] * len(graph.edges))
    spectrum = np.linalg.eigvalsh(matrix)
    chi, steps = spectrum[-1] / spectrum[1], 1
    gossip = matrix / spectrum[-1]
    if multi_consensus:
        steps = math.ceil(chi * math.log(2))
        gossip, chi = np.eye(size) - np.linalg.matrix_power(np.eye(size) - gossip, steps), 2.0
    mixing = torch.from_numpy(gossip)
    fast = math.sqrt(mu / largest)
    tau1, sigma2 = 1 / (1 / fast + 0.5), fast / (16 * chi)
    sigma1, eta, nu = 1 / (1 / sigma2 + 0.5), 1 / (largest * fast), mu / 2
    beta, delta, zeta = 1 / (2 * largest), 1 / (17 * largest), 0.5
    gamma, theta = nu / (14 * sigma2 * chi**2), nu / (4 * sigma2)
    x = xf = y = yf = z = zf = m = torch.zeros(problem.shape, dtype=torch.float64)
    error, rounds = 1.0, 0
    while TARGET < error < 1e6 and rounds < most_rounds:
        xg = tau1 * x + (1 - tau1) * xf
        yg, zg = sigma1 * y + (1 - sigma1) * yf, sigma1 * z + (1 - sigma1) * zf
        slope = problem.gradients(xg) - nu * xg
        u, k = yg + zg, 1 + eta * nu
        b = (x + eta * nu * xg - eta * slope) / k
        y_new = (y + theta * beta * slope - theta / nu * u - theta * b) / (1 + theta * beta + theta * eta / k)
        x_new = b + eta * y_new / k
        v = gamma / nu * u + m
        mixed = mixing @ v
        z_new, m = z + gamma * delta * (zg - z) - mixed, v - mixed
        xf, yf, zf = xg + fast * (x_new - x), yg + sigma2 * (y_new - y), zg - zeta * (mixing @ u)
        x, y, z, rounds = x_new, y_new, z_new, rounds + 1
        if rounds % 10 == 0:
            error = problem.error(xf)
    return Cost(size * rounds, 4 * len(graph.edges) * steps * rounds, error, rounds)


def dadao(problem: Either, graph: Graph, until: float = 20_000.0, seed: int = 0, multiplier: float = 1.0) -> Cost:
    """Run DADAO at the least rates, uniform over the edges."""
    return run_dadao(problem, required_rates(edge_shares(graph, "uniform"), multiplier), until, seed=seed)


def _print(name: str, cost: Cost) -> None:
    ending = "" if cost.reached else f"   not reached: {cost.error:.2g}"
    print(f"{name:38s} {cost.gradients:9,d} gradients {cost.vectors:11,d} vectors{ending}", flush=True)


def _compare(problem: Either, seeds: Sequence[int] = (0,)) -> None:
    """Print what every method needs on both graphs."""
    mu, largest = problem.curvatures
    print(f"{type(problem).__name__}, condition number {largest / mu:.0f}")
    for name in ("ring", "star"):
        graph = graph_of(name)
        print(f"{name}: {least_total_rate(edge_shares(graph, 'uniform')):.3f} exchanges per unit of time")
        for seed in seeds:
            _print(f"  DADAO, seed {seed}", dadao(problem, graph, seed=seed))
        cost, step = tuned_gradient_tracking(problem, graph, 20_000)
        _print(f"  gradient tracking, step {step}/L", cost)
        _print("  ADOM+, several consensus steps", run_adom_plus(problem, graph, 20_000))
        _print("  ADOM+", run_adom_plus(problem, graph, 15_000, multi_consensus=False))


def main() -> None:
    """Print the tables."""
    problem = make_problem()
    _compare(problem, seeds=(0, 1, 2))
    _compare(make_problem(decay=1.35))
    _compare(make_logistic())
    barbell = graph_of("barbell")
    print("two groups of 8 with one bridge, 300 units of time")
    for kind in ("uniform", "optimal"):
        rates = required_rates(edge_shares(barbell, kind))
        _print(f"  {kind} edge rates", run_dadao(problem, rates, until=300.0))
    print("a tenth of the rates, on the ring")
    ring = required_rates(edge_shares(graph_of("ring"), "uniform"))
    _print("  DADAO", run_dadao(problem, ring.scaled(0.1), until=50.0, check_every=50))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
