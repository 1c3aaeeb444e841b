"""Slots on Ray, the workers' side: the actor that owns a device, and the one that gives away the coordinator's data.

It neither makes actors nor reports their deaths: `ray.py` does, which imports this module and is not imported here.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial)

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from raysearch import objective, parcels, profile
from raysearch.compile_cache import PIECE_BYTES, Archive, CompileCache, open_cache
from raysearch.data import PreparedData, fetch, find, offer, prepare, texts_of
from raysearch.errors import UserError
from raysearch.executors import SlotInfo, Speed
from raysearch.joining import Software, check_software, installed
from raysearch.model import Outcome
from raysearch.nursery import Nursery
from raysearch.objective import Preset
from raysearch.parcels import Parcel
from raysearch.profile import Hardware
from raysearch.runner import Run, RunResult, RunSpec, full_disk, returned_files, sweep

GAUGE_LIMIT_S = 120.0  # importing torch from a cold disk takes most of it
MATMUL_MARK = "RAYSEARCH_MATMUL_TFLOPS"  # tells a trial what a matmul reached on its slot
GIVE_LIMIT_S = 120.0
PIECES_AHEAD = 2  # of 8 MiB, in Ray's small store
PARCEL_S = 600.0  # how long a packed cache is good for others who ask


@dataclass(frozen=True)
class SlotPlan:
    """What every slot of a study is told once.

    Attributes:
        study: Id of the study.
        session: Id of the coordinator's session.
        folder: The study's folder on the coordinator's machine.
        token: A file in it, by which a slot finds out whether it sees the same disk.
        preset: Name of the preset, or `auto` by hardware, or empty for objectives without presets.
        dataset: Named dataset, or empty for the preset's own choice.
        datasets: Datasets that were settled earlier, by preset.
        withheld: Names of variables that no process of a Ray that is started here sees, beside what looks like secrets.
        manifests: Hashes of their data, by preset.
        software: Of the head; all nodes need the same.
    """

    study: str
    session: str
    folder: str
    token: str
    preset: str
    dataset: str
    datasets: dict[str, str]
    withheld: tuple[str, ...] = ()
    manifests: dict[str, str] = field(default_factory=dict[str, str])
    software: Software = field(default_factory=installed)


class _Giver:
    """What all actors can do that have data: give it to others, in a thread of its own."""

    def __init__(self) -> None:
        self._data: dict[tuple[str, str], PreparedData] = {}  # by preset and dataset

    def data_parcel(self, preset: str, dataset: str) -> Parcel | None:
        """What it can give of that, if it has it."""
        found = self._data.get((preset, dataset))
        return offer(found) if found else None

    def data_piece(self, preset: str, dataset: str, name: str, offset: int) -> bytes:
        """A piece of a file of what it has offered."""
        return parcels.piece(Path(self._data[preset, dataset].folder), name, offset)


class Store(_Giver):
    """The actor on the coordinator's machine: what was prepared there is for all, and texts of a folder there too.

    Args:
        cache: The coordinator's RAYSEARCH_CACHE.
    """

    def __init__(self, cache: str | None) -> None:
        super().__init__()
        if cache:
            os.environ["RAYSEARCH_CACHE"] = cache

    def data_parcel(self, preset: str, dataset: str) -> Parcel | None:
        """What it can give; of a folder that is only here, it is made when it is first asked for."""
        if (preset, dataset) not in self._data:
            chosen = objective.named_preset(objective.load_presets(), preset)
            found, texts = find(chosen, dataset), texts_of(dataset)
            if not found and texts and texts.is_dir():
                found = prepare(chosen, dataset)
            if found:
                self._data[preset, dataset] = found
        return super().data_parcel(preset, dataset)


class Slot(_Giver):
    """The actor: owns one device, runs one trial at a time, each in processes of its own."""

    def __init__(self, plan: SlotPlan, host: str, place: str, device: str, threads: int) -> None:
        super().__init__()
        self._plan = plan
        self._host = host
        self._place = place
        self._device = device
        self._threads = threads
        self._folder = ""
        self._found: SlotInfo | None = None
        self._speed: Speed | None = None
        self._slot_id = ""
        self._shares_disk = (Path(plan.folder) / plan.token).exists()
        self._run: tuple[str, int, Run] | None = None
        self._cancelled: set[tuple[str, int]] = set()
        self._nursery = Nursery()
        self._cache: CompileCache | None = None
        self._parcel: Archive | None = None

    def describe(self) -> SlotInfo:
        """Finds out what the slot is made of, and whether its machine has the data."""
        check_software(installed(), self._plan.software)
        hardware = self._hardware()
        self._slot_id = f"{self._host}:{hardware.uuid[:12]}" if hardware.uuid else self._place
        # Of earlier sessions on this machine, and of an actor of this one that died here.
        sweep(self._plan.study, session=self._plan.session, slot=self._slot_id)
        for left in Path(tempfile.gettempdir()).glob(f"{glob.escape(self._scratch())}*"):
            shutil.rmtree(left, ignore_errors=True)
        _check_disk(tempfile.gettempdir())
        if not self._plan.preset:
            return SlotInfo(self._slot_id, hardware, "", None, self._shares_disk)
        presets, named = objective.load_presets(), self._plan.preset
        if named == "auto":
            preset = objective.choose_preset(presets, device=hardware.device, memory_mb=hardware.memory_mb)
        else:
            preset = objective.named_preset(presets, named)
        self._cache = open_cache(hardware, os.environ)
        kind = self._cache.key if self._cache else ""
        self._found = SlotInfo(self._slot_id, hardware, preset.name, None, self._shares_disk, compile_cache=kind)
        found = find(preset, self._plan.datasets.get(preset.name) or self._plan.dataset or None)
        return self._ready(found) if found else self._found

    def obtain(self, dataset: str, manifest: str, givers: list[tuple[str, Any]]) -> SlotInfo:
        """Sees to data that its machine lacks; takes long.

        Args:
            dataset: What all slots with this preset have, or empty for the preset's own choice.
            manifest: Its hash, or empty if nobody has it yet.
            givers: Hosts and actors that may have it, to be asked in turn; if none has, it is made here.

        Raises:
            ConnectionError: They had it and did not come through, and it cannot be made here.
        """
        assert self._found
        preset = objective.named_preset(objective.load_presets(), self._found.preset)
        found, broken = find(preset, dataset or None), ""
        for host, giver in () if found else givers:
            try:
                found = _fetched(giver, preset, dataset or preset.dataset, manifest)
            except (RayError, UserError) as error:  # the next one goes on where it stopped
                broken = f"{host} did not give its data: {said_by(error)}"
            if found:
                return dataclasses.replace(self._ready(found), data_from=host)
        try:
            return self._ready(found or prepare(preset, dataset or None))
        except UserError as error:
            raise ConnectionError(f"{broken}; and {error}") if broken else error from None

    def _ready(self, found: PreparedData) -> SlotInfo:
        assert self._found
        self._data[self._found.preset, found.dataset] = found
        self._folder = found.folder
        self._speed = gauged(self._device, self._threads)  # last: making data is work for the CPU
        return dataclasses.replace(self._found, data=found, speed=self._speed)

    def _hardware(self) -> Hardware:
        if self._device == "cpu":
            return profile.cpu()
        done = subprocess.run(
            [sys.executable, "-m", "raysearch.profile"], capture_output=True, text=True, check=False, timeout=120
        )
        if done.returncode != 0:
            raise UserError(f"the GPU of {self._place} cannot be read: {done.stderr.strip().splitlines()[-1:]}")
        found = [Hardware(**fields) for fields in json.loads(done.stdout)]
        if found[0].device != "cuda":
            raise UserError(f"{self._place} has no GPU that NVML shows; check the driver on that node")
        return found[0]

    def run(self, spec: RunSpec) -> RunResult:
        """Runs one attempt to its end."""
        shares = self._shares_disk
        out = Path(spec.out if shares else f"{tempfile.mkdtemp(prefix=self._scratch())}/{spec.trial_id}")
        env = dict(os.environ)
        if self._device == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
        if self._speed is not None:
            env[MATMUL_MARK] = repr(self._speed.matmul_tflops)
        if self._cache:
            env |= self._cache.environment()
        with self._cache.in_use() if self._cache else contextlib.nullcontext():
            run = Run(spec, out=out, data=self._folder, env=env, slot=self._slot_id, nursery=self._nursery)
            self._run = (spec.trial_id, spec.attempt, run)
            if (spec.trial_id, spec.attempt) in self._cancelled:  # before it began
                run.cancel()
            try:
                result = run.wait()
            finally:
                self._run = None
        if result.outcome is Outcome.LOST:
            _check_disk(out)
        if shares:
            return result
        files = returned_files(out)
        shutil.rmtree(out.parent, ignore_errors=True)
        return dataclasses.replace(result, files=files)

    def _scratch(self) -> str:
        """How the folders begin that this slot makes for trials; of what it leaves when it is killed, too."""
        return f"raysearch-{self._plan.study[:12]}-{self._slot_id.replace('/', '-')}-"

    def progress(self) -> dict[str, Any]:
        """What the trial in flight says of itself."""
        current = self._run
        return current[2].progress() if current else {}

    def cancel(self, trial_id: str, attempt: int) -> None:
        """Ends an attempt that is in flight or about to begin."""
        self._cancelled.add((trial_id, attempt))
        current = self._run
        if current and current[:2] == (trial_id, attempt):
            current[2].cancel()

    # ---- the compile cache on its way to a worker that has none; in threads of their own, beside a trial ----

    def pack_cache(self) -> tuple[int, str] | None:
        """Packs the cache for other slots; says its size in bytes and its hash. Several may come at the same time."""
        if self._cache and (self._parcel is None or self._parcel.packed_at < time.time() - PARCEL_S):
            if self._parcel:
                self._parcel.file.close()
            self._parcel = self._cache.pack()
        return (self._parcel.size_bytes, self._parcel.sha256) if self._parcel else None

    def cache_piece(self, sha256: str, offset: int) -> bytes:
        """A piece of what was packed; nothing if it was packed anew meanwhile."""
        return self._parcel.piece(offset) if self._parcel and self._parcel.sha256 == sha256 else b""

    def fetch_cache(self, givers: list[Any]) -> str:
        """Fills an empty cache from one of the slots that are asked in turn; says what came of it."""
        if self._cache is None:
            return ""
        said = "none has one"
        with self._cache.to_be_filled() as wanted:
            for giver in givers if wanted else ():
                try:
                    size_bytes, sha256 = _asked(giver.pack_cache) or (0, "")
                    if size_bytes:
                        offsets = range(0, size_bytes, PIECE_BYTES)
                        self._cache.receive((_asked(giver.cache_piece, sha256, at) for at in offsets), sha256)
                        return f"{size_bytes} bytes"
                except (RayError, UserError, OSError) as error:  # trials compile for themselves, as without it
                    said = said_by(error)
        return said if wanted else "not wanted"


def _check_disk(folder: str | Path) -> None:
    full = full_disk(Path(folder))
    if full:
        raise OSError(errno.ENOSPC, full)


def _asked(method: Any, *arguments: Any, limit_s: float | None = GIVE_LIMIT_S) -> Any:
    """What another slot says; it has a thread for that."""
    return ray.get(method.options(concurrency_group="give").remote(*arguments), timeout=limit_s)


def _fetched(giver: Any, preset: Preset, dataset: str, manifest: str) -> PreparedData | None:
    """Data from another actor, None if it has none of that kind."""
    # no limit: it may have to make it first, and Ray tells if it dies
    parcel: Parcel | None = _asked(giver.data_parcel, preset.name, dataset, limit_s=None)
    if parcel is None or manifest not in ("", parcel.manifest_sha256):
        return None

    def pieces(name: str, offsets: Iterable[int]) -> Generator[bytes]:
        asked: deque[Any] = deque()
        piece = giver.data_piece.options(concurrency_group="give")
        for offset in offsets:
            asked.append(piece.remote(preset.name, dataset, name, offset))
            if len(asked) > PIECES_AHEAD:
                yield ray.get(asked.popleft(), timeout=GIVE_LIMIT_S)
        while asked:
            yield ray.get(asked.popleft(), timeout=GIVE_LIMIT_S)

    return fetch(preset, parcel, pieces)


def gauged(device: str, threads: int) -> Speed | None:
    """What the device reaches, by a process of its own; None if it cannot be told, which is no reason against a slot.

    Args:
        device: `cuda` or `cpu`.
        threads: CPU threads of a trial on a CPU slot.
    """
    command = [sys.executable, "-P", "-m", "trainer.gauge", "--device", device]
    command += ["--threads", str(threads)] if device == "cpu" else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GAUGE_LIMIT_S)
        found = json.loads(done.stdout)
        return Speed(float(found["matmul_tflops"]), float(found["copy_gb_per_s"]))
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        return None


def said_by(error: BaseException) -> str:
    """What an exception of Ray's says, in a line."""
    text = " ".join(str(error).split())
    _, found, detail = text.rpartition("Worker exit detail: ")
    if found:
        text = detail.split(" Some common causes")[0]
    elif "Traceback" in text:
        text = str(error).strip().splitlines()[-1]
    return text if isinstance(error, UserError) else text[:300] or type(error).__name__
