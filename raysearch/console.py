"""What a person sees of a running study: a live view on a terminal, plain lines elsewhere.

It only reads the study, decides nothing and never writes to stdout.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, TextIO

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from raysearch import schedule, tally
from raysearch.directions import described, parse
from raysearch.errors import UserError
from raysearch.health import THROTTLED_SHARE, is_throttled
from raysearch.model import (
    Directed,
    Dropped,
    Judged,
    Measurement,
    Outcome,
    ProfileAdded,
    Purpose,
    RatchetMoved,
    Record,
    Refused,
    SessionEnded,
    SessionStarted,
    SlotGauged,
    SlotRestored,
    SlotSetAside,
    Trial,
    TrialFinished,
    TrialStarted,
)
from raysearch.schedule import Slot
from raysearch.study import Study, TrialState
from raysearch.tally import Fate, Line, Standing
from raysearch.wording import better_is, clean, compared, duration, gain, last_line, number, places, plural, signed
from raysearch.yields import named

REFRESH_S = 0.25
SHOWN_TRIALS = 8
HINT = "Ctrl-C drains: trials in flight finish. Twice stops."
DRAINING_HINT = "draining: trials in flight finish, nothing new starts. Ctrl-C again stops them."
STYLES = {
    Fate.KEEP: "bold green",
    Fate.FAILED: "red",
    Fate.RETEST: "yellow",
    Fate.CARRIED: "yellow",
    Fate.BASELINE: "blue",
}


class SlotProgress(Protocol):
    """How far the trial on a slot is: what the console needs of an executor's report."""

    @property
    def phase(self) -> str:
        """What it does, in a word."""
        ...

    @property
    def progress(self) -> float:
        """Of its budget, 0 to 1."""
        ...

    @property
    def seconds_left(self) -> float | None:
        """Until its end, if that can be told."""
        ...


