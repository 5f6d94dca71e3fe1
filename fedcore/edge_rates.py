"""How often each edge of a graph should be used: shares of the exchanges, and how many are needed.

A decoupled accelerated method needs chi1 chi2 <= 1/2 at the actual rates. With shares w of unit sum, whose
Laplacian has chi1(w) and chi2(w), the smallest total rate is therefore sqrt(2 chi1(w) chi2(w)). Shares are uniform, or
those that need the fewest exchanges.

Source: Nabli and Oyallon, 2023 (ICML), arXiv:2208.00779, who relax the best shares to a semidefinite program. Here
they solve an equivalent convex one: with Lap(w) the Laplacian,

    maximise sqrt(t s)  subject to  Lap(w) >= t (I - 11^T/n),  Lap(w) >= s (e_i - e_j)(e_i - e_j)^T for every edge,
    w >= 0, sum w = 1;  then chi1 = 1/t, chi2 = 1/(2 s), and the total rate is 1/sqrt(t s).

It is given to cvxpy where that is installed. Otherwise log chi1 + log chi2, which is convex in w, is smoothed and
minimised by quasi-Newton steps, to three or four digits.
"""
import math
from importlib.util import find_spec

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from fedcore.errors import FedcoreError, InvalidSetting
from fedcore.graphs import EdgeRates, Graph

KINDS = ("uniform", "optimal")
# Powers p of the smoothed maxima, which exceed the true ones by at most a factor (number of terms)^(1/p).
SHARPNESS = (4.0, 16.0, 64.0, 256.0, 1024.0)
OPTIONS = {"maxiter": 200}
# An edge whose share is e^-30 of the largest is as good as unused, and rounding must not make it less.
LEAST_LOGIT = -30.0
# A larger program has more constraints than a general solver digests: the descent is faster there.
LARGEST_PROGRAM = 64        # edges
# Shares that a solver leaves slightly above zero stand for edges that are not used.
LEAST_USEFUL_SHARE = 1e-6
# chi1 chi2 at the smallest total rate.
LARGEST_PRODUCT = 0.5


class NoOptimum(FedcoreError):
    """The solver found no best edge rates."""


def edge_shares(graph: Graph, kind: str) -> EdgeRates:
    """Return each edge's share of all exchanges: rates with the sum 1.

    Args:
        kind: `uniform`, or `optimal` for as few exchanges as the condition chi1 chi2 <= 1/2 allows.
    """
    if kind not in KINDS:
        raise InvalidSetting("edge_rates", kind, f"one of {', '.join(KINDS)}")
    count = len(graph.edges)
    uniform = np.full(count, 1 / max(count, 1))
    if kind == "uniform" or count < 2:
        return _normalised(graph, uniform)
    program = find_spec("cvxpy") is not None and count <= LARGEST_PROGRAM
    found = best_shares_by_program(graph) if program else best_shares_by_descent(graph)
    # Neither is exact, so symmetric graphs may come out a hair worse than they went in.
    return min(_normalised(graph, uniform), found, key=least_total_rate)


def least_total_rate(shares: EdgeRates) -> float:
    """Return the smallest total rate at which chi1 chi2 <= 1/2: sqrt(2 chi1(w) chi2(w)), for shares w of unit sum."""
    return math.sqrt(shares.chi1 * shares.chi2 / LARGEST_PRODUCT)


def required_rates(shares: EdgeRates, multiplier: float = 1.0) -> EdgeRates:
    """Return `multiplier` times the lowest rates, in exchanges per unit of time, at which chi1 chi2 <= 1/2."""
    return shares.scaled(multiplier * least_total_rate(shares))


def paced_rates(shares: EdgeRates, exchanges_per_node: float) -> EdgeRates:
    """Return rates at which a node takes part in so many exchanges per unit of time, on average over the nodes."""
    return shares.scaled(exchanges_per_node * shares.graph.num_nodes / 2)


