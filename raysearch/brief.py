"""What a mind is told of a study, as facts read from its state. Pure; `proposers.context` puts them into words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Brief:
    """What is known of one profile of a study."""
