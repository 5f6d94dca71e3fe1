"""What a server asks of a client's private records, and what the client answers.

    train.diff2   "arrays" x, "config" as `Ask.config` writes it, "previous" and "direction" where they are needed
                  -> "arrays" the noised vector in the model's layout, "metrics", "reply"

The reply says nothing else that was computed from a record: no loss, no time, and the work that was to be expected.
"""
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedcore.errors import MalformedReply, MalformedRequest
from fedcore.payload import ARRAYS, CONFIG, REPLY, check_finite, read_arrays, read_num_examples, single_record
from fedcore.privacy.mechanism import NEIGHBOURING, NOISE_MODES
from fedcore.vectors import Layout

# The message type, and the action that a ClientApp registers for it.
PRIVATE, ACTION = "train.diff2", "diff2"
PREVIOUS, DIRECTION, KNOWS_PREVIOUS, ROUND = "previous", "direction", "knows-previous", "round"
GRADIENT, DIFFERENCE, MIXTURE, STEPS = KINDS = ("gradient", "difference", "mixture", "steps")


def digest(*vectors: Tensor) -> str:
    """Return a short name of some vectors' bits."""
    state = blake2b(digest_size=16)
    for vector in vectors:
        state.update(vector.contiguous().numpy().tobytes())
    return state.hexdigest()


@dataclass(frozen=True)
class Terms:
    """What holds for a whole run, and what a client holds the server to.

    Attributes:
        epsilon, delta: of everything that is released about one client's records.
        noise_mode, neighbouring: see `fedcore.privacy.mechanism`.
    """

    epsilon: float
    delta: float
    noise_mode: str
    neighbouring: str


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        terms: of the run.
        round: exchanges that this run had before; noise in simulations is drawn by it.
        kind: `gradient`; `difference` to the previous x; `mixture` of both; local `steps`.
        noise_multiplier: z.
        clip_gradient: C1, largest norm of a record's gradient.
        clip_difference: C2, largest norm of a record's difference, over the distance of the two x.
        gradient_weight: a, of the gradient in a mixture.
        sample_rate: q, with which each record takes part.
        num_steps, batch_size, step_size: K, b and eta of local steps.
        previous: digest of the previous x; empty where it does not matter.
    """

    terms: Terms
    round: int
    seed: int
    kind: str
    noise_multiplier: float
    clip_gradient: float
    clip_difference: float = 1.0
    gradient_weight: float = 1.0
    sample_rate: float = 1.0
    num_steps: int = 1
    batch_size: int = 1
    step_size: float = 0.0
    previous: str = ""

    def config(self) -> ConfigRecord:
        """Return it as a message carries it."""
        fields = asdict(self)
        fields |= fields.pop("terms")
        return ConfigRecord({name.replace("_", "-"): value for name, value in fields.items()})

    @classmethod
    def of(cls, message: Message) -> "Ask":
        """Read a request.

        Raises:
            MalformedRequest: an entry is missing, or lies outside its range.
        """
        record = message.content.get(CONFIG)
        if not isinstance(record, ConfigRecord):
            raise MalformedRequest(f"The request has no {CONFIG!r}.")
        config: dict[str, Any] = {name.replace("-", "_"): value for name, value in record.items()}
        for name in ("noise_multiplier", "clip_gradient", "clip_difference", "epsilon"):
            _require(config, name, above=0)
        _require(config, "delta", above=0, below=1)
        _require(config, "sample_rate", above=0, at_most=1)
        _require(config, "gradient_weight", at_least=0, at_most=1)
        _require(config, "step_size", at_least=0)
        for name, least in (("round", 0), ("seed", 0), ("num_steps", 1), ("batch_size", 1)):
            _require(config, name, at_least=least, whole=True)
        for name, allowed in (("kind", KINDS), ("noise_mode", NOISE_MODES), ("neighbouring", NEIGHBOURING)):
            if config.get(name) not in allowed:
                raise MalformedRequest(f"The request's {name} is {config.get(name)!r}, but must be one of "
                                       f"{', '.join(allowed)}.")
        if not isinstance(config.get("previous"), str):
            raise MalformedRequest("The request does not say what came before it.")
        terms = Terms(*(config[name] for name in Terms.__dataclass_fields__))
        return cls(terms, **{name: config[name] for name in cls.__dataclass_fields__ if name != "terms"})


def _require(
    config: Mapping[str, Any], name: str, *, above: float = -math.inf, at_least: float = -math.inf,
    below: float = math.inf, at_most: float = math.inf, whole: bool = False,
) -> None:
    value = config.get(name)
    kinds = (int,) if whole else (int, float)
    fits = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not (above < value < below and at_least <= value <= at_most):  # type: ignore[operator]
        raise MalformedRequest(f"The request's {name} is {value!r}, which is not usable.")


@dataclass(frozen=True)
class Contribution:
    """A client's answer that passed validation.

    Attributes:
        values: the noised vector, shape (d,); None when the client asks for the previous x first.
        metrics: as they came.
    """

    values: Tensor | None
    metrics: dict[str, Any]


def read_contribution(content: RecordDict, asked: Ask, layout: Layout) -> Contribution:
    """Validate an answer.

    Raises:
        MalformedReply: a record is missing, a value is not finite, or it answers something else.
    """
    metrics: dict[str, Any] = dict(single_record(content, MetricRecord, "metrics").items())
    read_num_examples(metrics)
    work = metrics.get("work-steps")
    if not isinstance(work, int) or work < 0:
        raise MalformedReply(f"the metrics' work-steps is {work!r}, which is no number of steps")
    said = content.get(REPLY)
    if not isinstance(said, ConfigRecord) or said.get(ROUND) != asked.round:
        raise MalformedReply(f"it does not say that it answers round {asked.round}")
    if said.get(KNOWS_PREVIOUS) is False:
        return Contribution(None, metrics)
    values, _ = read_arrays(single_record(content, ArrayRecord, ARRAYS), layout)
    check_finite(values, {})
    return Contribution(values, metrics)
