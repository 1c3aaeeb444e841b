"""Smaller cards, stood in for by a larger one: what fits, what is lost to memory, how long evaluation takes on a 3060.

A run is held to less memory and told an older compute capability (`--memory-gb`, `--capability` of the harness). Its
speed stays that of the card that is there, and so do its shared memory and its machine code.

`python benchmarks/cards.py --data DIR` prints what the finder of micro-batches picks from 8, 12, 24 and 80 GB;
`--prove` shows how twice as much goes. `--edits 30` makes random edits of the model's size and batch, runs each in
12 GB, and counts those that were lost to memory.
"""
# ruff: noqa: E402  # the path is put right before anything of this repository is imported

from __future__ import annotations

import argparse
import functools
import json
import os
import queue
import random
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # from any folder, and although another file here may be named as a package is
    sys.path = [str(ROOT), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "benchmarks")]

from raysearch import knobs
from raysearch.objective import TRAIN_FILE, Preset, base_program, load_presets, trainer_folder
from trainer.evaluation import predicted_s
from trainer.memory import GB
from trainer.telemetry import peak_tflops

CARD = "NVIDIA GeForce RTX 3060"
# Shares of the 25.5 TFLOPS of a 3060, operations counted as our model counts its own. The published run's own figure is
# 19.5% of 101 TFLOPS, which is 77% of 25.5; its last steps (570 x 131,072 tokens in 300 s, 88 MFLOP a token) come to
# 86%, so 68% is on the safe side. Its evaluation took 197 s for 20,971,520 tokens at 277 MFLOP / 3 each: 38%.
SHARES = {"68% of its peak": 0.68, "38%, as the published evaluation": 0.38}
PUBLISHED_S = 197

CASES = (("rtx3060", 8, "8.6"), ("rtx3060", 12, "8.6"), ("rtx3060", 24, "8.9"), ("rtx3060", 80, None))
CASES += (("h100", 24, "8.9"), ("h100", 80, None))
EDITED = ("DEPTH", "MODEL_DIM", "SEQ_LEN", "TOTAL_BATCH_SIZE")
EDITS_GB, EDITS_CAPABILITY = 12, "8.6"
TRIES = 1000  # of values that keep the program's rules
PROOF_BUDGET_S = 2
LAST_S = 300  # for a run; a cold start of a deep model takes one or two minutes

# Appended to a program: so many rows, whatever the harness finds.
FORCED = """

_train = train


def train(run):
    run.micro_batch = lambda *_, **__: {rows}
    return _train(run)
"""


@dataclass(frozen=True)
class Job:
    """One run of the harness.

    Attributes:
        memory_gb: None for all that the card has.
        facts: What the table says of it beside its result.
    """

    name: str
    program: str
    memory_gb: float | None
    capability: str | None
    budget_s: float
    eval_tokens: int
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Ran:
    """How it went: result.json (empty if there is none), the log, seconds from outside."""

    job: Job
    result: Mapping[str, Any]
    log: str
    seconds: float

    @property
    def outcome(self) -> str:
        """As the harness has it; `no result` for a run that was ended from outside."""
        return str(self.result.get("outcome", "no result"))


