"""The discrete-event engine: what holds of any run, and what a run costs."""
import gc
import tracemalloc

import pytest
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.checkpoint import load_tree, save_tree
from fedcore.options import RunOptions, StopRule
from fedcore.simulations.devices import Devices
from fedcore.simulations.grid import VirtualGrid
from fedcore.simulations.network import Network
from tests.support import Adding, Fates, Federation, Intervals, TableDevices, Toy, train_request, vector_model

NODES = 3
MODEL = vector_model()
indices = st.tuples(st.integers(0, NODES - 1), st.integers(0, 3))
moments, ttls = st.sampled_from([0.0, 0.5, 1.0, 4.0]), st.sampled_from([None, 2.0, 5.0])
pushes = st.lists(st.tuples(moments, st.integers(0, NODES - 1), st.integers(1, 4), ttls), min_size=1, max_size=8)
worlds = st.fixed_dictionaries({
    "crashes": st.dictionaries(indices, st.sampled_from([0.1, 0.5]), max_size=2),
    "requests": st.sets(indices, max_size=2), "replies": st.sets(indices, max_size=2),
    "away": st.dictionaries(st.integers(0, NODES - 1), st.tuples(st.sampled_from([0.5, 1.0, 3.0]),
                                                                 st.sampled_from([3.5, 6.0])), max_size=2),
    "lazy": st.booleans(), "shared": st.booleans(), "latency_s": st.sampled_from([0.0, 0.25]),
})


def build(world, fails=(2,)):
    network = Network(world["latency_s"], uplink_mbps=0.004, downlink_mbps=0.008,
                      server_uplink_mbps=0.01 if world["shared"] else None,
                      server_downlink_mbps=0.005 if world["shared"] else None)
    away = {partition: [(0.0, start), (end, 1e9)] for partition, (start, end) in world["away"].items()}
    app = Toy(lazy=world["lazy"], keeps_state=True, fails=fails)
    return VirtualGrid(
        app, NODES, devices=Devices(0.5, jitter=0.3), network=network,
        failures=Fates(world["crashes"], world["requests"], world["replies"]), availability=Intervals(away),
    )


def next_happening(grid, plan):
    """Return what happens next in a plan of pushes; None when nothing can."""
    until = plan[0][0] if plan else None
    event = grid.next_event(until)
    if event is not None and event.kind == "time":
        _, node, steps, ttl = plan.pop(0)
        name = grid.push_messages([train_request(MODEL, 1000 + node, ttl=ttl, **{"local-steps": steps, "draw": 0})])[0]
        return "push", grid.now, node, name
    if event is None:
        return None
    if event.kind != "reply":
        return event.kind, event.at, event.node_id
    message = event.message
    name = message.metadata.reply_to_message_id
    if message.has_error():
        return "error", event.at, event.node_id, name, message.error.code, grid.task_times(name)
    values = message.content["arrays"]["params"].numpy().tobytes()
    return "reply", event.at, event.node_id, name, values, grid.task_times(name)


def happenings(grid, plan, limit=10**6):
    found = []
    while len(found) < limit and (happening := next_happening(grid, plan)) is not None:
        found.append(happening)
    return found


@given(pushes, worlds)
def test_every_message_has_one_answer_and_time_never_runs_backwards(plan, world):
    found = happenings(build(world), sorted(plan, key=lambda push: push[0]))
    times = [happening[1] for happening in found]
    assert times == sorted(times)
    sent = [happening[3] for happening in found if happening[0] == "push" and happening[3] is not None]
    answered = [happening[3] for happening in found if happening[0] in ("reply", "error")]
    assert sorted(sent) == sorted(answered)


@given(pushes, worlds)
def test_the_parts_of_a_task_add_up_and_a_node_does_one_thing_at_a_time(plan, world):
    found = happenings(build(world), sorted(plan, key=lambda push: push[0]))
    pushed = {happening[3]: happening[1] for happening in found if happening[0] == "push"}
    busy = {}
    for happening in found:
        parts = happening[-1] if happening[0] in ("reply", "error") else None
        if parts is not None:
            end = pushed[happening[3]] + sum(parts.values())
            assert end == pytest.approx(happening[1])
            started = end - parts["compute_s"] - parts["upload_s"]
            assert started >= busy.get(happening[2], 0.0) - 1e-9
            busy[happening[2]] = end


