"""Which way a metric improves."""

# A metric whose name holds one of these words is better when it is smaller.
SMALLER_IS_BETTER = ("loss", "error", "perplexity", "mse", "mae", "gap", "distance", "regret")


def smaller_is_better(metric: str) -> bool:
    """Say whether a metric improves downwards, from its name."""
    return any(word in metric for word in SMALLER_IS_BETTER)


def reaches(metric: str, value: float, target: float) -> bool:
    """Say whether a figure is at least as good as its target."""
    return value <= target if smaller_is_better(metric) else value >= target
