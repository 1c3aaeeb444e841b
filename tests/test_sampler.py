"""The sampler of clocks, heat and energy: on a fake card behind pynvml, on none, and (marker gpu) on a real one."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer import sampler
from trainer.sampler import HW_POWER_BRAKE, HW_SLOWDOWN, SW_POWER_CAP, SW_THERMAL_SLOWDOWN, Reading, Sampler, facts_of

CUDA = torch.device("cuda")


def readings(seconds: int, **changes: Callable[[int], float | None]) -> list[Reading]:
    """One a second: 100 W, a counter that agrees, 1410 MHz, 60 °C, no reason to throttle; but for the changes."""
    usual: dict[str, Callable[[int], Any]] = {
        "energy_j": lambda at: 5000.0 + 100.0 * at,
        "power_w": lambda at: 100.0,
        "sm_clock_mhz": lambda at: 1410.0,
        "memory_clock_mhz": lambda at: 2619.0,
        "temperature_c": lambda at: 60.0,
        "reasons": lambda at: SW_POWER_CAP,
    }
    functions: dict[str, Callable[[int], Any]] = usual | changes
    return [Reading(float(at), **{name: of(at) for name, of in functions.items()}) for at in range(seconds + 1)]


def told(found: list[Reading], *, end: float = 20.0, training: tuple[float, float] | None = (5.0, 15.0), **more: Any):
    return facts_of(found, end=end, training=training, **more)


# ---- what readings come to ----


def test_energy_is_the_counter_s_and_of_the_training_between_its_own_ends():
    found = told(readings(20), training=(5.25, 15.5), sm_clock_max_mhz=1980)
    assert found == {
        "energy_j": 2000.0,
        "train_energy_j": 1025.0,
        "temperature_c": 60.0,
        "sm_clock_max_mhz": 1980,
        "sm_clock_mhz": 1410.0,
        "memory_clock_mhz": 2619.0,
        "power_w": 100.0,
        "throttled_share": 0.0,
        "power_capped_share": 1.0,
    }


def test_a_card_without_a_counter_has_its_power_added_up_and_says_so():
    found = told(readings(20, energy_j=lambda at: None, power_w=lambda at: 10.0 * at))
    assert found["energy_j"] == pytest.approx(10 * 20**2 / 2)
    assert found["train_energy_j"] == pytest.approx(10 * (15**2 - 5**2) / 2)
    assert found["energy_integrated"] == 1
    assert found["power_w"] == pytest.approx(100.0)


def test_energy_that_was_not_known_for_long_or_to_the_end_is_absent_and_not_too_small():
    silent = lambda at: None  # noqa: E731
    holes = told(readings(20, energy_j=silent, power_w=lambda at: None if 6 < at < 14 else 100.0))
    broken = told(readings(20, energy_j=lambda at: 100.0 * at if at < 10 else None, power_w=silent))
    cut = told(readings(9))
    for found in (holes, broken, cut):
        assert not {"energy_j", "train_energy_j", "energy_integrated"} & set(found)
        assert found["sm_clock_mhz"] == 1410.0


def test_clocks_and_power_are_the_training_s_and_heat_the_whole_trial_s():
    busy = lambda at: 5 <= at <= 15 and not 9 <= at <= 11  # noqa: E731
    found = told(
        readings(
            20,
            sm_clock_mhz=lambda at: 1410.0 if busy(at) else 210.0,
            power_w=lambda at: 600.0 if busy(at) else 70.0,
            temperature_c=lambda at: 81.0 if at == 17 else 70.0,
        ),
        pauses=[(8.9, 11.1)],
    )
    assert (found["sm_clock_mhz"], found["power_w"], found["temperature_c"]) == (1410.0, 600.0, 81.0)


@pytest.mark.parametrize(
    "reason", [SW_THERMAL_SLOWDOWN, HW_SLOWDOWN, HW_POWER_BRAKE, SW_THERMAL_SLOWDOWN | SW_POWER_CAP]
)
def test_a_trial_whose_clock_was_held_down_is_marked(reason: int):
    found = told(readings(20, reasons=lambda at: reason if at in (6, 7) else 0))
    assert found["throttled_share"] == pytest.approx(2 / 11, abs=1e-4)
    assert found["throttled"] == 1
    assert found["power_capped_share"] == pytest.approx(2 / 11 if reason & SW_POWER_CAP else 0, abs=1e-4)


def test_a_short_slowdown_one_outside_of_the_training_and_the_power_limit_mark_nothing():
    short = told(readings(20, reasons=lambda at: SW_THERMAL_SLOWDOWN if at in (3, 6, 18) else SW_POWER_CAP))
    assert short["throttled_share"] == pytest.approx(1 / 11, abs=1e-4)
    assert "throttled" not in short


def test_a_trial_that_did_not_come_to_train_has_its_energy_and_heat_alone():
    assert told(readings(20), training=None) == {"energy_j": 2000.0, "temperature_c": 60.0}


def test_of_no_reading_nothing_is_told():
    assert told([]) == {}


# ---- the thread ----


class FakeNvml(SimpleNamespace):
    """A pynvml with one card, which answers `answers` times."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, answers: int = 10**9, **functions: Callable[..., Any]):
        left = iter(range(answers))

        def answering(value: Callable[..., Any]) -> Callable[..., Any]:
            def call(handle: str, *of: int) -> Any:
                assert handle == "handle of GPU-17"
                if next(left, None) is None:
                    raise self.NVMLError("the GPU is lost")
                return value(*of)

            return call

        energy = count(10_000, 500)
        usual = {
            "nvmlDeviceGetTotalEnergyConsumption": lambda: next(energy),
            "nvmlDeviceGetPowerUsage": lambda: 123_000,
            "nvmlDeviceGetClockInfo": lambda kind: {1: 1410, 2: 2619}[kind],
            "nvmlDeviceGetMaxClockInfo": lambda kind: {1: 1980}[kind],
            "nvmlDeviceGetTemperature": lambda kind: {0: 64}[kind],
            "nvmlDeviceGetCurrentClocksEventReasons": lambda: 0x24,
        }
        super().__init__(**{name: answering(of) for name, of in (usual | functions).items()})
        self.nvmlInit = lambda: None
        self.nvmlDeviceGetHandleByUUID = lambda uuid: f"handle of {uuid}"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Puts an imagined card into the machine, and sees to it that no sampler of it is left."""
    monkeypatch.setattr(sampler, "INTERVAL_S", 0.01)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="17"))
    yield lambda nvml: monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert not [thread for thread in threading.enumerate() if thread.name == "sampler"]


def sampled(seconds: float = 0.2) -> dict[str, float]:
    """A trial that trains for a while beside a sampler."""
    one = Sampler(CUDA)
    started = time.perf_counter()
    time.sleep(seconds)
    return one.facts(started + seconds / 2, seconds / 2)


def test_a_card_is_sampled_beside_the_trial_until_its_facts_are_asked_for(card: Callable[[Any], None]):
    card(FakeNvml())
    found = sampled()
    assert found["energy_j"] > found["train_energy_j"] > 0
    assert (found["sm_clock_mhz"], found["sm_clock_max_mhz"], found["memory_clock_mhz"]) == (1410, 1980, 2619)
    assert (found["temperature_c"], found["power_w"]) == (64, 123)
    assert (found["throttled_share"], found["power_capped_share"], found["throttled"]) == (1, 1, 1)


def test_the_older_name_of_the_reasons_is_taken_where_the_newer_is_not_there(card: Callable[[Any], None]):
    def missing() -> int:
        raise FakeNvml.NVMLError("function not found")

    nvml = FakeNvml(
        nvmlDeviceGetCurrentClocksEventReasons=missing, nvmlDeviceGetCurrentClocksThrottleReasons=lambda: 0x20
    )
    card(nvml)
    assert sampled()["throttled_share"] == 1
    del nvml.nvmlDeviceGetCurrentClocksEventReasons  # a pynvml that is older still
    assert sampled()["throttled_share"] == 1


def test_a_card_that_stops_answering_leaves_what_is_known_and_the_trial_goes_on(card: Callable[[Any], None]):
    card(FakeNvml(answers=40))
    found = sampled()
    assert "energy_j" not in found
    assert found["temperature_c"] == 64


def test_a_driver_that_hangs_is_not_waited_for(card: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampler, "STOP_LIMIT_S", 0.1)
    hang = threading.Event()
    card(FakeNvml(nvmlDeviceGetPowerUsage=hang.wait))
    started = time.perf_counter()
    assert sampled() == {}
    assert time.perf_counter() - started < 1.0
    hang.set()
    for thread in threading.enumerate():
        if thread.name == "sampler":
            thread.join(5.0)


def test_a_machine_without_nvml_or_without_the_library_has_no_facts(card: Callable[[Any], None]):
    def no_driver() -> None:
        raise FakeNvml.NVMLError("driver not loaded")

    nvml = FakeNvml()
    nvml.nvmlInit = no_driver
    card(nvml)
    assert sampled(0.05) == {}
    card(None)  # an import of it fails
    assert sampled(0.05) == {}


def test_a_trial_that_never_uses_the_card_ends_without_having_asked_it(
    card: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    card(FakeNvml(answers=0))
    assert sampled(0.05) == {}


def test_on_a_cpu_there_is_no_thread_and_no_fact():
    before = threading.active_count()
    one = Sampler(torch.device("cpu"))
    assert threading.active_count() == before
    assert one.facts(0.0, 10.0) == {}


# ---- a real card ----


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # an unrelated package named pynvml warns at import
def test_a_matmul_load_has_energy_and_plausible_clocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampler, "INTERVAL_S", 0.1)
    one = Sampler(CUDA)
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    torch.mm(a, a)
    torch.cuda.synchronize()
    started = time.perf_counter()
    while time.perf_counter() - started < 3.0:
        for _ in range(100):
            torch.mm(a, a)
        torch.cuda.synchronize()
    found = one.facts(started, time.perf_counter() - started)
    print(found)
    assert found["energy_j"] > found["train_energy_j"] > 0
    assert found["train_energy_j"] == pytest.approx(3.0 * found["power_w"], rel=0.5)
    assert 100 < found["sm_clock_mhz"] <= found["sm_clock_max_mhz"] < 4000
    assert 20 < found["temperature_c"] < 110
    assert 20 < found["power_w"] < 1500
    assert 0 <= found["throttled_share"] <= 1
    assert 0 <= found["power_capped_share"] <= 1
    assert len(one._readings) > 20  # pyright: ignore[reportPrivateUsage]
