"""What a client gives away about its records: at most what was agreed, written down before it is sent."""
import math

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given, settings
from hypothesis.strategies import floats, integers, sampled_from
from torch import nn

from fedcore.clients.books import Books, ledger_at
from fedcore.errors import InvalidSetting, MalformedRequest, ReleaseRefused, UnsupportedModel
from fedcore.payload import ARRAYS, INFO, METRICS, REPLY, VectorRecord
from fedcore.privacy.accounting import Release, plan
from fedcore.privacy.mechanism import message_std
from fedcore.privacy.wire import DIFFERENCE, DIRECTION, GRADIENT, MIXTURE, PREVIOUS, STEPS, Terms, digest
from fedcore.vectors import Model
from tests.strategies.private_world import (
    DIMENSION,
    RECORDS,
    TERMS,
    Curved,
    Records,
    asked,
    client_of,
    node_context,
    point,
    request,
    values_of,
)

CENTRAL = Terms(3.0, 1e-3, "central", "replace-one")


@pytest.fixture
def client():
    return client_of(Records())


def difference(x, before, **changes):
    return request(x, asked(DIFFERENCE, previous=digest(before), **changes), **{PREVIOUS: before})


@settings(max_examples=25)
@given(seed=integers(0, 10**6), record=integers(0, RECORDS - 1), value=floats(-50, 50), clip=floats(0.01, 5),
       kind=sampled_from([GRADIENT, DIFFERENCE, MIXTURE]))
def test_replacing_any_record_moves_the_message_by_at_most_its_sensitivity(seed, record, value, clip, kind):
    x, before = point(seed), point(seed + 1)
    ask = asked(kind, terms=CENTRAL, clip_gradient=clip, clip_difference=clip, gradient_weight=0.3,
                previous="" if kind == GRADIENT else digest(before))
    message = request(x, ask, **{PREVIOUS: before})
    one, other = (values_of(client_of(Records(replaced))(message, node_context()))
                  for replaced in ({}, {(0, record): value}))
    slope = clip * float((x - before).norm())
    bound = {GRADIENT: clip, DIFFERENCE: slope, MIXTURE: 0.3 * clip + 0.7 * slope}[kind]
    assert (one - other).norm() <= 2 * bound / RECORDS * (1 + 1e-9)


@pytest.mark.parametrize("kind, changes", [(GRADIENT, {}), (DIFFERENCE, {}), (STEPS, {"num_steps": 3})])
def test_a_record_that_is_not_finite_leaves_everything_else_as_it_is(kind, changes):
    x, before = point(1), point(2)
    ask = asked(kind, terms=CENTRAL, previous=digest(before), noise_multiplier=1000.0, batch_size=RECORDS, **changes)
    message = request(x, ask, **{PREVIOUS: before, DIRECTION: before})
    spoiled = values_of(client_of(Records({(0, 3): math.nan}))(message, node_context()))
    assert torch.isfinite(spoiled).all()


def test_clipping_and_differences_are_those_of_the_definition(client):
    x, before = point(1), point(2)
    inputs, targets = Records().data(0)

    def gradients(params):
        return torch.stack([torch.func.grad(lambda p, a=a, b=b: 0.5 * (torch.tanh(a @ p) - b) ** 2)(params)
                            for a, b in zip(inputs, targets, strict=True)])

    def clipped(rows, norm):
        return torch.stack([row * min(1, norm / row.norm()) for row in rows]).mean(0)

    slope = 0.7 * (x - before).norm()
    got = values_of(client(difference(x, before, terms=CENTRAL, clip_difference=0.7), node_context()))
    assert torch.allclose(got, clipped(gradients(x) - gradients(before), slope), atol=1e-14)
    got = values_of(client(request(x, asked(terms=CENTRAL, clip_gradient=0.3)), node_context()))
    assert torch.allclose(got, clipped(gradients(x), 0.3), atol=1e-14)


def test_without_movement_the_message_is_exactly_zero(client):
    x = point(1)
    assert torch.equal(values_of(client(difference(x, x), node_context())), torch.zeros_like(x))


