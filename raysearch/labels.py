"""The labels that a Ray node is started with, `ray start --labels="$(raysearch node-labels)"`: what its hardware is.

It reads no hardware itself, and a label decides nothing but where Ray looks for a card: slots see for themselves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from raysearch import profile
from raysearch.profile import Hardware

PROFILE = "raysearch/profile"
_SEVERAL = "_"  # between kinds of a node that has several; in none of their names
_LONGEST = 63  # characters of a label's value


def node_labels(found: Sequence[Hardware], *, version: str) -> str:
    """The labels of a node, as `ray start --labels` takes them.

    Args:
        found: What is visible there: GPUs, or one CPU.
        version: Of raysearch.
    """
    gpus = sum(hardware.device == "cuda" for hardware in found)
    labels = {
        PROFILE: _SEVERAL.join(_kinds(found)),
        "raysearch/gpus": str(gpus),
        "raysearch/torch": found[0].torch,
        "raysearch/version": version,
    }
    return ",".join(f"{name}={_value(text)}" for name, text in labels.items())


def names(label: str, hardware: Hardware) -> bool:
    """Whether the value of the label `raysearch/profile` names this hardware."""
    kind = profile.base_slug(hardware)
    return kind in label.split(_SEVERAL) or _value(kind) == label


def advice(found: Sequence[Hardware], *, chosen: bool) -> list[str]:
    """What whoever starts Ray on this node should know first, a line each.

    Args:
        found: What is visible.
        chosen: Whether CUDA_VISIBLE_DEVICES is set.
    """
    said: list[str] = []
    gpus = [hardware for hardware in found if hardware.device == "cuda"]
    kinds = _kinds(gpus)
    if len(kinds) > 1:
        starts = "; ".join(f"CUDA_VISIBLE_DEVICES={_uuids(gpus, kind)} ray start …" for kind in kinds)
        said.append(f"this node has {len(kinds)} kinds of GPU ({', '.join(kinds)}); Ray starts once for each: {starts}")
    elif any(gpu.mig for gpu in gpus) and not chosen:
        said.append(
            "Ray counts GPUs and not their slices; start it with "
            f"CUDA_VISIBLE_DEVICES={_uuids(gpus, kinds[0])} and --num-gpus={len(gpus)}"
        )
    if gpus and gpus[0].gpus > len(gpus):
        said.append(f"CUDA_VISIBLE_DEVICES shows {len(gpus)} of this machine's {gpus[0].gpus} GPUs; they are labelled")
    for gpu in gpus:
        said += [f"{gpu.name} {gpu.uuid}: {remark}" for remark in profile.remarks(gpu)]
    return said


def _kinds(found: Sequence[Hardware]) -> list[str]:
    return list(dict.fromkeys(profile.base_slug(hardware) for hardware in found))


def _uuids(gpus: Sequence[Hardware], kind: str) -> str:
    return ",".join(gpu.uuid for gpu in gpus if profile.base_slug(gpu) == kind)


def _value(text: str) -> str:
    """A text as the value of a label: letters, digits, dots, dashes and underscores, at its ends letters or digits."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:_LONGEST].strip("._-")
