"""On what terms a slot joins: it has the head's software and the study's data, and is what its node's label says.

It compares and words; executors ask it, and act on what it says.
"""

from __future__ import annotations

from dataclasses import dataclass

from raysearch import __version__, labels, profile
from raysearch.errors import UserError
from raysearch.executors import SlotInfo

_SHOWN = 12  # characters of a hash


@dataclass(frozen=True)
class Software:
    """What every node must have in the same version."""

    raysearch: str
    torch: str


def installed() -> Software:
    """Of this machine."""
    return Software(__version__, profile.torch_version())


def check_software(here: Software, head: Software) -> None:
    """Refuses a node whose software is not the head's; the build of torch (`+cu130`) may be another one.

    Raises:
        UserError: What differs, and what to do on that node.
    """
    if here.raysearch != head.raysearch:
        raise UserError(
            f"raysearch there is {here.raysearch}, the head has {head.raysearch}; all nodes need the same: "
            "install the head's wheel on that node and start Ray there again"
        )
    if _public(here.torch) != _public(head.torch):
        raise UserError(
            f"torch there is {here.torch}, the head has {head.torch}; all nodes need the same version: install "
            f"torch=={_public(head.torch)} on that node (constraints.txt has it) and start Ray there again"
        )


def data_refusal(slot: SlotInfo, manifest: str | None) -> str | None:
    """Why a slot's data are not the study's, None if they are.

    Args:
        slot: It has just been set up.
        manifest: Hash of the data that the study's other trials with this preset were run on; None for the first ones.
    """
    if slot.data is None or manifest is None or slot.data.manifest_sha256 == manifest:
        return None
    return (
        f"its data {slot.data.folder} ({slot.data.dataset}) have the manifest {slot.data.manifest_sha256[:_SHOWN]}, "
        f"the study's for preset {slot.preset!r} have {manifest[:_SHOWN]}; one study has one set of data: move that "
        "folder away, and the node gets the study's when Ray is started there again, or start another --study"
    )


def described(slot: SlotInfo) -> str:
    """What a slot is, with what its owner should know of it."""
    said = [slot.hardware.name]
    if slot.speed:
        said += [f"matmul {slot.speed.matmul_tflops:.3g} TFLOPS", f"copy {slot.speed.copy_gb_per_s:.0f} GB/s"]
    said += profile.remarks(slot.hardware)
    if slot.data_from:
        said.append(f"data copied from {slot.data_from}")
    if 0 < slot.node_gpus < slot.hardware.gpus:
        said.append(f"Ray has {slot.node_gpus} of the machine's {slot.hardware.gpus} GPUs there, the others are hidden")
    return ", ".join(said)


def mislabelled(slot: SlotInfo) -> str | None:
    """What to say of a node whose label names other hardware, None if it does not."""
    if not slot.label or labels.names(slot.label, slot.hardware):
        return None
    host, kind = slot.id.rpartition(":")[0] or slot.id, profile.base_slug(slot.hardware)
    return (
        f"node {host} has {kind}, but its label {labels.PROFILE} says {slot.label}; what it has counts: "
        'start Ray there with --labels="$(raysearch node-labels)"'
    )


def _public(version: str) -> str:
    return version.split("+", maxsplit=1)[0]
