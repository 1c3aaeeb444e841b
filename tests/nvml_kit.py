"""An imagined machine that answers as NVML does: there is no card here that is sliced or drives a display.

It has NVML's own names, constants and errors, and only functions that the real `pynvml` has.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pynvml


@dataclass(frozen=True)
class Card:
    """A GPU, or a slice of one; `slices` has one entry for each place, None where it is empty. None: MIG is off."""

    name: str
    memory_mb: int
    uuid: str
    capability: tuple[int, int] = (9, 0)
    display: int | None = None  # None: the card knows no displays, as those of data centres
    knows_mig: bool = True
    slices: Sequence[Card | None] | None = None


def nvml(*cards: Card) -> Any:
    """A module `pynvml` of a machine with these cards."""

    def mig_mode(card: Card) -> list[int]:
        if not card.knows_mig:
            raise error(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(card.slices is not None)] * 2

    def mig_slice(card: Card, index: int) -> Card:
        found = (card.slices or ())[index]
        if found is None:
            raise error(pynvml.NVML_ERROR_NOT_FOUND)
        return found

    def capability(card: Card) -> tuple[int, int]:
        if card.uuid.startswith("MIG-"):
            raise error(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return card.capability

    def display(card: Card) -> int:
        if card.display is None:
            raise error(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return card.display

    functions: dict[str, Any] = {
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetCount": lambda: len(cards),
        "nvmlDeviceGetHandleByIndex": lambda index: cards[index],
        "nvmlDeviceGetName": lambda card: card.name,
        "nvmlDeviceGetUUID": lambda card: card.uuid,
        "nvmlDeviceGetMemoryInfo": lambda card: SimpleNamespace(total=card.memory_mb * 2**20),
        "nvmlDeviceGetCudaComputeCapability": capability,
        "nvmlDeviceGetDisplayActive": display,
        "nvmlDeviceGetMigMode": mig_mode,
        "nvmlDeviceGetMaxMigDeviceCount": lambda card: len(card.slices or ()),
        "nvmlDeviceGetMigDeviceHandleByIndex": mig_slice,
    }
    constants = ("NVML_DEVICE_MIG_ENABLE", "NVMLError", "NVMLError_NotSupported", "NVMLError_NotFound")
    constants += ("NVMLError_FunctionNotFound",)
    for name in functions:
        assert callable(getattr(pynvml, name)), f"NVML has no {name}"
    return SimpleNamespace(**functions, **{name: getattr(pynvml, name) for name in constants})


def error(code: int) -> Exception:
    return pynvml.NVMLError(code)


def h100(number: int = 0, **changes: Any) -> Card:
    return Card("NVIDIA H100 80GB HBM3", 81559, f"GPU-h100{number}", **changes)


def rtx3060(number: int = 0, **changes: Any) -> Card:
    return Card("NVIDIA GeForce RTX 3060", 12288, f"GPU-3060{number}", (8, 6), knows_mig=False, **changes)


def cut_h100() -> Card:
    """In three slices, with an empty place before the last."""
    small = [Card("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9984, f"MIG-small{number}") for number in (0, 1)]
    return h100(9, slices=[*small, None, Card("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 40448, "MIG-large0"), None, None])