class Console:
    """Shows a study on a stream: live on a terminal, else one line an event.

    The live view is redrawn by `refresh` alone, at most four times a second, and never from a thread: the study may
    change between two calls. A stream that cannot be written to (the terminal was closed) ends the show, not the study.

    Args:
        study: The state, which the caller changes.
        name: Of the study.
        metric: Of the objective.
        stream: Where to show it; stderr by default.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        study: Study,
        *,
        name: str,
        metric: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._study = study
        self._name, self._metric = clean(name, 60), clean(metric, 40)
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._started_at = clock()
        self._drawn_at = float("-inf")
        self._gone = False
        self._live: Live | None = None
        self._snapshot: Snapshot | None = None
        self._frame: Frame | None = None
        self._rich: RichConsole | None = None
        if self._stream.isatty():
            terminal = RichConsole(file=self._stream, force_terminal=True, highlight=False, markup=False, emoji=False)
            self._rich = None if terminal.is_dumb_terminal else terminal

    @property
    def is_live(self) -> bool:
        """Whether there is a terminal to draw on."""
        return self._rich is not None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def note(self, text: str) -> None:
        """Says something that is no event: above the live view, or as a line."""
        self._say(self._clock(), text)

    def record(self, record: Record) -> None:
        """Tells of an event that has just been applied to the study; the live view shows it with its next refresh."""
        if self._rich is None:
            line = told(self._study, record, self._metric)
            if line:
                self._say(record.at, line)

    def refresh(
        self, now: float, *, slots: Sequence[Slot], progress: Mapping[str, SlotProgress], draining: bool = False
    ) -> None:
        """Redraws the live view, unless that was done just before; does nothing without a terminal.

        Args:
            now: Unix time.
            slots: All slots, in the order in which to show them.
            progress: Of the trials in flight, by slot; a slot that is missing has not reported yet.
            draining: Whether the study is coming to its end on purpose.
        """
        if self._rich is None or self._gone:
            return
        self._frame = Frame(now, list(slots), dict(progress), draining)
        if 0 <= now - self._drawn_at < REFRESH_S:
            return
        self._drawn_at = now
        self._draw()

    def close(self) -> None:
        """Draws the last state and leaves it on the screen; more calls do nothing."""
        if self._frame is not None and not self._gone:
            self._draw()
        live, self._live, self._frame = self._live, None, None
        if live is not None:
            try:
                live.stop()
            except OSError:
                self._gone = True

    def _draw(self) -> None:
        assert self._rich is not None
        assert self._frame is not None
        if self._snapshot is None or self._snapshot.seq != self._study.seq:
            self._snapshot = snapshot(self._study, name=self._name, metric=self._metric)
        size = self._rich.size
        picture = view(self._snapshot, self._frame, width=size.width, height=size.height)
        try:
            if self._live is None:
                # stdout stays the caller's; what others print on stderr goes above the view
                self._live = Live(console=self._rich, auto_refresh=False, redirect_stdout=False, redirect_stderr=True)
                self._live.start()
            self._live.update(picture, refresh=True)
        except OSError:
            self._gone = True

    def _say(self, at: float, text: str) -> None:
        if self._gone:
            return
        line = f"+{_stamp(at - self._started_at)} {clean(text, 600)}"
        try:
            if self._rich is not None:
                self._rich.print(Text(line, style="dim", overflow="fold"))
            else:
                self._stream.write(f"{line}\n")
                self._stream.flush()
        except OSError:
            self._gone = True


def _stamp(seconds: float) -> str:
    minutes, rest = divmod(max(0, int(seconds)), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}"


# ---- plain lines ----


def told(study: Study, record: Record, metric: str) -> str:
    """An event in one line, with the study as it is after it; empty for events that are told by a later one.

    What others wrote is in the line as it came: the caller cleans the whole line.
    """
    line = ""
    match record.event:
        case SessionStarted(host, pid, version):
            done = sum(run.outcome is not None for run in study.trials.values())
            again = f", {plural(done, 'trial')} done before" if done else ""
            line = f"session on {host}, process {pid}, raysearch {version}{again}"
        case SessionEnded(reason):
            line = f"session ended: {reason}"
        case ProfileAdded(profile, commit):
            line = f"profile {profile.slug}: {profile.hardware}, {profile.budget} a trial, starts at {commit[:7]}"
        case Directed(file, text):
            line = f"directions, {file}: {_directions(file, text)}"
        case Refused(proposal_id, reason):
            proposal = next((one for one, _ in reversed(study.refused) if one.id == proposal_id), None)
            line = f"refused {proposal_id}: {reason}" + (f": {proposal.hypothesis}" if proposal else "")
        case Dropped() as event:
            line = f"{named(event.proposer, event.model)}: no proposal: {event.reason}"
        case TrialStarted(trial, attempt, slot):
            again = f", attempt {attempt}" if attempt > 1 else ""
            line = f"start {trial.id} on {slot} ({trial.purpose.value}{again}): {_about(study, trial)}"
        case TrialFinished() as event:
            line = _told_end(event, metric)
        case Judged() as event:
            line = f"verdict {event.candidate} {event.verdict.value}: {event.reason}"
        case RatchetMoved() as event:
            line = _told_move(study, event, metric)
        case SlotSetAside() | SlotRestored() | SlotGauged() as event:
            line = _told_slot(study, event)
        case _:
            pass
    return line


def _directions(file: str, text: str) -> str:
    try:
        return described(parse(text, where=file))
    except UserError as error:  # another version's
        return str(error)


def _told_slot(study: Study, event: SlotSetAside | SlotRestored | SlotGauged) -> str:
    if isinstance(event, SlotGauged):
        slow = {one.slot: one.reason for one in study.slow_slots(study.lane(event.profile))}
        return f"slot {event.slot} is {slow[event.slot]}" if event.slot in slow else ""
    if isinstance(event, SlotRestored):
        return f"slot {event.slot} gets trials again"
    again = f"; {plural(len(event.repeat), 'trial')} run again elsewhere" if event.repeat else ""
    return f"slot {event.slot} set aside: {event.reason}{again}"


def _about(study: Study, trial: Trial) -> str:
    return study.candidate(trial.candidate).candidate.proposal.hypothesis


def _told_end(event: TrialFinished, metric: str) -> str:
    measured = event.measurement
    if measured is None:
        tail = last_line(event.log_tail)
        return f"{_words(event.outcome)} {event.trial_id}: {event.reason}" + (f"; last line: {tail}" if tail else "")
    value = number(measured.value, places(measured.value))
    return f"done {event.trial_id}: {metric} {value}{_took(measured)}"


def _took(measured: Measurement) -> str:
    training = f"{measured.training_s:.1f} s of training in " if measured.training_s else ""
    share = 100 * measured.facts.get(THROTTLED_SHARE, 0.0)
    throttled = f", throttled for {share:.0f} % of the training" if is_throttled(measured) else ""
    return f", {training}{measured.wall_s:.1f} s{throttled}"


def _told_move(study: Study, event: RatchetMoved, metric: str) -> str:
    at = tally.standing(study, event.profile)
    decimals = places(at.value, at.noise.sigma if at.noise else None)
    against = f", {_against(study, at)}" if at.delta is not None else ""
    said = study.candidate(event.candidate).candidate.proposal.hypothesis
    return (
        f"ratchet {event.profile} moved to {event.commit[:7]} ({event.candidate}): "
        f"{metric} {number(at.value, decimals)}{against}: {said}"
    )


def _against(study: Study, at: Standing) -> str:
    told = compared(
        at.delta or 0.0, study.settings.direction, places(at.baseline, at.noise.sigma if at.noise else None)
    )
    return "equal to the baseline" if told == "equal" else f"{told} than the baseline"


def _words(outcome: Outcome) -> str:
    return outcome.value.replace("_", " ")


# ---- the live view ----


@dataclass(frozen=True)
class Frame:
    """What changes from one refresh to the next without an event."""

    now: float
    slots: list[Slot]
    progress: dict[str, SlotProgress]
    draining: bool = False


@dataclass(frozen=True)
class Champion:
    """A profile's line and its last wins, newest first."""

    slug: str
    figures: str
    wins: list[Text]


