"""What the card does beside a trial, asked of NVML once a second: clocks, temperature, power, energy, throttling.

It gives the card no work, never waits for it, and fails no trial: what cannot be read is absent.
"""

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from trainer.telemetry import nvml_of

_clock = time.perf_counter  # taken now: a candidate may replace the module's function later

INTERVAL_S = 1.0
STOP_LIMIT_S = 2.0  # for a last reading; a driver that hangs is not waited for
MAX_GAP_S = 5.0  # between two readings of the power, over which it is not known
THROTTLED_SHARE = 0.1  # of the training's samples, above which the trial is marked

# Why the clock is lower than it could be, as bits (nvml.h, nvmlClocksEventReason*; older drivers: ThrottleReason).
SW_POWER_CAP = 0x04  # normal at full load
HW_SLOWDOWN, SW_THERMAL_SLOWDOWN, HW_THERMAL_SLOWDOWN, HW_POWER_BRAKE = 0x08, 0x20, 0x40, 0x80
THROTTLING = HW_SLOWDOWN | SW_THERMAL_SLOWDOWN | HW_THERMAL_SLOWDOWN | HW_POWER_BRAKE
REASONS_BY = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
CLOCK_SM, CLOCK_MEMORY, TEMPERATURE_OF_GPU = 1, 2, 0  # nvmlClockType_t, nvmlTemperatureSensors_t


@dataclass(frozen=True)
class Reading:
    """The card at one time; None for what it does not tell.

    Attributes:
        at: Seconds of the process's clock.
        energy_j: Total since the driver was loaded, of the whole card.
        power_w: Now; on newer cards the mean of the last second.
        reasons: Bits, see above.
    """

    at: float
    energy_j: float | None = None
    power_w: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    temperature_c: float | None = None
    reasons: int | None = None


class Card:
    """One card, as NVML tells of it."""

    def __init__(self, nvml: Any, handle: Any):
        self._nvml, self._handle = nvml, handle

    def read(self) -> Reading:
        """All that the card tells now."""
        return Reading(
            at=_clock(),
            energy_j=_scaled(self._ask("nvmlDeviceGetTotalEnergyConsumption"), 1e-3),
            power_w=_scaled(self._ask("nvmlDeviceGetPowerUsage"), 1e-3),
            sm_clock_mhz=self._ask("nvmlDeviceGetClockInfo", CLOCK_SM),
            memory_clock_mhz=self._ask("nvmlDeviceGetClockInfo", CLOCK_MEMORY),
            temperature_c=self._ask("nvmlDeviceGetTemperature", TEMPERATURE_OF_GPU),
            reasons=next((bits for name in REASONS_BY if (bits := self._ask(name)) is not None), None),
        )

    def sm_clock_max_mhz(self) -> float | None:
        """The highest clock that the card can have."""
        return self._ask("nvmlDeviceGetMaxClockInfo", CLOCK_SM)

    def _ask(self, name: str, *of: int) -> Any:
        """What a function of NVML says; None where this card, driver or pynvml does not have it."""
        try:
            return getattr(self._nvml, name)(self._handle, *of)
        except (AttributeError, self._nvml.NVMLError):
            return None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


class Sampler:
    """Reads the card from a thread of its own, from when the trial first uses it until `facts`; on a CPU never.

    Attributes:
        pauses: Start and end of what interrupted the training, by the process's clock: its samples do not count.
    """

    def __init__(self, device: torch.device):
        self.pauses: list[tuple[float, float]] = []
        self._readings: list[Reading] = []
        self._sm_clock_max_mhz: float | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if device.type == "cuda":
            self._thread = threading.Thread(target=self._work, args=(device,), name="sampler", daemon=True)
            self._thread.start()

    def _work(self, device: torch.device) -> None:
        while not torch.cuda.is_initialized():  # the trial's own thread does that; before, there is nothing to see
            if self._ended.wait(0.1):
                return
        found = nvml_of(device)
        if found is None:
            return
        card = Card(*found)
        self._sm_clock_max_mhz = card.sm_clock_max_mhz()
        over = False
        while not over:
            self._readings.append(card.read())
            over = self._ended.wait(INTERVAL_S)
        self._readings.append(card.read())

    def facts(self, training_at: float | None, training_s: float) -> dict[str, float]:
        """Ends the sampling; what there is to tell of the trial, by name. See `facts_of`.

        Args:
            training_at: When the timed training began, by the process's clock; None if it did not.
            training_s: How long it took, with its pauses.
        """
        if self._thread is None:
            return {}
        now = _clock()
        self._ended.set()
        self._thread.join(STOP_LIMIT_S)
        training = (training_at, training_at + training_s) if training_at is not None and training_s > 0 else None
        readings = list(self._readings)
        return facts_of(
            readings, end=now, training=training, pauses=self.pauses, sm_clock_max_mhz=self._sm_clock_max_mhz
        )


