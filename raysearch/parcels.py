"""Prepared data on their way from one machine to another: a folder's files in pieces, resumed where they stopped.

It does not know how a piece travels, nor what is in it: the trainer checks and takes in what has arrived.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock

from raysearch.errors import UserError

MANIFEST = "manifest.json"
PIECE_BYTES = 8 * 2**20
_SHOWN = 12  # characters of a hash

Pieces = Callable[[str, Iterable[int]], Iterable[bytes]]


@dataclass(frozen=True)
class Parcel:
    """What a machine has to give.

    Attributes:
        dataset: Its name.
        manifest_sha256: Names the data as a whole.
        files: Size in bytes by name, the manifest among them.
    """

    dataset: str
    manifest_sha256: str
    files: dict[str, int]


def packed(folder: Path, *, dataset: str, manifest_sha256: str) -> Parcel:
    """What a prepared folder has to give.

    Raises:
        OSError: A file of it is gone.
    """
    names = [*json.loads((folder / MANIFEST).read_bytes())["files"], MANIFEST]
    return Parcel(dataset, manifest_sha256, {name: (folder / name).stat().st_size for name in names})


def piece(folder: Path, name: str, offset: int) -> bytes:
    """At most PIECE_BYTES of a file, from an offset on."""
    with (folder / name).open("rb") as file:
        file.seek(offset)
        return file.read(PIECE_BYTES)


@contextmanager
def waiting_place(folder: Path, parcel: Parcel) -> Generator[Path]:
    """Where a parcel waits until it is whole; one process of a machine at a time fills it.

    What has arrived stays there when the block is left by an error, so that the next one goes on with it.

    Args:
        folder: Where the data will lie; the place is beside it.
        parcel: What is to arrive. Rests of others for the same folder are removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    arriving = folder.with_name(f"{folder.name}.arriving-{parcel.manifest_sha256[:_SHOWN]}")
    with filelock.FileLock(f"{folder}.arriving.lock"):
        for rest in folder.parent.glob(f"{folder.name}.arriving-*"):
            if rest != arriving:
                shutil.rmtree(rest, ignore_errors=True)
        arriving.mkdir(exist_ok=True)
        yield arriving
        shutil.rmtree(arriving, ignore_errors=True)


def receive(parcel: Parcel, arriving: Path, pieces: Pieces) -> None:
    """Fetches what is not there yet.

    Args:
        parcel: What is to arrive.
        arriving: Where; what an earlier call has left there counts.
        pieces: Gives the pieces of a file (its name) at offsets in bytes.

    Raises:
        UserError: The parcel names what is no file of such a folder, or a piece is not as long as it must be.
        OSError: There is no room.
    """
    _check_room(parcel, arriving)
    for name, size_bytes in parcel.files.items():
        if Path(name).name != name:
            raise UserError(f"data: {name!r} is no name of a file in a data folder; the parcel is refused")
        with (arriving / name).open("ab") as file:
            if file.tell() > size_bytes:  # of whatever was interrupted, this cannot come
                file.truncate(0)
            offsets = range(file.tell(), size_bytes, PIECE_BYTES)
            for offset, content in zip(offsets, pieces(name, offsets), strict=True):
                if len(content) != min(PIECE_BYTES, size_bytes - offset):
                    raise UserError(f"data: {name} was changed while it was copied: it had {size_bytes} bytes")
                file.write(content)
                file.flush()  # what is there counts, if this process is killed now


def _check_room(parcel: Parcel, arriving: Path) -> None:
    there = sum(path.stat().st_size for path in arriving.iterdir())
    need, free = sum(parcel.files.values()) - there, shutil.disk_usage(arriving).free
    if free < need:
        raise OSError(
            errno.ENOSPC,
            f"{arriving.parent}: the study's data need {need / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free there; "
            "make room, or set RAYSEARCH_CACHE to another disk where Ray is started",
        )