@dataclass(frozen=True)
class Snapshot:
    """What the live view shows of a study, counted once an event: a refresh takes no more time when trials are many."""

    seq: int
    title: str
    subtitle: str
    session_at: float
    running: dict[str, tuple[TrialState, str]] = field(default_factory=dict[str, tuple[TrialState, str]])
    champions: list[Champion] = field(default_factory=list[Champion])
    trials: list[list[Text]] = field(default_factory=list[list[Text]])
    footer: str = ""


def snapshot(study: Study, *, name: str, metric: str) -> Snapshot:
    """Gathers what the live view shows of a study."""
    lines = [line for line in tally.lines(study) if line.runs]
    spans = tally.sessions(study)
    limit = f" of {study.settings.max_trials}" if study.settings.max_trials is not None else ""
    finished = sum(run.outcome is not None for run in study.trials.values())
    queued, refused = sum(schedule.queue_length(study, lane) for lane in study.lanes.values()), len(study.refused)
    return Snapshot(
        seq=study.seq,
        title=name,
        subtitle=f"{metric}, {better_is(study.settings.direction)}",
        session_at=spans[-1][0] if spans else study.last_at,
        running={run.slot: (run, clean(_about(study, run.trial))) for run in study.running.values()},
        champions=[_champion(study, slug) for slug in study.lanes],
        trials=[_trial_cells(study, line) for line in reversed(lines[-40:])],
        footer=f"candidates {tally.tried(study)}{limit} · trials {finished} · queued {queued} · refused {refused}",
    )


