"""Compares trainers at one budget: speed, memory, score and where the seconds go, in one table.

`python benchmarks/trainer.py --data DIR h100 --reference PATH` runs presets of ours and programs in the manner of
karpathy/autoresearch, one at a time on each GPU. A variant is a preset (`h100`), one with another budget in seconds
(`h100@150`), with other constants (`h100:DEPTH=9,TOTAL_BATCH_SIZE=262144`), with both (`h100:DEPTH=9@150`), or a
program as it is (`path/to/train.py`). It judges nothing: one run is no win.
"""
# ruff: noqa: E402  # the path is put right before anything of this repository is imported

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # this file is named as the package is
    sys.path = [str(ROOT), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "benchmarks")]

from benchmarks.trainer_table import Row, first_reference, write
from benchmarks.trainer_variants import Variant, read_variants
from raysearch.errors import UserError
from raysearch.objective import TRAIN_FILE, load_presets
from raysearch.wording import plural

CPU = "cpu"
AROUND_S = 900.0  # of a run's limit, beside its training: a cold start and an evaluation on a slow card


@dataclass(frozen=True)
class Job:
    """One run of a variant: with one seed, in a folder; a budget in tokens counts instead of the seconds."""

    variant: Variant
    seed: int
    folder: Path
    budget_tokens: int | None = None


# ---- running ----