@pytest.mark.parametrize("simulated", [True, False], ids=["seeded", "secure"])
def test_noise_has_the_deviation_that_the_message_claims(simulated):
    task = Records(records=2)
    client, clean = client_of(task), values_of(client_of(task)(request(point(1), asked(terms=CENTRAL)), node_context()))
    budget = Terms(1e6, 1e-3, "local", "replace-one")
    drawn = torch.stack([values_of(client(request(point(1), asked(round=index, terms=budget)), context)) - clean
                         for context in [node_context(simulated=simulated)] for index in range(250)])
    std = message_std("local", 4.0, 0.5, 2, [2], "replace-one")
    assert drawn.std().item() == pytest.approx(std, rel=0.08)
    assert abs(drawn.mean().item()) < 4 * std / math.sqrt(drawn.numel())


def test_secure_noise_does_not_follow_from_the_seed(client):
    message = request(point(1), asked())
    assert not torch.equal(*(values_of(client(message, node_context(simulated=False))) for _ in range(2)))
    assert torch.equal(*(values_of(client(message, node_context())) for _ in range(2)))


def test_a_request_that_comes_twice_is_answered_with_the_same_bytes_and_charged_once(client):
    context = node_context(simulated=False)
    first, again = (client(request(point(1), asked()), context) for _ in range(2))
    assert torch.equal(values_of(first), values_of(again))
    assert Books(context).releases == 1
    client(request(point(1), asked(round=1)), context)
    assert Books(context).releases == 2


def test_a_client_keeps_the_last_point_and_asks_for_it_when_it_was_lost(client):
    x, before = point(1), point(2)
    ask = asked(DIFFERENCE, previous=digest(before), round=1)
    context = node_context()
    client(request(before, asked()), context)
    kept = client(request(x, ask), context)
    assert kept.content[REPLY]["knows-previous"]
    forgetful = node_context()
    reply = client(request(x, ask), forgetful)
    assert not reply.content[REPLY]["knows-previous"] and ARRAYS not in reply.content
    assert Books(forgetful).releases == 0
    brought = client(request(x, ask, **{PREVIOUS: before}), forgetful)
    assert torch.equal(values_of(brought), values_of(kept))


def test_nothing_but_the_noised_vector_is_told(client):
    reply = client(request(point(1), asked()), node_context()).content
    assert set(reply[METRICS]) == {"num-examples", "work-steps"}
    assert set(reply[REPLY]) == {"round", "knows-previous"} and set(reply) == {ARRAYS, METRICS, REPLY}


def test_the_size_of_a_sample_is_not_told(client):
    budget = Terms(50.0, 1e-3, "local", "add-remove")
    steps = {int(client(request(point(1), asked(sample_rate=0.3, round=index, terms=budget)), node_context())
                 .content[METRICS]["work-steps"]) for index in range(6)}
    assert len(steps) == 1


@pytest.mark.parametrize("config, changes, words", [
    ({"min_noise_multiplier": 5.0}, {}, "min-noise-multiplier=5"),
    ({"max_epsilon": 0.1, "max_delta": 1e-5}, {}, "max-epsilon=0.1"),
    ({"max_releases": 1}, {"kind": STEPS, "num_steps": 40, "batch_size": RECORDS}, "max-releases=1"),
    ({"max_releases": 9}, {"terms": CENTRAL}, "trust-server"),
    ({}, {"terms": Terms(3.0, 1e-3, "distributed", "replace-one")}, "secure sum"),
    ({}, {"noise_multiplier": 0.5}, "agreed"),
])
def test_less_noise_or_more_releases_than_allowed_are_refused(client, config, changes, words):
    context = node_context(**config)
    ask = asked(**{"kind": GRADIENT, **changes})
    with pytest.raises(ReleaseRefused, match=words):
        client(request(point(1), ask, **{DIRECTION: point(2)}), context)
    assert Books(context).releases == 0


def test_a_server_that_goes_back_on_its_word_is_refused(client):
    context = node_context()
    client(request(point(1), asked()), context)
    with pytest.raises(ReleaseRefused, match="began under"):
        client(request(point(1), asked(round=1, terms=Terms(8.0, 1e-3, "local", "replace-one"))), context)
    with pytest.raises(ReleaseRefused, match="agreed"):
        for index in range(2, 60):
            client(request(point(index), asked(round=index)), context)
    spent = Books(context).spent
    assert spent.within(TERMS.epsilon, TERMS.delta) and not spent.plus(Release(4.0)).within(TERMS.epsilon, TERMS.delta)


