"""EControl beside its baselines on uneven least squares; prints the tables of docs/algorithms/econtrol.md.

    python -m tests.paper.econtrol_study

Client i of n has f_i(x) = 1/2 sum_j c_ij (x_j - o_ij)^2 with curvatures c_i = (i/n) logspace(0, -1, d) + 0.05 and an
optimum o_i drawn from a normal law, scaled so that the mean of |grad f_i(x*)|^2 is zeta^2; gradients carry noise
N(0, sigma^2/d I). All clients are rows of one matrix, and
the rules are those that the clients run; Top-6 of d = 60. Step sizes are in units of 1/L, L the largest curvature of
the mean. The gap is f(x) - f(x*), over f(x_0) - f(x*) where it is called relative.
"""
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedcore.seeds import torch_generator
from fedcore.strategies.feedback_rule import Memory, Rule, respond, server_step

DIMENSION, KEPT = 60, 6
CONTRACTION = KEPT / DIMENSION
# Ratios of sqrt(2); a best value at an end of its range would say that the range is too short.
STEP_SIZES = [2.0 ** (exponent / 2) for exponent in range(-16, 3)]
NOISY_STEP_SIZES = [2.0 ** (exponent / 2) for exponent in range(-18, -5)]
TARGET = 1.5e-5


@dataclass(frozen=True)
class Problem:
    """Least squares of n clients.

    Attributes:
        curvatures: c, shape (n, d).
        optima: o, shape (n, d).
        noise: sigma, norm of the gradient noise.
    """

    curvatures: Tensor
    optima: Tensor
    noise: float

    @property
    def optimum(self) -> Tensor:
        """x*, shape (d,)."""
        return (self.curvatures * self.optima).sum(0) / self.curvatures.sum(0)

    @property
    def smoothness(self) -> float:
        """L of the mean."""
        return float(self.curvatures.mean(0).max())

    def gap(self, params: Tensor) -> float:
        """Return f(x) - f(x*)."""
        return float(0.5 * (self.curvatures.mean(0) * (params - self.optimum).square()).sum())

    def gradients(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return every client's gradient, with noise where a generator is given, shape (n, d)."""
        exact = self.curvatures * (params - self.optima)
        if generator is None:
            return exact
        return exact + self.noise / DIMENSION**0.5 * torch.randn(exact.shape, dtype=exact.dtype, generator=generator)


def make_problem(clients: int, zeta: float, noise: float = 0.0, seed: int = 0) -> Problem:
    """Return the problem that the module describes."""
    share = torch.arange(1, clients + 1, dtype=torch.float64) / clients
    curvatures = share[:, None] * torch.logspace(0, -1, DIMENSION, dtype=torch.float64) + 0.05
    draws = torch_generator(seed, "least squares", clients)
    problem = Problem(curvatures, torch.randn(clients, DIMENSION, dtype=torch.float64, generator=draws), noise)
    heterogeneity = problem.gradients(problem.optimum).square().sum(1).mean().sqrt()
    return replace(problem, optima=problem.optima * (zeta / heterogeneity))


def top(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row with its largest values only, as what is sent and as what arrives."""
    chosen = vectors.abs().topk(KEPT, dim=1).indices
    sent = torch.zeros_like(vectors).scatter(1, chosen, vectors.gather(1, chosen))
    return sent, sent


def whole(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows as they are."""
    return vectors, vectors


@dataclass(frozen=True)
class Method:
    """A rule with its compressor.

    Attributes:
        ideal: start from the clients' gradients at the optimum, and never change them: the bound of error feedback.
    """

    rule: Rule
    compress: Callable[[Tensor], tuple[Tensor, Tensor]] = top
    ideal: bool = False


def econtrol(feedback: float = CONTRACTION) -> Method:
    """Return EControl with a feedback strength."""
    return Method(Rule(feedback=feedback, estimates=True))


METHODS = {
    "SGD": Method(Rule(), whole),
    "EC-Ideal": Method(Rule(feedback=1.0), ideal=True),
    "EF21": Method(Rule(estimates=True)),
    "EControl": econtrol(),
    "EF21-SGDM": Method(Rule(estimates=True, gradient_weight=0.1)),
    "EC": Method(Rule(feedback=1.0)),
    "naive Top-K": Method(Rule()),
}


def gaps(problem: Problem, method: Method, step_size: float, seed: int = 0) -> Iterable[float]:
    """Yield the gap before each round, without end; stops when the run diverges.

    Args:
        step_size: in units of 1/L.
    """
    gamma, generator = step_size / problem.smoothness, torch_generator(seed, "noise")
    params = torch.zeros(DIMENSION, dtype=torch.float64)
    fixed = problem.gradients(problem.optimum) if method.ideal else torch.zeros_like(problem.optima)
    limit, memory = 1e3 * problem.gap(params), None
    while (gap := problem.gap(params)) <= limit:
        yield gap
        gradients = problem.gradients(params, generator) - fixed
        if memory is None:    # h_0 = g_0
            memory = Memory.at(method.rule, gradients, gradients if method.rule.estimates else None)
        memory, sent = respond(method.rule, memory, gradients, method.compress)
        direction = memory.estimate if method.rule.estimates else sent + fixed
        params = server_step(params, direction.mean(0), gamma)


def rounds_to(problem: Problem, method: Method, step_size: float, target: float, most: int, window: int = 1) -> int:
    """Return how many rounds pass until the mean gap of a window is below the target; `most` if that is not reached."""
    recent: list[float] = []
    for index, gap in enumerate(gaps(problem, method, step_size)):
        recent = [*recent[-window + 1:], gap] if window > 1 else [gap]
        if len(recent) == window and sum(recent) / window <= target:
            return index
        if index >= most:
            break
    return most


def fewest_rounds(
    problem: Problem, methods: Iterable[Method], target: float, most: int, window: int = 1,
    step_sizes: Sequence[float] = STEP_SIZES,
) -> tuple[int, float]:
    """Return the fewest rounds to a target over the step sizes (and variants of a method), and the step size."""
    best = (most, 0.0)
    for method in methods:
        for step_size in step_sizes:
            found = rounds_to(problem, method, step_size, target, best[0], window)
            if found < best[0]:    # a run that was broken off says as many as the best
                best = (found, step_size)
    return best


def least_gap(problem: Problem, method: Method, rounds: int) -> float:
    """Return the lowest last gap over the step sizes."""
    found = []
    for step_size in STEP_SIZES:
        run = [gap for gap, _ in zip(gaps(problem, method, step_size), range(rounds + 1), strict=False)]
        if len(run) == rounds + 1:
            found.append(run[-1])
    return min(found)


def noise_floor(problem: Problem, method: Method, step_size: float = 0.02, rounds: int = 1500) -> float:
    """Return the mean gap of the last quarter of so many rounds."""
    run = [gap for gap, _ in zip(gaps(problem, method, step_size), range(rounds), strict=False)]
    tail = run[-rounds // 4:]
    return sum(tail) / len(tail)


def start_gap(problem: Problem) -> float:
    """Return f(x_0) - f(x*)."""
    return problem.gap(torch.zeros(DIMENSION, dtype=torch.float64))


VARIANTS = {
    "SGD": [METHODS["SGD"]], "EF21": [METHODS["EF21"]], "EC": [METHODS["EC"]],
    "EControl": [econtrol(feedback) for feedback in (0.05, 0.1, 0.2)],
    "EF21-SGDM": [Method(Rule(estimates=True, gradient_weight=weight)) for weight in (0.05, 0.1, 0.2)],
}


def main() -> None:
    """Print the three tables."""
    torch.set_num_threads(1)
    exact = make_problem(10, 10.0)
    print("no noise, zeta = 10, n = 10: fewest rounds to a relative gap of 1e-10, step size")
    for name in ("SGD", "EC-Ideal", "EF21", "EControl"):
        print(name, *fewest_rounds(exact, [METHODS[name]], 1e-10 * start_gap(exact), 800))
    for name in ("EC", "naive Top-K"):
        print(name, "relative gap after 800 rounds", least_gap(exact, METHODS[name], 800) / start_gap(exact))
    print("noise floor at 0.02/L, sigma = 10, zeta = 10, n = 4, 16, 64")
    for name in ("SGD", "EControl", "EF21", "EF21-SGDM"):
        print(name, *(f"{noise_floor(make_problem(n, 10.0, 10.0), METHODS[name]):.3g}" for n in (4, 16, 64)))
    both = make_problem(16, 100.0, 3.0)
    print(f"zeta = 100, sigma = 3, n = 16: rounds until the 25-round mean of the relative gap is below {TARGET}")
    for name, variants in VARIANTS.items():
        target = TARGET * start_gap(both)
        print(name, *fewest_rounds(both, variants, target, 4000, 25, NOISY_STEP_SIZES), flush=True)


if __name__ == "__main__":
    main()
