"""A server as the meeting point of peers: introduces them to each other, and learns how they get on.

It never averages, and no tensors go between peers through its hands: it sends all of them the model to start from, and
gets one mean model back after each segment, which the peers compute among themselves. What it relays, it does not read.
"""
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ConfigRecord, RecordDict

from fedcore.errors import AllNodesFailed, BadInput, MalformedReply, NothingCanHappen
from fedcore.hub import Hub
from fedcore.payload import CONFIG, REPLY
from fedcore.peers.host_rules import HostRules
from fedcore.peers.relaying import Relaying
from fedcore.peers.segments import (
    ABOUT,
    COUNTERS,
    NO_STEP,
    QUERY,
    RELAY,
    RELAYED,
    RUN,
    TRAIN,
    Introduction,
    Segment,
    SegmentReport,
)
from fedcore.peers.segments import describe as describe_strategy
from fedcore.rounds import RoundStrategy
from fedcore.session import Session
from fedcore.tasks import NODE_GONE, Answer, Failure, Node, Replies, printable

if TYPE_CHECKING:
    from fedcore.peers.strategy import PeerStrategy

logger = logging.getLogger("fedcore")

# So many segments in a row that came to nothing, and nothing ever will.
MOST_STALLED = 3
# Where a message takes seconds, peers come to a rendezvous that much later than each other.
SLOW_RENDEZVOUS_S = 90.0
# How long a server that is back waits for those who belong to the run, looking so often.
RETURN_S, LOOK_EVERY_S = 60.0, 0.2
# Counted in the summary where there were any.
TROUBLES = ("silent", "asymmetric_exchanges", "failed_meetings")
SAVED = ("run", "number", "epoch", "members", "places", "steps", "counters", "clock", "trained_s", "done", "finished",
         "distance", "peer_bytes", "waiting_s", "stalled")


