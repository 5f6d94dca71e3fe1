"""What private synchronous methods have in common: a budget planned in advance, kept, and written down.

Every round each client answers with the mean of its records' clipped vectors plus noise. What the vectors are, and what
the server makes of their mean, distinguishes the methods: each is a `Schedule` and its settings.

A release is charged to every client that is asked, before it is asked: what is lost on the way counts as spent. The run
ends before a release that would pass the budget. A run that resumes from a checkpoint older than its ledger goes by the
ledger, and begins with a restart.
"""
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from flwr.app import RecordDict
from torch import Tensor

from fedcore.errors import InvalidSetting, MalformedReply, UnsupportedModel
from fedcore.hub import Hub
from fedcore.payload import ARRAYS, CONFIG, VectorRecord
from fedcore.privacy.accounting import Release, Spending
from fedcore.privacy.ledger import LEDGER_FILE, Ledger
from fedcore.privacy.mechanism import CENTRAL, DISTRIBUTED, NEIGHBOURING, NOISE_MODES, mean_std, noise
from fedcore.privacy.wire import (
    DIFFERENCE,
    GRADIENT,
    MIXTURE,
    PREVIOUS,
    PRIVATE,
    Ask,
    Contribution,
    digest,
    read_contribution,
)
from fedcore.rounds import RoundStrategy
from fedcore.seeds import torch_generator
from fedcore.strategies.private_plan import BETWEEN, FULL, LOCAL_STEPS, Budget, Schedule, make_budget
from fedcore.strategies.settings import check_choice, check_count, check_number
from fedcore.tasks import Answer, Node, Reply
from fedcore.vectors import Layout, Model

logger = logging.getLogger("fedcore")

# As torch's BatchNorm calls what it keeps.
RUNNING = ("running_mean", "running_var", "num_batches_tracked")
EPSILONS_OF_SAMPLES = 20    # times that a run computes the epsilon of sampled releases, which takes long


def next_estimate(estimate: Tensor | None, mean: Tensor, gradient_weight: float) -> Tensor:
    """Return v: the mean itself in a full round (`estimate` None), else v <- (1 - a) v + mean; shape (d,)."""
    return mean if estimate is None else (1 - gradient_weight) * estimate + mean


def mean_of(messages: Sequence[Tensor]) -> Tensor:
    """Return the equal-weight mean of vectors of shape (d,), summed in order."""
    total = messages[0].clone()
    for message in messages[1:]:
        total += message
    return total / len(messages)


def gradient_step(params: Tensor, estimate: Tensor, server_lr: float) -> Tensor:
    """Return x - eta v, shape (d,)."""
    return params - server_lr * estimate


