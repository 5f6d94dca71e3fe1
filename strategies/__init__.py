"""Published algorithms, one file each: `from fedcore.strategies.fedcompass import FedCompass`."""

if __name__ != "fedcore.strategies":
    raise ImportError(
        f"This package is fedcore.strategies, but was imported as {__name__!r}: every class in it would exist twice. "
        "Write for example: from fedcore.strategies.fedbuff import FedBuff"
    )
