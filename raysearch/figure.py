"""Draws progress.png: every trial and the ratchet, one panel a profile. It reads a study and writes no file.

Imported only when a figure is wanted: matplotlib takes a second. It uses no global state of matplotlib (no pyplot), so
that there is no backend to choose and no figure to close.
"""

# pyright: reportUnknownMemberType=false
# matplotlib's stubs leave the type of **kwargs open in nearly every call.

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, cast

from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from raysearch import tally
from raysearch.model import Direction, Purpose
from raysearch.study import Study, TrialState
from raysearch.tally import Fate, Standing
from raysearch.wording import better_is, clean, number, places, plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_IN = 12.0
PANEL_IN = 5.4
EMPTY_PANEL_IN = 1.4
LEFT_IN, RIGHT_IN, TOP_IN, BOTTOM_IN = 0.85, 0.2, 0.4, 1.05
DPI = 110
LABELS_AT_MOST = 14
LABEL_CHARS, LABEL_LINES = 30, 2
LABEL_DISTANCES = (8, 20, 32, 46, 62, 80, 100, 122, 146)  # points
GREEN = "#0d5c30"
INK = "#222222"


class Kind(Enum):
    """How a trial is drawn."""

    KEPT = "kept"
    DISCARDED = "discarded"
    UNDECIDED = "undecided or carried over"
    REFERENCE = "baseline and reference runs"
    FAILED = "failed: no number"


@dataclass(frozen=True)
class Look:
    """Marker, size in points squared, face and edge colour; kinds differ by shape and filling, not by colour alone."""

    marker: str
    size: float
    face: str
    edge: str
    order: float


LOOKS = {
    Kind.REFERENCE: Look("+", 34, "#2f6ea8", "#2f6ea8", 2.15),
    Kind.DISCARDED: Look("o", 22, "none", "#8a8a8a", 2.1),
    Kind.UNDECIDED: Look("D", 22, "none", "#c77f1a", 2.2),
    Kind.KEPT: Look("o", 46, "#1f9d55", GREEN, 3.0),
    Kind.FAILED: Look("x", 34, "#c0392b", "#c0392b", 2.5),
}


@dataclass(frozen=True)
class Point:
    """A finished trial: its place in the order of finishing, from 1, and its value if it has one."""

    x: int
    value: float | None
    kind: Kind


@dataclass(frozen=True)
class Step:
    """A win: where the ratchet moved, to what value, and what is written at it."""

    x: int
    value: float
    text: str


@dataclass(frozen=True)
class Panel:
    """What is drawn of a profile; `values` are the numbers among `points`."""

    at: Standing
    points: list[Point]
    steps: list[Step]
    values: list[float]


def draw_progress(study: Study, *, metric: str) -> bytes:
    """A PNG with one panel a profile: trials in their order of finishing against the metric, and the ratchet line.

    Args:
        study: What is told of; an empty one gives a figure that says so.
        metric: Name of the metric.
    """
    panels = [_panel_of(study, slug) for slug in study.lanes]
    heights_in = [PANEL_IN if panel.values else EMPTY_PANEL_IN for panel in panels] or [EMPTY_PANEL_IN]
    total_in = sum(heights_in)
    figure = Figure(figsize=(WIDTH_IN, total_in), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    if not panels:
        figure.text(0.5, 0.5, "no profile yet: nothing has been run", ha="center", va="center", color=INK)
    top_in = total_in
    for panel, height_in in zip(panels, heights_in, strict=False):
        top_in -= height_in
        bottom_in = BOTTOM_IN if panel.values else 0.2
        axes = figure.add_axes(
            (
                LEFT_IN / WIDTH_IN,
                (top_in + bottom_in) / total_in,
                1 - (LEFT_IN + RIGHT_IN) / WIDTH_IN,
                (height_in - bottom_in - TOP_IN) / total_in,
            )
        )
        if panel.values:
            _draw(axes, canvas.get_renderer(), panel, study.settings.direction, metric)
        else:
            _draw_empty(axes, panel)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _panel_of(study: Study, slug: str) -> Panel:
    points, steps = _points(study, slug)
    values = [point.value for point in points if point.value is not None]
    return Panel(tally.standing(study, slug), points, steps, values)


def _draw_empty(axes: Axes, panel: Panel) -> None:
    axes.set_axis_off()
    axes.set_title(_drawable(_title(panel.at)), loc="left", fontsize=11, color=INK, parse_math=False)
    failed = f"{plural(len(panel.points), 'trial')} failed, nothing" if panel.points else "nothing"
    axes.text(0.5, 0.5, f"{failed} measured yet", transform=axes.transAxes, ha="center", va="center", color=INK)


def _draw(axes: Axes, renderer: RendererAgg, panel: Panel, direction: Direction, metric: str) -> None:
    axes.set_title(_drawable(_title(panel.at)), loc="left", fontsize=11, color=INK, parse_math=False)
    axes.set_ylabel(_drawable(f"{clean(metric, 40)} ({better_is(direction)})"), parse_math=False)
    axes.set_xlabel("finished trials")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    last = panel.points[-1].x
    axes.set_xlim(0.0, last + max(1.0, 0.02 * last))
    bottom, top = _limits(panel, direction)
    axes.set_ylim(bottom, top)
    path = _ratchet_line(axes, panel)
    _baseline_band(axes, panel.at)
    _scatter(axes, panel.points, bottom, top, direction)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.42 / (PANEL_IN - BOTTOM_IN - TOP_IN)),  # below the panel: it covers nothing
        ncols=4,
        fontsize=8.5,
        frameon=False,
        handletextpad=0.5,
        columnspacing=2.0,
    )
    _label_steps(axes, renderer, panel, path, direction)