@settings(max_examples=40)
@given(pushes, worlds, st.integers(1, 12))
def test_saved_and_loaded_at_any_moment_everything_happens_as_it_would_have(tmp_path_factory, plan, world, cut):
    plan = sorted(plan, key=lambda push: push[0])
    whole = happenings(build(world), list(plan))
    first, rest = build(world), list(plan)
    before = happenings(first, rest, limit=cut)
    path = tmp_path_factory.mktemp("grid") / "state"
    save_tree(path, first.state_dict())
    second = build(world)
    second.load_state_dict(load_tree(path))
    assert before + happenings(second, rest) == whole


@given(pushes, worlds)
def test_lazy_and_eager_clients_take_the_same_time_and_answer_the_same(plan, world):
    plan = sorted(plan, key=lambda push: push[0])
    # Of a client that raises, only an estimate says how long it would have taken.
    lazy, eager = (happenings(build({**world, "lazy": kind}, fails=()), list(plan)) for kind in (True, False))
    assert lazy == eager


# ---- the start of the clock -----------------------------------------------------------------------------------------


def test_the_clock_is_set_to_zero_only_when_nothing_is_under_way():
    grid = VirtualGrid(Toy(), 2, devices=TableDevices([1.0, 9.0]))
    grid.send_and_receive([train_request(MODEL)])
    grid.start_clock()
    assert grid.now == 0.0
    grid.send_and_receive([train_request(MODEL, 1000), train_request(MODEL, 1001, ttl=2.0)])
    assert grid.now == 2.0
    grid.start_clock()
    assert grid.now == 2.0, "node 1 is busy until 9 s, though nobody waits for it"
    (reply,) = grid.send_and_receive([train_request(MODEL, 1001)])
    assert not reply.has_error() and grid.now == 18.0


# ---- what it costs --------------------------------------------------------------------------------------------------


def peak_mb(work):
    """Return by how much memory grew at most during some work, MB, and what was left of it afterwards."""
    gc.collect()
    tracemalloc.start()
    try:
        result = work()
        gc.collect()
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del result
    return peak / 1e6, left / 1e6


def rounds_of(grid, active, rounds, model):
    for turn in range(rounds):
        grid.send_and_receive([train_request(model, 1000 + (turn * active + node) % grid.num_nodes)
                               for node in range(active)])


def test_registered_clients_cost_nothing_until_they_work():
    # 100 active clients whose replies are 4 MB together; 10,000 registered ones with a model each would be 400 MB.
    model = vector_model(10_000)
    app = Toy(layout=model.layout)
    many = VirtualGrid(app, 10_000, devices=TableDevices([1.0]))
    peak, left = peak_mb(lambda: rounds_of(many, 100, 5, model))
    assert peak < 25 and left < 1


@pytest.mark.parametrize("lazy", [True, False])
def test_nothing_is_kept_of_what_has_ended(lazy):
    model = vector_model(10_000)
    app = Toy(lazy=lazy, layout=model.layout)
    grid = VirtualGrid(app, 10, devices=TableDevices([1.0, 2.0]), failures=Fates(replies={(3, 1)}, requests={(4, 1)}))
    rounds_of(grid, 10, 2, model)
    peak, left = peak_mb(lambda: rounds_of(grid, 10, 60, model))
    assert left < 0.3 and peak < 5


def test_a_long_asynchronous_run_keeps_nothing_of_its_past():
    model = vector_model(10_000)
    options = RunOptions(stop=StopRule(client_updates=300))
    run = Federation(Adding(), 10, options, Toy(layout=model.layout), model=model, grid={"devices": Devices(0.1, 0.5)})
    run.notes.rows, run.notes.tasks = [], []

    def work():
        return run.run()

    peak, left = peak_mb(work)
    assert left < 2.0 and peak < 8.0
    hub, engine = run.hub, run.virtual.engine
    assert not hub._by_id and not hub._unread and not engine._times and len(hub._tasks) <= 10


def test_an_app_whose_messages_are_never_pulled_is_its_own_affair():
    app = ClientApp()
    app.query()(lambda message, context: Message(RecordDict(), reply_to=message))
    grid = VirtualGrid(app, 2)
    ids = grid.push_messages([Message(RecordDict(), 1000, "query"), Message(RecordDict(), 1001, "query")])
    grid.pull_messages(ids[:1])
    assert len(grid.pull_messages(ids[1:])) == 1