class Runner:
    """Runs jobs on some GPUs, with one compile cache and one memory of micro-batches for all of them.

    Args:
        at_once: Runs side by side on each GPU.
        until: When to start no more, by the monotonic clock; None: never.
    """

    def __init__(self, data: Path, out: Path, *, gpus: Sequence[str], at_once: int, until: float | None):
        self._data, self._out, self._until = data, out, until
        self._places: queue.SimpleQueue[str] = queue.SimpleQueue()
        for gpu in [*gpus] * at_once:
            self._places.put(gpu)
        self._threads = len(gpus) * at_once
        self._said = threading.Lock()

    def all(self, jobs: Iterable[Job], then: Callable[[Ran], Job | None] = lambda _: None) -> list[list[Ran]]:
        """Runs the jobs, and for each what follows from how it went; leaves out those for which no time is left."""
        with ThreadPoolExecutor(self._threads) as pool:
            return [chain for chain in pool.map(lambda job: self._chain(job, then), jobs) if chain]

    def _chain(self, job: Job | None, then: Callable[[Ran], Job | None]) -> list[Ran]:
        chain: list[Ran] = []
        while job is not None and (self._until is None or time.monotonic() < self._until):
            chain.append(self._run(job))
            job = then(chain[0]) if len(chain) == 1 else None
        return chain

    def _run(self, job: Job) -> Ran:
        gpu = self._places.get()
        try:
            ran = self._run_on(gpu, job)
        finally:
            self._places.put(gpu)
        with self._said:
            print(f"{job.name}: {ran.outcome}, {ran.seconds:.0f} s", file=sys.stderr, flush=True)
        return ran

    def _run_on(self, gpu: str, job: Job) -> Ran:
        folder = self._out / job.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TRAIN_FILE).write_text(job.program)
        held = ["--memory-gb", str(job.memory_gb)] if job.memory_gb else []
        held += ["--capability", job.capability] if job.capability else []
        command = [
            sys.executable,
            "-m",
            "trainer.harness",
            "--train-file",
            str(folder / TRAIN_FILE),
            "--device",
            "cuda",
        ]
        command += ["--data", str(self._data), "--out", str(folder), "--budget-s", str(job.budget_s)]
        command += ["--eval-tokens", str(job.eval_tokens), *held]
        env = os.environ | {
            "CUDA_VISIBLE_DEVICES": gpu,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "RAYSEARCH_CACHE": str(self._out / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(self._out / "compiled"),
        }
        started = time.monotonic()
        with (folder / "run.log").open("w") as log:
            try:
                subprocess.run(command, env=env, stdout=log, stderr=log, check=False, timeout=LAST_S)
            except subprocess.TimeoutExpired:
                log.write(f"ended after {LAST_S} s\n")
        seconds = time.monotonic() - started
        result = folder / "result.json"
        return Ran(
            job, json.loads(result.read_text()) if result.exists() else {}, (folder / "run.log").read_text(), seconds
        )


# ---- what fits ----


def sizes(runner: Runner, programs: Mapping[str, str], own_gb: float, asked: argparse.Namespace) -> None:
    """Prints what is found from each size of memory, and with --prove how twice as much goes."""
    jobs: list[Job] = []
    for preset, memory_gb, capability in CASES:
        if memory_gb not in asked.memory or memory_gb > 1.1 * own_gb:
            continue
        whole = memory_gb > 0.9 * own_gb
        for uncapped in (False, True) if asked.uncapped else (False,):
            program = programs[preset]
            if uncapped:
                values = values_of(program)
                program = knobs.rewrite(program, {"DEVICE_BATCH_SIZE": values["TOTAL_BATCH_SIZE"] // values["SEQ_LEN"]})
            facts = {"preset": preset, "GB": f"{memory_gb}", "as": capability or "itself"}
            facts["at most"] = "all" if uncapped else "2^17"
            name = f"{preset}-{memory_gb}gb{'-uncapped' if uncapped else ''}"
            limit = None if whole else float(memory_gb)
            jobs.append(Job(name, program, limit, capability, asked.budget_s, asked.eval_tokens, facts))
    rows = [
        [*ran.job.facts.values(), *told(ran), twice(chain[1:], ran, asked.prove)]
        for chain in runner.all(jobs, doubled if asked.prove else lambda _: None)
        for ran in chain[:1]
    ]
    print("What the finder picks\n")
    table(["preset", "GB", "as", "at most", *TOLD, "twice as many rows"], rows)


TOLD = (
    "rows",
    "tokens at once",
    "probes",
    "begun anew",
    "reserved GB",
    "peak GB",
    "tokens/s",
    "val_bpb",
    "s",
    "outcome",
)


def told(ran: Ran) -> list[str]:
    """The columns of TOLD."""
    found = ran.result
    rows = found.get("micro_batch_rows")
    at_once = f"{rows * values_of(ran.job.program)['SEQ_LEN']:,}" if rows else ""
    return [
        str(rows or ""),
        at_once,
        str(found.get("micro_batch_probes", "")),
        str(found.get("oom_retries", "")),
        f"{found['reserved_mb'] / 1024:.2f}" if found else "",
        f"{found['peak_vram_mb'] / 1024:.2f}" if found else "",
        f"{found['tokens_per_s']:,.0f}" if found else "",
        f"{found['val_bpb']:.4f}" if found.get("val_bpb") else "",
        f"{ran.seconds:.0f}",
        ran.outcome,
    ]


def doubled(ran: Ran) -> Job | None:
    """The same with twice the rows, if the step has as many."""
    rows, values = ran.result.get("micro_batch_rows"), values_of(ran.job.program)
    if ran.outcome != "measured" or not rows or values["TOTAL_BATCH_SIZE"] % (2 * rows * values["SEQ_LEN"]):
        return None
    program = ran.job.program + FORCED.format(rows=2 * rows)
    return replace(ran.job, name=f"{ran.job.name}-twice", program=program, budget_s=PROOF_BUDGET_S)


def twice(proof: Sequence[Ran], ran: Ran, wanted: bool) -> str:
    """What came of twice the rows, in words."""
    if not proof:
        return "" if not wanted or ran.outcome != "measured" else "there are no more in a step"
    found = proof[0]
    if found.outcome != "measured":
        return f"{found.result.get('micro_batch_rows') or '?'}: {found.outcome.replace('_', ' ')}"
    reserved = f"{found.result['reserved_mb'] / 1024:.2f} GB"
    speed = found.result["tokens_per_s"] / ran.result["tokens_per_s"] - 1 if ran.result["tokens_per_s"] else 0.0
    return f"{found.result['micro_batch_rows']}: fits with {reserved}, {speed:+.1%} tokens/s"


# ---- random edits ----


def edits(runner: Runner, program: str, asked: argparse.Namespace) -> None:
    """Prints how random edits went in 12 GB, and how many were lost to memory."""
    chance = random.Random(asked.seed)
    jobs: list[Job] = []
    for number in range(1, asked.edits + 1):
        values = edited(program, chance)
        facts = {"edit": str(number)} | {name: str(values[name]) for name in EDITED}
        source = knobs.rewrite(program, values)
        name = f"edit-{asked.seed}-{number}"
        jobs.append(Job(name, source, EDITS_GB, EDITS_CAPABILITY, asked.edit_budget_s, asked.eval_tokens, facts))
    ran = [chain[0] for chain in runner.all(jobs)]
    print(f"Random edits of the rtx3060 preset in {EDITS_GB} GB, seed {asked.seed}\n")
    table(["edit", *EDITED, *TOLD], [[*one.job.facts.values(), *told(one)] for one in ran])
    for one in ran:
        if one.outcome not in ("measured", "out_of_memory"):
            print(f"{one.job.name}: {one.outcome}: {one.result.get('reason') or one.log.strip().splitlines()[-1:]}")
    print(summary(ran))


def edited(program: str, chance: random.Random) -> dict[str, knobs.Value]:
    """Other values of the edited knobs, anywhere in their ranges, that keep the program's rules."""
    known, rules = knobs.read_knobs(program), knobs.read_rules(program)
    now = {name: knob.value for name, knob in known.items()} | values_of(program)
    for _ in range(TRIES):
        drawn = {name: drawn_from(known[name], chance) for name in EDITED}
        if not knobs.broken_rule(rules, now | drawn):
            return drawn
    raise SystemExit(f"no values of {', '.join(EDITED)} keep the program's rules in {TRIES} tries; look at its rules")


def drawn_from(knob: knobs.Knob, chance: random.Random) -> knobs.Value:
    """Any value of its range, by its own scale."""
    return chance.choice(knob.choices) if knob.choices else knob.nearest(knob.at(chance.random()))


def summary(ran: Sequence[Ran]) -> str:
    """The count that matters: a trial is lost if memory ran out with more than one row at once, or without a result."""
    counts = Counter(one.outcome for one in ran)
    full = [one for one in ran if one.outcome == "out_of_memory"]
    lost = [one for one in full if (one.result.get("micro_batch_rows") or rows_tried(one.log)) != 1]
    other = len(ran) - counts["measured"] - len(full)
    more = f", {other} ended otherwise" if other else ""
    return (
        f"{len(ran)} trials, {counts['measured']} measured, {len(full)} out of memory "
        f"({len(full) - len(lost)} with a single row), {len(lost)} lost{more}"
    )


def rows_tried(log: str) -> int | None:
    """Rows of the last probe in the log."""
    tried = [line.split()[1] for line in log.splitlines() if line.startswith("micro-batch: ")]
    return int(tried[-1]) if tried else None


# ---- evaluation on a 3060 ----


def evaluation(preset: Preset, program: str) -> None:
    """Prints how long evaluation takes on a 3060, by its operations."""
    peak = peak_tflops(CARD)
    assert peak is not None
    flops = model_flops(program, preset)
    print(f"Evaluation on an RTX 3060 ({peak} TFLOPS), predicted: {flops / 3e6:.1f} MFLOP a token forward\n")
    rows = [
        [f"{tokens:,}", *(f"{seconds(tokens, flops_per_token=flops, peak_tflops=peak):.1f}" for seconds in BY_SHARE)]
        for tokens in (preset.eval_tokens, preset.whole_tokens)
    ]
    table(["tokens", *(f"s at {name}" for name in SHARES)], rows)
    print(f"published for 20,971,520 tokens and a model of 50 M parameters: {PUBLISHED_S} s\n")


BY_SHARE = [functools.partial(predicted_s, share_of_peak=share) for share in SHARES.values()]


def model_flops(program: str, preset: Preset) -> float:
    """What the program's model says of itself, forward and backward."""
    with tempfile.TemporaryDirectory() as folder:  # kernels have to be read from a file
        (path := Path(folder) / TRAIN_FILE).write_text(program)
        names = runpy.run_path(str(path))
        return float(names["GPT"](preset.vocab_size, preset.row_tokens, torch.device("cpu")).flops_per_token)


# ---- programs, tables ----


def values_of(program: str) -> dict[str, Any]:
    """Values of the knobs, and of DEVICE_BATCH_SIZE, which is none."""
    lines = knobs.constant_lines(program)
    device = {"DEVICE_BATCH_SIZE": lines["DEVICE_BATCH_SIZE"].value} if "DEVICE_BATCH_SIZE" in lines else {}
    return device | {name: knob.value for name, knob in knobs.read_knobs(program).items()}


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table in Markdown."""
    widths = [max(len(row[place]) for row in [names, *rows]) for place in range(len(names))]
    for row in [names, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |")
    print(flush=True)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, help="Folder made by python -m trainer.prepare, vocabulary 8192, rows 2048."
    )
    parser.add_argument("--out", type=Path, help="Folder for programs, logs and results; default: a temporary one.")
    parser.add_argument("--gpus", default="0", help="Indices, with commas between them.")
    parser.add_argument("--at-once", type=int, default=1, help="Runs side by side on each GPU, as its memory allows.")
    parser.add_argument(
        "--memory", default="8,12,24,80", help="GB to hold the runs to, as far as the card has as much."
    )
    parser.add_argument("--budget-s", type=float, default=10.0, help="Of each run.")
    parser.add_argument("--eval-tokens", type=int, default=262144, help="Of each run.")
    parser.add_argument("--prove", action="store_true", help="Run each again with twice the rows.")
    parser.add_argument(
        "--uncapped", action="store_true", help="Run each also with all rows of a step allowed at once."
    )
    parser.add_argument("--edits", type=int, default=0, help="Random edits to run instead.")
    parser.add_argument("--edit-budget-s", type=float, default=3.0, help="Of each of them.")
    parser.add_argument("--seed", type=int, default=0, help="Of the edits.")
    parser.add_argument("--stop-after-s", type=float, help="Start no run later than that.")
    asked = parser.parse_args()
    asked.memory = [float(size) for size in asked.memory.split(",")]
    return asked


def main() -> None:
    """Prints the tables."""
    asked = parsed()
    until = time.monotonic() + asked.stop_after_s if asked.stop_after_s else None
    presets = load_presets()
    source = (trainer_folder() / TRAIN_FILE).read_text()
    programs = {name: base_program(source, presets[name]) for name in ("rtx3060", "h100")}
    evaluation(presets["rtx3060"], programs["rtx3060"])
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA card here: what fits is measured on one; run this where there is one")
    if asked.data is None:
        raise SystemExit("--data is missing; name a folder made by python -m trainer.prepare --preset rtx3060")
    own_gb = torch.cuda.get_device_properties(0).total_memory / GB
    with tempfile.TemporaryDirectory() as temporary:
        out = (asked.out or Path(temporary)).absolute()
        runner = Runner(asked.data, out, gpus=asked.gpus.split(","), at_once=asked.at_once, until=until)
        print(f"{torch.cuda.get_device_name(0)}, {own_gb:.1f} GB, torch {torch.__version__}\n")
        if asked.edits:
            edits(runner, programs["rtx3060"], asked)
        else:
            sizes(runner, programs, own_gb, asked)


if __name__ == "__main__":
    main()
