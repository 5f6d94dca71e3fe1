"""How a run learns who its simulated nodes are: without messages where their app can say it."""
import logging

from fedcore.clients.settings import TrainSettings
from fedcore.clients.tasks.simulated import Simulated
from fedcore.clients.torch_client import torch_client
from fedcore.options import RunOptions, StopRule
from fedcore.vectors import Model
from tests.support import Adding, Federation, Toy

UPDATES = RunOptions(stop=StopRule(client_updates=9))


class Counted:
    """Wraps a ClientApp, and counts its messages by type."""

    def __init__(self, app):
        self.app, self.types = app, []

    def attach(self):
        inner = type(self.app).__call__

        def call(app, message, context):
            self.types.append(message.metadata.message_type)
            return inner(app, message, context)

        self.app.__class__ = type("CountedApp", (type(self.app),), {"__call__": call})
        return self.app


def simulated_federation(app, clients=3):
    return Federation(Adding(), clients, UPDATES, app, Model.of(Simulated(20).model()))


def test_an_app_that_describes_its_nodes_is_sent_no_query():
    counted = Counted(torch_client(Simulated(20, examples=7), TrainSettings()))
    run = simulated_federation(counted.attach()).run()
    assert set(counted.types) == {"train"}
    assert [(node.partition, node.num_examples) for node in run.hub.nodes] == [(0, 7), (1, 7), (2, 7)]


def test_a_node_is_the_same_whether_it_was_asked_or_described():
    asked = torch_client(Simulated(20, examples=7), TrainSettings())
    asked.describe = None
    by_message = simulated_federation(asked).run()
    described = simulated_federation(torch_client(Simulated(20, examples=7), TrainSettings())).run()
    assert by_message.hub.nodes == described.hub.nodes
    assert by_message.session.clients == described.session.clients
    assert by_message.strategy.diary == described.strategy.diary
    assert by_message.notes.rows == described.notes.rows
    assert [{**row, "task": row["task"] - 3} for row in by_message.notes.tasks] == described.notes.tasks


def test_a_description_counts_as_the_nodes_task_as_a_query_does():
    indices = []

    class Devices:
        def compute_seconds(self, partition, task_index, work_steps):
            indices.append((partition, task_index))
            return 1.0

    app = torch_client(Simulated(20), TrainSettings())
    Federation(Adding(), 2, RunOptions(stop=StopRule(client_updates=2)), app, Model.of(Simulated(20).model()),
               grid={"devices": Devices()}).run()
    assert indices[:2] == [(0, 1), (1, 1)]


def test_a_description_that_fails_is_asked_for_by_message():
    class Broken(Simulated):
        def __init__(self):
            super().__init__(20)
            self.calls = 0

        @property
        def examples(self):
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("the disk is asleep")
            return 5

        @examples.setter
        def examples(self, value):
            pass

    run = simulated_federation(torch_client(Broken(), TrainSettings())).run()
    assert [(node.partition, node.num_examples) for node in run.hub.nodes] == [(0, 5), (1, 5), (2, 5)]


def test_clients_that_know_no_query_are_admitted_without_a_word(caplog):
    with caplog.at_level(logging.WARNING, "fedcore"):
        run = Federation(Adding(), 3, UPDATES, Toy(has_query=False)).run()
    assert [(node.partition, node.num_examples) for node in run.hub.nodes] == [(0, 1), (1, 1), (2, 1)]
    assert run.hub.counts["failures"] == 0 and not run.notes.of("failure")
    assert not caplog.records


def test_a_thousand_nodes_are_found_by_partition_and_listed_in_order():
    run = simulated_federation(torch_client(Simulated(20), TrainSettings()), clients=1000)
    run.session.open()
    hub = run.hub
    assert [node.partition for node in hub.nodes] == list(range(1000))
    assert hub.nodes is hub.nodes
    gone = hub.remove_node(hub.nodes[17].id)
    assert hub.node_of(17) is None and gone not in hub.nodes and len(hub.nodes) == 999
    hub.add_nodes([(gone, "update,model")])
    assert hub.node_of(17) is gone and hub.nodes[17] is gone


