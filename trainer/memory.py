"""What this process may use of its card: a limit below the card's own memory, what is free of it, how memory runs out.

It decides on no batch size, and does not know what the memory is used for.
"""

import gc
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from trainer.common import cache_dir
from trainer.errors import UsageError

GB = 2**30
MEMORY_VARIABLE, CAPABILITY_VARIABLE = "RAYSEARCH_MEMORY_GB", "RAYSEARCH_CAPABILITY"

# A process holds more than torch's allocator knows of: the CUDA context (about 0.5 GB on a Hopper card, less on smaller
# ones) and the kernels that are loaded as it goes.
CONTEXT_AT_MOST_BYTES, LATER_BYTES = GB * 3 // 4, GB // 4

# These make or load the code that runs on the card: they have to know the card as it is.
CODE_GENERATORS = ("triton.", "torch._dynamo.device_interface.", "torch._inductor.runtime.")


@dataclass(frozen=True)
class Room:
    """A card's memory as this process may use it: all of it, and what torch can still take of it, in bytes."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class _Held:
    """A limit that is in force: of the process, and what it leaves to torch's allocator."""

    limit_bytes: int
    torch_bytes: int


class _Card:
    """What was changed in torch for this process; one process has one card."""

    held: _Held | None = None
    own_capability: Callable[..., tuple[int, int]] | None = None


# ---- a limit ----


def hold(device: torch.device, *, memory_gb: float | None = None, capability: str | None = None) -> None:
    """Holds this process to less than its card has; call it before anything is allocated.

    Args:
        device: Where the trial runs; on a CPU there is nothing to hold, and what the environment says is ignored.
        memory_gb: GiB of the card that the process may use, CUDA context included; None: RAYSEARCH_MEMORY_GB, else all.
            As much as the card has, or more, is no limit.
        capability: The compute capability ("8.6") that torch is to answer with, so that the program and torch choose
            what they would choose on such a card; None: RAYSEARCH_CAPABILITY, else the card's own. It is a stand-in for
            tests: the code is still made for the card that is there, with its shared memory and its speed.

    Raises:
        UsageError: A limit for a CPU, one that leaves nothing, or a capability above the card's.
    """
    if device.type != "cuda":
        for option, value in (("--memory-gb", memory_gb), ("--capability", capability)):
            if value is not None:
                raise UsageError(f"{option} {value} with --device cpu: it is about a CUDA card; leave it out")
        return
    _hold_memory(memory_gb if memory_gb is not None else _memory_of_environment())
    _hold_capability(capability if capability is not None else os.environ.get(CAPABILITY_VARIABLE) or None)


def _memory_of_environment() -> float | None:
    told = os.environ.get(MEMORY_VARIABLE)
    if not told:
        return None
    try:
        gigabytes = float(told)
    except ValueError:
        gigabytes = math.nan
    if not 0 < gigabytes < math.inf:
        raise UsageError(f"{MEMORY_VARIABLE} is {told!r}: it must be a positive number of GiB; mend it or unset it")
    return gigabytes


def _hold_memory(memory_gb: float | None) -> None:
    if memory_gb is None:
        if _Card.held is not None:
            torch.cuda.set_per_process_memory_fraction(1.0)
        _Card.held = None
        return
    free, card = torch.cuda.mem_get_info()  # makes the context
    used = card - free - torch.cuda.memory_reserved()
    torch_bytes = torch_share(int(memory_gb * GB), card_bytes=card, used_bytes=used)
    if torch_bytes <= 0:
        context = (CONTEXT_AT_MOST_BYTES + LATER_BYTES) / GB
        raise UsageError(
            f"--memory-gb {memory_gb:g} leaves nothing beside the CUDA context; give more than {context:g}"
        )
    torch.cuda.set_per_process_memory_fraction(min(1.0, torch_bytes / card))
    _Card.held = _Held(min(int(memory_gb * GB), card), torch_bytes)


def torch_share(limit_bytes: int, *, card_bytes: int, used_bytes: int) -> int:
    """What a limit of the process leaves to torch's allocator.

    Args:
        limit_bytes: Of the process.
        card_bytes: The card's whole memory.
        used_bytes: What is in use beside torch's allocator. That is the process's context, and whatever others hold on
            the card: they do not count against this process's limit, so a context is taken to be no larger than they
            come.
    """
    if limit_bytes >= card_bytes:
        return card_bytes
    return limit_bytes - min(used_bytes, CONTEXT_AT_MOST_BYTES) - LATER_BYTES


def room() -> Room:
    """The memory of the current CUDA card for this process, now; what others hold on the card is not free."""
    free, card = torch.cuda.mem_get_info()
    if _Card.held is None:
        return Room(card, free)
    left = _Card.held.torch_bytes - torch.cuda.memory_reserved()
    return Room(_Card.held.limit_bytes, max(0, min(free, left)))


# ---- another card's compute capability ----


def _hold_capability(capability: str | None) -> None:
    if _Card.own_capability is not None:
        torch.cuda.get_device_capability, _Card.own_capability = _Card.own_capability, None
    if capability is None:
        return
    own, wanted = torch.cuda.get_device_capability(), capability_of(capability)
    if wanted > own:
        raise UsageError(
            f"--capability {capability}: this card has {own[0]}.{own[1]}, and can stand in for older ones alone"
        )
    _Card.own_capability = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = _stand_in(wanted, torch.cuda.get_device_capability)
    # torch's key of a compiled graph has the card's name, not its capability: other choices need another folder
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(cache_dir() / "compiled")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{re.sub(r'-as-[0-9.]+$', '', folder)}-as-{wanted[0]}.{wanted[1]}"


def _stand_in(wanted: tuple[int, int], own: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
    def get_device_capability(device: Any = None) -> tuple[int, int]:
        caller = f"{sys._getframe(1).f_globals.get('__name__', '')}."
        return own(device) if caller.startswith(CODE_GENERATORS) else wanted

    return get_device_capability


def capability_of(text: str) -> tuple[int, int]:
    """`8.6` as (8, 6).

    Raises:
        UsageError: It is no compute capability.
    """
    major, dot, minor = text.partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal()):
        raise UsageError(f"--capability {text}: it is two whole numbers with a dot between them, such as 8.6")
    return int(major), int(minor)


# ---- when it runs out ----

OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",  # torch's allocator on the CPU
    "CUDA error: out of memory",  # the driver's, for what does not go through torch's allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, also when a compiler or a candidate wrapped the error into one of its own."""
    for one in _chain(error):
        if isinstance(one, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(one, RuntimeError) and any(text in str(one) for text in OUT_OF_MEMORY_TEXTS):
            return True
    return False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def let_go(error: BaseException) -> None:
    """Drops what the frames of an error hold: the locals of functions that are over, not of those that still run."""
    for one in _chain(error):
        traceback.clear_frames(one.__traceback__)


def release(device: torch.device) -> None:
    """Gives back all that nothing refers to any more, also what the first step hid from Python's collector."""
    gc.unfreeze()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def begin_anew(device: torch.device) -> None:
    """Leaves nothing of a training that is over: neither tensors nor compiled graphs, nor its peak of memory."""
    gc.enable()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()  # also the memory pools of captured graphs
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
