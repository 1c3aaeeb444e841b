"""How fast this device is: a dense matmul and a copy in its memory, measured in about two seconds, printed as JSON.

It knows nothing of models and trials: it is the yardstick that a trial's throughput is held against.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

MATMUL_S, COPY_S = 1.5, 0.5  # about, warm-up included
CPU_SHARE = 0.5  # of these on a CPU
WARM_UP = 1 / 3  # of the time, until clocks and caches are as they will be
FEWEST, MOST = 3, 1000  # repeats
SIZES = {"cuda": 8192, "cpu": 1024}  # rows and columns; half of that on a card with little free memory
COPY_BYTES = {"cuda": 2**28, "cpu": 2**27}  # beyond the caches
LITTLE_FREE_BYTES = 2**30


def measure(device: torch.device) -> dict[str, str | int | float]:
    """The device's speed.

    Args:
        device: On a GPU the matmul is in bfloat16, on a CPU in float32, which is what trials are in there.

    Returns:
        device, dtype, size (rows and columns of the matrices), matmul_tflops (10^12 operations a second, a multiply and
        an add being two), copy_gb_per_s (10^9 bytes a second, read and written), seconds.
    """
    started = time.perf_counter()
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    size, copy_bytes, share = SIZES[device.type], COPY_BYTES[device.type], 1.0 if cuda else CPU_SHARE
    if cuda and torch.cuda.mem_get_info(device)[0] < LITTLE_FREE_BYTES:
        size, copy_bytes = size // 2, copy_bytes // 4
    # random numbers: with zeros a card draws less power, and has a higher clock than in training
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    matmul_s = median_s(lambda: torch.mm(a, b, out=c), device, limit_s=share * MATMUL_S)
    source = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = median_s(lambda: target.copy_(source), device, limit_s=share * COPY_S)
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "size": size,
        "matmul_tflops": round(2 * size**3 / matmul_s / 1e12, 4),
        "copy_gb_per_s": round(2 * copy_bytes / copy_s / 1e9, 2),
        "seconds": round(time.perf_counter() - started, 3),
    }


def median_s(work: Callable[[], object], device: torch.device, *, limit_s: float) -> float:
    """Median seconds of a piece of work after a warm-up, by the device's own clock.

    Args:
        work: Starts it.
        device: Where it runs.
        limit_s: About how long all of it may take.
    """
    work()  # kernels are loaded, workspaces made
    _wait(device)
    started, done = time.perf_counter(), 0
    while done < FEWEST or time.perf_counter() - started < WARM_UP * limit_s:
        work()
        _wait(device)
        done += 1
    one_s = (time.perf_counter() - started) / done
    repeats = min(MOST, max(FEWEST, int((1 - WARM_UP) * limit_s / one_s)))
    if device.type == "cuda":
        return _by_events(work, repeats)
    times: list[float] = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _by_events(work: Callable[[], object], repeats: int) -> float:
    """All are started at once, as a training step does it: the card does not wait for the host between two."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in itertools.pairwise(marks)) / 1000


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.gauge", description="Measures this device's speed.")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; default: torch's choice")
    arguments = parser.parse_args()
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        print(
            "gauge: --device cuda: torch sees no CUDA device; use --device cpu or install a CUDA build of torch",
            file=sys.stderr,
        )
        return 2
    if arguments.threads > 0:
        torch.set_num_threads(arguments.threads)
    print(json.dumps(measure(torch.device(name))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
