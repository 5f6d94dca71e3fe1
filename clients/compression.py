"""The client's side of compressed training, as a Flower mod: for our clients, and for those of any Flower app.

    app = ClientApp()

    @app.train(mods=[compression_mod])
    def train(message, context): ...

It acts only on requests that ask for it, and stands before every other mod: those see the model as it was trained.
With error feedback a client adds to what it has learnt whatever its earlier payloads left out: with delta = trained
minus received, it sends C(e + delta), and e <- e + delta - C(e + delta).

Source: Seide et al., 2014, in the form of Stich et al., 2018, arXiv:1809.07599, with a model update for the gradient.
"""
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from fedcore.clients import memory
from fedcore.compressed import ASKED, NEVER, Asked, learnt, seal
from fedcore.compression.base import unsent_share
from fedcore.flower import with_id
from fedcore.payload import read_arrays, single_record
from fedcore.seeds import torch_generator

# Where a client keeps what its payloads left out.
MEMORY, ERROR = "fedcore.compression", "error"


def compression_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Let a client's training reply carry a compressed update, where the request asks for one.

    Raises:
        MalformedRequest: what the request asks has no meaning here.
        NotFinite: the update cannot be compressed.
    """
    asked = Asked.of(message.content)
    if asked is None:
        return call_next(message, context)
    arrays = single_record(message.content, ArrayRecord, "arrays")
    layout = asked.layout(arrays)
    codec = asked.codec(layout)
    received, _ = read_arrays(arrays, layout)    # before anybody trains on them in place
    # Flower's mods for training expect one record of configuration.
    rest = RecordDict({name: record for name, record in message.content.items() if name != ASKED})
    reply = call_next(with_id(message, rest, message.metadata.message_id), context)
    if reply.has_error():
        return reply
    before = None
    if asked.error_feedback and asked.after != NEVER:
        before = memory.recall(context, MEMORY, asked.after)
    vector = learnt(reply.content, received, layout)
    if before is not None and before[ERROR].shape == vector.shape and before[ERROR].dtype == vector.dtype:
        vector = before[ERROR] + vector
    else:
        before = None
    who = context.node_config.get("partition-id", context.node_id)
    payload = codec.encode(vector, torch_generator(asked.seed, str(who), "compress update", asked.number))
    sent = codec.decode(payload)
    if asked.error_feedback:
        memory.keep(context, MEMORY, before, asked.after, {ERROR: vector - sent}, asked.number)
    reply.content = seal(reply.content, asked, payload, unsent_share(vector, sent), layout)
    return reply
