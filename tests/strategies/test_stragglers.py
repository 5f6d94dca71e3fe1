"""Clients that are slow, or crash now and then: who is waited for, how long, and who is given up."""
import pytest
from flwr.serverapp.strategy import FedAvg

from fedcore.rounds import FlowerRounds
from fedcore.seeds import derive_seed
from fedcore.strategies.fedasync import FedAsync
from fedcore.strategies.fedbuff import FedBuff
from fedcore.strategies.fedfix import FedFix

TIMES_S = [1.0, 1.1, 1.2, 1.3, 30.0]    # the last one is a straggler


class Unlucky:
    """Half of all tasks crash half-way, of whichever client."""

    def crash_point(self, partition, task_index):
        return 0.5 if task_index and derive_seed(5, partition, task_index) % 2 else None

    def loses_request(self, partition, task_index):
        return False

    def loses_reply(self, partition, task_index):
        return False


def fedavg():
    return FlowerRounds(FedAvg(fraction_evaluate=0.0, min_evaluate_nodes=0))


@pytest.mark.parametrize("strategy", [FedAsync(), FedBuff(2), FedFix()], ids=["fedasync", "fedbuff", "fedfix"])
def test_clients_that_crash_now_and_then_are_never_left_aside(federate, strategy):
    outcome = federate(strategy, [1.0, 1.2, 1.4], failures=Unlucky(), seconds=200)
    late = [task["node"] for task in outcome.tasks if task["start_s"] > 180 and task["outcome"] == "ok"]
    assert set(late) == {0, 1, 2} and outcome.hub.counts["failures"] > 50


def test_a_fixed_deadline_leaves_the_straggler_out(federate):
    outcome = federate(fedavg(), TIMES_S, round_deadline_s=3.0, min_replies_share=0.5, rounds=4)
    assert [row["nodes"] for row in outcome.of("update")][0] == [0, 1, 2, 3]
    assert outcome.hub.now == pytest.approx(4 * 3.0)


def test_an_adaptive_deadline_follows_what_answers_take(federate):
    outcome = federate(fedavg(), TIMES_S, round_deadline_s="adaptive", min_replies_share=0.5, rounds=5)
    times = [row["time_s"] for row in outcome.of("update")]
    first, *others = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    assert first == 30.0    # nothing is known yet: everybody is waited for
    assert all(taken <= 2 * 1.3 for taken in others) and outcome.of("update")[0]["nodes"] == [0, 1, 2, 3, 4]


def test_the_least_share_of_replies_is_waited_for_beyond_the_deadline(federate):
    outcome = federate(fedavg(), TIMES_S, round_deadline_s=0.5, min_replies_share=0.6, rounds=2)
    assert all(row["nodes"] == [0, 1, 2] for row in outcome.of("update"))
    assert outcome.of("update")[0]["time_s"] == 1.2


def test_who_is_awaited_is_known_with_the_time_since_when(federate):
    seen = []

    class Watching(FedAsync):
        def on_reply(self, hub, reply):
            super().on_reply(hub, reply)
            seen.append([(task.node.partition, task.sent_at) for task in hub.awaited()])

    federate(Watching(), [1.0, 10.0], client_updates=3)
    assert seen[0] == [(1, 0.0), (0, 1.0)] and seen[1] == [(1, 0.0), (0, 2.0)]
