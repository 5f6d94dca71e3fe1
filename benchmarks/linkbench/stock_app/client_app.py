"""A client that moves bytes and computes nothing, as a stock Flower app."""
from functools import cache

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@cache
def model(size: int) -> ArrayRecord:
    """Return an array of `size` bytes; made once in a process."""
    return ArrayRecord({"weight": Array(np.full(size // 4, 1e-3, np.float32))})


@app.train("noop")
def noop(message: Message, context: Context) -> Message:
    """Answer at once."""
    return Message(RecordDict(), reply_to=message)


@app.train("down")
def down(message: Message, context: Context) -> Message:
    """Take a model."""
    message.content["arrays"]["weight"].numpy()
    return Message(RecordDict(), reply_to=message)


@app.train("up")
def up(message: Message, context: Context) -> Message:
    """Give a model."""
    return Message(RecordDict({"arrays": model(int(message.content["config"]["size"]))}), reply_to=message)