def test_the_operators_epsilon_holds_over_all_runs_of_a_ledger_file(client, tmp_path):
    limits = {"max_epsilon": 3.0, "max_delta": 1e-3, "privacy_ledger": str(tmp_path / "ledger.jsonl")}
    for run in range(9):
        context = node_context(simulated=False, **limits)
        context.run_id = run
        try:
            for index in range(3):
                client(request(point(index), asked(round=index)), context)
        except ReleaseRefused as error:
            assert "max-epsilon=3" in str(error) and run > 1
            break
    else:
        pytest.fail("the limit was never reached")
    ledger_at.cache_clear()    # as a new process would begin
    books = Books(node_context(**limits))
    assert books.spent_ever.within(3.0, 1e-3) and books.spent_ever == plan((Release(4.0, times=books.releases),))


def test_the_ledger_is_written_before_the_reply_leaves_even_when_the_state_is_lost(client, tmp_path):
    path = tmp_path / "ledger.jsonl"
    for _ in range(2):    # the process dies after the first reply, and what it kept in memory with it
        ledger_at.cache_clear()
        client(request(point(1), asked()), node_context(simulated=False, privacy_ledger=str(path)))
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("trust", [True, "true"])
def test_an_operator_may_trust_the_server(client, trust):
    context = node_context(max_releases=5, trust_server=trust)
    assert ARRAYS in client(request(point(1), asked(terms=CENTRAL)), context).content


@pytest.mark.parametrize("config, name", [
    ({"max_epsilon": 3.0}, "max-epsilon"), ({"max_epsilon": -1.0, "max_delta": 1e-5}, "max-epsilon"),
    ({"max_epsilon": 3.0, "max_delta": 1.0}, "max-delta"), ({"trust_server": "yes"}, "trust-server"),
    ({"max_releases": "ten"}, "max-releases"),
])
def test_limits_that_are_none_are_refused_by_name(client, config, name):
    with pytest.raises(InvalidSetting, match=f"^{name}"):
        client(request(point(1), asked()), node_context(**config))


@pytest.mark.parametrize("options, config", [({"private": True}, {}), ({}, {"max_releases": 5})])
@pytest.mark.parametrize("action", ["train", "train.gradient", "evaluate"])
def test_a_private_node_answers_to_nothing_that_would_tell_without_noise(options, config, action):
    content = RecordDict({ARRAYS: VectorRecord(Model.of(Curved())), "config": ConfigRecord({})})
    with pytest.raises(ReleaseRefused, match="private"):
        client_of(Records(), **options)(Message(content, 1000, action), node_context(**config))


def test_a_private_node_does_not_tell_how_many_records_have_which_label():
    def told(client, context):
        return client(Message(RecordDict(), 1000, "query"), context).content[INFO]

    assert "labels" in told(client_of(Records()), node_context())
    assert "labels" not in told(client_of(Records(), private=True), node_context())
    assert "labels" not in told(client_of(Records()), node_context(max_releases=5))


class Normalised(Records):
    """Records for a model that mixes them."""

    def model(self):
        return nn.Sequential(nn.Linear(DIMENSION, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()


def test_a_model_with_batchnorm_is_refused_by_the_client():
    model = Model.of(Normalised().model())
    message = Message(RecordDict({ARRAYS: VectorRecord(model), "config": asked().config()}), 1000, "train.diff2")
    with pytest.raises(UnsupportedModel, match="BatchNorm1d"):
        client_of(Normalised())(message, node_context())


@pytest.mark.parametrize("change", [
    {"noise-multiplier": 0.0}, {"noise-multiplier": math.nan}, {"clip-gradient": -1.0}, {"delta": 1.0},
    {"epsilon": 0.0}, {"kind": "all"}, {"sample-rate": 0.0}, {"round": "x"}, {"gradient-weight": 2.0},
    {"noise-mode": "none"}, {"neighbouring": "any"}, {"previous": 3},
])
def test_a_request_without_meaning_is_refused_by_name(client, change):
    message = request(point(1), asked())
    for name, value in change.items():
        message.content["config"][name] = value
    with pytest.raises(MalformedRequest):
        client(message, node_context())


def test_a_point_that_is_not_finite_is_refused(client):
    x = point(1)
    x[0] = math.inf
    with pytest.raises(MalformedRequest, match="infinite"):
        client(request(x, asked()), node_context())