def best_shares_by_program(graph: Graph) -> EdgeRates:
    """Return the best shares, from the semidefinite program.

    Raises:
        NoOptimum: the solver failed.
    """
    import cvxpy

    # Without the constant vector, which no share can change, the program is strictly feasible.
    differences = _differences(graph)
    shares, scale = cvxpy.Variable(len(graph.edges), nonneg=True), cvxpy.Variable(2, nonneg=True)
    inner = differences @ cvxpy.diag(shares) @ differences.T
    constraints = [cvxpy.sum(shares) == 1, inner >> scale[0] * np.eye(graph.num_nodes - 1)]
    constraints += [inner >> scale[1] * np.outer(column, column) for column in differences.T]
    problem = cvxpy.Problem(cvxpy.Maximize(cvxpy.geo_mean(scale)), constraints)
    try:
        problem.solve()
    except cvxpy.error.SolverError as error:
        raise NoOptimum(f"cvxpy found no best edge rates: {error}. Take edge_rates: uniform.") from error
    if shares.value is None:
        raise NoOptimum(f"cvxpy found no best edge rates: it ended as {problem.status}. Take edge_rates: uniform.")
    return _normalised(graph, np.asarray(shares.value))


def best_shares_by_descent(graph: Graph) -> EdgeRates:
    """Return nearly best shares: the smoothed objective is minimised again and again, each time sharper.

    With X = Lap(w)^+, the largest eigenvalue and the largest resistance become (tr X^p)^(1/p) and
    (sum over edges of R_e^p)^(1/p), whose logarithms have the gradients

        d/dw_e = -sum_k a_k (v_k . b_e)^2 / lambda_k    and    -b_e^T X (sum_f c_f b_f b_f^T / R_f) X b_e,

    b_e = e_i - e_j, a and c the shares of each term in its sum. w = softmax(u) keeps w on the simplex.
    """
    differences = _differences(graph)

    def smoothed(logits: np.ndarray, power: float) -> tuple[float, np.ndarray]:
        shares = softmax(logits)
        values, vectors = np.linalg.eigh((differences * shares) @ differences.T)
        turned = vectors.T @ differences                                                # v_k . b_e
        resistances = (turned**2 / values[:, None]).sum(axis=0)
        gaps, drops = -power * np.log(values), power * np.log(resistances)
        pull = (softmax(gaps) / values) @ turned**2
        inner = (turned * (softmax(drops) / resistances)) @ turned.T / np.outer(values, values)
        pull += np.einsum("ke,kl,le->e", turned, inner, turned, optimize=True)
        return (logsumexp(gaps) + logsumexp(drops)) / power, -shares * (pull - shares @ pull)

    logits = np.zeros(len(graph.edges))
    best = _normalised(graph, softmax(logits))
    for power in SHARPNESS:
        found = minimize(smoothed, logits, args=(power,), jac=True, method="L-BFGS-B", options=OPTIONS)
        logits = np.maximum(found.x - found.x.max(), LEAST_LOGIT)
        best = min(best, _normalised(graph, softmax(logits)), key=least_total_rate)
    return best


def _differences(graph: Graph) -> np.ndarray:
    """Return e_i - e_j of every edge in the space orthogonal to the constant vector, shape (n - 1, edges)."""
    size, count = graph.num_nodes, len(graph.edges)
    plain = np.zeros((size, count))
    plain[graph.ends[:, 0], np.arange(count)] = 1.0
    plain[graph.ends[:, 1], np.arange(count)] = -1.0
    basis = np.linalg.qr(np.column_stack([np.ones(size), np.eye(size)[:, 1:]]))[0][:, 1:]
    return np.asarray(basis.T @ plain)


def _normalised(graph: Graph, shares: np.ndarray) -> EdgeRates:
    """Return shares with the sum 1, those of edges that are as good as unused set to 0."""
    kept = np.where(shares > LEAST_USEFUL_SHARE * shares.max(initial=0.0), shares, 0.0)
    return EdgeRates(graph, tuple((kept / max(kept.sum(), math.ulp(0.0))).tolist()))
