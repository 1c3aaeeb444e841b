"""Sees to the trainer's prepared data on this machine, through the trainer's own command: made here, or fetched.

It does not look into them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from raysearch import parcels
from raysearch.errors import UserError
from raysearch.objective import Preset
from raysearch.parcels import Parcel, Pieces

_FOLDER = "files:"


def texts_of(dataset: str) -> Path | None:
    """The folder that a dataset is, if it is one of the user's own texts."""
    name = dataset.removeprefix(_FOLDER)
    return Path(name).expanduser() if name and name != dataset else None


def anywhere(dataset: str) -> str:
    """A dataset's name as it means the same in every working directory."""
    texts = texts_of(dataset)
    return f"{_FOLDER}{texts.resolve()}" if texts else dataset


@dataclass(frozen=True)
class PreparedData:
    """Prepared data, as `trainer.prepare` reported it.

    Attributes:
        folder: On this machine.
        why: Why this dataset was taken, in a sentence.
    """

    folder: str
    dataset: str
    why: str
    manifest_sha256: str
    evaluation_version: str


def prepare(preset: Preset, dataset: str | None, *, show: bool = False) -> PreparedData:
    """Makes a preset's data on this machine, or finds it made.

    Args:
        preset: Whose vocabulary and row length.
        dataset: Its name, or None for the trainer's choice.
        show: Whether the progress goes to this process's stderr.

    Raises:
        UserError: What the preparation said in its last line.
    """
    return _asked(preset, dataset, show=show)


def find(preset: Preset, dataset: str | None) -> PreparedData | None:
    """A preset's data if this machine has them; nothing is made.

    Args:
        preset: Whose vocabulary and row length.
        dataset: Its name, or None for the preset's own.

    Raises:
        UserError: They are there, but broken.
    """
    found = _asked(preset, dataset, "--find")
    return found if found.manifest_sha256 else None


def offer(found: PreparedData) -> Parcel:
    """What this machine can give of its data.

    Raises:
        OSError: A file is gone.
    """
    return parcels.packed(Path(found.folder), dataset=found.dataset, manifest_sha256=found.manifest_sha256)


def fetch(preset: Preset, parcel: Parcel, pieces: Pieces) -> PreparedData:
    """Gets a preset's data from another machine, and takes them in after a look at every byte.

    Args:
        preset: Whose data they are.
        parcel: What that machine offers.
        pieces: Gives pieces of its files.

    Raises:
        UserError: What came is damaged, or other data; it is gone then.
        OSError: There is no room. What came stays for the next call, as it does when `pieces` raises.
    """
    here = Path(_asked(preset, parcel.dataset, "--find").folder)
    with parcels.waiting_place(here, parcel) as arriving:
        found = find(preset, parcel.dataset)
        if found:
            return found  # another slot of this machine has got them meanwhile
        parcels.receive(parcel, arriving, pieces)
        try:
            return _asked(preset, parcel.dataset, "--take", str(arriving))
        except UserError as error:
            shutil.rmtree(arriving)
            raise UserError(f"what came is damaged: {error}") from None


def _asked(preset: Preset, dataset: str | None, *options: str, show: bool = False) -> PreparedData:
    command = [sys.executable, "-m", "trainer.prepare", "--preset", preset.name, *options]
    if dataset:
        command += ["--dataset", dataset]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        last = ""
        for line in process.stderr:  # the last line is held back: when the preparation fails, it is the error
            if show and last:
                sys.stderr.write(last)
            last = line
        output = process.stdout.read()
    if process.returncode != 0:
        said = last.strip().removeprefix("error: ")
        raise UserError(said or f"the data of preset {preset.name!r} could not be prepared: exit {process.returncode}")
    if show and last:
        sys.stderr.write(last)
    found = json.loads(output.strip().splitlines()[-1])
    return PreparedData(
        folder=found["data"],
        dataset=found["dataset"],
        why=found["why"],
        manifest_sha256=found["manifest_sha256"],
        evaluation_version=found["evaluation_version"],
    )