def visible_gpus() -> list[str]:
    """The GPUs that a child would see, as CUDA_VISIBLE_DEVICES names them; none where there is no driver."""
    named_ones = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named_ones is not None:
        return [name.strip() for name in named_ones.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else []


def card_of(gpu: str) -> str:
    """The name of a GPU, or of no GPU."""
    if gpu == CPU:
        return CPU
    asked = ["nvidia-smi", f"--id={gpu}", "--query-gpu=name", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return "unknown"


@dataclass
class Bench:
    """Runs jobs, one at a time on each GPU.

    Attributes:
        gpus: Free and busy ones.
        cache: Of compiled code, for all; None: an empty one for each job.
        running: Process ids, which are their process groups too.
        is_stopping: Whether a run that starts now is to end at once.
    """

    data: Path
    eval_tokens: int | None
    gpus: Sequence[str]
    cache: Path | None
    limit_s: float | None
    running: set[int] = field(default_factory=set[int])
    is_stopping: bool = False

    def run(self, jobs: Sequence[Job]) -> Generator[tuple[Job, Row], None, None]:
        """Each job with what came of it, as they end; whatever happens, no process is left behind."""
        self.is_stopping = False
        free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for gpu in self.gpus:
            free.put(gpu)
        ended: queue.SimpleQueue[tuple[Job, Row | BaseException]] = queue.SimpleQueue()

        def perform(job: Job) -> None:
            gpu = free.get()
            try:
                ended.put((job, self.perform(job, gpu)))
            except BaseException as error:  # noqa: BLE001  # told to the main thread
                ended.put((job, error))
            finally:
                free.put(gpu)

        pool = ThreadPoolExecutor(len(self.gpus))
        try:
            for job in jobs:
                pool.submit(perform, job)
            for _ in jobs:
                job, row = ended.get()
                if isinstance(row, BaseException):
                    raise row
                yield job, row
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self.is_stopping = True
            for pid in list(self.running):
                kill(pid)
            pool.shutdown()

    def perform(self, job: Job, gpu: str) -> Row:
        """Runs a job to its end or its limit; a job that fails is a row with its reason."""
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "result.json").unlink(missing_ok=True)
        limit_s = self.limit_s or AROUND_S + (1.5 if job.budget_tokens is None else 4.0) * job.variant.budget_s
        with self._cache() as cache, (job.folder / "log.txt").open("wb") as log:
            started = time.perf_counter()
            child = subprocess.Popen(
                self.command(job, gpu),
                env=environment(cache, gpu),
                cwd=job.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.running.add(child.pid)
            if self.is_stopping:
                kill(child.pid)
            try:
                child.wait(limit_s)
                killed = ""
            except subprocess.TimeoutExpired:
                killed = f"no end after {limit_s:.0f} s; give it more with --limit-s"
            finally:
                wall_s = time.perf_counter() - started
                kill(child.pid)  # also what the run has left behind
                child.wait()
                self.running.discard(child.pid)
        result = read_result(job.folder)
        one = job.variant
        reason = killed or failure(result, child.returncode, job.folder / "log.txt")
        return Row(one.label, job.seed, one.is_reference, one.budget_s, gpu, wall_s, result, reason)

    def command(self, job: Job, gpu: str) -> list[str]:
        """The argument vector of a job; writes the program that it needs."""
        one = job.variant
        program = one.program
        if program is None:
            program = job.folder / TRAIN_FILE
            program.write_text(one.source or "")
        shared = ["--data", self.data.resolve(), "--out", job.folder.resolve(), "--seed", job.seed]
        if self.eval_tokens is not None:
            shared += ["--eval-tokens", self.eval_tokens]
        if one.is_reference:
            own = [ROOT / "benchmarks" / "reference.py", "--reference", program.resolve(), "--budget-s", one.budget_s]
        else:
            budget = ("--budget-tokens", job.budget_tokens) if job.budget_tokens else ("--budget-s", one.budget_s)
            device = "cpu" if gpu == CPU else "cuda"  # without CUDA it fails in one line, instead of training for hours
            own = ["-m", "trainer.harness", "--train-file", program.resolve(), *budget, "--device", device]
        return [sys.executable, "-P", *map(str, [*own, *shared])]

    @contextlib.contextmanager
    def _cache(self) -> Iterator[Path]:
        if self.cache is not None:
            yield self.cache
            return
        with tempfile.TemporaryDirectory(prefix="raysearch-cold-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)


def environment(cache: Path, gpu: str) -> dict[str, str]:
    """Of a job: one GPU, the caches in one folder, the modules of this repository."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "" if gpu == CPU else gpu,
        "TORCHINDUCTOR_CACHE_DIR": str(cache.absolute() / "inductor"),
        "TRITON_CACHE_DIR": str(cache.absolute() / "triton"),
        "RAYSEARCH_CACHE": str(cache.absolute() / "raysearch"),  # the micro-batch that was found fit
        "PYTHONPATH": os.pathsep.join(paths),
        "RAYSEARCH_SPAWNED_AT": repr(time.time()),
    }


def kill(pid: int) -> None:
    """Ends a process group, if it is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def read_result(folder: Path) -> dict[str, Any]:
    """The run's result.json; empty where there is none, or a broken one."""
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def failure(result: Mapping[str, Any], code: int, log: Path) -> str:
    """Why a run has no score; "" if it has one."""
    if result.get("outcome") == "measured":
        return ""
    if result:
        return f"{result.get('outcome')}: {result.get('reason')}"
    said = [line.strip() for line in re.split(r"[\r\n]", log.read_text(errors="replace")) if line.strip()]
    return f"exit code {code}: {said[-1] if said else 'it said nothing'}"


# ---- the command ----


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="PRESET[:NAME=VALUE,...][@SECONDS] or PATH.py.")
    parser.add_argument("--data", type=Path, required=True, help="Folder made by python -m trainer.prepare.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the table and each run's files.")
    parser.add_argument(
        "--reference", action="append", default=[], metavar="PATH", help="Folder with an autoresearch-style train.py."
    )
    parser.add_argument("--budget-s", type=positive, default=300.0, help="Seconds of training.")
    parser.add_argument("--eval-tokens", type=int, help="Tokens to score (whole rows); default: all of val.")
    parser.add_argument("--seed", type=int, default=0, help="The first one.")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="Seeds for each variant.")
    parser.add_argument("--gpus", help="Such as 0,1, or cpu; default: all that are visible, else the CPU.")
    parser.add_argument("--cold", action="store_true", help="Each run with empty caches, as the first on a machine.")
    parser.add_argument("--cache", type=Path, help="Folder of the shared caches; default: among temporary files.")
    parser.add_argument("--same-tokens", action="store_true", help="Ours again on the first reference's tokens.")
    parser.add_argument("--limit-s", type=positive, help="Of a whole run; default: by its budget.")
    return parser.parse_args(arguments)


def positive(text: str) -> float:
    """A positive number; ValueError otherwise."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for what cannot be run together."""
    if not arguments.variants and not arguments.reference:
        raise UserError(f"no variant: nothing to compare; give a preset ({', '.join(load_presets())}) or --reference")
    if arguments.same_tokens and not arguments.reference:
        raise UserError("--same-tokens without --reference: there are no tokens to go by; give one")
    if arguments.cold and arguments.cache:
        raise UserError("--cold with --cache: a cold run has a cache of its own; leave one of them out")
    if arguments.repeat < 1 or (arguments.eval_tokens is not None and arguments.eval_tokens < 1):
        raise UserError("--repeat and --eval-tokens have to be 1 or more; give a larger number")
    if not (arguments.data / "manifest.json").is_file():
        raise UserError(
            f"--data {arguments.data} has no manifest.json; run: python -m trainer.prepare --data {arguments.data}"
        )


def perform(arguments: argparse.Namespace) -> str:
    """Runs everything; returns the table.

    Raises:
        UserError: What was asked for cannot be run.
    """
    check(arguments)
    variants = read_variants(arguments.reference, arguments.variants, budget_s=arguments.budget_s)
    gpus = [gpu for gpu in (arguments.gpus or "").split(",") if gpu] or visible_gpus() or [CPU]
    shared = arguments.cache or Path(tempfile.gettempdir()) / f"raysearch-benchmark-{os.getuid()}"
    out: Path = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.data, arguments.eval_tokens, gpus, None if arguments.cold else shared, arguments.limit_s)
    jobs = planned(variants, range(arguments.seed, arguments.seed + arguments.repeat), out)
    facts = {"cards": {gpu: card_of(gpu) for gpu in gpus}, "data": str(arguments.data), "cold": arguments.cold}
    heading = (
        f"{', '.join(sorted(set(facts['cards'].values())))}; {arguments.budget_s:g} s of training where no other is "
        f"named; {'empty caches for each run' if arguments.cold else 'shared caches'}"
    )
    rows: list[Row | None] = [None] * len(jobs)

    def done() -> list[Row]:
        return [row for row in rows if row is not None]

    with contextlib.closing(bench.run(jobs)) as runs:
        for job, row in runs:
            rows[jobs.index(job)] = row
            write(done(), out, heading, facts)
            say(f"{len(done())} of {plural(len(jobs), 'run')}", row)
    if arguments.same_tokens:
        again = at_the_references_tokens(jobs, done())
        with contextlib.closing(bench.run(list(again))) as runs:
            for number, (job, row) in enumerate(runs, 1):
                mine = again[job]
                mine.same_tokens_bpb, mine.same_tokens_reason = row.fact("val_bpb"), row.reason
                write(done(), out, heading, facts)
                say(f"{number} of {plural(len(again), 'run')} at the reference's tokens", row)
    return write(done(), out, heading, facts)