def facts_of(
    readings: Sequence[Reading],
    *,
    end: float,
    training: tuple[float, float] | None,
    pauses: Sequence[tuple[float, float]] = (),
    sm_clock_max_mhz: float | None = None,
) -> dict[str, float]:
    """What a trial's readings come to.

    Args:
        readings: In order of time.
        end: When the trial was over, by the clock of the readings.
        training: Start and end of the timed training; None if there was none.
        pauses: Start and end of what interrupted it.
        sm_clock_max_mhz: The highest clock that the card can have.

    Returns:
        energy_j of the card from the trial's first use of it to the trial's end, train_energy_j of the training with
        its pauses; energy_integrated (1) where both are the sampled power's and not the card's own counter's;
        temperature_c (the highest); while training: sm_clock_mhz and memory_clock_mhz (medians), power_w (mean),
        throttled_share and power_capped_share (of the samples), throttled (1 above THROTTLED_SHARE). Without what is
        not known.
    """
    told = _energy(readings, end, training)
    told["temperature_c"] = _of(readings, "temperature_c", max)
    if readings:
        told["sm_clock_max_mhz"] = sm_clock_max_mhz
    start, stop = training or (math.inf, -math.inf)
    at_work = [r for r in readings if start <= r.at <= stop and not any(a <= r.at <= b for a, b in pauses)]
    told["sm_clock_mhz"] = _of(at_work, "sm_clock_mhz", median)
    told["memory_clock_mhz"] = _of(at_work, "memory_clock_mhz", median)
    told["power_w"] = _of(at_work, "power_w", fmean)
    reasons = [r.reasons for r in at_work if r.reasons is not None]
    if reasons:
        told["throttled_share"] = fmean(bool(bits & THROTTLING) for bits in reasons)
        told["power_capped_share"] = fmean(bool(bits & SW_POWER_CAP) for bits in reasons)
        if told["throttled_share"] > THROTTLED_SHARE:
            told["throttled"] = 1
    return {name: round(value, 4) for name, value in told.items() if value is not None}


def _of(readings: Sequence[Reading], name: str, what: Callable[[list[float]], float]) -> float | None:
    values = [getattr(reading, name) for reading in readings]
    known = [value for value in values if value is not None]
    return what(known) if known else None


def _energy(
    readings: Sequence[Reading], end: float, training: tuple[float, float] | None
) -> dict[str, float | int | None]:
    """Joules of the trial and of its training, by the card's counter, else by the sampled power."""
    for totals, integrated in ((_counted(readings), False), (_integrated(readings), True)):
        whole = _between(totals, totals[0][0], end) if totals else None
        if whole is not None:
            told: dict[str, float | int | None] = {"energy_j": whole}
            told["train_energy_j"] = _between(totals, *training) if training else None
            return told | ({"energy_integrated": 1} if integrated else {})
    return {}


def _counted(readings: Sequence[Reading]) -> list[tuple[float, float]]:
    return [(r.at, r.energy_j) for r in readings if r.energy_j is not None]


def _integrated(readings: Sequence[Reading]) -> list[tuple[float, float]]:
    """The running total of the power by the trapezoid rule; empty where it was not known for too long."""
    powers = [(r.at, r.power_w) for r in readings if r.power_w is not None]
    totals = [(at, 0.0) for at, _ in powers[:1]]
    for (before, old), (at, new) in itertools.pairwise(powers):
        if at - before > MAX_GAP_S:
            return []
        totals.append((at, totals[-1][1] + (at - before) * (old + new) / 2))
    return totals


def _between(totals: Sequence[tuple[float, float]], start: float, end: float) -> float | None:
    """How much a running total grew between two times; None where it does not reach that far."""
    times, values = zip(*totals, strict=True)
    if not times[0] <= start <= end <= times[-1]:
        return None
    return float(np.interp(end, times, values) - np.interp(start, times, values))
