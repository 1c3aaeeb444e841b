"""What a trial writes while it runs: its phase, its curve, its log. It measures nothing."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

_wall_clock, _clock = time.time, time.perf_counter  # taken now: a candidate may replace the module's functions later


class Reporter:
    """Writes progress.json, curve.jsonl and the log; keeps each to about two writes a second."""

    INTERVAL_S = 0.5
    LOG_INTERVAL_S = 2.0

    def __init__(self, out: Path):
        self._out = out
        self._phase, self._written_at, self._logged_at = "", -math.inf, -math.inf
        self._curve = (out / "curve.jsonl").open("w")
        self._curve_at, self._pending = -math.inf, None

    def phase(self, phase: str, progress: float = 0.0) -> None:
        """Says where the trial is; a new phase is written at once, progress within one at most twice a second."""
        now = _clock()
        if phase == self._phase and now - self._written_at < self.INTERVAL_S:
            return
        self._phase, self._written_at = phase, now
        write_json(self._out / "progress.json", {"phase": phase, "progress": round(progress, 4), "at": _wall_clock()})

    def step(self, *, step: int, tokens: int, seconds: float, loss: float, progress: float, note: str) -> None:
        """Adds a point to the curve, or keeps it until close() when the last point is too recent."""
        now = _clock()
        self._pending = {"step": step, "tokens": tokens, "seconds": round(seconds, 4), "loss": round(loss, 6)}
        self._pending["progress"] = round(progress, 5)
        if now - self._curve_at >= self.INTERVAL_S:
            self._curve_at = now
            self._write_point()
        if now - self._logged_at >= self.LOG_INTERVAL_S:
            self._logged_at = now
            print(f"step {step:5d} | {100 * progress:5.1f}% | loss {loss:.4f} | {note}", flush=True)
        self.phase("train", progress)

    def close_curve(self) -> None:
        """Writes the last point, if it is not in the curve yet."""
        if not self._curve.closed:
            self._write_point()
            self._curve.close()

    def _write_point(self) -> None:
        if self._pending is not None:
            self._curve.write(json.dumps(self._pending) + "\n")
            self._curve.flush()
            self._pending = None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replaces the file in one move, so that a reader never sees half of it."""
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps(value))
    os.replace(draft, path)