def _champion(study: Study, slug: str) -> Champion:
    at = tally.standing(study, slug)
    decimals = places(at.baseline, at.noise.sigma if at.noise else None)
    wins: list[Text] = []
    for place in range(len(at.steps), 0, -1):
        state = at.steps[place - 1]
        text = Text(f"{place:>3} {state.candidate.id} ", style="dim")
        text.append(signed(state.delta, state.delta_se, decimals), style="green")
        wins.append(text.append(f" {clean(state.candidate.proposal.hypothesis)}", style="default"))
    if at.blocked:
        return Champion(slug, f"blocked: {clean(at.blocked)}", wins)
    if at.value is None or at.baseline is None:
        return Champion(slug, "the baseline is being measured", wins)
    noise = f" ± {number(at.noise.sigma, decimals)}" if at.noise else ""
    if at.delta is None:
        wanted = study.settings.baseline_runs
        runs = plural(at.runs, "run") if at.runs >= wanted else f"{at.runs} of {wanted} runs"
        win = ", no win yet" if at.runs >= wanted else ""
        return Champion(slug, f"{number(at.value, decimals)}{noise}, the baseline ({runs}){win}", wins)
    figures = f"{number(at.value, decimals)}{noise}, {_against(study, at)} {number(at.baseline, decimals)}"
    return Champion(slug, f"{figures}, {plural(len(at.steps), 'win')}", wins)


def _trial_cells(study: Study, line: Line) -> list[Text]:
    state, proposal = line.state, line.state.candidate.proposal
    noise = study.noise(study.lane(proposal.profile))
    decimals = places(line.value, noise.sigma if noise else None)
    style = STYLES.get(line.fate, "default")
    word = line.fate.value
    if line.fate is Fate.FAILED and line.outcome is not None:
        word = _words(line.outcome)
    elif line.fate is Fate.OPEN:
        word = state.verdict.value if state.verdict else "to judge"
    elif line.fate is Fate.BASELINE:
        word = plural(len(line.runs), "run")
    delta = Text(signed(state.delta, state.delta_se, decimals) if state.delta is not None else "")
    if state.delta is not None:
        delta.stylize("green" if gain(state.delta, study.settings.direction) > 0 else "red")
    said = clean(proposal.hypothesis)
    reason = line.runs[-1].reason
    about = f"{clean(reason, 60)}: {said}" if line.fate is Fate.FAILED and reason else said
    name = "baseline" if line.fate is Fate.BASELINE else state.candidate.id
    cells = [Text(name), Text(proposal.profile, style="dim"), Text(word, style=style)]
    return [*cells, Text(number(line.value, decimals)), delta, Text(about)]


@dataclass(frozen=True)
class Rows:
    """How many lines each part of the view gets."""

    slots: int
    champions: int
    wins: int
    trials: int


