"""Slugs and fingerprints of hardware."""

import dataclasses
import json
import subprocess
import sys

import pytest

from raysearch.errors import UserError
from raysearch.model import Profile
from raysearch.profile import Hardware, base_slug, held, same_profile, visible, with_slug


def gpu(name: str, memory_mb: int, uuid: str = "GPU-1") -> Hardware:
    return Hardware("cuda", name, memory_mb, "9.0", "580.1", uuid, 16, "2.13.0")


@pytest.mark.parametrize(
    ("name", "memory_mb", "slug"),
    [
        ("NVIDIA GeForce RTX 3060", 12288, "rtx3060-12gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "rtx4060ti-16gb"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 16376, "rtx4070tisuper-16gb"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, "rtx4090-laptop-16gb"),
        ("NVIDIA H100 80GB HBM3", 81559, "h100-80gb"),
        ("NVIDIA H100 PCIe", 81559, "h100-pcie-80gb"),
        ("NVIDIA H100 NVL", 95830, "h100-nvl-94gb"),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100-40gb"),
        ("NVIDIA H200", 143771, "h200-140gb"),
        ("Tesla T4", 15360, "t4-15gb"),
        ("NVIDIA RTX A6000", 49140, "rtxa6000-48gb"),
        ("NVIDIA L4", 23034, "l4-22gb"),
    ],
)
def test_slug_names_the_model_and_its_memory(name: str, memory_mb: int, slug: str):
    assert base_slug(gpu(name, memory_mb)) == slug


def test_slug_of_a_cpu_is_cpu():
    assert base_slug(Hardware("cpu", "AMD EPYC", 0, "", "", "", 2, "2.13.0")) == "cpu"


PROFILE = Profile("", "cpu", "AMD EPYC", 0, 2, {"torch": "2.13.0"}, "cpu", "20 s", "sotu", "1-65536", 1)


def test_two_kinds_with_one_name_get_two_slugs():
    first = with_slug(PROFILE, "cpu", [])
    other = with_slug(dataclasses.replace(PROFILE, hardware="Intel"), "cpu", ["cpu"])
    assert first.slug == "cpu"
    assert other.slug.startswith("cpu-")
    assert not same_profile(first, other)


@pytest.mark.parametrize(
    "change",
    [
        {"budget": "40 s"},
        {"software": {"torch": "2.14"}},
        {"evaluation": "2-65536"},
        {"data": "python"},
        {"threads": 2},
    ],
)
def test_whatever_changes_a_score_changes_the_profile(change: dict[str, object]):
    assert not same_profile(PROFILE, dataclasses.replace(PROFILE, **change))  # pyright: ignore[reportArgumentType]


def test_cuda_visible_devices_hides_gpus_as_cuda_does():
    gpus = [gpu("a", 1, "GPU-aa"), gpu("b", 1, "GPU-bb"), gpu("c", 1, "GPU-cc")]
    names = lambda value: [g.name for g in visible(gpus, value)]  # noqa: E731
    assert names(None) == ["a", "b", "c"]
    assert names("") == []
    assert names("2,0") == ["c", "a"]
    assert names("GPU-bb") == ["b"]
    assert names("1,-1,0") == ["b"]


def test_a_gpu_that_is_held_to_less_is_another_kind_of_hardware():
    own = gpu("NVIDIA H100 80GB HBM3", 81559)
    small = held(own, {"RAYSEARCH_MEMORY_GB": "12", "RAYSEARCH_CAPABILITY": "8.6"})
    assert (base_slug(small), small.memory_mb, small.capability) == ("h100-12gb", 12288, "8.6")
    assert held(own, {"RAYSEARCH_MEMORY_GB": "200"}) == held(own, {}) == own


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RAYSEARCH_MEMORY_GB", "much"),
        ("RAYSEARCH_MEMORY_GB", "-1"),
        ("RAYSEARCH_CAPABILITY", "sm_86"),
        ("RAYSEARCH_CAPABILITY", "10.0"),
    ],
)
def test_a_gpu_that_is_held_to_nonsense_is_refused(name: str, value: str):
    with pytest.raises(UserError, match=f"{name} is '{value}': it must be .*; mend or unset it"):
        held(gpu("NVIDIA H100 80GB HBM3", 81559), {name: value})


def test_hardware_of_this_machine_is_printed_as_json():
    done = subprocess.run([sys.executable, "-m", "raysearch.profile"], capture_output=True, text=True, check=True)
    found = [Hardware(**fields) for fields in json.loads(done.stdout)]
    assert found[0].device in ("cpu", "cuda")
    assert found[0].cores >= 1
    assert found[0].torch != "none"
