"""The clients' side of the black-box methods: from a request and what is remembered to an answer."""
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context

from fedcore.arrays import LazyArray
from fedcore.clients.blackbox_request import Asked, Outcome
from fedcore.errors import InvalidSetting, MalformedRequest
from fedcore.seeds import numpy_generator
from fedcore.strategies.black_box import DESCEND, PROBE, SURROGATE
from fedcore.strategies.finite_differences import DifferenceDescent, Differences, descend_by_differences, estimate
from fedcore.strategies.gaussian_process import likeliest_lengthscale, median_lengthscale
from fedcore.strategies.random_features import Features
from fedcore.strategies.surrogates import Correction, Descent, History, Search, ask_around, descend, finish, surrogate

QUERIES, OWN, OWN_ROUND = "fedcore.blackbox.history", "fedcore.blackbox.own", "fedcore.blackbox.own-round"
LEFT, LEFT_ROUND = "fedcore.blackbox.left", "fedcore.blackbox.left-round"
Settings = TypeVar("Settings", Search, Differences)


def settings_of(asked: Asked, kind: type[Settings]) -> Settings:
    """Return a method's settings.

    Raises:
        MalformedRequest: they have no meaning to this client.
    """
    known = {entry.name for entry in fields(kind)}
    if asked.settings.keys() != known:
        raise MalformedRequest(f"The request's settings are {sorted(asked.settings)}; this client knows "
                               f"{sorted(known)}.")
    try:
        return kind(**asked.settings)
    except InvalidSetting as error:
        raise MalformedRequest(f"The request's settings cannot be used: {error}") from error


def generator_of(asked: Asked, purpose: str) -> np.random.Generator:
    """Return the random numbers of one round of one client."""
    return numpy_generator(asked.request.seed, asked.request.partition, purpose, asked.round)


# ---- what is remembered -------------------------------------------------------------------------------------------


def read_history(context: Context, dimension: int) -> History:
    """Return the queries that a client remembers."""
    record = context.state.get(QUERIES)
    if not isinstance(record, ArrayRecord):
        return History.empty(dimension)
    return History(record["points"].numpy(), record["values"].numpy())


def write_history(context: Context, history: History) -> None:
    """Remember queries."""
    write_vectors(context, QUERIES, points=history.points, values=history.values)


def write_vectors(context: Context, key: str, **vectors: np.ndarray) -> None:
    """Remember arrays under one name."""
    record = ArrayRecord()
    for name, values in vectors.items():
        record[name] = LazyArray(values)
    context.state[key] = record


def remember(context: Context, key: str, values: np.ndarray, label: Mapping[str, Any]) -> None:
    """Remember a vector, and what it belongs to."""
    write_vectors(context, key, values=values)
    context.state[f"{key}-round"] = ConfigRecord(dict(label))


def recall(context: Context, key: str, round_index: int) -> tuple[np.ndarray, Mapping[str, Any]] | None:
    """Return the vector that is remembered of a round, and what it belongs to; None where there is none."""
    record, label = context.state.get(key), context.state.get(f"{key}-round")
    if not isinstance(record, ArrayRecord) or not isinstance(label, ConfigRecord) or label.get("round") != round_index:
        return None
    return record["values"].numpy().astype(float), dict(label.items())


# ---- FZooS --------------------------------------------------------------------------------------------------------


def features_of(asked: Asked, search: Search) -> Features:
    """Return the feature map that all clients of the run share."""
    lengthscale = asked.entry("lengthscale", float)
    if not 0 < lengthscale < np.inf:
        raise MalformedRequest(f"The request's lengthscale is {lengthscale}, but must be above 0.")
    return Features(asked.request.seed, search.features, len(asked.point), lengthscale)


def label_of(features: Features, round_index: int) -> dict[str, Any]:
    """Return what weights belong to: they mean something to those only who share all of it."""
    return {"round": round_index, "seed": features.seed, "features": features.count,
            "lengthscale": features.lengthscale}


def correction_of(asked: Asked, search: Search, features: Features) -> Correction | None:
    """Return gamma_t (h(w, x) - h(w_i, x)); None in a round for which this client has no weights of its own.

    Raises:
        MalformedRequest: the weights belong to other features than this client's.
    """
    lengths = asked.entry("corrections", list)
    if len(lengths) != search.local_iterations or not all(0 <= length <= 1 for length in lengths):
        raise MalformedRequest("The request's corrections are not one number from 0 to 1 for each local iteration.")
    if asked.extra is None:
        return None
    if len(asked.extra) != features.count:
        raise MalformedRequest(f"The request brings {len(asked.extra)} weights, but speaks of {features.count} "
                               "features.")
    weights_round = asked.entry("weights_round", int)
    own = recall(asked.context, OWN, weights_round)
    if own is None:
        return None    # never mix rounds: the difference would be biased
    weights, label = own
    if label != label_of(features, weights_round):
        raise MalformedRequest(f"The request's features are {label_of(features, weights_round)}, but this client's "
                               f"weights belong to {label}.")
    difference = asked.extra - weights
    return lambda t, point: lengths[t] * features.gradient(difference, point)


