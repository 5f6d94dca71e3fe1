"""Copies of each other's vectors: what both ends hold is the same, whatever gets lost."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import MalformedPayload
from fedcore.peers.copies import HEAD_BYTES, NOTHING, START, Copies
from fedcore.registry import build

SIZE = 20
CODEC = build("compressors", {"name": "top_k", "fraction": 0.1}).codec([(SIZE,)], torch.float64)
ZERO = torch.zeros(SIZE, dtype=torch.float64)


def pair():
    ends = [Copies(CODEC, lambda number: torch.Generator()) for _ in range(2)]
    for rank, end in enumerate(ends):
        end.begin(ZERO, (1 - rank,))
    return ends


def vectors(step):
    return torch.randn(2, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def meet(ends, step, arrives=(True, True), values=None):
    """Let both ends exchange; returns what each says of the other's message, None where it was lost."""
    offers = [end.offers((vectors(step) if values is None else values)[rank], (1 - rank,), step)[1 - rank]
              for rank, end in enumerate(ends)]
    return [ends[rank].hear(1 - rank, offers[1 - rank]) if arrives[rank] else None for rank in range(2)], offers


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12))
def test_ends_that_say_they_agree_do_and_they_always_find_back(losses):
    ends = pair()
    for step, arrives in enumerate(losses):
        found, _ = meet(ends, step, arrives)
        if found == [True, True]:
            assert torch.equal(ends[0].mine(1), ends[1].theirs(0)) and torch.equal(ends[1].mine(0), ends[0].theirs(1))
    for step in range(len(losses), len(losses) + 3):
        found, _ = meet(ends, step)
    assert found == [True, True]
    assert torch.equal(ends[0].mine(1), ends[1].theirs(0)) and torch.equal(ends[1].mine(0), ends[0].theirs(1))


def test_copies_come_ever_closer_to_a_vector_that_stays():
    ends, values = pair(), vectors(0)
    distances = []
    for step in range(12):
        _, offers = meet(ends, step, values=values)
        distances.append(float((ends[1].theirs(0) - values[0]).norm()))
    assert all(later < earlier or later == 0 for earlier, later in zip(distances, distances[1:], strict=False))
    assert distances[-1] == 0 and len(offers[0]) == HEAD_BYTES + CODEC.num_bytes


def test_an_end_that_has_forgotten_everything_gets_the_whole_vector():
    ends = pair()
    for step in range(3):
        meet(ends, step)
    ends[1] = Copies(CODEC, lambda number: torch.Generator())
    assert meet(ends, 3)[0] == [False, False]
    found, offers = meet(ends, 4)
    assert found == [True, True] and torch.equal(ends[1].theirs(0), vectors(4)[0])
    assert len(offers[0]) == HEAD_BYTES + SIZE * 8
    assert len(meet(ends, 5)[1][0]) == HEAD_BYTES + CODEC.num_bytes


def test_neighbours_with_the_same_copy_get_the_same_bytes_and_one_that_is_none_any_more_is_forgotten():
    held = Copies(CODEC, lambda number: torch.Generator())
    held.begin(ZERO, (1, 2, 3))
    offers = held.offers(vectors(0)[0], (1, 2, 3), 0)
    assert torch.equal(offers[1], offers[2]) and held.mine(1) is held.mine(3)
    state = held.state_dict()
    assert len(state["shared"]) == 1
    again = Copies(CODEC, lambda number: torch.Generator())
    again.load_state_dict(state)
    assert again.mine(1) is again.mine(2) and torch.equal(again.mine(1), held.mine(1))
    held.offers(vectors(1)[0], (1,), 1)
    assert held.state_dict()["mine"].keys() == held.state_dict()["theirs"].keys() == {1}


@pytest.mark.parametrize("spoil", [
    lambda offer: offer[:10], lambda offer: offer[:-1], lambda offer: offer.float(), lambda offer: offer[None],
])
def test_bytes_that_are_no_message_are_refused(spoil):
    ends = pair()
    offer = ends[0].offers(vectors(0)[0], (1,), 0)[1]
    with pytest.raises(MalformedPayload):
        ends[1].hear(0, spoil(offer))
    assert NOTHING < START and torch.equal(ends[1].theirs(0), ZERO)
