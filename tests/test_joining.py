"""On what terms a slot joins: the head's software, the study's data, the label of its node, the speed of its card."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from toy import Toy, gpu

from raysearch import joining, report
from raysearch.data import PreparedData
from raysearch.errors import UserError
from raysearch.executors import SlotInfo, SlotJoined, Speed
from raysearch.health import slow
from raysearch.joining import Software, check_software, data_refusal
from raysearch.model import SlotGauged
from raysearch.profile import Hardware

HEAD = Software("0.1.0", "2.13.0+cpu")
H100 = gpu("NVIDIA H100 80GB HBM3", 81559)


def slot(name: str = "a", hardware: Hardware = H100, **changes: object) -> SlotInfo:
    return replace(SlotInfo(name, hardware, "", None, True), **changes)  # pyright: ignore[reportArgumentType]


# ---- software ----


@pytest.mark.parametrize(
    ("here", "said"),
    [
        (Software("0.2.0", "2.13.0"), "raysearch there is 0.2.0, the head has 0.1.0; .*install the head's wheel"),
        (Software("0.1.0", "2.12.1+cu130"), r"torch there is 2.12.1\+cu130, the head has .*install torch==2.13.0 on"),
        (Software("0.1.0", "none"), "torch there is none"),
    ],
)
def test_a_node_with_other_software_is_refused_with_value_rule_and_remedy(here: Software, said: str):
    with pytest.raises(UserError, match=said):
        check_software(here, HEAD)


def test_a_head_without_a_gpu_may_have_another_build_of_torch():
    check_software(Software("0.1.0", "2.13.0+cu130"), HEAD)


# ---- data ----


def data(manifest: str) -> PreparedData:
    return PreparedData("/data/sotu", "sotu", "there is no network", manifest, "1")


def test_a_node_with_other_data_is_refused_with_value_rule_and_remedy():
    found = slot(preset="h100", data=data("b" * 64))
    assert data_refusal(found, None) is None
    assert data_refusal(found, "b" * 64) is None
    assert data_refusal(slot(), "a" * 64) is None
    said = data_refusal(found, "a" * 64)
    assert said is not None
    for part in ("/data/sotu", "bbbbbbbbbbbb", "aaaaaaaaaaaa", "'h100'", "move that folder away", "--study"):
        assert part in said


# ---- what is said of a slot ----


def test_a_slot_that_has_joined_is_described_as_what_it_is():
    odd = replace(H100, name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", mig=True, gpus=7)
    said = joining.described(slot(hardware=odd, node_gpus=2, speed=Speed(101.25, 240.0)))
    assert said.startswith("NVIDIA H100 80GB HBM3 MIG 1g.10gb, matmul 101 TFLOPS, copy 240 GB/s, a MIG slice: ")
    assert said.endswith("Ray has 2 of the machine's 7 GPUs there, the others are hidden")
    assert joining.described(slot(hardware=replace(H100, gpus=2), node_gpus=2)) == H100.name
    assert "drives a display" in joining.described(slot(hardware=replace(H100, display=True)))


def test_a_label_that_names_another_card_is_told_in_one_line():
    assert joining.mislabelled(slot()) is None
    assert joining.mislabelled(slot(label="h100-80gb")) is None
    said = joining.mislabelled(slot("box:GPU-1", label="rtx3060-12gb"))
    assert said == (
        "node box has h100-80gb, but its label raysearch/profile says rtx3060-12gb; what it has counts: "
        'start Ray there with --labels="$(raysearch node-labels)"'
    )


# ---- speed ----


def gauges(**tflops: Sequence[float]) -> dict[str, list[SlotGauged]]:
    return {name: [SlotGauged(name, "p", value, 1000.0) for value in found] for name, found in tflops.items()}


def test_a_card_three_per_cent_below_the_median_of_the_others_is_slow():
    (found,) = slow(gauges(a=[600], b=[602], c=[604], d=[583.9]))
    assert (found.slot, found.what, found.others) == ("d", "matmul", 3)
    assert found.reason == (
        "3.0 % slower in matmul than the median of the others: 583.9 against 602 TFLOPS; "
        "see to its cooling, power limit and clocks"
    )
    assert slow(gauges(a=[600], b=[602], c=[604], d=[584])) == []


def test_memory_counts_like_arithmetic_and_the_worse_of_both_is_said():
    found = gauges(a=[600], b=[600], c=[600])
    found["c"] = [SlotGauged("c", "p", 570.0, 900.0)]
    (only,) = slow(found)
    assert (only.what, round(only.share, 3)) == ("copy", 0.1)


def test_a_card_that_is_alone_is_compared_with_its_own_past():
    assert slow(gauges(a=[50])) == []
    assert slow(gauges(a=[51, 50, 50, 49])) == []
    (found,) = slow(gauges(a=[51, 50, 50, 45]))
    assert "10.0 % slower in matmul than the median of its own earlier ones" in found.reason


def test_the_latest_measurement_of_a_slot_counts():
    assert slow(gauges(a=[600], b=[500, 600])) == []


def test_a_slow_card_is_told_by_console_status_and_report_and_in_later_sessions(tmp_path: Path):
    speeds = {"slot0": 600.0, "slot1": 598.0, "slot2": 570.0}
    toy = Toy(tmp_path / "s", hardware=(H100, H100, H100))

    def gauged(toy: Toy) -> None:
        reports = toy.executor._reports  # pyright: ignore[reportPrivateUsage]
        for index, one in enumerate(reports):
            if isinstance(one, SlotJoined):
                info = replace(one.slot, speed=Speed(speeds[one.slot.id], 2000.0))
                reports[index] = SlotJoined(info)

    toy.drive(trials=2, meanwhile=gauged)
    line = "slot2 is 4.8 % slower in matmul than the median of the others: 570 against 599 TFLOPS"
    assert toy.said.getvalue().count(line) == 1
    found = report.status(toy.study, name="s", metric="score", now=toy.clock(), running=False)
    assert [one["slot"] for one in found["profiles"][0]["slow_slots"]] == ["slot2"]
    assert "slot2: 4.8 % slower in matmul" in report.status_text(found)
    report.write_all(toy.study, toy.path, name="s", metric="score")
    assert "Slot slot2 is 4.8 % slower in matmul" in (toy.path / "report.md").read_text()
    # a card that is alone in the next session is compared with those of the first
    toy.hardware, speeds["slot0"] = (H100,), 500.0
    toy.drive(trials=3, meanwhile=gauged)
    assert [one.slot for one in toy.study.slow_slots(toy.study.lanes["h100-80gb"])] == ["slot0"]
    assert toy.replayed().lanes["h100-80gb"].gauges == toy.study.lanes["h100-80gb"].gauges
