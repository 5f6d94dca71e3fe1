"""An attacker who knows everything but one record, and whether it beats the epsilon that is claimed.

Whole runs of DIFF2 are made on two data sets that differ in one record. The attacker sees every message, knows all
other records, and computes the likelihood ratio of the two data sets: no statistic is better. On one half of the runs
it picks its threshold, on the other half it is measured, with 95 % confidence limits (Clopper and Pearson, 1934).
"""
import math

import pytest
import torch
from scipy.stats import beta

from fedcore.privacy.mechanism import clip_records, noise, sensitivity
from fedcore.privacy.wire import Terms
from fedcore.strategies.private import gradient_step, next_estimate
from fedcore.strategies.private_plan import BETWEEN, FULL, Schedule, make_budget
from tests.strategies.private_world import Records, asked, client_of, node_context, point, request
from tests.strategies.private_world import values_of as message_of

EPSILON, DELTA, ROUNDS, INTERVAL, RELATION = 1.0, 1e-5, 6, 3, "replace-one"
RUNS, CLIP, SLOPE, STEP = 25_000, 0.5, 1.0, 0.4
ERROR = 0.025    # each of the two rates may lie beyond its limit so often


def epsilon_shown(without, with_it, delta=DELTA):
    """Return the epsilon that an attack proves, at 95 % confidence.

    Args:
        without, with_it: the attacker's scores on runs over either data set, shape (runs,).
    """
    half = len(without) // 2
    thresholds = torch.quantile(torch.cat([without[:half], with_it[:half]]), torch.linspace(0.01, 0.999, 100).double())

    def shown(threshold, one, other):
        false, true = int((one > threshold).sum()), int((other > threshold).sum())
        most_false = beta.ppf(1 - ERROR, false + 1, len(one) - false) if false < len(one) else 1.0
        least_true = beta.ppf(ERROR, true, len(other) - true + 1) if true else 0.0
        return math.log(max(least_true - delta, 1e-12) / most_false)

    best = max(thresholds.tolist(), key=lambda threshold: shown(threshold, without[:half], with_it[:half]))
    return shown(best, without[half:], with_it[half:])


def records():
    """Return one client's inputs, targets and curvatures, and the last two with the first record replaced.

    A record's loss is curvature/2 (w x)^2 - target (w x): gradients and their differences can have either sign.
    """
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 2, dtype=torch.float64, generator=draw)
    inputs[0] = torch.tensor([3.0, 0.0])
    known = torch.stack([torch.randn(8, dtype=torch.float64, generator=draw), torch.ones(8, dtype=torch.float64)])
    one, other = known.clone(), known.clone()
    one[:, 0], other[:, 0] = torch.tensor([20.0, 1.0]), torch.tensor([-20.0, -1.0])
    return inputs, one, other


def clipped_mean(inputs, known, params, previous, clip_norms):
    """Return each run's mean of clipped gradients, or of differences; shape (runs, 2)."""
    def gradients(at):
        targets, curvatures = known
        return (curvatures * (at @ inputs.T) - targets)[:, :, None] * inputs    # shape (runs, records, 2)

    found = gradients(params) if previous is None else gradients(params) - gradients(previous)
    scaled = found / clip_norms.clamp(min=1e-300)[:, None, None]
    factors, _ = clip_records(scaled.reshape(-1, 2), 1.0)
    return (factors.reshape(found.shape[:2])[:, :, None] * found).mean(1)


def scores(truth, claimed, turned_down, seed):
    """Return the attacker's log-likelihood ratios over runs on data of which `truth` holds."""
    inputs, first, second = records()
    budget = make_budget(Schedule(INTERVAL, split=0.5), ROUNDS, 0, claimed, None, DELTA, "local", RELATION)
    draw = torch.Generator().manual_seed(seed)
    params = previous = torch.zeros(RUNS, 2, dtype=torch.float64)
    estimate, ratio = None, torch.zeros(RUNS, dtype=torch.float64)
    for index in range(ROUNDS):
        full = index % INTERVAL == 0
        moved = SLOPE * (params - previous).norm(dim=1)
        clip_norms = torch.full_like(moved, CLIP) if full else moved
        before = None if full else previous
        std = budget.noise[FULL if full else BETWEEN] * sensitivity(1.0, len(inputs), RELATION) / turned_down
        mean = clipped_mean(inputs, truth, params, before, clip_norms)
        message = mean + clip_norms[:, None] * noise(std, mean, draw)
        one, other = (clipped_mean(inputs, known, params, before, clip_norms) for known in (first, second))
        distances = (message - one).square().sum(1) - (message - other).square().sum(1)
        ratio += distances / (2 * (std * clip_norms).square())
        estimate = next_estimate(None if full else estimate, message, 0.0)
        previous, params = params, gradient_step(params, estimate, STEP)
    return ratio


@pytest.mark.parametrize("claimed", [EPSILON, 3.0])
def test_whole_runs_never_show_more_than_the_claimed_epsilon(claimed):
    _, first, second = records()
    shown = epsilon_shown(scores(first, claimed, 1.0, 1), scores(second, claimed, 1.0, 2))
    assert 0.25 * claimed < shown <= claimed    # an attack that shows nothing would prove nothing


def test_the_same_audit_catches_noise_that_was_turned_down_tenfold():
    _, first, second = records()
    assert epsilon_shown(scores(first, EPSILON, 10.0, 1), scores(second, EPSILON, 10.0, 2)) > 2 * EPSILON


# The noise is the system's own, different every time: so few messages show a thirtieth of it without fail.
@pytest.mark.parametrize("turned_down, caught", [(1.0, False), (30.0, True)])
def test_messages_of_a_real_client_show_no_more_than_they_claim(turned_down, caught):
    noise_multiplier, far = 4.0, {(0, 0): 3.0}
    claimed = make_budget(Schedule(), 1, 0, None, noise_multiplier, DELTA, "local", RELATION).terms.epsilon
    # The client is told less noise than is claimed, and agrees.
    loose = Terms(1e6, DELTA, "local", RELATION)
    x, clean = 0 * point(1), []
    for replaced in ({}, far):
        plain = asked(terms=Terms(1e6, DELTA, "central", RELATION))
        clean.append(message_of(client_of(Records(replaced))(request(x, plain), node_context())))
    direction = clean[1] - clean[0]
    found = []
    for replaced in ({}, far):
        client, context = client_of(Records(replaced)), node_context(simulated=False)
        asks = (asked(round=index, terms=loose, noise_multiplier=noise_multiplier / turned_down)
                for index in range(500))
        found.append(torch.stack([message_of(client(request(x, ask), context)) @ direction for ask in asks]))
    assert (epsilon_shown(*found) > claimed) is caught
