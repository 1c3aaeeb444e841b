"""The human's directions, `program.md`: prose for those who read, a fenced block for those who do not. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Directions:
    """What the human wants of every proposer.

    Attributes:
        prose: The text without its block, for models and coding agents.
    """

    prose: str = ""
