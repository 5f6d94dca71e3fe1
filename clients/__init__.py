"""What runs where the data is: tasks, local training and the ClientApps."""

if __name__ != "fedcore.clients":
    raise ImportError(
        f"This package is fedcore.clients, but was imported as {__name__!r}: every class in it would exist twice. "
        "Write for example: from fedcore.clients.torch_client import torch_client"
    )