def descend_on_surrogate(asked: Asked) -> Outcome:
    """Answer `train.descend` of FZooS: T local iterations along the Gaussian process's gradient."""
    search = settings_of(asked, Search)
    features = features_of(asked, search)
    correction = correction_of(asked, search, features)
    generator = generator_of(asked, "descend")
    history, start_value, extra = read_history(asked.context, len(asked.point)), float("nan"), None
    both = asked.entry("surrogate", bool)
    if not len(history):
        # Where both exchanges are one, the start itself is asked a moment later.
        history, start_value = ask_around(asked.oracle, history, asked.point, search, generator, with_centre=not both)
    if both:
        left = recall(asked.context, LEFT, asked.round - 1)
        history, start_value = finish(asked.oracle, history, asked.point, None if left is None else left[0], search,
                                      features.lengthscale, generator)
        extra = kept_weights(asked, search, features, history)
    state = Descent(history, asked.point, record=asked.task.gradient is not None)
    descend(asked.oracle, state, search, features.lengthscale, generator, correction)
    history = state.history.newest(search.memory)
    write_history(asked.context, history)
    remember(asked.context, LEFT, state.point, {"round": asked.round})
    figures = {**errors_of(asked, state), "value": start_value, "flat_steps": state.flat_steps,
               "history": len(history)}
    if proposal := asked.entry("proposal", str):
        figures["lengthscale"] = proposed(proposal, history, state.point, search)
    return Outcome(asked.moved(state.point), extra, **figures)


def proposed(rule: str, history: History, point: np.ndarray, search: Search) -> float:
    """Return the lengthscale that fits a client's queries best."""
    names = history.nearest(point, search.nearest)
    points, values = history.points[names], history.values[names]
    if len(names) < 2:
        return float("nan")
    if rule == "median":
        return median_lengthscale(points)
    return likeliest_lengthscale(points, values, search.noise) if np.ptp(values) > 0 else float("nan")


def finish_round(asked: Asked) -> Outcome:
    """Answer `train.surrogate`: query the server's new point and around it, and send the surrogate."""
    search = settings_of(asked, Search)
    features = features_of(asked, search)
    history = read_history(asked.context, len(asked.point))
    left = recall(asked.context, LEFT, asked.round)
    history, value = finish(asked.oracle, history, asked.point, None if left is None else left[0], search,
                            features.lengthscale, generator_of(asked, "finish"))
    extra = kept_weights(asked, search, features, history)
    write_history(asked.context, history.newest(search.memory))
    return Outcome(extra=extra, value=value, history=len(history))


def kept_weights(asked: Asked, search: Search, features: Features, history: History) -> torch.Tensor | None:
    """Compute the weights w_i, remember them as they are sent, and return them; None where nobody wants them."""
    if not asked.entry("weights", bool):
        return None
    if not len(history):
        raise MalformedRequest("This client has no query to make a surrogate of.")
    weights = asked.sent(surrogate(history, asked.point, features, search))
    remember(asked.context, OWN, weights.numpy(), label_of(features, asked.round))
    return weights


# ---- finite differences -------------------------------------------------------------------------------------------


def probe(asked: Asked) -> Outcome:
    """Answer `train.probe`: the estimate at the received point, remembered as it is sent."""
    settings = settings_of(asked, Differences)
    settings.check_dimension(len(asked.point))
    found, value = estimate(asked.oracle, asked.point, settings, generator_of(asked, "probe"))
    control = asked.sent(found)
    remember(asked.context, OWN, control.numpy(), {"round": asked.round})
    return Outcome(control, value=value)


def descend_on_differences(asked: Asked) -> Outcome:
    """Answer `train.descend` of the finite-difference methods."""
    settings = settings_of(asked, Differences)
    settings.check_dimension(len(asked.point))
    control = None
    own = recall(asked.context, OWN, asked.entry("control_round", int))
    if asked.extra is not None and own is not None:
        if asked.extra.shape != asked.point.shape:
            raise MalformedRequest("The request's control variate has another dimension than this client's task.")
        control = asked.extra - own[0]
    state = DifferenceDescent(asked.point)
    descend_by_differences(asked.oracle, state, settings, generator_of(asked, "descend"), control)
    extra = None
    if settings.control == "previous":
        extra = asked.sent(state.mean_estimate)
        remember(asked.context, OWN, extra.numpy(), {"round": asked.round})
    figures = {**errors_of(asked, state), "value": state.start_value, "flat_steps": state.flat_steps}
    return Outcome(asked.moved(state.point), extra, **figures)


def errors_of(asked: Asked, state: Descent | DifferenceDescent) -> dict[str, float]:
    """Return how far estimates were from the truth, relative to it, where the task knows it."""
    task, figures = asked.task, dict[str, float]()
    width = task.box.high - task.box.low
    for name, known, estimates in (("surrogate_error", task.gradient, state.local),
                                   ("gradient_error", task.mean_gradient, state.used)):
        if known is None or not estimates:
            continue
        arguments = (asked.request.site,) if name == "surrogate_error" else ()
        errors = []
        for point, found in zip(state.visited, estimates, strict=True):
            truth = known(task.box.from_unit(point), *arguments) * width
            errors.append(np.linalg.norm(found - truth) / max(np.linalg.norm(truth), np.finfo(float).tiny))
        figures[name] = float(np.mean(errors))
    return figures


METHODS: dict[tuple[str, str], Callable[[Asked], Outcome]] = {
    (Search.__name__, DESCEND): descend_on_surrogate,
    (Search.__name__, SURROGATE): finish_round,
    (Differences.__name__, PROBE): probe,
    (Differences.__name__, DESCEND): descend_on_differences,
}
