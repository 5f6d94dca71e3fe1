"""Settings that are right one by one and wrong together."""
from collections.abc import Mapping
from typing import Any

from fedcore.config import Experiment, name_of
from fedcore.errors import BadInput, InvalidSetting
from fedcore.schema import nearest

# Flower's wrappers that rely on the clients for the norm of what they send.
CLIPPED_BY_CLIENTS = ("dp_client_fixed_clipping", "dp_client_adaptive_clipping")


def contradictions(experiment: Experiment, task: Any, strategy: Any) -> list[BadInput]:
    """Return what cannot be meant, or would make the run wait forever.

    Args:
        task, strategy: as built from the settings; None where they could not be built.
    """
    found = [*_training(experiment), *_ending(experiment), *_evaluating(experiment, task)]
    found += [*_taking_part(experiment, strategy), *_compressing(experiment, strategy)]
    found += [*_only_evaluating(experiment, task, strategy), *_keeping_private(experiment, strategy)]
    return [*found, *_suiting(task, strategy), *_hosting(experiment, strategy)]


def _hosting(experiment: Experiment, strategy: Any) -> list[BadInput]:
    """Refuse segments of broken steps."""
    segment = experiment.peers.segment
    if segment != int(segment) and not getattr(strategy, "by_time", True):
        return [InvalidSetting("peers.segment", segment, f"a whole number of steps with {experiment.strategy_name}")]
    return []


def _training(experiment: Experiment) -> list[BadInput]:
    train = experiment.train
    if train.local_steps is not None and train.local_epochs is not None:
        return [InvalidSetting(
            "train.local_epochs", train.local_epochs, f"left out when train.local_steps={train.local_steps} is given",
            "Both say how long a client trains.",
        )]
    return []


def _ending(experiment: Experiment) -> list[BadInput]:
    stop, rule, found = experiment.stop, experiment.round, list[BadInput]()
    if stop.target and not stop.has_limit:
        found.append(InvalidSetting(
            "stop.target", stop.target, "accompanied by a limit",
            "A run that never reaches it would never end. Add stop.seconds, stop.rounds or stop.client_updates.",
        ))
    if rule.min_replies_share < 1 and rule.deadline_s is None:
        found.append(InvalidSetting(
            "round.min_replies_share", rule.min_replies_share, "1, or round.deadline_s must be given",
            "Without a deadline a round waits for every reply.",
        ))
    return found


def _evaluating(experiment: Experiment, task: Any) -> list[BadInput]:
    rule, target, found = experiment.evaluate, experiment.stop.target, list[BadInput]()
    if rule.where == "none" and target:
        found.append(InvalidSetting(
            "evaluate.where", "none", "server or clients", f"The target {dict(target)} has to be measured by somebody."
        ))
    if rule.unit == "versions" and rule.every != int(rule.every):
        found.append(InvalidSetting(
            "evaluate.every", rule.every, "a whole number of versions",
            "Or count in seconds, with evaluate.unit: seconds.",
        ))
    if rule.where == "server" and task is not None and not hasattr(task, "test_data") and not _is_black_box(task):
        found.append(InvalidSetting(
            "evaluate.where", "server", "clients or none",
            f"The task {experiment.task_name} has no test_data() for a server.",
        ))
    reported = getattr(task, "metric_names", None)
    if isinstance(reported, (tuple, list)):
        for metric in target.keys() - set(reported):
            found.append(InvalidSetting(
                f"stop.target.{metric}", target[metric], f"a target for {' or '.join(reported) or 'nothing'}",
                f"The task {experiment.task_name} reports no {metric}. {nearest(metric, reported)}".rstrip(),
            ))
    if "accuracy" in target and not 0 <= target["accuracy"] <= 1:
        found.append(InvalidSetting(
            "stop.target.accuracy", target["accuracy"], "a number from 0 to 1", "93 % is written 0.93."
        ))
    return found


def _taking_part(experiment: Experiment, strategy: Any) -> list[BadInput]:
    """Ask our strategies; Flower's wait until as many nodes are there as they were told to."""
    count, found = experiment.clients.count, list[BadInput]()
    try:
        getattr(strategy, "check_clients", lambda _: None)(count)
    except InvalidSetting as error:
        found.append(error if error.name.startswith("clients.") else error.under("strategy"))
    except BadInput as error:
        found.append(error)
    given = experiment.strategy if isinstance(experiment.strategy, dict) else {}
    for name in ("min_available_nodes", "min_train_nodes"):
        needed = getattr(strategy, name, None)
        if isinstance(needed, int) and needed > count:
            where = f"strategy.{name}" if name in given else "clients.count"
            value, allowed = (needed, f"at most {count}") if name in given else (count, f"at least {needed}")
            found.append(InvalidSetting(
                where, value, allowed,
                f"{experiment.strategy_name} would wait forever: {name} is {needed}, and there are {count} clients.",
            ))
            break
    return found


