"""Facts of a trial beside its score: size of the model, throughput against the card's peak, memory, start."""

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

_wall_clock = time.time  # taken now: a candidate may replace the module's function later

# Dense bf16 TFLOPS with float32 accumulation. What is often quoted for the GeForce cards is with sparsity, or with
# float16 accumulation.
PEAK_BF16_TFLOPS = {
    "RTX 3060": 25.5,
    "RTX 3070": 40.6,
    "RTX 3080": 59.5,
    "RTX 3090": 71.0,
    "RTX 4060 Ti": 44.1,
    "RTX 4070": 58.3,
    "RTX 4080": 97.5,
    "RTX 4090": 165.2,
    "RTX 5090": 209.5,
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100": 989.5,
    "H200": 989.5,
    "L4": 121.0,
    "A10G": 70.0,
}


def parameters_of(model: Any) -> int:
    """How many numbers the model has."""
    return sum(p.numel() for p in model.parameters())


def shape_of(model: Any) -> tuple[int | None, int]:
    """Layers (the model's own `depth`, else its longest ModuleList) and width (of its first embedding; 1 if none)."""
    modules = list(model.modules())
    lists = [len(m) for m in modules if isinstance(m, torch.nn.ModuleList)]
    widths = [m.embedding_dim for m in modules if isinstance(m, torch.nn.Embedding)]
    depth = getattr(model, "depth", None)
    return (depth if isinstance(depth, int) else max(lists, default=None)), (widths or [1])[0]


def flops_per_token(model: Any) -> float:
    """Of forward and backward: what the model says of itself, else six for each weight of a matrix product."""
    told = getattr(model, "flops_per_token", None)
    if isinstance(told, int | float):
        return float(told)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    return 6.0 * sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in tables)


def peak_tflops(card: str) -> float | None:
    """Dense bf16 TFLOPS of a card by NVIDIA's name of it; None when it is not in the table."""
    for name, tflops in PEAK_BF16_TFLOPS.items():
        if re.search(rf"\b{name}\b(?! (Ti|SUPER|Laptop|D)\b)", card):
            return tflops
    return None


def measured_tflops() -> float | None:
    """What a matmul reached on this slot when it was set up (`trainer.gauge`), as the worker says; None unless it does.

    It is in RAYSEARCH_MATMUL_TFLOPS, in 10^12 operations a second.
    """
    try:
        tflops = float(os.environ["RAYSEARCH_MATMUL_TFLOPS"])
    except (KeyError, ValueError):
        return None
    return tflops if 0 < tflops < float("inf") else None


def memory_mb(device: torch.device) -> dict[str, float]:
    """Peak memory: reserved by torch, in use by this process as the driver sees it, and of the process on the host."""
    import resource  # noqa: PLC0415  # POSIX alone

    unit = 2**20 if sys.platform == "darwin" else 2**10
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if device.type != "cuda":
        return {"peak_vram_mb": 0.0, "reserved_mb": 0.0, "peak_rss_mb": round(host, 1)}
    reserved = torch.cuda.max_memory_reserved() / 2**20
    return {
        "peak_vram_mb": round(max(reserved, _driver_memory_mb(device)), 1),
        "reserved_mb": round(reserved, 1),
        "peak_rss_mb": round(host, 1),
    }


def _driver_memory_mb(device: torch.device) -> float:
    """What NVML says that this process holds; 0 when it cannot say (no library, another pid namespace)."""
    found = nvml_of(device)
    if found is None:
        return 0.0
    nvml, handle = found
    try:
        mine = [p for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
        return sum(p.usedGpuMemory or 0 for p in mine) / 2**20
    except nvml.NVMLError:
        return 0.0


def nvml_of(device: torch.device) -> tuple[Any, Any] | None:
    """The module pynvml and its handle of the device, by the card's UUID; None when there is no such thing."""
    try:
        import pynvml  # noqa: PLC0415  # only on a machine with a GPU
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return None


def spawned_at(first_line_at: float) -> float:
    """Unix time at which this process was started: as its parent says, else as Linux does, else `first_line_at`."""
    try:
        return float(os.environ["RAYSEARCH_SPAWNED_AT"])
    except (KeyError, ValueError):
        pass
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return first_line_at
    return _wall_clock() - uptime_s + ticks / os.sysconf("SC_CLK_TCK")
