"""The yardstick of a slot: a matmul and a copy, measured here on the CPU and (marker gpu) on a card."""

import json
import subprocess
import sys
import time

import pytest
import torch

from trainer import gauge, telemetry


def test_the_speed_of_this_cpu_is_printed_as_json_in_a_few_seconds():
    started = time.monotonic()
    command = [sys.executable, "-m", "trainer.gauge", "--device", "cpu", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert time.monotonic() - started < 30
    assert set(found) == {"device", "dtype", "size", "matmul_tflops", "copy_gb_per_s", "seconds"}
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    assert 0.001 < found["matmul_tflops"] < 10
    assert 0.1 < found["copy_gb_per_s"] < 1000
    assert not done.stderr


def test_work_that_takes_a_known_time_is_measured_as_that_time():
    found = gauge.median_s(lambda: time.sleep(0.01), torch.device("cpu"), limit_s=0.2)
    assert 0.01 <= found < 0.02


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_said_in_one_line():
    command = [sys.executable, "-m", "trainer.gauge", "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("gauge: --device cuda: torch sees no CUDA device; use --device cpu")
    assert done.stderr.count("\n") == 1


@pytest.mark.gpu
def test_a_card_reaches_a_good_part_of_its_peak_and_never_more():
    found = gauge.measure(torch.device("cuda"))
    print(found)
    assert found["dtype"] == "bfloat16"
    assert float(found["seconds"]) < 10
    assert 50 < float(found["copy_gb_per_s"]) < 20_000
    peak = telemetry.peak_tflops(str(found["device"]))
    if peak:
        assert 0.3 * peak < float(found["matmul_tflops"]) < 1.05 * peak
