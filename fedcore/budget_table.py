"""The budget table of an experiment, as `fedcore privacy` prints it."""
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedcore.config import load_experiment
from fedcore.errors import BadInput
from fedcore.privacy.accounting import Release, Spending
from fedcore.privacy.mechanism import mean_std
from fedcore.privacy.words import ADVERSARIES, NOT_PROTECTED, RELATIONS, meaning
from fedcore.terminal import make_console, pairs, plain_spaces, table

OTHER_EPSILONS = (0.5, 1.0, 3.0, 5.0, 8.0)
MOMENTS = 5     # of a run for which the spending is shown
WIDTH = 100


def show_budget(file: Path, overrides: Sequence[str]) -> None:
    """Print what a run will spend.

    Raises:
        BadInput: the experiment cannot be run, or its strategy promises nothing about single records.
    """
    from fedcore.clients.build import build_task, client_sizes

    experiment = load_experiment(file, overrides)
    strategy: Any = experiment.build_strategy()
    if not hasattr(strategy, "plan") or not getattr(strategy, "keeps_records_private", False):
        raise BadInput(f"{experiment.strategy_name} promises no privacy for single records, so there is no budget to "
                       "show. Use diff2, dp_gd, dp_sgd or dp_srm.")
    sizes = client_sizes(build_task(experiment), experiment.clients.count)
    rounds = min(strategy.rounds_of(experiment.stop.rounds), experiment.stop.rounds or strategy.rounds)
    budget = strategy.plan(strategy.rounds_of(experiment.stop.rounds), sizes)
    terms, sampled = budget.terms, strategy.schedule.sample_rate < 1
    console = make_console()
    facts = [("promise", f"({terms.epsilon:.6g}, {terms.delta:g})-differential privacy of {experiment.strategy_name} "
                         f"over {budget.rounds} rounds"),
             ("for whom", f"every single record of the {len(sizes)} clients, {sum(sizes):,} records in all"),
             ("against whom", ADVERSARIES[terms.noise_mode]),
             ("neighbours", RELATIONS[terms.neighbouring])]
    console.print(pairs([(name, plain_spaces(text)) for name, text in facts]))
    for text in (meaning(terms.epsilon, terms.delta, sampled), NOT_PROTECTED):
        console.print("\n" + textwrap.fill(text, WIDTH), markup=False, soft_wrap=True)
    console.print()
    console.print(table("Releases about each client", ("what", "times", "noise multiplier", "clip norm C",
                                                        "noise on the mean"), _releases(strategy, budget, sizes),
                        right=(1, 2, 4)))
    console.print()
    console.print(table("Spent", ("after round", "epsilon"), _moments(strategy, budget, rounds, sizes), right=(0, 1)))
    if strategy.epsilon is not None and not sampled:    # finding noise for samples takes long
        console.print()
        console.print(table("Other budgets", ("epsilon", "noise multipliers"),
                            _others(strategy, budget.rounds, sizes), right=(0,)))


def _releases(strategy: Any, budget: Any, sizes: Sequence[int]) -> list[list[str]]:
    from fedcore.strategies.private_plan import BETWEEN, FULL, LOCAL_STEPS

    full, between = strategy.schedule.counts(budget.rounds)
    local = strategy.local_releases(budget.rounds, sizes)
    weight, slope = strategy.schedule.gradient_weight, f"{strategy.clip_difference:g} |x - x'|"
    mixed = f"{weight:g} x {strategy.clip_gradient:g} + {1 - weight:g} x {slope}" if weight else slope
    clips = {FULL: (full, f"{strategy.clip_gradient:g}"), BETWEEN: (between, mixed),
             LOCAL_STEPS: (local, "clip_local |y - y'|")}
    names = {FULL: "gradients", BETWEEN: "mixtures" if weight else "differences", LOCAL_STEPS: "local steps"}
    rows = []
    for kind, (times, clip) in clips.items():
        if times:
            z = budget.noise[kind]
            drawn = [strategy.schedule.sample_rate * size for size in sizes]
            unit = mean_std(budget.terms.noise_mode, z, 1.0, drawn, budget.terms.neighbouring)
            std = "in every step" if kind == LOCAL_STEPS else f"{unit:.3g} C"
            rows.append([names[kind], f"{times:,}", f"{z:.6g}", clip, std])
    return rows


def _moments(strategy: Any, budget: Any, rounds: int, sizes: Sequence[int]) -> list[list[str]]:
    from fedcore.strategies.private_plan import BETWEEN, FULL, LOCAL_STEPS

    rows = []
    for done in sorted({max(1, round(rounds * part / MOMENTS)) for part in range(1, MOMENTS + 1)} | {1}):
        full, between = strategy.schedule.counts(done)
        spent = Spending().plus(Release(budget.noise[FULL], strategy.schedule.sample_rate, full))
        if between:
            spent = spent.plus(Release(budget.noise[BETWEEN], 1.0, between))
        if local := strategy.local_releases(done, sizes):
            spent = spent.plus(Release(budget.noise[LOCAL_STEPS], 1.0, local))
        rows.append([f"{done:,}", f"{spent.epsilon(budget.terms.delta):.6g}"])
    return rows


def _others(strategy: Any, rounds: int, sizes: Sequence[int]) -> list[list[str]]:
    own, rows = strategy.epsilon, []
    for epsilon in sorted({*OTHER_EPSILONS, own}):
        strategy.epsilon = epsilon
        noise = strategy.plan(rounds, sizes).noise
        rows.append([f"{epsilon:g}", ", ".join(f"{kind} {value:.4g}" for kind, value in noise.items())])
    strategy.epsilon = own
    return rows