def planned(variants: Sequence[Variant], seeds: Iterable[int], out: Path) -> list[Job]:
    """The runs, seed by seed, so that a machine that gets slower does so for all variants alike."""
    names = [re.sub(r"[^\w.@=-]+", "_", one.label) for one in variants]
    return [
        Job(one, seed, out / f"{number:02d}-{names[number]}-seed{seed}")
        for seed in seeds
        for number, one in enumerate(variants)
    ]


def at_the_references_tokens(jobs: Sequence[Job], rows: Sequence[Row]) -> dict[Job, Row]:
    """Our measured runs once more, with as many tokens as the first reference had with that seed."""
    again: dict[Job, Row] = {}
    for job, row in zip(jobs, rows, strict=True):
        first = first_reference(rows, seed=row.seed)
        if row.is_reference or not row.is_measured:
            continue
        tokens = first.fact("total_tokens") if first else None
        if tokens is None:
            row.same_tokens_reason = "no run of the first reference was measured"
            continue
        again[Job(job.variant, job.seed, job.folder / "same-tokens", int(tokens))] = row
    return again


def say(progress: str, row: Row) -> None:
    """Tells on stderr that a run has ended."""
    came = row.reason or f"val_bpb {row.fact('val_bpb'):.6f}, {row.fact('tokens_per_s'):,.0f} tokens/s"
    print(f"{progress}: {row.label}, seed {row.seed}, on {row.gpu}: {came}, {row.wall_s:.1f} s", file=sys.stderr)


def main() -> int:
    """Prints the table; 1 if a run failed."""
    arguments = parse()
    # a supervisor's signal ends the runs too, which have process groups of their own
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(perform(arguments), end="")
    except UserError as error:
        print(f"trainer benchmark: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("trainer benchmark: stopped; the table so far is in --out", file=sys.stderr)
        return 130
    listed = json.loads((arguments.out / "table.json").read_text())["rows"]
    return int(any(row["reason"] or row["same_tokens_reason"] for row in listed))


if __name__ == "__main__":
    sys.exit(main())