def _title(at: Standing) -> str:
    decimals = places(at.baseline, at.noise.sigma if at.noise else None)
    name = f"{at.profile.slug}: {clean(at.profile.hardware, 60)}, {at.profile.budget} a trial"
    if at.baseline is None:
        return name
    if at.value is None or at.delta is None:
        return f"{name}; baseline {number(at.baseline, decimals)}, no win yet"
    figures = f"{number(at.baseline, decimals)} → {number(at.value, decimals)}"
    return f"{name}; {figures} after {plural(len(at.steps), 'win')}"


def _points(study: Study, slug: str) -> tuple[list[Point], list[Step]]:
    done = [run for run in tally.finished(study) if run.trial.profile == slug]
    fates = {line.state.candidate.id: line.fate for line in tally.lines(study, done)}
    points = [
        Point(x, run.measurement.value if run.measurement else None, _kind(run, fates[run.trial.candidate]))
        for x, run in enumerate(done, start=1)
    ]
    steps: list[Step] = []
    for win in study.lane(slug).wins:
        x = sum((run.finished_at or 0.0) <= win.at for run in done)
        value = study.value(win.candidate)
        if value is not None:
            said = clean(study.candidate(win.candidate).candidate.proposal.hypothesis)
            text = textwrap.wrap(f"{len(steps) + 1}  {said}", LABEL_CHARS, max_lines=LABEL_LINES, placeholder=" …")
            steps.append(Step(x, value, "\n".join(_drawable(line) for line in text)))
    return points, steps


def _kind(run: TrialState, fate: Fate) -> Kind:
    if run.measurement is None:
        return Kind.FAILED
    if run.trial.purpose in (Purpose.BASELINE, Purpose.REFERENCE):
        return Kind.REFERENCE
    return {Fate.KEEP: Kind.KEPT, Fate.DISCARD: Kind.DISCARDED, Fate.FAILED: Kind.DISCARDED}.get(fate, Kind.UNDECIDED)


