"""Where trials run: one protocol, and what an executor reports. Each module of this package is an executor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from raysearch.data import PreparedData
from raysearch.profile import Hardware
from raysearch.runner import RunResult, RunSpec


@dataclass(frozen=True)
class Speed:
    """What a slot's device reached when the slot was set up. It is no part of the profile: it varies from card to card.

    Attributes:
        matmul_tflops: Dense matmul, 10^12 operations a second; bfloat16 on a GPU, float32 on a CPU.
        copy_gb_per_s: Copy in its memory, 10^9 bytes a second, read and written.
    """

    matmul_tflops: float
    copy_gb_per_s: float


@dataclass(frozen=True)
class SlotInfo:
    """A slot that is ready.

    Attributes:
        id: Unique in the cluster, and the same for the same GPU when it comes back.
        hardware: What it is.
        preset: Name of the preset that its data was prepared for; empty for objectives without presets.
        data: None for objectives without data, and while the slot's machine lacks them.
        shares_disk: Whether it sees the study's folder.
        speed: None where it was not measured: for objectives without presets, or because that failed.
        compile_cache: Kind of its compile cache, which slots of that kind may share; empty if it has none of ours.
        label: What its node's label `raysearch/profile` says; empty where there is none, or where it is of no concern.
        node_gpus: GPUs that Ray has on its node.
        data_from: The host that gave its machine the data just now; empty if they were there, or made there.
    """

    id: str
    hardware: Hardware
    preset: str
    data: PreparedData | None
    shares_disk: bool
    speed: Speed | None = None
    compile_cache: str = ""
    label: str = ""
    node_gpus: int = 0
    data_from: str = ""


@dataclass(frozen=True)
class SlotProgress:
    """What the trial on a slot says of itself.

    Attributes:
        progress: 0 to 1 within the phase.
        seconds_left: To the trial's end, as the coordinator reckons it; an executor leaves it None.
    """

    slot_id: str
    phase: str
    progress: float
    seconds_left: float | None = None


@dataclass(frozen=True)
class SlotJoined:
    """A slot is ready for trials."""

    slot: SlotInfo


@dataclass(frozen=True)
class SlotLeft:
    """A slot is gone; a run that was on it is reported by its own `RunEnded`."""

    slot_id: str
    reason: str


@dataclass(frozen=True)
class SlotFailed:
    """A place for a slot that cannot be used, and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class RunEnded:
    """An attempt ended."""

    trial_id: str
    attempt: int
    result: RunResult


Report = SlotJoined | SlotLeft | SlotFailed | RunEnded | SlotProgress


class Executor(Protocol):
    """Runs attempts on slots. None of its methods waits for a trial."""

    def start(self, slot_id: str, spec: RunSpec) -> None:
        """Starts an attempt on a slot that is free."""
        ...

    def poll(self, timeout_s: float) -> list[Report]:
        """What happened since the last call; waits up to `timeout_s` for something to happen."""
        ...

    def cancel(self, trial_id: str) -> None:
        """Ends an attempt in flight; its `RunEnded` says CANCELLED."""
        ...

    def want(self, slots: Mapping[str, int]) -> None:
        """Asks whoever can start machines for so many slots of each kind, in all; takes what it asked for before back.

        Args:
            slots: How many, by the slug of their hardware.
        """
        ...

    def starting(self) -> int:
        """How many slots are being set up; 0 before the first `poll` says nothing."""
        ...

    def close(self) -> None:
        """Ends all attempts in flight and gives the slots back."""
        ...
