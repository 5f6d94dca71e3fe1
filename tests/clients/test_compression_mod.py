"""The mod that compresses what a client has learnt: its memory, its wire, and its use in any Flower app."""
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st

from fedcore.clients.compression import compression_mod
from fedcore.clients.settings import TrainSettings
from fedcore.clients.torch_client import torch_client
from fedcore.compressed import ASKED, NEVER, PAYLOAD, Compression, read_compressed
from fedcore.compressing import CompressedGrid
from fedcore.errors import InvalidSetting, MalformedReply, MalformedRequest
from fedcore.payload import ARRAYS, CONFIG, METRICS, VectorRecord, model_from_arrays, wire_bytes
from fedcore.simulations.grid import VirtualGrid
from fedcore.strategies.fedbuff import FedBuff
from tests.support import ForeignGrid, Toy, small_net, vector_model

TOP = Compression({"name": "top_k", "fraction": 0.25})
DIMENSION = 8


def towards(message, context):
    """Train as a stock Flower client does: the trained model comes back, moved by what the request says."""
    config, arrays = message.content[CONFIG], message.content[ARRAYS]
    moved = torch.tensor(config["move"]) if "move" in config else torch.full((DIMENSION,), 0.5)
    trained = torch.from_numpy(arrays["w"].numpy()) + moved
    content = RecordDict({ARRAYS: ArrayRecord({"w": Array(trained.numpy())}),
                          METRICS: MetricRecord({"num-examples": 4})})
    return Message(content, reply_to=message)


@pytest.fixture
def app():
    made = ClientApp()
    made.train(mods=[compression_mod])(towards)
    return made


def new_context():
    return Context(0, 1000, {"partition-id": 0}, RecordDict(), {})


def request(number, after=NEVER, compression=TOP, **config):
    arrays = ArrayRecord({"w": Array(torch.ones(DIMENSION).numpy())})
    content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord(config)})
    layout = model_from_arrays(arrays).layout
    return Message(compression.ask(content, number, after, 0, layout), 1000, "train"), layout


def payload_of(reply):
    return reply.content[ARRAYS][PAYLOAD].numpy().tolist()


moves = st.lists(st.lists(st.floats(-4, 4, width=16), min_size=DIMENSION, max_size=DIMENSION), min_size=1, max_size=5)


@given(moves=moves, name=st.sampled_from(["top_k", "sign", "rand_k", "natural", "qsgd"]))
def test_what_was_sent_and_what_is_remembered_add_up_to_what_was_learnt(moves, name):
    app, context, compression = ClientApp(), new_context(), Compression({"name": name})
    app.train(mods=[compression_mod])(towards)
    total = torch.zeros(DIMENSION)
    for number, move in enumerate(moves):
        message, layout = request(number, number - 1, compression, move=move)
        reply = app(message, context)
        total += read_compressed(reply.content[ARRAYS], compression.codec(layout), layout)[0]
    remembered = context.state["fedcore.compression.after"]["error"].numpy()
    assert torch.allclose(total + torch.from_numpy(remembered), torch.tensor(moves).sum(0), atol=1e-3)


def test_a_request_that_comes_twice_is_answered_with_the_same_bytes(app):
    context = new_context()
    first = request(3)[0]
    assert payload_of(app(first, context)) == payload_of(app(first, context))
    second = request(5, 3, move=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])[0]
    assert payload_of(app(second, context)) == payload_of(app(second, context))


def test_a_task_that_the_server_did_not_use_is_forgotten(app):
    lossy, clean = new_context(), new_context()
    for context in (lossy, clean):
        app(request(0)[0], context)
    app(request(1, 0, move=[9.0] + [0.0] * 6 + [8.0])[0], lossy)
    third = request(2, 0)[0]
    assert payload_of(app(third, lossy)) == payload_of(app(third, clean))


def test_a_client_that_has_forgotten_begins_with_nothing_left_out(app):
    fresh = payload_of(app(request(7)[0], new_context()))
    assert payload_of(app(request(7, 6)[0], new_context())) == fresh


def test_requests_that_ask_for_nothing_are_left_alone(app):
    content = RecordDict({ARRAYS: ArrayRecord({"w": Array(torch.ones(DIMENSION).numpy())}), CONFIG: ConfigRecord()})
    reply = app(Message(content, 1000, "train"), new_context())
    assert list(reply.content[ARRAYS]) == ["w"] and ASKED not in reply.content


@pytest.mark.parametrize("change", [
    {"compressor": "{"}, {"compressor": '{"name": "os:system"}'}, {"number": "x"}, {"after": 1.5},
    {"error-feedback": 1}, {"buffers": "w"}, {"buffers": ["w"]},
])
def test_a_request_without_meaning_is_refused_by_name(app, change):
    message = request(0)[0]
    message.content[ASKED] = ConfigRecord({**message.content[ASKED], **change})
    with pytest.raises(MalformedRequest):
        app(message, new_context())


