"""House prices from a CSV file, made up here."""
import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcore.clients.evaluation import evaluate_model
from fedcore.clients.modules import initial_model
from fedcore.clients.partitions import ByKey, Dirichlet, Iid
from fedcore.clients.task import PartitionedTask
from fedcore.clients.tasks.files import UnreadableData
from fedcore.clients.tasks.tables import NUMBERS, PROXIMITIES, PROXIMITY, TARGET, Housing
from fedcore.errors import InvalidSetting, MissingData


def rows(count: int = 40) -> list[dict[str, object]]:
    generator = np.random.default_rng(0)
    found = []
    for number in range(count):
        figures = generator.uniform(1, 9, len(NUMBERS)).round(3).tolist()
        row: dict[str, object] = dict(zip(NUMBERS, figures, strict=True))
        row |= {"longitude": -120.5 + number % 4, TARGET: 1e5 * (1 + number % 5), PROXIMITY: PROXIMITIES[number % 5]}
        row["latitude"] = 35.5
        found.append(row)
    return found


def write(path: Path, table: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return path


def test_features_are_standardised_over_the_training_examples(tmp_path):
    task = Housing(write(tmp_path / "housing.csv", rows(200)))
    inputs, targets = task.training_data().batch(torch.arange(160))
    varying = [column for column, name in enumerate(NUMBERS) if name != "latitude"]
    assert torch.allclose(inputs[:, varying].mean(0), torch.zeros(7), atol=1e-5)
    assert torch.allclose(inputs[:, varying].std(0, correction=0), torch.ones(7), atol=1e-4)
    assert (inputs[:, 1] == 0).all()      # a constant column carries nothing, and divides by nothing
    assert (inputs[:, 8:].sum(1) == 1).all()
    assert set(targets.tolist()) == {1.0, 2.0, 3.0, 4.0, 5.0}
    assert len(task.test_data()) == 40


def test_a_missing_number_of_bedrooms_becomes_the_median(tmp_path):
    table = rows(200)
    for row in table[::7]:
        row["total_bedrooms"] = ""
    inputs, _ = Housing(write(tmp_path / "housing.csv", table)).training_data().batch(torch.arange(160))
    values, counts = inputs[:, 4].unique(return_counts=True)
    imputed = values[counts.argmax()]
    assert torch.isfinite(inputs).all() and counts.max() > 10
    assert (inputs[:, 4] < imputed).sum() == pytest.approx((inputs[:, 4] > imputed).sum(), abs=2)


@pytest.mark.parametrize(("key", "owners"), [("degree", 4), ("ocean_proximity", 5)])
def test_regions_are_natural_clients(tmp_path, key, owners):
    pool = Housing(write(tmp_path / "housing.csv", rows(200)), key=key)
    assert len(np.unique(pool.traits().keys)) == owners
    task = PartitionedTask(pool, ByKey(), num_clients=owners)
    features = [task.data(site).batch(torch.arange(len(task.data(site))))[0] for site in range(owners)]
    columns = slice(0, 1) if key == "degree" else slice(8, 13)
    assert all(len(part[:, columns].unique(dim=0)) == 1 for part in features)
    assert task.labels(0) is None


def test_prices_have_no_classes(tmp_path):
    task = PartitionedTask(Housing(write(tmp_path / "housing.csv", rows())), Dirichlet(1.0), num_clients=2)
    with pytest.raises(InvalidSetting, match="no classes"):
        task.data(0)


def test_errors_are_measured(tmp_path):
    task = PartitionedTask(Housing(write(tmp_path / "housing.csv", rows())), Iid(), num_clients=2)
    model = initial_model(task, 0)
    zero = model.replace(torch.zeros_like(model.params))
    targets = task.test_data().all_targets()
    figures = evaluate_model(task, zero)
    assert figures == pytest.approx({"loss": targets.square().mean().item(), "mae": targets.mean().item()})


@pytest.mark.parametrize(("column", "value", "words"), [
    ("population", "", "line 4: population is ''"),
    ("population", "many", "line 4: population is 'many'"),
    ("population", "nan", "line 4: population is 'nan'"),
    (TARGET, "inf", "line 4: median_house_value is 'inf'"),
    (PROXIMITY, "MOON", "line 4: ocean_proximity is 'MOON'"),
])
def test_a_value_that_makes_no_sense_is_refused_with_its_line(tmp_path, column, value, words):
    table = rows()
    table[2][column] = value
    with pytest.raises(UnreadableData, match=words):
        Housing(write(tmp_path / "housing.csv", table)).training_data()


@pytest.mark.parametrize(("content", "words"), [
    ("", "no column 'longitude'"), ("a,b\n1,2\n", "no column 'longitude'"),
    (",".join((*NUMBERS, TARGET, PROXIMITY)) + "\n", "0 districts"),
    (",".join((*NUMBERS, TARGET, PROXIMITY)) + "\n1,2\n", "line 2: housing_median_age is None"),
])
def test_a_file_of_something_else_is_refused(tmp_path, content, words):
    (tmp_path / "housing.csv").write_text(content)
    with pytest.raises(UnreadableData, match=words):
        Housing(tmp_path / "housing.csv").training_data()


def test_wrong_settings_are_refused(tmp_path):
    with pytest.raises(MissingData, match="set task.path.*longitude"):
        Housing().training_data()
    with pytest.raises(InvalidSetting, match="key='county'"):
        Housing(write(tmp_path / "housing.csv", rows()), key="county")
