"""Slugs and fingerprints of hardware."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from nvml_kit import Card, cut_h100, h100, nvml, rtx3060
from ray._private.label_utils import parse_node_labels_string

from raysearch import __version__
from raysearch.errors import UserError
from raysearch.labels import advice, names, node_labels
from raysearch.model import Profile
from raysearch.profile import Hardware, base_slug, held, read_gpus, remarks, same_profile, visible, with_slug


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
    gpus = [[gpu("a", 1, "GPU-aa")], [gpu("b", 1, "GPU-bb")], [gpu("c", 1, "GPU-cc")]]
    names = lambda value: [g.name for g in visible(gpus, value)]  # noqa: E731
    assert names(None) == ["a", "b", "c"]
    assert names("") == []
    assert names("2,0") == ["c", "a"]
    assert names("GPU-bb") == ["b"]
    assert names("1,-1,0") == ["b"]


# ---- what NVML says; of machines that are not here, so NVML is imagined, with its own names ----


def test_a_gpu_in_mig_mode_is_its_slices_each_with_a_slug_of_its_own():
    (parts,) = read_gpus(nvml(cut_h100()))
    assert [(base_slug(part), part.uuid, part.memory_mb) for part in parts] == [
        ("h100-mig-1g-10gb", "MIG-small0", 9984),
        ("h100-mig-1g-10gb", "MIG-small1", 9984),
        ("h100-mig-3g-40gb", "MIG-large0", 40448),  # behind an empty place
    ]
    assert {(part.capability, part.mig, part.gpus) for part in parts} == {("9.0", True, 3)}


def test_a_gpu_in_mig_mode_that_is_not_cut_is_of_no_use():
    assert read_gpus(nvml(h100(slices=[None, None]))) == [[]]


def test_slices_are_chosen_by_uuid_and_an_index_means_the_first_slice_of_that_gpu():
    gpus = read_gpus(nvml(h100(), cut_h100()))
    uuids = lambda value: [part.uuid for part in visible(gpus, value)]  # noqa: E731
    assert uuids(None) == ["GPU-h1000", "MIG-small0", "MIG-small1", "MIG-large0"]
    assert uuids("MIG-large0,MIG-small1") == ["MIG-large0", "MIG-small1"]
    assert uuids("1,0") == ["MIG-small0", "GPU-h1000"]


def test_cards_that_know_no_mig_and_no_display_are_plain():
    (parts,) = read_gpus(nvml(rtx3060()))
    assert [(base_slug(part), part.mig, part.display) for part in parts] == [("rtx3060-12gb", False, False)]
    assert remarks(parts[0]) == []


def test_a_card_that_drives_a_display_and_a_slice_are_reported_as_what_they_are():
    shown, idle, cut = read_gpus(nvml(rtx3060(display=1), rtx3060(display=0), cut_h100()))
    assert remarks(shown[0]) == ["drives a display, which takes memory and time from trials"]
    assert remarks(idle[0]) == []
    assert remarks(cut[0])[0].startswith("a MIG slice")


# ---- the labels of a node ----


def labels(*cards: Card, chosen: str | None = None) -> tuple[dict[str, str], list[str]]:
    """Labels as Ray reads them, and what is said beside them."""
    found = visible(read_gpus(nvml(*cards)), chosen)
    text = node_labels(found, version="0.1.0")
    assert "\n" not in text
    return parse_node_labels_string(text), advice(found, chosen=chosen is not None)


def test_a_node_is_labelled_by_what_it_has():
    found, said = labels(h100(0), h100(1))
    assert found["raysearch/profile"] == "h100-80gb"
    assert found["raysearch/gpus"] == "2"
    assert said == []


def test_a_torch_build_is_a_valid_label():
    text = node_labels([replace(gpu("a", 1024), torch="2.13.0+cu130")], version="0.1.0")
    assert parse_node_labels_string(text)["raysearch/torch"] == "2.13.0-cu130"


def test_a_name_that_is_too_long_for_a_label_is_cut_and_still_known():
    card = gpu("NVIDIA " + "Very Long Name " * 8, 1024)
    value = parse_node_labels_string(node_labels([card], version="1"))["raysearch/profile"]
    assert len(value) <= 63
    assert names(value, card)


def test_a_node_of_several_kinds_is_told_to_start_ray_once_for_each():
    found, said = labels(h100(), rtx3060(0), rtx3060(1))
    assert found["raysearch/profile"] == "h100-80gb_rtx3060-12gb"
    (line,) = said
    assert "CUDA_VISIBLE_DEVICES=GPU-h1000 ray start" in line
    assert "CUDA_VISIBLE_DEVICES=GPU-30600,GPU-30601 ray start" in line


def test_hidden_gpus_are_counted_and_what_is_visible_is_labelled():
    found, said = labels(h100(), rtx3060(0), rtx3060(1), chosen="GPU-3060")
    assert (found["raysearch/profile"], found["raysearch/gpus"]) == ("rtx3060-12gb", "1")
    assert said == ["CUDA_VISIBLE_DEVICES shows 1 of this machine's 3 GPUs; they are labelled"]


def test_slices_are_started_by_uuid_since_ray_counts_gpus():
    _, said = labels(replace(cut_h100(), slices=(cut_h100().slices or ())[:2]))
    assert "CUDA_VISIBLE_DEVICES=MIG-small0,MIG-small1 and --num-gpus=2" in said[0]


@pytest.mark.parametrize(
    ("label", "fits"), [("h100-80gb", True), ("rtx3060-12gb_h100-80gb", True), ("h100-12gb", False), ("h100", False)]
)
def test_a_label_names_a_card_or_does_not(label: str, fits: bool):
    assert names(label, gpu("NVIDIA H100 80GB HBM3", 81559)) is fits


def test_the_command_prints_labels_of_this_machine_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "raysearch.run", "node-labels"], capture_output=True, text=True, check=True
    )
    (line,) = done.stdout.splitlines()
    found = parse_node_labels_string(line)
    assert found["raysearch/version"] == __version__
    assert found["raysearch/profile"]


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