def _limits(panel: Panel, direction: Direction) -> tuple[float, float]:
    """The y axis: everything better than the baseline and a part of what is worse; the rest is drawn at the edge.

    Labels of wins stand on the better side of the ratchet, so there is room for them.
    """
    at, steps = panel.at, panel.steps
    sign = 1.0 if direction is Direction.MINIMIZE else -1.0  # times the sign, lower is better
    costs = sorted(sign * value for value in [*panel.values, *(step.value for step in steps)])
    sigma = at.noise.sigma if at.noise else 0.0
    start = sign * at.baseline if at.baseline is not None else costs[len(costs) // 2]
    best = min(costs[0], start - 2 * sigma)
    won = start - best
    worst = min(costs[-1], start + max(0.6 * won, 8 * sigma))
    worst = max(worst, start + 2 * sigma)
    span = (worst - best) or max(abs(worst), 1.0) * 0.02
    low = best - (0.38 if steps else 0.08) * span
    high = worst + 0.10 * span
    return (low, high) if sign > 0 else (-high, -low)


def _ratchet_line(axes: Axes, panel: Panel) -> list[tuple[float, float]]:
    """Draws the champion's value over the trials; returns the line's corners in data coordinates."""
    if panel.at.baseline is None:
        return []
    corners: list[tuple[float, float]] = [(axes.get_xlim()[0], panel.at.baseline)]
    for step in panel.steps:
        corners += [(step.x, corners[-1][1]), (step.x, step.value)]
    corners.append((axes.get_xlim()[1], corners[-1][1]))
    axes.plot(
        [x for x, _ in corners],
        [y for _, y in corners],
        color=GREEN,
        linewidth=1.8,
        zorder=2.8,
        label="ratchet (mean of the champion's fresh runs)",
    )
    return corners


def _baseline_band(axes: Axes, at: Standing) -> None:
    if at.baseline is None or at.noise is None:
        return
    low, high = at.baseline - at.noise.sigma, at.baseline + at.noise.sigma
    axes.axhspan(low, high, color="#4878a8", alpha=0.16, linewidth=0, zorder=1, label="baseline ± σ")
    axes.axhline(at.baseline, color="#4878a8", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.1)


def _scatter(axes: Axes, points: Sequence[Point], bottom: float, top: float, direction: Direction) -> None:
    """Draws the trials: those without a number and those off the scale at the worse edge."""
    minimize = direction is Direction.MINIMIZE
    margin = 0.025 * (top - bottom)
    edge, arrow = (top - margin, "^") if minimize else (bottom + margin, "v")
    shrink = 1.0 if len(points) <= 200 else max(0.25, (200 / len(points)) ** 0.5)
    for kind, look in LOOKS.items():
        inside: list[tuple[float, float]] = []
        clipped: list[float] = []
        for point in points:
            if point.kind is not kind:
                continue
            if point.value is None:
                inside.append((point.x, edge))
            elif (point.value > edge) if minimize else (point.value < edge):
                clipped.append(point.x)
            else:
                inside.append((point.x, point.value))
        size = look.size * (shrink if kind in (Kind.DISCARDED, Kind.FAILED) else max(shrink, 0.6))
        _marks(axes, inside, look, size=size, label=f"{kind.value} ({len(inside)})")
        worse = "above" if minimize else "below"
        off = Look(arrow, look.size, look.face, look.edge, look.order)
        _marks(
            axes,
            [(x, edge) for x in clipped],
            off,
            size=size,
            label=f"{kind.value}, {worse} the scale ({len(clipped)})",
        )


def _marks(axes: Axes, places_at: Sequence[tuple[float, float]], look: Look, *, size: float, label: str) -> None:
    if not places_at:
        return
    xs, ys = [x for x, _ in places_at], [y for _, y in places_at]
    if look.marker in "+x":
        axes.scatter(xs, ys, s=size, marker=look.marker, c=look.edge, linewidths=1.2, zorder=look.order, label=label)
        return
    axes.scatter(
        xs,
        ys,
        s=size,
        marker=look.marker,
        facecolors=look.face,
        edgecolors=look.edge,
        linewidths=0.9,
        zorder=look.order,
        label=label,
    )


# ---- labels of the wins ----


def _label_steps(
    axes: Axes, renderer: RendererAgg, panel: Panel, path: Sequence[tuple[float, float]], direction: Direction
) -> None:
    """Writes at each win what it was, where there is room: on the better side, clear of line, points and labels.

    With many wins the largest steps are named first.
    """
    before = path[0][1] if path else 0.0
    sizes: list[float] = []
    for step in panel.steps:
        sizes.append(abs(step.value - before))
        before = step.value
    wanted = sorted(range(len(sizes)), key=lambda n: -sizes[n])[:LABELS_AT_MOST]
    labels: list[Bbox] = []
    taken = _line_boxes(axes, path) + _point_boxes(axes, panel.points)
    written = 0
    for n in wanted:
        found = _placed(axes, renderer, panel.steps[n], taken=taken, labels=labels, direction=direction)
        if found is not None:
            box, leader = found
            labels.append(box.padded(3.0))
            taken += [labels[-1], *leader]
            written += 1
    if written < len(panel.steps):
        note = f"{written} of {len(panel.steps)} wins named"
        y = 0.02 if direction is Direction.MINIMIZE else 0.95
        axes.text(0.995, y, note, transform=axes.transAxes, ha="right", fontsize=8, color="#666666")


def _placed(
    axes: Axes,
    renderer: RendererAgg,
    step: Step,
    *,
    taken: Sequence[Bbox],
    labels: Sequence[Bbox],
    direction: Direction,
) -> tuple[Bbox, list[Bbox]] | None:
    """Adds a step's label at the first free place, near ones first.

    Returns:
        The box of the text and those of the line that leads to it, in display coordinates; None when nothing is free.
    """
    better = -1.0 if direction is Direction.MINIMIZE else 1.0
    room = axes.get_window_extent(renderer)
    anchor = cast("tuple[float, float]", tuple(axes.transData.transform((step.x, step.value))))
    ways = itertools.product(LABEL_DISTANCES, ((-1.0, better), (1.0, better), (1.0, -better)), (0.2, 0.8))
    for distance, (side, down), slant in ways:
        label = axes.annotate(
            step.text,
            xy=(step.x, step.value),
            xytext=(side * (5.0 + slant * distance), down * distance),
            textcoords="offset points",
            ha="right" if side < 0 else "left",
            va="top" if down < 0 else "bottom",
            fontsize=8.5,
            linespacing=1.1,
            color=GREEN,
            parse_math=False,
            zorder=4,
            arrowprops={
                "arrowstyle": "-",
                "color": GREEN,
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 2,
                "relpos": (1.0 if side < 0 else 0.0, 1.0 if down < 0 else 0.0),
            },
        )
        label.update_positions(renderer)
        box = Text.get_window_extent(label, renderer)  # of the text alone, without the line that leads to it
        leader = _leader(anchor, (box.x1 if side < 0 else box.x0, box.y1 if down < 0 else box.y0))
        inside = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
        if inside and not _meet([box], taken) and not _meet(leader, labels):
            return box, leader
        label.remove()
    return None


def _leader(start: tuple[float, float], end: tuple[float, float]) -> list[Bbox]:
    """The line from a step to its label as small boxes, the part next to the step left out."""
    count = max(2, int(max(abs(end[0] - start[0]), abs(end[1] - start[1])) / 6))
    points = [
        (start[0] + (end[0] - start[0]) * part / count, start[1] + (end[1] - start[1]) * part / count)
        for part in range(1, count)
    ]
    return [Bbox.from_extents(x - 1, y - 1, x + 1, y + 1) for x, y in points]


def _meet(boxes: Sequence[Bbox], others: Sequence[Bbox]) -> bool:
    return any(box.overlaps(other) for box in boxes for other in others)


def _point_boxes(axes: Axes, points: Sequence[Point]) -> list[Bbox]:
    """Points that a label must not cover; in a cloud of thousands, the kept ones alone."""
    few = len(points) <= 4000
    shown = [(p.x, p.value) for p in points if p.value is not None and (few or p.kind is Kind.KEPT)]
    corners = [cast("tuple[float, float]", tuple(axes.transData.transform(point))) for point in shown]
    return [Bbox.from_extents(x - 7, y - 7, x + 7, y + 7) for x, y in corners]


def _line_boxes(axes: Axes, path: Sequence[tuple[float, float]]) -> list[Bbox]:
    """The pieces of the ratchet line as thin boxes in display coordinates."""
    corners = [cast("tuple[float, float]", tuple(axes.transData.transform(corner))) for corner in path]
    return [
        Bbox.from_extents(min(x0, x1) - 2, min(y0, y1) - 2, max(x0, x1) + 2, max(y0, y1) + 2)
        for (x0, y0), (x1, y1) in itertools.pairwise(corners)
    ]


def _drawable(text: str) -> str:
    """Characters that the font lacks become question marks (matplotlib would warn and draw boxes)."""
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    known = font.get_charmap()
    return "".join(char if ord(char) in known else "?" for char in text)
