"""Patches that a person drops into a running study with `raysearch propose`: files in the study's `inbox` folder.

An item is a JSON file, written in one piece; it is taken once, and kept under `inbox/taken` afterwards.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysearch.model import Operator
from raysearch.proposers import Idea

_SOURCE = "inbox "  # begins the source of what lay here, whoever it says that it is by


@dataclass(frozen=True)
class Item:
    """A dropped patch.

    Attributes:
        path: Its file.
        profiles: Slugs that it is for.
    """

    path: Path
    idea: Idea
    profiles: tuple[str, ...]


def drop(inbox: Path, *, patch: str, why: str, by: str, profiles: Sequence[str], at: float) -> Path:
    """Puts a patch into the inbox; the coordinator takes it within a second or two.

    Args:
        inbox: Folder of the study.
        patch: Unified diff.
        why: The hypothesis.
        by: Who proposes it.
        profiles: Slugs that it is for.
        at: Unix time in seconds, for the order of the items.
    """
    inbox.mkdir(exist_ok=True)
    words = re.sub(r"[^a-z0-9]+", "-", why.lower()).strip("-")[:40] or "patch"
    target = inbox / f"{at:017.6f}-{words}.json"
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps({"patch": patch, "why": why, "by": by, "profiles": list(profiles)}))
    temporary.replace(target)
    return target


def waiting(inbox: Path) -> tuple[list[Item], list[tuple[Path, str]]]:
    """What lies in the inbox, oldest first, and the files that are no items, with the reason."""
    items: list[Item] = []
    bad: list[tuple[Path, str]] = []
    for path in sorted(inbox.glob("*.json")):
        try:
            items.append(_item(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            bad.append((path, f"{type(error).__name__}: {error}"))
    return items, bad


def _item(path: Path) -> Item:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    patch, why, by, profiles = (found[key] for key in ("patch", "why", "by", "profiles"))
    if not isinstance(profiles, list):
        raise TypeError("profiles must be a list")
    texts = [patch, why, by, *profiles]  # pyright: ignore[reportUnknownVariableType] - what JSON gives
    if not all(isinstance(text, str) for text in texts):  # pyright: ignore[reportUnknownVariableType]
        raise TypeError("patch, why, by and profiles must be text")
    "".join(texts).encode()  # pyright: ignore[reportUnknownArgumentType] - JSON may hold half a character
    idea = Idea(patch=patch, operator=Operator.DRAFT, hypothesis=why, proposer=by, source=f"{_SOURCE}{path.name}")
    return Item(path, idea, tuple(profiles))  # pyright: ignore[reportUnknownArgumentType]


def is_from(source: str) -> bool:
    """Whether a proposal with this source is one that a person dropped."""
    return source.startswith(_SOURCE)


def take(path: Path) -> None:
    """Moves an item aside, after what it says was journalled."""
    taken = path.parent / "taken"
    taken.mkdir(exist_ok=True)
    target = taken / path.name
    path.replace(target if not target.exists() else taken / f"{time.time():.6f}-{path.name}")
