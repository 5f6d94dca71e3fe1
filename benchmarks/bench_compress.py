"""Time compressors beside `torch.topk` and a copy: encode and decode of one vector, the best of a few tries.

Seconds are of the processor, on one thread, so that other work on the machine disturbs little. The last column is the
most memory that either needed beyond vector and payload, its result included, in copies of the vector (Linux only).

    python benchmarks/bench_compress.py [--size 25000000] [--tries 3] [--only top_k,sign]
"""
import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from fedcore.compression.base import Codec
from fedcore.registry import build, names

FRACTION = 0.01


def best_of(tries: int, work: Callable[[], object]) -> float:
    """Return the least processor seconds of several tries."""
    times = []
    for _ in range(tries):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def peak_of(work: Callable[[], object]) -> int | None:
    """Return by how many bytes the process grew at most while something ran; None where the system does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")    # begins to measure the largest resident set anew
    before = _resident(status, "VmRSS")
    work()
    return _resident(status, "VmHWM") - before


def _resident(status: Path, name: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line for each compressor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=25_000_000, help="values in the vector")
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--only", default=",".join(names("compressors")), help="names of compressors")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    vector = torch.randn(options.size, generator=torch.Generator().manual_seed(0))
    side = int(options.size**0.5)
    shapes = [(side, side), (options.size - side * side,)]
    copy_s = best_of(options.tries, vector.clone)
    topk_s = best_of(options.tries, lambda: torch.topk(vector.abs(), max(1, int(FRACTION * options.size))))
    print(f"{'':12}{'encode_s':>10}{'decode_s':>10}{'both/topk':>11}{'both/copy':>11}{'bytes/value':>13}"
          f"{'extra':>8}")
    print(f"{'copy':12}{copy_s:10.3f}")
    print(f"{'torch.topk':12}{topk_s:10.3f}{'':10}{1:11.2f}{topk_s / copy_s:11.1f}")
    for name in options.only.split(","):
        spec = {"name": name, "fraction": FRACTION} if name in ("top_k", "rand_k") else name
        codec = build("compressors", spec).codec(shapes, torch.float32)
        generator = torch.Generator().manual_seed(0)
        payload = codec.encode(vector, generator)
        encode_s = best_of(options.tries, partial(codec.encode, vector, generator))
        decode_s = best_of(options.tries, partial(codec.decode, payload))
        both = encode_s + decode_s
        print(f"{name:12}{encode_s:10.3f}{decode_s:10.3f}{both / topk_s:11.2f}{both / copy_s:11.1f}"
              f"{codec.num_bytes / options.size:13.3f}{extra_of(codec, vector, payload, generator):>8}")


def extra_of(codec: Codec, vector: torch.Tensor, payload: torch.Tensor, generator: torch.Generator) -> str:
    """Return the peak of extra memory of encoding and decoding, in copies of the vector."""
    peaks = [peak_of(partial(codec.encode, vector, generator)), peak_of(partial(codec.decode, payload))]
    known = [peak for peak in peaks if peak is not None]
    return f"{max(known) / (vector.numel() * vector.itemsize):.1f}" if known else "?"


if __name__ == "__main__":
    main()
