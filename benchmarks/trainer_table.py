"""The table of the benchmark of trainers: a row a run, means over seeds, and why a run failed.

It runs nothing, and judges nothing.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = ("start", "import", "data", "build", "first_step", "train", "eval")
NOTES = (
    "A reference runs as it is, with torch's attention (cuDNN, FlexAttention), our rows and our score. Its clock "
    "leaves out its first 11 steps: they stand under `first step`, with its compilation. Its seed is the order of the "
    "rows alone."
)
COLUMNS = ("tokens/s", "× reference", "MFU %", "reserved MB", "energy kJ", "steps", "tokens M", "params M", "val_bpb")
SAME_TOKENS = "val_bpb at the reference's tokens"


@dataclass
class Row:
    """What came of a job.

    Attributes:
        gpu: Its number or UUID, or `cpu`.
        wall_s: From the start of the process to its end, seen from outside.
        result: result.json; empty if the run wrote none.
        reason: Why there is no score; "" if there is one.
        same_tokens_bpb: Of the run on as many tokens as the reference trained on.
        same_tokens_reason: Why that run has no score.
    """

    label: str
    seed: int
    is_reference: bool
    budget_s: float
    gpu: str
    wall_s: float
    result: Mapping[str, Any]
    reason: str
    same_tokens_bpb: float | None = None
    same_tokens_reason: str = ""

    @property
    def is_measured(self) -> bool:
        """Whether it has a score."""
        return not self.reason

    def fact(self, name: str) -> float | None:
        """A number of the result; None where there is none."""
        value = self.result.get(name)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    @property
    def seconds(self) -> dict[str, float]:
        """By part; `rest` is what no part holds, `total` what was seen from outside."""
        said = self.result.get("seconds", {})
        parts = {name: float(said.get(name, 0.0)) for name in PARTS} if said else {}
        return {**parts, "rest": self.wall_s - sum(parts.values()), "total": self.wall_s}


def cells(row: Row, first: Row | None) -> dict[str, str]:
    """A row of the table, by column."""
    speed, base = row.fact("tokens_per_s"), first.fact("tokens_per_s") if first else None
    return {
        "variant": row.label,
        "seed": str(row.seed),
        "tokens/s": shown(speed, ",.0f"),
        "× reference": shown(speed / base if speed and base else None, ".3f"),
        "MFU %": shown(row.fact("mfu_percent"), ".1f"),
        "reserved MB": shown(row.fact("reserved_mb"), ",.0f"),
        "energy kJ": shown(row.fact("energy_j"), ",.1f", 1e-3),
        "steps": shown(row.fact("num_steps"), ",.0f"),
        "tokens M": shown(row.fact("total_tokens"), ",.1f", 1e-6),
        "params M": shown(row.fact("num_params"), ",.1f", 1e-6),
        "val_bpb": shown(row.fact("val_bpb"), ".6f") if row.is_measured else "failed",
        SAME_TOKENS: "failed" if row.same_tokens_reason else shown(row.same_tokens_bpb, ".6f"),
        **{name.replace("_", " "): shown(value, ".1f") for name, value in row.seconds.items()},
    }


def shown(value: float | None, form: str, unit: float = 1.0) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else format(value * unit, form)


def first_reference(rows: Iterable[Row], *, seed: int | None = None) -> Row | None:
    """The first measured run of the first reference: with this seed where there is one."""
    references = [row for row in rows if row.is_reference]
    mine = [row for row in references if row.label == references[0].label and row.is_measured]
    return next((row for row in mine if row.seed == seed), mine[0] if mine else None)


def table(rows: Sequence[Row], heading: str) -> str:
    """All runs as Markdown: a column that no run fills is left out."""
    found = [cells(row, first_reference(rows, seed=row.seed)) for row in rows]
    parts = [name.replace("_", " ") for name in (*PARTS, "rest", "total")]
    optional = {"× reference", "MFU %", "energy kJ", SAME_TOKENS}
    if len({row.seed for row in rows}) == 1:
        optional.add("seed")
    names = [
        name
        for name in ("variant", "seed", *COLUMNS, SAME_TOKENS, *parts)
        if name not in optional or (name != "seed" and any(one.get(name, "–") != "–" for one in found))
    ]
    lines = markdown(names, [[one.get(name, "–") for name in names] for one in found])
    reasons = [f"- {row.label}, seed {row.seed}: {row.reason}" for row in rows if row.reason]
    reasons += [
        f"- {row.label}, seed {row.seed}, at the reference's tokens: {row.same_tokens_reason}"
        for row in rows
        if row.same_tokens_reason
    ]
    notes = [NOTES] if any(row.is_reference for row in rows) else []
    scored = sorted({str(row.result["evaluation"]) for row in rows if row.is_measured and "evaluation" in row.result})
    heading += f"; evaluation {', '.join(scored)} (version, tokens)" if scored else ""
    blocks = [[heading], lines, means(rows), reasons, notes]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def means(rows: Sequence[Row]) -> list[str]:
    """Mean and standard deviation over seeds, where there are several."""
    lines: list[list[str]] = []
    for label in dict.fromkeys(row.label for row in rows):
        mine = [row for row in rows if row.label == label and row.is_measured]
        if len(mine) < 2:
            continue
        scores = [row.fact("val_bpb") or math.nan for row in mine]
        speeds = [row.fact("tokens_per_s") or 0.0 for row in mine]
        same = [row.same_tokens_bpb for row in mine if row.same_tokens_bpb is not None]
        lines.append(
            [
                label,
                str(len(mine)),
                f"{statistics.fmean(speeds):,.0f}",
                f"{statistics.fmean(scores):.6f}",
                f"{statistics.stdev(scores):.6f}",
                shown(statistics.fmean(same) if same else None, ".6f"),
            ]
        )
    names = ["variant", "seeds", "tokens/s, mean", "val_bpb, mean", "val_bpb, σ", f"{SAME_TOKENS}, mean"]
    return markdown(names, lines) if lines else []


def markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [names, *rows]) for i in range(len(names))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [":".ljust(widths[0], "-"), *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(names), f"|{'|'.join(f' {one} ' for one in rule)}|", *map(line, rows)]


def write(rows: Sequence[Row], out: Path, heading: str, facts: Mapping[str, Any]) -> str:
    """Writes table.md and table.json; returns the table."""
    text = table(rows, heading)
    (out / "table.md").write_text(text)
    listed = [vars(row) | {"seconds": row.seconds} for row in rows]
    (out / "table.json").write_text(json.dumps({**facts, "rows": listed}, indent=1) + "\n")
    return text
