"""What the trainer's modules share: the error meant for a person, notes, the cache folder, the check of the disk.

It does not know what is prepared, nor where it comes from.
"""

import os
import shlex
import shutil
import sys
import time
from pathlib import Path

MB = 1_000_000
PRESETS = Path(__file__).parent / "presets"


class DataError(Exception):
    """Bad input, broken data, no space or no network: one line with the value, the rule and the remedy."""


def say(message: str) -> None:
    """Writes a note for the person to stderr; stdout belongs to the result."""
    print(message, file=sys.stderr, flush=True)


class Ticker:
    """Says at most one note every few seconds, so that a log file and a terminal can both be read.

    Args:
        every_s: the least time between two notes, in seconds.
    """

    def __init__(self, every_s: float = 5.0):
        self._every_s = every_s
        self._last_s = time.monotonic()

    def say(self, message: str) -> None:
        """Says the note, or nothing when the last one is too recent."""
        now_s = time.monotonic()
        if now_s - self._last_s >= self._every_s:
            self._last_s = now_s
            say(message)


def require_space(folder: Path, need_bytes: int, what: str) -> None:
    """Refuses before the disk is full, because a full disk also stops everything else that runs on the machine.

    Raises:
        DataError: fewer than `need_bytes` are free where `folder` is, or will be.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < need_bytes:
        raise DataError(
            f"{folder}: {what} needs {need_bytes / MB:,.0f} MB and {free_bytes / MB:,.0f} MB are free; "
            "free some space, or choose another disk with --data DIR and RAYSEARCH_CACHE"
        )


def cache_dir() -> Path:
    """Where data and downloads are kept: RAYSEARCH_CACHE, else the user's cache folder."""
    if named := os.environ.get("RAYSEARCH_CACHE"):
        return Path(named).expanduser().absolute()
    import platformdirs  # noqa: PLC0415

    return platformdirs.user_cache_path("raysearch")


def reason(error: Exception) -> str:
    """An error in a few words, on one line."""
    if isinstance(error, KeyError):
        return f"without {error}"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())


def preset_names() -> list[str]:
    """The presets that come with the trainer."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def repair_by_preset(directory: Path) -> str:
    """The remedy for a folder that does not tell what was in it."""
    return (
        f"prepare it with: python -m trainer.prepare --preset PRESET --data {shlex.quote(str(directory))} --force "
        f"(PRESET: {', '.join(preset_names())})"
    )
