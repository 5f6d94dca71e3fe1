"""The parts of `bench_sim.py`."""
