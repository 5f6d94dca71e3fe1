"""Local SGD, SlowMo, DiLoCo and synchronous SGD: what ties them to each other, bit for bit where nothing rounds."""
import pytest
import torch

from fedcore.errors import InvalidSetting
from fedcore.strategies.all_reduce_sgd import AllReduceSgd
from fedcore.strategies.diloco import DiLoCo, heavy_ball_step, nesterov_step
from fedcore.strategies.local_sgd import LocalSgd, OuterState, SlowMo, slow_momentum_step
from tests.peer_lab import models, play, prepare, same


def close(first, second):
    return all(torch.allclose(*pair, rtol=1e-12, atol=1e-13) for pair in zip(first, second, strict=True))


def test_slowmo_and_diloco_with_full_steps_and_no_momentum_are_local_sgd(tmp_path):
    plain = models(play(LocalSgd(3), tmp_path / "a"))
    assert close(models(play(SlowMo(3, 1.0, 0.0), tmp_path / "b")), plain)
    assert close(models(play(DiLoCo(3, 1.0, 0.0, nesterov=False), tmp_path / "c")), plain)


def test_heavy_ball_diloco_is_slowmo(tmp_path):
    assert close(models(play(SlowMo(3, 0.7, 0.5), tmp_path / "a")),
                 models(play(DiLoCo(3, 0.7, 0.5, nesterov=False), tmp_path / "b")))


def test_one_local_step_per_average_is_synchronous_sgd(tmp_path):
    assert close(models(play(LocalSgd(1), tmp_path / "a")), models(play(AllReduceSgd(), tmp_path / "b")))


def test_it_is_not_with_adam_inside(tmp_path):
    adam = {"train": {"optimizer": "adam"}}
    assert not close(models(play(LocalSgd(1), tmp_path / "a", **adam)),
                     models(play(AllReduceSgd(), tmp_path / "b", **adam)))


@pytest.mark.parametrize("optimizer", ["sgd", {"name": "sgd", "momentum": 0.9}, "adam"])
def test_one_peer_alone_is_the_local_optimizer_bit_for_bit(optimizer, tmp_path):
    train = {"train": {"optimizer": optimizer}}
    alone = play(LocalSgd(3), tmp_path / "a", 1, **train)
    bare = prepare(LocalSgd(3), tmp_path / "b", 1, **train)
    work, params = bare.work.peer(0), bare.model.params
    for _ in range(4):
        params = work.train(params, {}, 3).params
    assert torch.equal(models(alone)[0], params)


def test_all_peers_hold_the_same_bits_after_every_round(tmp_path):
    for name, strategy in (("a", LocalSgd(2)), ("b", SlowMo(2)), ("c", DiLoCo(2)), ("d", AllReduceSgd(2))):
        held = models(play(strategy, tmp_path / name, 5, train={"optimizer": {"name": "sgd", "momentum": 0.5}}))
        assert same(held, [held[0]] * 5)


def test_averages_can_be_weighted_by_examples(tmp_path):
    simulation = prepare(LocalSgd(1, averaging="samples"), tmp_path, 2, stop={"rounds": 1})
    made = simulation._make

    def weighted(rank):
        peer = made(rank)
        peer.num_examples = (1, 3)[rank]
        return peer

    simulation._make = weighted
    simulation.play()
    alone = [simulation.work.peer(rank).train(simulation.model.params, {}, 1).params for rank in range(2)]
    assert torch.allclose(models(simulation)[0], 0.25 * alone[0] + 0.75 * alone[1], rtol=1e-13)


def test_the_local_optimizer_keeps_its_memory_unless_told_otherwise(tmp_path):
    train = {"train": {"optimizer": {"name": "sgd", "momentum": 0.9}}}
    kept = models(play(LocalSgd(2, inner_state="keep"), tmp_path / "keep", **train))
    reset = models(play(LocalSgd(2, inner_state="reset"), tmp_path / "reset", **train))
    assert not close(kept, reset)
    plain = [models(play(LocalSgd(2, inner_state=state), tmp_path / f"plain {state}")) for state in ("keep", "reset")]
    assert same(*plain)


def test_the_first_step_tells_which_form_of_momentum_it_is():
    state, moved = OuterState.at(torch.zeros(2)), torch.ones(2)
    assert torch.allclose(nesterov_step(state, moved, 0.7, 0.9).params, torch.full((2,), -1.33))
    assert torch.allclose(heavy_ball_step(state, moved, 0.7, 0.9).params, torch.full((2,), -0.7))
    assert torch.allclose(slow_momentum_step(state, moved, 0.7, 0.9).params, torch.full((2,), -0.7))


def test_nesterov_is_torchs(tmp_path):
    point = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.SGD([point], lr=0.7, momentum=0.9, nesterov=True)
    state = OuterState.at(point.detach().clone())
    for index in range(5):
        moved = torch.arange(3, dtype=torch.float64) - index
        point.grad = moved.clone()
        optimizer.step()
        state = nesterov_step(state, moved, 0.7, 0.9)
    assert torch.allclose(state.params, point.detach(), rtol=1e-13)


def test_local_steps_on_uneven_data_end_at_their_own_fixed_point(tmp_path):
    """Clients 1/2 (x - b_i)^T A_i (x - b_i): x* = (sum A~_i)^-1 sum A~_i b_i, A~_i = I - (I - lr A_i)^H."""
    task = {"name": "quadratic", "noise": 0.0, "dimension": 4, "curvature_spread": 1.0, "condition": 5.0}
    for steps, biased in ((1, False), (8, True)):
        simulation = play(LocalSgd(steps), tmp_path / str(steps), 3, task=task, stop={"rounds": 400}, train={"lr": 0.2})
        pulls, targets = 0.0, 0.0
        for rank in range(3):
            centre, curvature, _ = simulation.task._client(rank)
            pull = torch.from_numpy(1 - (1 - 0.2 * curvature) ** steps)
            pulls, targets = pulls + pull, targets + pull * torch.from_numpy(centre)
        found = models(simulation)[0]
        assert torch.allclose(found, targets / pulls, atol=1e-9)
        assert torch.allclose(found, torch.from_numpy(simulation.task.optimum), atol=1e-6) != biased


@pytest.mark.parametrize("build, name", [
    (lambda: LocalSgd(0), "inner_steps"), (lambda: LocalSgd(averaging="median"), "averaging"),
    (lambda: LocalSgd(inner_state="average"), "inner_state"), (lambda: SlowMo(outer_lr=0.0), "outer_lr"),
    (lambda: SlowMo(outer_momentum=1.0), "outer_momentum"), (lambda: DiLoCo(outer_momentum=0.0), "nesterov"),
    (lambda: DiLoCo(outer_lr=-1.0), "outer_lr"), (lambda: AllReduceSgd(0), "steps_per_round"),
])
def test_a_setting_out_of_its_range_is_refused_by_name(build, name):
    with pytest.raises(InvalidSetting) as caught:
        build()
    assert caught.value.name == name
