"""fedcore: federated and decentralized training, in virtual time on one machine or across many, built on Flower.

    import fedcore
    run = fedcore.simulate("experiment.yaml")
    print(run.summary["best_accuracy"])
"""
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedcore.runs import Run
    from fedcore.simulations.run import simulate

__all__ = ["Run", "__version__", "simulate"]
__version__ = "0.1.0"

_HOME = Path(__file__).parent
if not (_HOME / "strategies").is_dir() and (_HOME.parent / "strategies" / "__init__.py").is_file():
    # A checkout keeps the other floors of the house beside this folder; an installed package has them inside.
    __path__.append(str(_HOME.parent))

_LAZY = {"simulate": "fedcore.simulations.run", "Run": "fedcore.runs"}


def __getattr__(name: str) -> object:
    # Importing torch takes seconds: `fedcore --help` must not pay for it.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fedcore' has no attribute {name!r}")
