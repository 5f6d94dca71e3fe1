"""Tuning a small network for a metric that has no gradient: precision, recall, F1 or Jaccard."""
import csv
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn import functional

from fedcore.clients.blackbox import BlackBoxTask
from fedcore.clients.modules import seeded_torch
from fedcore.clients.partitions import Partition, Traits
from fedcore.clients.task import Site
from fedcore.clients.tasks.files import UnreadableData, existing, read_text
from fedcore.errors import BadInput, InvalidSetting
from fedcore.registry import build
from fedcore.seeds import derive_seed, numpy_generator

METRICS = ("precision", "recall", "f1", "jaccard")
# Of the table: to train the network on, to tune it on (the clients'), to test it on.
TRAIN_SHARE, TUNE_SHARE = 0.4, 0.4
TRAIN_LR = 0.01
ADVICE = "Give a CSV file with a header; columns that are no numbers are left out."


@dataclass(frozen=True)
class Table:
    """A table of two classes.

    Attributes:
        features: standardised, shape (rows, columns).
        positive: shape (rows,).
    """

    features: np.ndarray
    positive: np.ndarray

    def rows(self, chosen: np.ndarray) -> "Table":
        """Return some of the rows."""
        return Table(self.features[chosen], self.positive[chosen])


def score(name: str, predicted: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Return a metric of the positive class for each row of predictions; 0 where it is not defined.

    Args:
        predicted: whether an example is called positive, shape (n, examples).
        positive: whether it is, shape (examples,).
    """
    hits = (predicted & positive).sum(1)
    called, there = predicted.sum(1), positive.sum()
    under = {"precision": called, "recall": np.full(len(hits), there), "f1": (called + there) / 2,
             "jaccard": called + there - hits}[name]
    return np.divide(hits, under, out=np.zeros(len(hits)), where=under > 0)


class MetricTuning(BlackBoxTask):
    """Minimise 1 - metric over what is added to the weights of a small network.

    The network (one hidden layer, tanh) may be trained a little by gradient descent on two fifths of a table; two
    fifths are divided among the clients, each of whom measures on its own part; the rest is for testing.

    Args:
        metric: `precision`, `recall`, `f1` or `jaccard`, of the positive class.
        path: a CSV table; None: scikit-learn's breast cancer table, malignant being positive.
        target: its column to predict.
        above: values of the target above this are positive; None: above the median.
        hidden: width of the hidden layer.
        train_steps: of Adam with the whole training part, before the search; 0 leaves the network as it was drawn.
        width: at most so much is added to or taken from each weight.
        partition: of the examples among the clients, by label.
        budget, retries, timeout_s: as for every black box.
    """

    batched = True

    def __init__(
        self, metric: Literal["precision", "recall", "f1", "jaccard"] = "f1", path: Path | None = None,
        target: str | None = None, above: float | None = None, hidden: int = 8, train_steps: int = 0,
        width: float = 1.0, partition: str | dict[str, Any] = "iid", budget: int | None = None, retries: int = 0,
        timeout_s: float | None = None, num_clients: int = 5, seed: int = 0,
    ):
        if metric not in METRICS:
            raise InvalidSetting("metric", metric, f"one of {', '.join(METRICS)}")
        if (path is None) != (target is None):
            raise InvalidSetting("target", target, "given together with path",
                                 "Without both, the breast cancer table is used.")
        for name, value, least in (("hidden", hidden, 1), ("train_steps", train_steps, 0)):
            if value < least:
                raise InvalidSetting(name, value, f"at least {least}")
        if not 0 < width < np.inf:
            raise InvalidSetting("width", width, "a finite number above 0")
        self.metric, self.hidden, self.train_steps, self.width = metric, hidden, train_steps, width
        self.num_clients, self.seed = num_clients, seed
        self.table = breast_cancer() if path is None else read_table(existing(path, "blackbox_metric", ADVICE),
                                                                     str(target), above)
        self.partitioner = build("partitions", partition, "task.partition")
        columns = self.table.features.shape[1]
        super().__init__((columns + 2) * hidden + 1, (-width, width), budget, retries, timeout_s)
        self.metric_names = ("loss", metric, f"test_{metric}")

    def evaluate_many(self, points: np.ndarray, site: Site) -> np.ndarray:
        return 1 - self._score(points, self._part(site))

    def figures(self, point: np.ndarray) -> dict[str, float]:
        """Return the metric on all clients' examples together, and on those that nobody tunes on."""
        return {self.metric: float(self._score(point[None], self._tune)[0]),
                f"test_{self.metric}": float(self._score(point[None], self._test)[0])}

    def _score(self, points: np.ndarray, table: Table) -> np.ndarray:
        return score(self.metric, self._outputs(self._trained + points, table.features) > 0, table.positive)

    def _outputs(self, weights: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Return the networks' outputs, shape (n, examples), for weights of shape (n, dimension)."""
        columns, hidden = features.shape[1], self.hidden
        first, shift, last = np.split(weights[:, :-1], [columns * hidden, (columns + 1) * hidden], axis=1)
        inner = np.tanh(features @ first.reshape(-1, columns, hidden) + shift[:, None])
        return np.asarray((inner @ last[:, :, None])[..., 0] + weights[:, -1:])

    # ---- parts of the table -----------------------------------------------------------------------------------------

    @cached_property
    def _order(self) -> np.ndarray:
        return numpy_generator(0, "metric").permutation(len(self.table.positive))

    def _share(self, start: float, end: float) -> Table:
        count = len(self._order)
        return self.table.rows(self._order[round(start * count):round(end * count)])

    @cached_property
    def _tune(self) -> Table:
        return self._share(TRAIN_SHARE, TRAIN_SHARE + TUNE_SHARE)

    @cached_property
    def _test(self) -> Table:
        return self._share(TRAIN_SHARE + TUNE_SHARE, 1)

    @cached_property
    def _split(self) -> Partition:
        labels = self._tune.positive.astype(np.int64)
        return self.partitioner.split(Traits(len(labels), labels=labels), self.num_clients, self.seed)

    def _part(self, site: Site) -> Table:
        if not isinstance(site, int) or not 0 <= site < self.num_clients:
            raise BadInput(f"The table is divided among clients 0 to {self.num_clients - 1}; there is no {site!r}.")
        return self._tune.rows(np.asarray(self._split[site]))

    @cached_property
    def _trained(self) -> np.ndarray:
        """The network's weights after its short training, shape (dimension,)."""
        table = self._share(0, TRAIN_SHARE)
        features, positive = torch.from_numpy(table.features), torch.from_numpy(table.positive.astype(float))
        columns = features.shape[1]
        with seeded_torch(derive_seed(self.seed, "metric network"), torch.device("cpu")):
            first, last = nn.Linear(columns, self.hidden).double(), nn.Linear(self.hidden, 1).double()
        net = nn.Sequential(first, nn.Tanh(), last)
        optimizer = torch.optim.Adam(net.parameters(), lr=TRAIN_LR)
        with torch.enable_grad():    # whoever evaluates has switched gradients off
            for _ in range(self.train_steps):
                optimizer.zero_grad()
                functional.binary_cross_entropy_with_logits(net(features)[:, 0], positive).backward()
                optimizer.step()
        parts = (first.weight.T, first.bias, last.weight, last.bias)
        return torch.cat([part.detach().reshape(-1) for part in parts]).numpy()


@lru_cache(maxsize=1)
def breast_cancer() -> Table:
    """Return scikit-learn's breast cancer table: 569 tumours, 30 measurements; malignant is positive.

    Source: Street, Wolberg and Mangasarian, 1993, Nuclear feature extraction for breast tumor diagnosis.
    """
    bunch = load_breast_cancer()
    return Table(standardised(bunch.data), bunch.target == 0)


def standardised(columns: np.ndarray) -> np.ndarray:
    """Return columns of mean 0 and deviation 1."""
    deviation = columns.std(0)
    return np.asarray((columns - columns.mean(0)) / np.where(deviation > 0, deviation, 1.0))


@lru_cache(maxsize=4)
def read_table(path: Path, target: str, above: float | None) -> Table:
    """Return a table of a CSV file.

    Raises:
        UnreadableData: the file is no such table.
    """
    rows = list(csv.DictReader(read_text(path).splitlines()))
    if len(rows) < 10 or target not in rows[0]:
        raise UnreadableData(f"{path} has {len(rows)} rows, and column {target!r} is "
                             f"{'there' if rows and target in rows[0] else 'not'}; ten rows are needed. {ADVICE}")
    columns = {name: _numbers([row[name] for row in rows]) for name in rows[0]}
    wanted = columns.pop(target)
    kept = [values for values in columns.values() if values is not None]
    if wanted is None or not kept:
        raise UnreadableData(f"{path}: {target!r} and at least one other column must hold numbers. {ADVICE}")
    return Table(standardised(np.stack(kept, 1)), wanted > (np.median(wanted) if above is None else above))


def _numbers(texts: list[str]) -> np.ndarray | None:
    """Return a column's numbers, empty cells replaced by the median; None for a column that holds something else."""
    try:
        values = np.array([float(text) if text else np.nan for text in texts])
    except (TypeError, ValueError):
        return None
    known = np.isfinite(values)
    return np.where(known, values, np.median(values[known])) if known.any() else None