def test_mods_of_the_users_see_what_was_trained():
    seen = []

    def watching(message, context, call_next):
        assert len(message.content.config_records) == 1
        reply = call_next(message, context)
        seen.extend(reply.content[ARRAYS])
        return reply

    app = ClientApp()
    app.train(mods=[compression_mod, watching])(towards)
    app(request(0)[0], new_context())
    assert seen == ["w"]


@pytest.mark.parametrize("spec", ["top_k", "rand_k", "sign", "qsgd", "natural", "power_sgd", "identity"])
@pytest.mark.parametrize("kind", ["update", "model"])
def test_the_size_of_a_reply_is_known_before_it_is_computed(spec, kind):
    class Task:
        metric_names = ()

        def model(self):
            return small_net()

        def loss(self, model, inputs, targets):
            return (model(inputs) - targets).square().mean()

        def data(self, site):
            return torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.ones(6, 2)

    app = torch_client(Task(), TrainSettings(batch_size=4, local_steps=3, device="cpu"))
    arrays = VectorRecord(model_from_arrays(ArrayRecord(small_net().state_dict())))
    asked = Compression({"name": spec})
    content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({"reply": kind, "task-id": 4, "version": 1})})
    plain = RecordDict({ARRAYS: ArrayRecord(small_net().state_dict()), CONFIG: content[CONFIG]})
    layout = app.client.flat.layout    # the frozen entry is not compressed
    for body in (plain, RecordDict({**content, ARRAYS: VectorRecord(layout.split(small_net().state_dict()))})):
        message = Message(asked.ask(body, 4, NEVER, 0, layout), 1000, "train")
        estimate = app.estimate(message, new_context())
        reply = app(message, new_context())
        assert estimate.reply_bytes == wire_bytes(reply.content)
        assert estimate.work_steps == reply.content[METRICS]["work-steps"]


# ---- in an app of one's own -----------------------------------------------------------------------------------------


def start(grid, rounds=3):
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    return strategy.start(grid, ArrayRecord({"w": Array(torch.ones(DIMENSION).numpy())}), num_rounds=rounds)


def values_of(result):
    return torch.from_numpy(result.arrays["w"].numpy())


def test_flowers_own_fedavg_compresses_through_a_grid(app):
    everything = start(CompressedGrid(VirtualGrid(app, 3), "identity"))
    assert torch.allclose(values_of(everything), torch.full((DIMENSION,), 2.5))
    some = start(CompressedGrid(VirtualGrid(app, 3), {"name": "top_k", "fraction": 0.25}))
    # Two of eight values are sent each round, the largest first: what was left out comes later.
    assert sorted(values_of(some).tolist()) == [1.0, 1.0, 1.5, 1.5, 2.0, 2.0, 2.5, 2.5]


def test_a_client_without_the_mod_is_an_error_reply():
    plain = ClientApp()
    plain.train()(towards)
    result = start(CompressedGrid(VirtualGrid(plain, 3)), rounds=1)
    assert not result.train_metrics_clientapp and not result.arrays


def test_a_reply_of_another_task_is_an_error_reply(app):
    grid = CompressedGrid(VirtualGrid(app, 3), "identity")
    with pytest.raises(MalformedReply, match="task 5, not 6"):
        message, layout = request(5)
        grid.compression.open(app(message, new_context()).content, 6, "update", layout, None)


def test_our_strategies_take_the_grid_too():
    model = vector_model(40)
    toy, sizes = Toy(lazy=False, layout=model.layout), {}
    inner = toy()
    for compressor in ("identity", {"name": "top_k", "fraction": 0.05}):
        client = ClientApp()
        client.train(mods=[compression_mod])(inner)
        client.query()(inner)
        grid = ForeignGrid(client, {0: [11, 12, 13]}, patience=1)
        replies, answer = [], grid._answer
        grid._answer = lambda message, answer=answer, replies=replies: replies.append(answer(message)) or replies[-1]
        strategy = FedBuff(buffer_size=2)
        result = strategy.start(CompressedGrid(grid, compressor), ArrayRecord(model.state_dict()), num_rounds=2)
        assert result.arrays["params"].numpy().any()
        sizes[str(compressor)] = max(wire_bytes(reply.content) for reply in replies)
    assert min(sizes.values()) < max(sizes.values())


def test_a_grid_refuses_a_compressor_that_diverges():
    with pytest.raises(InvalidSetting, match="error_feedback: false"):
        CompressedGrid(VirtualGrid(Toy(), 2), {"name": "qsgd", "scaling": "unbiased"})
