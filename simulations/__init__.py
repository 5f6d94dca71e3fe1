"""Virtual time: modelled devices, networks, availability and failures, and the grid on which Flower apps run."""

if __name__ != "fedcore.simulations":
    raise ImportError(
        f"import {__name__} found fedcore's source folder; write `import fedcore.simulations` instead, "
        "so that no class exists twice under two names."
    )
