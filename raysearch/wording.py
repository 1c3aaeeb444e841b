"""How facts are said to people: cleaned text, signed differences, durations. It counts nothing and writes nothing."""

from __future__ import annotations

import math
import re
import unicodedata

from raysearch.model import Direction

# Whole escape sequences, so that no "[31m" stays behind: CSI; OSC and its kin up to their end; two bytes.
_ESCAPES = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]")


def clean(text: str, limit: int = 300) -> str:
    """Makes text that a model, a person or a log wrote safe for one line on a terminal, in a table or a figure.

    Escape sequences go, control, format (bidirectional overrides, zero widths) and surrogate characters become spaces,
    runs of white space one space.

    Args:
        text: Anything.
        limit: Characters that the result may have; a longer text ends in an ellipsis.
    """
    text = _ESCAPES.sub("", text[: 8 * limit])
    text = "".join(" " if unicodedata.category(char)[0] == "C" or char in "\u2028\u2029" else char for char in text)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str) -> str:
    """Text that others wrote, without escape sequences and control characters; lines and indents stay."""
    lines = [_ESCAPES.sub("", line).expandtabs(4) for line in text.splitlines()]
    return "\n".join("".join(" " if unicodedata.category(c)[0] == "C" else c for c in line).rstrip() for line in lines)


def last_line(text: str, limit: int = 200) -> str:
    """The last line of a log that says anything, cleaned; empty if none does."""
    for line in reversed(text[-8 * limit :].splitlines()):
        if cleaned := clean(line, limit):
            return cleaned
    return ""


def gain(delta: float, direction: Direction) -> float:
    """How much better a change of the metric is: positive when it improves."""
    return -delta if direction is Direction.MINIMIZE else delta


def better_is(direction: Direction) -> str:
    """`lower is better` or `higher is better`."""
    return "lower is better" if direction is Direction.MINIMIZE else "higher is better"


def places(value: float | None, sigma: float | None = None) -> int:
    """Decimals worth printing: four for numbers about one, fewer for large ones, more where the noise is small."""
    if value is None or not math.isfinite(value):
        return 4
    size = abs(value)
    usual = 4 if size < 100 else 2 if size < 10_000 else 0
    if not sigma or not math.isfinite(sigma):
        return usual
    return min(7, max(usual, 1 - math.floor(math.log10(sigma))))


def number(value: float | None, decimals: int = 4) -> str:
    """A number, or an en dash for none."""
    return "–" if value is None else f"{value:.{decimals}f}"


def signed(delta: float | None, se: float | None = None, decimals: int = 4) -> str:
    """A difference in the metric's own sign with its standard error: `-0.0312 ± 0.0040`; an en dash for none."""
    if delta is None:
        return "–"
    told = f"{delta:+.{decimals}f}"
    return told if se is None else f"{told} ± {se:.{decimals}f}"


def compared(delta: float, direction: Direction, decimals: int = 4) -> str:
    """A difference in words: `0.0312 better`, `0.0312 worse` or `equal`."""
    amount = f"{abs(delta):.{decimals}f}"
    if float(amount) == 0.0:
        return "equal"
    return f"{amount} {'better' if gain(delta, direction) > 0 else 'worse'}"


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: `0:07`, `1:02:03`."""
    whole = max(0, int(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def spelled(seconds: float) -> str:
    """A duration that needs no heading: `70 ms`, `7.5 s`, `11 min 26 s`, `3 h 05 min`."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def plural(count: int, noun: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
