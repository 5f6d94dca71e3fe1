"""The parts of bench_link.py."""