def _only_evaluating(experiment: Experiment, task: Any, strategy: Any) -> list[BadInput]:
    """Keep methods that only evaluate to tasks that can only be evaluated."""
    if task is None or strategy is None:
        return []
    if getattr(strategy, "needs_black_box", False) == _is_black_box(task):
        try:
            getattr(strategy, "check_dimension", lambda _: None)(getattr(task, "dimension", 0))
        except InvalidSetting as error:
            return [error.under("strategy")]
        return []
    if _is_black_box(task):
        return [InvalidSetting(
            "strategy", experiment.strategy_name, "fzoos, fedzo, fedprox_zo, scaffold_zo_1 or scaffold_zo_2",
            f"The task {experiment.task_name} can only be evaluated: it has no gradient.")]
    return [InvalidSetting(
        "task", experiment.task_name, "blackbox, blackbox_quadratics, blackbox_metric or blackbox_attack",
        f"{experiment.strategy_name} trains no model: it searches a function that can only be evaluated.")]


def _suiting(task: Any, strategy: Any) -> list[BadInput]:
    """Ask strategies that do not suit every task."""
    if task is None or strategy is None:
        return []
    try:
        getattr(strategy, "check_task", lambda _: None)(task)
    except InvalidSetting as error:
        return [error.under("strategy")]
    return []


def _is_black_box(task: Any) -> bool:
    return hasattr(task, "dimension") and any(hasattr(task, name) for name in ("evaluate", "evaluate_many"))


def _compressing(experiment: Experiment, strategy: Any) -> list[BadInput]:
    if experiment.compression is None or strategy is None:
        return []
    name = experiment.strategy_name
    reason = getattr(strategy, "no_compression", "")
    if name in CLIPPED_BY_CLIENTS:
        reason = "What a client adds from its memory is not clipped, so the noise would not protect it."
    if reason:
        return [InvalidSetting("compression", experiment.compression, f"left out with {name}", reason)]
    try:
        getattr(strategy, "check_compression", lambda *_: None)(experiment.compression, experiment.clients.count)
    except BadInput as error:
        return [error]
    return []


def _keeping_private(experiment: Experiment, strategy: Any) -> list[BadInput]:
    """Ask a strategy that promises privacy whether anything else of the run would break the promise."""
    if not getattr(strategy, "keeps_records_private", False):
        return []
    found = list[BadInput]()
    if experiment.evaluate.where == "clients":
        found.append(InvalidSetting(
            "evaluate.where", "clients", "server or none",
            f"What clients measure on their records is a release that the budget of {experiment.strategy_name} does "
            "not pay for.",
        ))
    if hasattr(strategy, "rounds_of"):
        try:
            strategy.rounds_of(experiment.stop.rounds)
        except InvalidSetting as error:
            found.append(error.under("strategy"))
    return found


def doubts(experiment: Experiment, given: Mapping[str, Any], task: Any, strategy: Any) -> list[str]:
    """Return warnings: what is allowed, but has no effect or probably another one than was meant.

    Args:
        given: what the file says, before defaults.
    """
    found = []
    name = experiment.strategy_name
    steps_given = {"local_steps", "local_epochs"} & _keys(given, "train")
    if steps_given and hasattr(strategy, "rules") and hasattr(strategy.rules, "max_local_steps"):
        found.append(f"train.{steps_given.pop()} has no effect: {name} chooses every client's local steps itself.")
    if steps_given and hasattr(strategy, "inner_steps"):
        found.append(f"train.{steps_given.pop()} has no effect: {name} has a setting of its own, strategy.inner_steps.")
    found += getattr(strategy, "doubts", lambda _: [])(experiment)
    waits = experiment.round.deadline_s is not None or experiment.round.min_replies_share < 1
    if waits and _is_event_driven(strategy):
        found.append(f"round.deadline_s and round.min_replies_share have no effect: {name} has no rounds to wait for.")
    partition = name_of(experiment.clients.partition)
    if partition != "iid" and task is not None and not hasattr(task, "training_data"):
        found.append(f"clients.partition: {partition} has no effect: the task {experiment.task_name} says itself who "
                     "has what.")
    if experiment.evaluate.where == "none":
        found.append("Nobody evaluates the model (evaluate.where: none), so the report will show no accuracy.")
    planned, ends = getattr(strategy, "rounds", None), experiment.stop.rounds
    if isinstance(planned, int) and ends is not None and ends != planned and hasattr(strategy, "rounds_of"):
        found.append(f"strategy.rounds={planned} and stop.rounds={ends} differ: the noise is for {planned} rounds, and "
                     "the run ends with the fewer of the two.")
    if (size := getattr(strategy, "buffer_size", None)) is not None and size > experiment.clients.count:
        found.append(f"strategy.buffer_size={size} is more than the {experiment.clients.count} clients: each version "
                     "waits for several updates of the same client.")
    return found


def _keys(given: Mapping[str, Any], section: str) -> set[str]:
    found = given.get(section)
    return set(found) if isinstance(found, Mapping) else set()


def _is_event_driven(strategy: Any) -> bool:
    from fedcore.events import EventStrategy

    return isinstance(strategy, EventStrategy)
