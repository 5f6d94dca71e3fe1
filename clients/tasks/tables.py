"""House prices in California from a local CSV file: regression, with regions as natural clients."""
import csv
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcore.clients.data import Dataset, Samples
from fedcore.clients.evaluation import regression_metrics
from fedcore.clients.models import build_model, check_model
from fedcore.clients.partitions import Traits
from fedcore.clients.tasks.files import UnreadableData, existing, read_text
from fedcore.errors import InvalidSetting
from fedcore.seeds import numpy_generator

NUMBERS = (
    "longitude", "latitude", "housing_median_age", "total_rooms", "total_bedrooms", "population", "households",
    "median_income",
)
TARGET, PROXIMITY = "median_house_value", "ocean_proximity"
PROXIMITIES = ("<1H OCEAN", "INLAND", "ISLAND", "NEAR BAY", "NEAR OCEAN")
NUM_FEATURES = len(NUMBERS) + len(PROXIMITIES)
MAY_BE_MISSING = ("total_bedrooms",)
TARGET_UNIT = 100_000.0
TEST_SHARE = 0.2
KEYS = ("degree", PROXIMITY)
ADVICE = (
    f"Give the California housing data as CSV with a header: {', '.join((*NUMBERS, TARGET, PROXIMITY))} "
    "(housing.csv of Geron's handson-ml repository)."
)


class Housing:
    """Median house value of a district, in units of 100,000 dollars, from eight figures and its place.

    Figures are standardised with the training examples' mean and deviation; a missing `total_bedrooms` becomes their
    median; `ocean_proximity` becomes five indicators. A fifth of the districts, always the same, is for testing.

    Args:
        path: the CSV file.
        key: what partition `by_key` keeps together: `degree` (a square of one degree) or `ocean_proximity`.
        model: name of the model, alone or under `name` among its settings.

    Source: Pace and Barry, 1997, Sparse spatial autoregressions (1990 census).
    """

    metric_names: tuple[str, ...] = ("loss", "mae")

    def __init__(
        self, path: Path | None = None, key: Literal["degree", "ocean_proximity"] = "degree",
        model: str | dict[str, Any] = "mlp",
    ):
        if key not in KEYS:
            raise InvalidSetting("key", key, " or ".join(KEYS))
        check_model(model, (NUM_FEATURES,), 1)
        if path is not None:    # a server, and a client with a site of its own, do without
            existing(path, "housing", ADVICE)
        self._path, self._key, self._model = path, key, model

    def model(self) -> nn.Module:
        """Return a fresh model of the 13 features, with one output."""
        return build_model(self._model, (NUM_FEATURES,), 1)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error of a batch."""
        return functional.mse_loss(model(inputs).reshape(targets.shape), targets)

    def metrics(self, model: nn.Module, data: Dataset) -> Mapping[str, float]:
        """Return mean squared and mean absolute error."""
        return regression_metrics(model, data)

    def training_data(self, site: str | None = None) -> Samples:
        """Return the training districts of the pool, or of a site's own file."""
        return self._load(site)[0]

    def test_data(self, site: str | None = None) -> Samples:
        """Return the test districts of the pool, or of a site's own file."""
        return self._load(site)[1]

    def traits(self) -> Traits:
        """Return the regions of the training districts."""
        keys = self._load(None)[2][self._key]
        return Traits(len(keys), keys=keys)

    def _load(self, site: str | None) -> tuple[Samples, Samples, dict[str, np.ndarray]]:
        return _read(existing(self._path if site is None else Path(site), "housing", ADVICE))


@lru_cache(maxsize=4)
def _read(path: Path) -> tuple[Samples, Samples, dict[str, np.ndarray]]:
    figures, prices, proximity = parse(path)
    order = numpy_generator(0, "housing").permutation(len(prices))
    num_test = int(TEST_SHARE * len(order))
    test, train = order[:num_test], order[num_test:]
    cells = np.floor(figures[train][:, :2])
    keys = {
        "degree": np.unique(cells, axis=0, return_inverse=True)[1].reshape(-1),
        PROXIMITY: proximity[train],
    }
    figures = standardised(figures, train)
    inputs = torch.from_numpy(np.concatenate((figures, np.eye(len(PROXIMITIES))[proximity]), axis=1).astype(np.float32))
    targets = torch.from_numpy((prices / TARGET_UNIT).astype(np.float32))
    return Samples(inputs[train], targets[train]), Samples(inputs[test], targets[test]), keys


def standardised(figures: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Return columns of mean 0 and deviation 1 over the rows `train`, missing values replaced by their median there."""
    figures = np.where(np.isnan(figures), np.nanmedian(figures[train], axis=0), figures)
    deviation = figures[train].std(axis=0)
    return (figures - figures[train].mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)


def parse(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return figures, shape (rows, 8), with NaN where one is missing; prices in dollars; numbers of the proximities.

    Raises:
        UnreadableData: a column is missing, or a value makes no sense.
    """
    rows = csv.DictReader(read_text(path).splitlines())
    missing = [name for name in (*NUMBERS, TARGET, PROXIMITY) if name not in (rows.fieldnames or ())]
    if missing:
        raise UnreadableData(f"{path} has no column {missing[0]!r}. {ADVICE}")
    figures, prices, proximity = [], [], []
    for number, row in enumerate(rows, start=2):
        where = f"{path}, line {number}"
        figures.append([_number(row[name], name, where) for name in NUMBERS])
        prices.append(_number(row[TARGET], TARGET, where))
        if row[PROXIMITY] not in PROXIMITIES:
            raise UnreadableData(f"{where}: {PROXIMITY} is {row[PROXIMITY]!r}; known are {', '.join(PROXIMITIES)}.")
        proximity.append(PROXIMITIES.index(row[PROXIMITY]))
    if len(prices) < 2:
        raise UnreadableData(f"{path} has {len(prices)} districts; two are needed at least.")
    return np.array(figures), np.array(prices), np.array(proximity)


def _number(text: str | None, name: str, where: str) -> float:
    if not text and name in MAY_BE_MISSING:
        return float("nan")
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise UnreadableData(f"{where}: {name} is {text!r}, which is no number.")
    return value
