"""A plain Flower app: handwritten digits."""