class PrivateRounds(RoundStrategy):
    """Base of the private methods.

    Args:
        schedule: of the method.
        epsilon: largest epsilon of the whole run, for every single record; or `noise_multiplier`.
        noise_multiplier: z of every release, instead of an epsilon.
        delta: below one over the number of records.
        rounds: R; None: as many as the run has (`stop.rounds`).
        clip_gradient: C1, largest norm of a record's gradient.
        clip_difference: C2, largest norm of a record's gradient difference, over the distance of the two points.
        server_lr: eta, the step size.
        noise_mode: who adds the noise, `local` or `central`.
        neighbouring: `replace-one` or `add-remove`.
    """

    keeps_records_private = True
    no_compression = "What its clients send carries noise, which does not compress."

    def __init__(
        self, schedule: Schedule, epsilon: float | None, noise_multiplier: float | None, delta: float,
        rounds: int | None, clip_gradient: float, clip_difference: float, server_lr: float, noise_mode: str,
        neighbouring: str,
    ):
        if (epsilon is None) == (noise_multiplier is None):
            raise InvalidSetting("epsilon", epsilon, "given, or else noise_multiplier, and not both",
                                 "Each follows from the other. For example epsilon: 3.")
        advice = "epsilon bounds what anybody can learn of one record; values from 0.5 to 10 are usual."
        if epsilon is not None:
            check_number("epsilon", epsilon, above=0, advice=advice)
        if noise_multiplier is not None:
            check_number("noise_multiplier", noise_multiplier, above=0)
        check_number("delta", delta, above=0, below=1, advice="It has to be below one over the number of records.")
        if rounds is not None:
            check_count("rounds", rounds, 1)
        for name, value in (("clip_gradient", clip_gradient), ("clip_difference", clip_difference),
                            ("server_lr", server_lr)):
            check_number(name, value, above=0)
        check_choice("noise_mode", noise_mode, NOISE_MODES)
        if noise_mode == DISTRIBUTED:
            raise InvalidSetting(
                "noise_mode", noise_mode, "local or central",
                "Shares of noise protect only within a secure sum, and Flower's SecAgg+ works with its legacy workflow "
                "alone: the server would see every client's vector with too little noise.",
            )
        check_choice("neighbouring", neighbouring, NEIGHBOURING)
        self.schedule, self.epsilon, self.noise_multiplier, self.delta = schedule, epsilon, noise_multiplier, delta
        self.rounds, self.server_lr = rounds, float(server_lr)
        self.clip_gradient, self.clip_difference = float(clip_gradient), float(clip_difference)
        self.noise_mode, self.neighbouring = noise_mode, neighbouring
        self.previous: Tensor | None = None         # x_{r-1}
        self.estimate: Tensor | None = None         # v; None: the next round is a full one
        self.participants: list[int] = []           # whose gradients are in v
        self.exchanges, self.since_full = 0, 0      # asked for so far; rounds since the last full one
        self.spent: dict[int, Spending] = {}
        self.entries = 0                            # of the ledger, at the last checkpoint
        self.sizes: list[int] = []                  # records of each client at the start
        self.budget: Budget | None = None
        self.ledger = Ledger()

    # ---- the plan ---------------------------------------------------------------------------------------------------

    def check_data(self, sizes: Sequence[int], layout: Layout | None = None) -> None:
        """Raise `InvalidSetting` where delta promises nothing, `UnsupportedModel` for a model that mixes records.

        Args:
            sizes: records of each client.
        """
        total = sum(sizes)
        if self.delta * total >= 1:
            raise InvalidSetting("delta", self.delta, f"below 1/{total}, one over the number of records",
                                 "A mechanism that publishes whole records at random would keep such a promise.")
        for spec in layout.buffers if layout is not None else ():
            if spec.name.endswith(RUNNING):
                raise UnsupportedModel(f"The model keeps BatchNorm statistics ({spec.name}): it mixes the records of a "
                                       "batch, so nothing can be promised about one. Use GroupNorm or LayerNorm.")

    def plan(self, rounds: int, sizes: Sequence[int]) -> Budget:
        """Return how much noise each release needs.

        Args:
            sizes: records of each client.
        """
        return make_budget(self.schedule, rounds, self.local_releases(rounds, sizes), self.epsilon,
                           self.noise_multiplier, self.delta, self.noise_mode, self.neighbouring)

    def local_releases(self, rounds: int, sizes: Sequence[int]) -> int:
        """Return in how many noised local steps of a run one record takes part at most."""
        return 0

    def rounds_of(self, stop_rounds: int | None) -> int:
        """Return R, given how many rounds the run has.

        Raises:
            InvalidSetting: nobody says.
        """
        rounds = self.rounds or stop_rounds
        if rounds is None:
            raise InvalidSetting("rounds", None, "a whole number of at least 1",
                                 "How much noise a budget asks for depends on it. Or give stop.rounds.")
        return rounds

    def begin(self, hub: Hub) -> Budget:
        """Make the plan, check it against the clients that are here, and take up the ledger."""
        if self.budget is not None:
            return self.budget
        # After a restart perhaps not everybody is back, and the plan must stay as it was.
        self.sizes = self.sizes or [node.num_examples for node in hub.nodes]
        self.check_data(self.sizes, hub.model.layout)
        budget = self.plan(self.rounds_of(hub.options.stop.rounds), self.sizes)
        simulated = bool(getattr(hub.grid, "simulated", False))
        folder = hub.recorder.folder
        self.ledger = Ledger(None if folder is None else folder / LEDGER_FILE, durable=not simulated)
        if simulated:
            self.ledger.cut(self.entries)    # what comes after is done again, to the bit
        elif len(self.ledger.entries) > self.entries:
            self._catch_up(hub)
        self.budget = budget
        return budget

    def _catch_up(self, hub: Hub) -> None:
        """Go by a ledger that knows of more releases than the checkpoint did."""
        lost = len(self.ledger.entries) - self.entries
        for entry in self.ledger.entries[self.entries:]:
            release = Release(entry["noise_multiplier"], entry["sample_rate"], entry["times"])
            for partition in entry["clients"]:
                self.spent[partition] = self.spent.get(partition, Spending()).plus(release)
            self.exchanges = max(self.exchanges, entry["exchange"] + 1)
        self.estimate, self.entries = None, len(self.ledger.entries)
        hub.warn(f"The ledger holds {lost} releases that this checkpoint does not know of. They count as spent, and "
                 "the next round asks for full gradients.")

    # ---- a round ----------------------------------------------------------------------------------------------------

    def round(self, hub: Hub, round_index: int) -> None:
        budget = self.begin(hub)
        if self.exchanges >= budget.rounds:
            hub.stop("budget")
            return
        full = self._full_is_due(hub)
        nodes = [node for node in hub.nodes if full or node.partition in self.participants]
        ask = self._ask(hub, budget, full)
        if not self.charge(FULL if full else BETWEEN, [node.partition for node in nodes],
                           Release(ask.noise_multiplier, ask.sample_rate)):
            hub.stop("budget")
            return
        self.exchanges += 1
        answered = self._collect(hub, nodes, ask)
        if not answered or (not full and len(answered) < len(nodes)):
            # Whoever is missing now would be missing from the estimate for ever.
            self.estimate = None
            hub.log(round=round_index + 1, failed_round=True, replies=len(answered), asked=len(nodes),
                    epsilon=self._epsilon(budget))
            hub.give_up_if_hopeless()
            return
        if full:
            self.participants, self.since_full = [reply.node.partition for reply in answered], 0
        self.since_full += 1
        mean, std, clip_norm = self._mean(hub, answered, ask)
        weight = self.schedule.gradient_weight
        estimate = next_estimate(None if full else self.estimate, mean, weight)
        params, used = self.step(hub, estimate, answered)
        if not torch.isfinite(params).all():
            hub.warn("The model is not finite any more: the steps are too long. The last finite one is kept.")
            hub.stop("diverged")
            return
        moved = float((params - hub.model.params).norm())
        self.previous, self.estimate = hub.model.params, estimate
        figures: dict[str, Any] = {"restart": int(full), "clip_norm": clip_norm, "noise_std": std, "moved": moved,
                   "noise_multiplier": ask.noise_multiplier, "epsilon": self._epsilon(budget)}
        hub.publish(params, used, round=round_index + 1, **figures)

    def _full_is_due(self, hub: Hub) -> bool:
        interval, present = self.schedule.interval, {node.partition for node in hub.nodes}
        done = interval is not None and self.since_full >= interval
        return done or self.estimate is None or self.previous is None or not present.issuperset(self.participants)

    def _ask(self, hub: Hub, budget: Budget, full: bool) -> Ask:
        weight, digested = self.schedule.gradient_weight, ""
        kind = GRADIENT if full else MIXTURE if weight else DIFFERENCE
        if not full:
            assert self.previous is not None
            digested = digest(self.previous)
        return Ask(
            budget.terms, self.exchanges, hub.seed, kind, budget.noise[FULL if full else BETWEEN], self.clip_gradient,
            self.clip_difference, 1.0 if full else weight, self.schedule.sample_rate, previous=digested,
        )

    def charge(self, kind: str, partitions: Sequence[int], release: Release) -> bool:
        """Write a release down for every client that will be asked; False where it would pass somebody's budget."""
        assert self.budget is not None
        after = {partition: self.spent.get(partition, Spending()).plus(release) for partition in partitions}
        terms = self.budget.terms
        if not all(spending.within(terms.epsilon, terms.delta) for spending in set_of(after.values())):
            return False
        self.spent |= after
        self.ledger.append({
            "exchange": self.exchanges - (kind == LOCAL_STEPS), "kind": kind, "clients": list(partitions),
            "noise_multiplier": release.noise_multiplier, "sample_rate": release.sample_rate, "times": release.times,
            "mu_squared": max(spending.mu_squared for spending in after.values()),
        })
        self.entries = len(self.ledger.entries)
        return True

    def _collect(self, hub: Hub, nodes: Sequence[Node], ask: Ask) -> list[Reply]:
        """Ask the nodes, those that have lost the previous model a second time, and return what can be used."""
        content = RecordDict({ARRAYS: hub.model_record(), CONFIG: ask.config()})
        found = self.usable(hub, hub.ask(nodes, PRIVATE, content).arrived, ask)
        forgetful = [answer.node for answer, contribution in found if contribution.values is None]
        if forgetful and self.previous is not None:
            previous = VectorRecord(Model(self.previous, hub.model.buffers, hub.model.layout))
            content = RecordDict({ARRAYS: hub.model_record(), PREVIOUS: previous, CONFIG: ask.config()})
            found += self.usable(hub, hub.ask(forgetful, PRIVATE, content).arrived, ask)
        found.sort(key=lambda pair: pair[0].node.partition)
        return [self._reply(hub, answer, contribution) for answer, contribution in found
                if contribution.values is not None]

    def usable(self, hub: Hub, answers: Sequence[Answer], ask: Ask) -> list[tuple[Answer, Contribution]]:
        """Return the answers that pass validation; the others are refused."""
        found = []
        for answer in answers:
            try:
                found.append((answer, read_contribution(answer.content, ask, hub.model.layout)))
            except MalformedReply as error:
                assert answer.task is not None
                hub.refuse(answer.task, error.reason, answer.bytes_up)
        return found

    @staticmethod
    def _reply(hub: Hub, answer: Answer, found: Contribution) -> Reply:
        reply = hub.restore_reply({
            "partition": answer.node.partition, "task_id": answer.task_id, "base_version": hub.version,
            "local_steps": found.metrics["work-steps"], "num_examples": found.metrics["num-examples"],
            "elapsed_s": answer.elapsed_s, "train_seconds": None, "metrics": found.metrics, "buffers": {},
            "values": found.values, "kind": "update", "base": None,
        })
        hub.accept(answer, reply)
        return reply

    def _mean(self, hub: Hub, answered: Sequence[Reply], ask: Ask) -> tuple[Tensor, float, float]:
        """Return the mean message, noised here where the clients did not; the noise's deviation; the clip norm."""
        slope = 0.0
        if self.previous is not None:
            slope = self.clip_difference * float((hub.model.params - self.previous).norm())
        clip_norm = ask.gradient_weight * self.clip_gradient + (1 - ask.gradient_weight) * slope
        # The size that the server learned before the first round: the one it planned with.
        sizes = [ask.sample_rate * reply.node.num_examples for reply in answered]
        std = mean_std(self.noise_mode, ask.noise_multiplier, clip_norm, sizes, self.neighbouring)
        mean = mean_of([reply.values for reply in answered])
        if self.noise_mode == CENTRAL:
            simulated = bool(getattr(hub.grid, "simulated", False))
            generator = torch_generator(hub.seed, "central noise", ask.round) if simulated else None
            mean = mean + noise(std, mean, generator)
        return mean, std, clip_norm

    def step(self, hub: Hub, estimate: Tensor, answered: Sequence[Reply]) -> tuple[Tensor, Sequence[Reply]]:
        """Return the next x, and the replies that it was made from."""
        return gradient_step(hub.model.params, estimate, self.server_lr), answered

    # ---- what was spent ---------------------------------------------------------------------------------------------

    def _epsilon(self, budget: Budget) -> float | None:
        """Return the largest epsilon of any client so far; None where it is not computed this time."""
        if self.schedule.sample_rate < 1 and self.exchanges < budget.rounds:
            if self.exchanges % max(1, budget.rounds // EPSILONS_OF_SAMPLES):
                return None
        return self.spent_epsilon()

    def spent_epsilon(self) -> float:
        """Return the largest epsilon of any client so far."""
        return max((spending.epsilon(self.delta) for spending in set_of(self.spent.values())), default=0.0)

    def summary_figures(self) -> dict[str, float | int | str | None]:
        figures: dict[str, float | int | str | None] = {"epsilon": self.spent_epsilon(), "delta": self.delta}
        if self.budget is not None:
            figures["epsilon_budget"] = self.budget.terms.epsilon
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {
            "previous": self.previous, "estimate": self.estimate, "participants": list(self.participants),
            "exchanges": self.exchanges, "since_full": self.since_full, "entries": self.entries,
            "sizes": list(self.sizes),
            "spent": {partition: spending.state() for partition, spending in self.spent.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("previous", "estimate", "exchanges", "since_full", "entries"):
            setattr(self, name, state[name])
        self.participants, self.sizes = list(state["participants"]), list(state["sizes"])
        self.spent = {partition: Spending.of(spending) for partition, spending in state["spent"].items()}


def set_of(spendings: Any) -> list[Spending]:
    """Return the different ones among spendings: most clients have spent the same."""
    return list({repr(spending.state()): spending for spending in spendings}.values())
