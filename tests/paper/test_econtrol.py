"""EControl's published claim at small scale, and what must be said beside it.

The figures, and the command that prints them, are in docs/algorithms/econtrol.md.
"""
import pytest
import torch

from fedcore.registry import build
from tests.paper.econtrol_study import (
    CONTRACTION,
    DIMENSION,
    METHODS,
    TARGET,
    VARIANTS,
    fewest_rounds,
    least_gap,
    make_problem,
    noise_floor,
    rounds_to,
    start_gap,
    top,
)

pytestmark = pytest.mark.paper
ROUNDS = 800


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def exact():
    """Uneven clients whose gradients carry no noise."""
    return make_problem(10, 10.0)


def test_the_study_compresses_as_clients_do():
    vectors = torch.randn(3, DIMENSION, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    codec = build("compressors", {"name": "top_k", "fraction": CONTRACTION}).codec([(DIMENSION,)], torch.float64)
    for vector, arrived in zip(vectors, top(vectors)[1], strict=True):
        assert torch.equal(codec.decode(codec.encode(vector, torch.Generator())), arrived)


@pytest.mark.parametrize("name, step_size, most", [
    ("SGD", 1.0, 100), ("EC-Ideal", 0.5, 200), ("EF21", 0.5, 200), ("EControl", 0.354, 300),
])
def test_without_noise_it_reaches_the_exact_optimum(exact, name, step_size, most):
    assert rounds_to(exact, METHODS[name], step_size, 1e-10 * start_gap(exact), most) < most


@pytest.mark.slow
@pytest.mark.parametrize("name, stalls_above", [("EC", 1e-4), ("naive Top-K", 0.1)])
def test_without_noise_classical_compensation_and_plain_top_k_stall_at_every_step_size(exact, name, stalls_above):
    assert least_gap(exact, METHODS[name], ROUNDS) > stalls_above * start_gap(exact)


@pytest.mark.slow
def test_the_noise_floor_falls_with_the_clients_and_stays_near_that_of_sgd():
    floors = []
    for clients in (4, 16, 64):
        problem = make_problem(clients, 10.0, 10.0)
        sgd, floor, estimate = (noise_floor(problem, METHODS[name]) for name in ("SGD", "EControl", "EF21"))
        assert floor < 2 * sgd and estimate > 4 * sgd
        floors.append(floor)
    assert floors[0] > 2 * floors[1] > 4 * floors[2]


@pytest.mark.slow
def test_with_uneven_data_and_noise_it_needs_half_the_rounds_of_ef21_and_ec():
    problem = make_problem(16, 100.0, 3.0)
    target, most = TARGET * start_gap(problem), 4000
    steps = {"EControl": (0.0625, 0.0442, 0.0313), "EF21": (0.0313, 0.0221, 0.0156, 0.0110, 0.0078),
             "EC": (0.0078, 0.0055, 0.0039, 0.0028), "EF21-SGDM": (0.0884, 0.0625, 0.0442)}
    rounds = {name: fewest_rounds(problem, VARIANTS[name], target, most, 25, steps[name])[0] for name in steps}
    assert 2 * rounds["EControl"] < rounds["EF21"] and 2 * rounds["EControl"] < rounds["EC"]
    # With its momentum tuned, EF21-SGDM is faster still on this quadratic.
    assert rounds["EF21-SGDM"] < rounds["EControl"]