class HostedPeers(RoundStrategy):
    """Runs a strategy of peers from a Flower server, segment by segment.

    Between segments nodes join (they start from what a living peer has) and leave; each such change begins an epoch.

    Args:
        strategy: what the peers do; every node needs the same.
    """

    def __init__(self, strategy: "PeerStrategy", rules: HostRules | None = None):
        self.strategy, self.rules = strategy, rules or HostRules()
        self.rules.check(strategy)
        self.run, self.number, self.epoch = "", 0, NO_STEP
        self.members: list[int] = []
        self.places: dict[int, dict[str, Any]] = {}              # by partition: the node, and how it is reached
        self.steps: dict[int, int] = {}                          # by partition: after which step it knows its state
        self.counters: dict[int, dict[str, float]] = {}          # by partition: what it has done
        self.clock = self.trained_s = 0.0                        # of the peers, seconds
        self.done = 0                                            # steps that are over
        self.finished = False
        self.distance: float | None = None
        self.peer_bytes, self.waiting_s, self.stalled = 0, 0.0, 0
        self.relaying = Relaying(self.rules.relay)
        self._stop_s: float | None = None
        self._returning = False                                  # the server was away, and so were the nodes

    # ---- the run ----------------------------------------------------------------------------------------------------

    def drive(self, session: Session) -> None:
        """Host the peers until the run's limits.

        Raises:
            BadInput: the grid's nodes cannot talk to each other, or one cannot take part from the beginning.
            AllNodesFailed: the peers do not get on.
        """
        hub = session.hub
        if getattr(hub.grid, "simulated", False) or not getattr(hub.grid, "nodes_meet", True):
            raise BadInput(f"{type(self.strategy).__name__} runs on peers that talk to each other, which simulated "
                           "clients cannot. Simulate it from an experiment file: fedcore simulate FILE.")
        self.relaying.check(hub.grid)
        self.run, self._returning = self.run or secrets.token_hex(8), session.resumed
        # The run's time is looked at between segments: peers all stop together, and not in the middle.
        self._stop_s = hub.options.stop.seconds
        hub.options = replace(hub.options, stop=replace(hub.options.stop, seconds=None))
        super().drive(session)

    def round(self, hub: Hub, round_index: int) -> None:
        """Host one segment."""
        if self._returning:
            self._await_return(hub)
        nodes = self._able(hub)
        if not nodes:
            outcome = hub.next_outcome(None)    # somebody comes, or is free again
            if not isinstance(outcome, (Answer, Failure)):
                hub.note_membership(outcome)
            hub.round_index -= 1
            return
        segment = self._plan(hub, nodes)
        self._host(hub, nodes, segment)
        hub.round_index = self._rounds_done(hub) - 1
        if self._stop_s is not None and (self.trained_s if self.strategy.by_time else hub.now) >= self._stop_s:
            hub.stop("seconds")

    def _rounds_done(self, hub: Hub) -> int:
        """Return the steps done; by time a round is as many gradients as there are peers."""
        return hub.totals["client_steps"] // max(1, hub.expected) if self.strategy.by_time else self.done

    def on_stop(self, hub: Hub) -> None:
        """Let the strategy do what it does at the end of a run, where the last segment was not known to be that."""
        if self.finished or not self.done or hub.stop_reason == "interrupted":
            return
        try:
            if nodes := self._able(hub):
                self._host(hub, nodes, self._plan(hub, nodes, ending=True))
        except (NothingCanHappen, AllNodesFailed, BadInput) as error:
            logger.warning("The peers could not be told that the run is over: %s", error)

    # ---- who takes part ---------------------------------------------------------------------------------------------

    def _await_return(self, hub: Hub) -> None:
        """Give nodes that lost the server while it was down the time to come back."""
        until = hub.now + RETURN_S
        while hub.now < until and self._away(hub):
            outcome = hub.next_outcome(hub.now + LOOK_EVERY_S)
            if not isinstance(outcome, (Answer, Failure)):
                hub.note_membership(outcome)
        self._returning = False

    @staticmethod
    def _away(hub: Hub) -> set[int]:
        """Return the partitions whose nodes belong to the run and are not connected, where the grid can tell."""
        look = getattr(hub.grid, "snapshot", None)
        here = None if look is None else {node["partition"] for node in look()["nodes"] if node["connected"]}
        return set() if here is None else {node.partition for node in hub.nodes} - here

    def _able(self, hub: Hub) -> list[Node]:
        """Return the nodes that can take part in the next segment; whoever is new is asked where it is reached."""
        away = self._away(hub)    # the others would wait for them in vain
        nodes = [node for node in hub.nodes
                 if node.partition not in away and not hub.is_busy(node) and not hub.is_left_aside(node)]
        self._ask_where(hub, [node for node in nodes if self.places.get(node.partition, {}).get("node") != node.id])
        here = {node.id for node in hub.nodes}
        return [node for node in nodes if node.id in here and self.places.get(node.partition, {}).get("address")]

    def _ask_where(self, hub: Hub, nodes: Sequence[Node]) -> None:
        """Learn how nodes are reached.

        Raises:
            BadInput: one cannot take part, and nobody has begun.
        """
        if not nodes:
            return
        replies = hub.ask(nodes, QUERY, RecordDict({CONFIG: ConfigRecord({RUN: self.run, RELAY: self.rules.relay})}))
        for answer in replies.arrived:
            try:
                found = Introduction.of(answer.content)
            except MalformedReply as error:
                assert answer.task is not None
                hub.refuse(answer.task, error.reason, answer.bytes_up)
                continue
            problem = found.problem or self._clash(answer.node.partition, found)
            if problem:
                self._turn_away(hub, answer.node, problem)
                continue
            self.places[answer.node.partition] = {
                "node": answer.node.id, "name": found.name, "address": found.address, "fingerprint": found.fingerprint}
            self.steps[answer.node.partition] = found.step
        for failure in replies.missing:
            if failure.code != NODE_GONE:
                last_line = failure.reason.rstrip().rsplit("\n", 1)[-1]
                self._turn_away(hub, failure.node, f"It does not answer as a peer: {last_line}")

    def _clash(self, partition: int, found: Introduction) -> str:
        """Return why a node does not go together with those that are known; empty: it does."""
        others = [place for other, place in self.places.items() if other != partition and place["address"]]
        for name in ("name", "address"):
            if getattr(found, name) in {place[name] for place in others} - {RELAYED}:
                return f"Another peer has the same {name}, {getattr(found, name)}. Give each its own."
        if any(bool(place["fingerprint"]) != bool(found.fingerprint) for place in others):
            return "Some peers have certificates and some have none. Give certificates to all of them."
        return ""

    def _turn_away(self, hub: Hub, node: Node, problem: str) -> None:
        text = f"Node {node.partition} cannot take part: {printable(problem)}"
        if not self.number:
            raise BadInput(text)
        hub.warn(text)
        self.places[node.partition] = {"node": node.id, "name": "", "address": "", "fingerprint": ""}

    # ---- one segment ------------------------------------------------------------------------------------------------

    def _plan(self, hub: Hub, nodes: Sequence[Node], ending: bool = False, only_mean: bool = False) -> Segment:
        members = sorted(node.partition for node in nodes)
        if members != self.members:
            self.members, self.epoch = members, self.epoch + 1
            hub.log(epoch=self.epoch, members=members)
        latest = max(self.steps.get(member, NO_STEP) for member in members)
        donors = tuple(member for member in members if self.steps.get(member, NO_STEP) == latest > NO_STEP)
        first = latest + 1 if donors else self.done
        steps, seconds, final = (0, None, ending) if ending or only_mean else self._length(hub, first)
        places = [self.places[member] for member in members]
        lost_after_s = max(self.rules.lost_after_s, SLOW_RENDEZVOUS_S if hub.slow_messages else 0.0)
        seed = hub.options.train_config.get("seed", hub.seed)
        segment = Segment(
            self.run, self.number, self.epoch, int(seed), first, steps, seconds, self.clock, final,
            final or self._measures(hub, first + steps), lost_after_s, tuple(members),
            tuple(place["name"] for place in places), tuple(place["address"] for place in places),
            tuple(place["fingerprint"] for place in places), donors, describe_strategy(self.strategy))
        self.number += 1
        return segment

    def _length(self, hub: Hub, first: int) -> tuple[int, float | None, bool]:
        """Return how many steps the next segment has, how long they last, and whether the run ends with them."""
        if self.strategy.by_time:
            left = float("inf") if self._stop_s is None else self._stop_s - self.trained_s
            return 1, min(self.rules.segment, left), left <= self.rules.segment
        total, steps = hub.options.stop.rounds, int(self.rules.segment)
        if total is None:
            return steps, None, False
        return max(0, min(steps, total - first)), None, first + steps >= total

    def _measures(self, hub: Hub, end: int) -> bool:
        rule = hub.options.evaluation
        return rule.where != "none" and (rule.unit == "seconds" or end // rule.every > hub.version // rule.every)

    def _host(self, hub: Hub, nodes: Sequence[Node], segment: Segment) -> None:
        """Send a segment to all members, and take note of what came of it."""
        model = None if segment.donors else hub.model
        self.relaying.begin(hub.grid, nodes)
        sent = [hub.send_to(node, TRAIN, segment.content(node.partition, model)) for node in nodes]
        reports = self._read(hub, segment, hub.collect(sent, enough=_rest_is_lost))
        self.relaying.count(hub.grid)
        went_on = self._count(hub, segment, reports)
        whole = [rank for rank in sorted(reports) if not reports[rank].problem]
        if whole and reports[whole[0]].mean is not None:    # it is for the lowest rank of those who live to say
            self._publish(hub, segment, reports[whole[0]], reports)
        elif (went_on or segment.final) and (nodes := self._able(hub)) and segment.steps:
            # Whoever had the mean is gone, or it was never finished: those who are left compute theirs.
            self._host(hub, nodes, self._plan(hub, nodes, only_mean=True))
        self._look_after(hub, segment, reports, went_on)

    def _read(self, hub: Hub, segment: Segment, replies: Replies) -> dict[int, SegmentReport]:
        """Return what members reported, by rank; whoever did not is asked again where it is reached."""
        reports = {}
        for answer in replies.arrived:
            assert answer.task is not None
            rank = answer.node.partition
            try:
                report = SegmentReport.of(answer.content, hub.model.layout)
                if report.step >= max(segment.end, segment.first):
                    raise MalformedReply(f"it is at step {report.step}, which nobody was to reach")
            except MalformedReply as error:
                hub.refuse(answer.task, error.reason, answer.bytes_up)
                self._forget(rank)
                continue
            self._add(hub, rank, answer, report)
            reports[rank] = report
        for failure in replies.missing:
            self._forget(failure.node.partition)
        return reports

    def _forget(self, rank: int) -> None:
        self.places.pop(rank, None)
        self.steps.pop(rank, None)

    def _add(self, hub: Hub, rank: int, answer: Answer, report: SegmentReport) -> None:
        """Count what a peer did in a segment, and write down what it wants written."""
        assert answer.task is not None
        before = self.counters.get(rank, dict.fromkeys(COUNTERS, 0.0))
        if any(report.counters[name] < before[name] for name in COUNTERS):
            before = dict.fromkeys(COUNTERS, 0.0)    # it has forgotten what it did
        did = {name: report.counters[name] - before[name] for name in COUNTERS}
        self.counters[rank], self.steps[rank] = dict(report.counters), report.step
        up, down = int(did["bytes_sent"]) + report.beside_bytes[0], int(did["bytes_received"]) + report.beside_bytes[1]
        hub.totals["exchanges"] = hub.totals.get("exchanges", 0) + int(did["exchanges"])
        hub.totals["bytes_up"] += up
        hub.totals["bytes_down"] += down
        self.peer_bytes += int(did["bytes_sent"])
        self.waiting_s += did["waiting_s"]
        computed = min(did["compute_s"], answer.elapsed_s)
        answer.task.note.update({
            "download_s": 0.0, "queue_s": 0.0, "compute_s": computed, "upload_s": answer.elapsed_s - computed,
            "bytes_up": answer.bytes_up + up, "bytes_down": answer.task.bytes_down + down,
            "exchanges": int(did["exchanges"])})
        hub.count_work(answer, int(did["updates"]), int(did["gradients"]))
        for event, figures in report.rows:
            hub.counts["refused"] += event == "refused"
            hub.recorder.metric(hub.now, event, version=hub.version, node=rank, **figures)

    def _count(self, hub: Hub, segment: Segment, reports: Mapping[int, SegmentReport]) -> bool:
        """Take note of how far the peers have come; returns whether they have."""
        reached = max((report.step for report in reports.values()), default=NO_STEP) + 1
        went_on = reached > segment.first
        self.done = max(self.done, reached)
        self.clock = max([self.clock, *(report.at for report in reports.values())])
        if went_on and segment.seconds is not None:
            self.trained_s += segment.seconds
        return went_on

    def _publish(self, hub: Hub, segment: Segment, mean: SegmentReport, reports: Mapping[int, SegmentReport]) -> None:
        """Take the peers' mean for the model, and evaluate it where that is due."""
        assert mean.mean is not None
        before, changed = hub.version, not torch.equal(mean.mean.params, hub.model.params)
        hub.model, self.distance = mean.mean, mean.distance
        hub.version = max(self.done, before + (changed and not segment.steps))
        self.finished = segment.final
        losses = [report.loss for report in reports.values() if report.loss is not None]
        own = [report.peer_loss for report in reports.values() if report.peer_loss is not None]
        hub.beside = {"consensus_distance": self.distance}
        if own:
            hub.beside |= {"peer_loss_min": min(own), "peer_loss_mean": sum(own) / len(own), "peer_loss_max": max(own)}
        hub.recorder.metric(hub.now, "update", version=hub.version, **hub.totals, nodes=sorted(reports),
                            **({"loss": sum(losses) / len(losses)} if losses else {}))
        if hub.evaluation_is_due(before):
            hub.evaluate()

    def _look_after(
        self, hub: Hub, segment: Segment, reports: Mapping[int, SegmentReport], went_on: bool
    ) -> None:
        """Say what went wrong, and give up when nothing goes right any more.

        Raises:
            AllNodesFailed: time after time the peers did not come to the end of a step.
        """
        problems = {rank: report.problem for rank, report in reports.items() if report.problem}
        for rank, problem in problems.items():
            hub.warn(f"Peer {rank} stopped early in segment {segment.number}: {printable(problem)}")
        if not segment.steps:
            return
        self.stalled = 0 if went_on else self.stalled + 1
        if self.stalled >= MOST_STALLED:
            why = next(iter(problems.values()), "none of them answered")
            raise AllNodesFailed(
                f"{self.stalled} segments in a row came to nothing; the last: {printable(why)} Can the peers dial each "
                f"other at {', '.join(segment.addresses)}?")

    # ---- what survives a restart ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that must survive a restart."""
        return {**{name: getattr(self, name) for name in SAVED}, "relayed_bytes": self.relaying.bytes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        for name in SAVED:
            setattr(self, name, state[name])
        self.relaying.bytes = state["relayed_bytes"]

    def summary(self) -> None:
        """Log the strategy's name."""
        logger.info("Strategy %s on peers, in segments of %s", type(self.strategy).__name__, asdict(self.rules))

    def summary_figures(self) -> dict[str, float | int | str | None]:
        """Return figures for the run's summary, as a simulation of peers has them."""
        sums = {name: sum(counters[name] for counters in self.counters.values()) for name in COUNTERS}
        spent = sums["compute_s"] + sums["waiting_s"]
        return {
            "gradients": int(sums["gradients"]), "exchanges": int(sums["exchanges"]),
            "consensus_distance": self.distance, "peer_bytes": self.peer_bytes,
            "waiting_share": sums["waiting_s"] / spent if spent else None, "segments": self.number,
            "relayed_bytes": self.relaying.bytes or None,
            **{name: int(sums[name]) or None for name in TROUBLES}, **self.strategy.summary_figures(),
        }


def _rest_is_lost(arrived: Sequence[Answer], awaited: Sequence[Node]) -> bool:
    """Say whether all who answered could not reach those who have not: these will not take part any more."""
    if not arrived or len(arrived) < len(awaited):
        return False
    lost = [_lost_of(answer.content) for answer in arrived]
    return all(node.partition in ranks for node in awaited for ranks in lost)


def _lost_of(content: RecordDict) -> set[int]:
    record = content.get(REPLY)
    try:
        return set(json.loads(str(record[ABOUT]))["lost"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        return set()    # it will be refused when it is read
