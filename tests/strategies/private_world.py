"""A small private federation: quadratic records with known gradients, and the parts that its tests share."""
import torch
from flwr.app import Context, Message, RecordDict
from torch import Tensor, nn

from fedcore.clients.settings import TrainSettings
from fedcore.clients.torch_client import torch_client
from fedcore.payload import ARRAYS, CONFIG, VectorRecord
from fedcore.privacy.wire import GRADIENT, PRIVATE, Ask, Terms
from fedcore.vectors import Model

DIMENSION, RECORDS = 5, 12
TERMS = Terms(3.0, 1e-3, "local", "replace-one")


class Curved(nn.Module):
    """A one-hidden-unit model without a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.params = nn.Parameter(0.1 * torch.ones(DIMENSION, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(inputs @ self.params)


class Records:
    """A regression of few records at each site."""

    metric_names = ("loss",)

    def __init__(self, replaced: dict[tuple[int, int], float] | None = None, records: int = RECORDS):
        self.replaced, self.records = replaced or {}, records

    def model(self) -> nn.Module:
        return Curved()

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (model(inputs) - targets).square().mean()

    def data(self, site: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(site)
        inputs = torch.randn(self.records, DIMENSION, dtype=torch.float64, generator=draw)
        targets = torch.randn(self.records, dtype=torch.float64, generator=draw)
        for (where, record), value in self.replaced.items():
            if where == site:
                inputs[record], targets[record] = value, -value
        return inputs, targets

    def validation_data(self, site: int) -> None:
        return None

    def labels(self, site: int) -> list[int]:
        return [self.records]

    def metrics(self, model: nn.Module, data: object) -> dict[str, float]:
        return {"loss": 0.0}


def node_context(partition: int = 0, simulated: bool = True, **config: object) -> Context:
    """Return the context of a node with nothing remembered."""
    settings = {"partition-id": partition, **{name.replace("_", "-"): value for name, value in config.items()}}
    if simulated:
        settings["simulated"] = True
    return Context(7, 1000 + partition, settings, RecordDict(), {})  # type: ignore[arg-type]


def client_of(task: object, **options: object) -> object:
    return torch_client(task, TrainSettings(batch_size=4, dtype="float64", device="cpu"), **options)  # type: ignore


def asked(kind: str = GRADIENT, **changes: object) -> Ask:
    """Return a request's settings."""
    settings = {"terms": TERMS, "round": 0, "seed": 0, "kind": kind, "noise_multiplier": 4.0, "clip_gradient": 0.5,
                **changes}
    return Ask(**settings)  # type: ignore[arg-type]


def request(params: Tensor, ask: Ask, **vectors: Tensor) -> Message:
    """Return a request at x, with further vectors by name."""
    model = Model.of(Curved())
    records = {name: VectorRecord(model.replace(values)) for name, values in {ARRAYS: params, **vectors}.items()}
    return Message(RecordDict({**records, CONFIG: ask.config()}), 1000, PRIVATE)


def point(seed: int, scale: float = 1.0) -> Tensor:
    """Return a random parameter vector."""
    return scale * torch.randn(DIMENSION, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def values_of(reply: Message) -> Tensor:
    """Return the vector that a reply brings."""
    return torch.from_numpy(reply.content[ARRAYS]["params"].numpy().copy())