def share_rows(height: int, *, slots: int, profiles: int) -> Rows:
    """Shares a terminal's height: header, footer and three titles are fixed, then slots, champions, trials, wins.

    Args:
        height: Lines of the terminal; one stays free, for the cursor.
        slots: Number of slots.
        profiles: Number of profiles.
    """
    free = max(4, height - 7)
    slot_rows = min(max(1, slots), max(1, free // 2))
    champion_rows = min(max(1, profiles), max(1, (free - slot_rows) // 2))
    free -= slot_rows + champion_rows
    wins = 1 if free - champion_rows >= 4 else 0
    trials = max(0, min(SHOWN_TRIALS, free - wins * champion_rows))
    free -= trials + wins * champion_rows
    more = max(0, min(4, free // champion_rows))
    return Rows(slot_rows, champion_rows, wins + more, trials + min(8, max(0, free - more * champion_rows)))


def view(found: Snapshot, frame: Frame, *, width: int, height: int) -> RenderableType:
    """The live view as rich shows it, at most `height` - 1 lines of `width` columns."""
    rows = share_rows(height, slots=len(frame.slots), profiles=len(found.champions))
    header = Table.grid(expand=True)
    header.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    header.add_column(justify="right", no_wrap=True)
    title = Text.assemble((f"raysearch {found.title}", "bold"), (f"  {found.subtitle}", "dim"))
    header.add_row(title, Text(duration(frame.now - found.session_at)))
    parts: list[RenderableType] = [header, _title("slots"), *_slot_rows(found, frame, rows.slots, width)]
    parts += [_title("champions"), *_champion_rows(found, rows), _title("last trials")]
    parts.append(_trial_table(found, rows.trials, width))
    parts += [_line(found.footer), _line(DRAINING_HINT if frame.draining else HINT, "dim")]
    return Group(*parts)


def _title(text: str) -> Rule:
    return Rule(Text(text, style="dim"), align="left", style="dim")


def _line(text: str, style: str = "default") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _slot_rows(found: Snapshot, frame: Frame, rows: int, width: int) -> list[RenderableType]:
    if not frame.slots:
        return [_line("no slot yet", "dim")]
    shown = frame.slots if len(frame.slots) <= rows else frame.slots[: rows - 1]
    table = Table.grid(padding=(0, 1), expand=True)
    for column_width in (None, None, 10, max(8, width // 8), 6):
        table.add_column(no_wrap=True, overflow="ellipsis", width=column_width)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for slot in shown:
        table.add_row(*_slot_cells(found, frame, slot))
    if len(shown) == len(frame.slots):
        return [table]
    hidden = frame.slots[len(shown) :]
    busy = sum(slot.id in found.running for slot in hidden)
    more = _line(f"… {plural(len(hidden), 'more slot')}: {busy} busy, {len(hidden) - busy} idle", "dim")
    return [table, more] if shown else [more]


def _slot_cells(found: Snapshot, frame: Frame, slot: Slot) -> list[RenderableType]:
    name = Text(clean(slot.id, 20), style="bold")
    if slot.id not in found.running:
        return [name, Text("idle", style="dim")]
    run, about = found.running[slot.id]
    trial = run.trial
    what = "baseline" if trial.purpose is Purpose.BASELINE else f"{trial.candidate} {trial.purpose.value}"
    at = frame.progress.get(slot.id)
    done = min(1.0, max(0.0, at.progress)) if at is not None else 0.0
    left = at.seconds_left if at is not None else None
    return [
        name,
        Text(what),
        Text(clean(at.phase, 20).replace("_", " ") if at is not None else "starting", style="cyan"),
        ProgressBar(total=1.0, completed=done, complete_style="cyan", finished_style="cyan"),
        Text("" if left is None else duration(left), justify="right"),
        Text(about),
    ]


def _champion_rows(found: Snapshot, rows: Rows) -> list[RenderableType]:
    if not found.champions:
        return [_line("no profile yet", "dim")]
    champions = found.champions
    shown = champions if len(champions) <= rows.champions else champions[: rows.champions - 1]
    parts: list[RenderableType] = []
    for champion in shown:
        text = Text.assemble((champion.slug, "bold"), f"  {champion.figures}")
        text.no_wrap, text.overflow = True, "ellipsis"
        parts.append(text)
        for win in champion.wins[: rows.wins]:
            win.no_wrap, win.overflow = True, "ellipsis"
            parts.append(win)
    if len(shown) < len(champions):
        parts.append(_line(f"… {plural(len(champions) - len(shown), 'more profile')}", "dim"))
    return parts


def _trial_table(found: Snapshot, rows: int, width: int) -> RenderableType:
    if not found.trials:
        return _line("no trial has finished yet", "dim")
    with_profile = len(found.champions) > 1 and width >= 100
    table = Table.grid(padding=(0, 1), expand=True)
    for justify in ("left", *(["left"] if with_profile else []), "left", "right", "right"):
        table.add_column(no_wrap=True, justify="right" if justify == "right" else "left")
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for cells in found.trials[:rows]:
        table.add_row(*(cells if with_profile else [cells[0], *cells[2:]]))
    return table
