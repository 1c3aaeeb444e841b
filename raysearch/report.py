"""What came of a study, for people and programs: results.tsv, a Markdown summary, progress.png, the status as JSON.

It decides nothing, keeps nothing and writes nothing outside of the functions named `write_*`; what it writes can be
made again from the journal at any time.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TypedDict

from raysearch import economics, schedule, tally
from raysearch.economics import ProposerStatus, WorthStatus
from raysearch.health import Heat, is_throttled
from raysearch.model import Direction, Operator, Outcome, Profile
from raysearch.study import Study
from raysearch.tally import CardUse, Fate, Gains, Line, Standing, TimeUse
from raysearch.wording import (
    better_is,
    clean,
    compared,
    duration,
    gain,
    last_line,
    number,
    places,
    plural,
    signed,
    spelled,
)

RESULTS = "results.tsv"
SUMMARY = "report.md"
PROGRESS = "progress.png"
WRITTEN = (RESULTS, SUMMARY, PROGRESS)
SHOWN_FAILURES = 10
SHOWN_REFUSALS = 10
SHOWN_VERDICTS = 8
SHOWN_THROTTLED = 10
BITS_PER_BYTE = "val_bpb"  # the metric of which it is known what twice the compute is worth


def write_all(study: Study, folder: Path, *, name: str, metric: str) -> list[Path]:
    """Writes results.tsv, report.md and progress.png into a folder.

    Returns:
        The files.

    Raises:
        OSError: The folder cannot be written to.
    """
    write_results(study, folder / RESULTS, metric=metric)
    write_summary(study, folder / SUMMARY, name=name, metric=metric)
    write_progress(study, folder / PROGRESS, metric=metric)
    return [folder / written for written in WRITTEN]


GAINS = (
    " Speed is the change of tokens a second. Learning is an estimate of what is left of the delta at equal tokens, "
    f"by a rule of thumb for GPUs: {tally.PER_DOUBLING_BPB} bits per byte for a doubling of compute (docs/adr/0008); "
    "the exact figure takes runs of both programs with --budget-tokens."
)


# ---- results.tsv ----


def results_rows(study: Study, *, metric: str) -> list[dict[str, str]]:
    """One row for each candidate that was run and is settled, in the order in which they were, baselines included.

    The first five columns are autoresearch's: commit, metric (0.000000 where there is none), memory_gb, status (keep:
    its tree is on the ratchet; discard; crash: no number) and description. The metric is the mean of the fresh runs
    where there are any, else the screening run's; `delta` is against the program that the candidate was built on.

    Args:
        study: What is told of.
        metric: Name of the second column.
    """
    return [_row(study, line, metric) for line in tally.lines(study) if line.fate.is_settled and line.runs]


def write_results(study: Study, path: Path, *, metric: str) -> None:
    """Writes `results_rows` as tab-separated values with a header, atomically."""
    rows = results_rows(study, metric=metric)
    columns = list(rows[0]) if rows else _columns(metric)
    text = "\n".join("\t".join(line) for line in [columns, *([row[column] for column in columns] for row in rows)])
    _write_atomically(path, f"{text}\n".encode())


def _columns(metric: str) -> list[str]:
    own = "profile candidate operator proposer outcome verdict delta delta_se pairs runs holdout whole reason base"
    numbers = (
        "carried_by training_s wall_s num_steps total_tokens num_params mfu_percent energy_kj throttled finished_at"
    )
    return ["commit", clean(metric, 40), "memory_gb", "status", "description", *own.split(), *numbers.split()]


def _row(study: Study, line: Line, metric: str) -> dict[str, str]:
    state, proposal = line.state, line.state.candidate.proposal
    measured = [run.measurement for run in line.runs if run.measurement is not None]
    first = measured[0] if measured else None
    fresh = study.lane(proposal.profile).fresh.values(proposal.id)
    holdouts = [one.holdout for one in measured if one.holdout is not None]
    wholes = [one.whole for one in measured if one.whole is not None]
    facts = first.facts if first else {}
    said = f"baseline: {proposal.hypothesis}" if line.fate is Fate.BASELINE else proposal.hypothesis
    finished_at = datetime.fromtimestamp(line.runs[-1].finished_at or 0.0, UTC)
    cells = (
        (state.ratchet_commit or state.candidate.commit)[:7],
        f"{line.value or 0.0:.6f}",
        f"{max((one.peak_vram_mb for one in measured), default=0.0) / 1024:.1f}",
        _status(line),
        _cell(said),
        proposal.profile,
        proposal.id,
        proposal.operator.value,
        _cell(proposal.proposer),
        line.outcome.value if line.outcome else "",
        state.verdict.value if state.verdict else "",
        "" if state.delta is None else f"{state.delta:+.6f}",
        "" if state.delta_se is None else f"{state.delta_se:.6f}",
        str(state.pairs),
        str(len(fresh) or len(measured)),
        f"{sum(holdouts) / len(holdouts):.6f}" if holdouts else "",
        f"{sum(wholes) / len(wholes):.6f}" if wholes else "",
        _cell(state.reason),
        proposal.base[:7],
        state.carried_by or "",
        f"{first.training_s:.1f}" if first else "",
        f"{first.wall_s:.1f}" if first else "",
        *(_whole(facts.get(fact)) for fact in ("num_steps", "total_tokens", "num_params")),
        f"{facts['mfu_percent']:.2f}" if "mfu_percent" in facts else "",
        f"{facts['energy_j'] / 1000:.1f}" if "energy_j" in facts else "",
        str(sum(is_throttled(one) for one in measured)),
        finished_at.isoformat(timespec="seconds"),
    )
    return dict(zip(_columns(metric), cells, strict=True))


def _cell(text: str) -> str:
    """Others' text without tabs and newlines; a quote in front would make a reader swallow the lines that follow."""
    text = clean(text)
    return f"'{text[1:]}" if text.startswith('"') else text


def _status(line: Line) -> str:
    if line.value is None:
        return "crash"
    return "keep" if line.fate in (Fate.BASELINE, Fate.KEEP) else "discard"


def _whole(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.0f}"


# ---- the Markdown summary ----


def write_summary(study: Study, path: Path, *, name: str, metric: str) -> None:
    """Writes `summary_markdown`, atomically."""
    _write_atomically(path, summary_markdown(study, name=name, metric=metric).encode())


def summary_markdown(study: Study, *, name: str, metric: str) -> str:
    """What came of the study in plain words: per profile its noise, champion, ratchet, counts, time and failures."""
    metric = _md(metric)
    spans = tally.sessions(study)
    lines = tally.lines(study)
    ended = sum(run.outcome is not None for run in study.trials.values())
    limit = f" of {study.settings.max_trials}" if study.settings.max_trials is not None else ""
    text = [f"# {_md(name)}", "", f"The metric is {metric}: {better_is(study.settings.direction)}.", ""]
    if not ended:
        text += ["No trial has finished yet: there is nothing to report.", ""]
    else:
        candidates = f"{plural(tally.tried(study), 'candidate')}{limit} tried, {plural(ended, 'trial')} finished"
        flight = f", {len(study.running)} in flight" if study.running else ""
        took = spelled(sum(end - start for start, end in spans))
        text += [f"{candidates}{flight}, over {took} in {plural(len(spans), 'session')}.", ""]
        text += [f"![{metric} by trial]({PROGRESS})", ""]
    for slug in study.lanes:
        own = [line for line in lines if line.state.candidate.profile == slug]
        text += _profile_part(study, slug, own, metric)
    text += _proposers_part(study) + _travelled_part(study)
    text += _refusals_part(study)
    return "\n".join(text).rstrip() + "\n"


def _profile_part(study: Study, slug: str, lines: list[Line], metric: str) -> list[str]:
    at = tally.standing(study, slug)
    text = [f"## {_md(slug)}", "", f"{_md(hardware(at.profile))}.", ""]
    if at.blocked:
        text += [f"**Nothing more can be run here: {_md(at.blocked)}.**", ""]
    text += _champion_part(study, at, metric)
    if at.steps:
        text += _ratchet_part(study, at, metric)
    if any(line.runs for line in lines):
        text += _counts_part(study, slug, lines) + _time_part(tally.time_use(study, slug))
        text += _card_part(tally.card_use(study, slug), study.lane(slug).heat) + _failures_part(lines)
    return text


def hardware(profile: Profile) -> str:
    """A profile in one sentence: hardware, budget, data, software."""
    size = f"{profile.memory_mb / 1024:.0f} GiB" if profile.memory_mb else plural(profile.cores, "core")
    threads = f", {plural(profile.threads, 'thread')} a trial" if profile.threads else ""
    software = ", ".join(f"{name} {version}" for name, version in profile.software.items())
    named = (
        ("budget", profile.budget),
        ("preset", profile.preset),
        ("data", profile.data),
        ("evaluation", profile.evaluation),
        ("with", software),
    )
    return f"{profile.hardware}, {size}{threads}; " + "; ".join(f"{what} {value}" for what, value in named if value)


def _champion_part(study: Study, at: Standing, metric: str) -> list[str]:
    decimals = places(at.baseline, at.noise.sigma if at.noise else None)
    if at.baseline is None:
        return ["The baseline is not measured yet.", ""]
    text = [f"- Baseline: {metric} {number(at.baseline, decimals)} (mean of {plural(at.baseline_runs, 'run')})."]
    if at.noise is None:
        text.append("- Noise: not known yet, it takes two runs of one program.")
    else:
        dof = f"{plural(round(at.noise.dof), 'degree')} of freedom"
        text.append(f"- Noise: σ = {number(at.noise.sigma, decimals)} from run to run ({dof}).")
    if at.value is None or at.delta is None:
        text.append("- Champion: the baseline. No win has been confirmed yet.")
    else:
        se = f" ± {number(at.value_se, decimals)}" if at.value_se is not None else ""
        text.append(
            f"- Champion: {metric} {number(at.value, decimals)}{se} (mean of {plural(at.runs, 'fresh run')}), "
            f"{_champion_name(at)}."
        )
        text.append(f"- That is {_against_baseline(study, at, decimals)}.")
    if at.holdout is not None:
        against = f", baseline {number(at.baseline_holdout, decimals)}" if at.baseline_holdout and at.steps else ""
        text.append(
            f"- Second held-out split (reported, never used to decide): {number(at.holdout, decimals)}{against}."
        )
    if at.whole is not None:
        against = f", baseline {number(at.baseline_whole, decimals)}" if at.baseline_whole and at.steps else ""
        text.append(f"- Whole evaluation set (reported; a part of it decides): {number(at.whole, decimals)}{against}.")
    return [*text, ""]


def _champion_name(at: Standing) -> str:
    return f"candidate {at.champion.candidate.id} at `{at.commit[:7]}` on `ratchet/{at.profile.slug}`"


def _against_baseline(study: Study, at: Standing, decimals: int) -> str:
    delta = at.delta or 0.0
    told = compared(delta, study.settings.direction, decimals)
    se = f" (± {number(at.delta_se, decimals)})" if at.delta_se is not None else ""
    sigmas = f", {abs(delta) / at.noise.sigma:.1f} σ" if at.noise and at.noise.sigma > 0 else ""
    return f"{told}{se} than the baseline{sigmas}" if told != "equal" else "equal to the baseline"


def _ratchet_part(study: Study, at: Standing, metric: str) -> list[str]:
    decimals = places(at.baseline, at.noise.sigma if at.noise else None)
    in_bits = metric == BITS_PER_BYTE and study.settings.direction is Direction.MINIMIZE
    parts = [tally.gains(study, state) if in_bits else None for state in at.steps]
    known = any(part is not None for part in parts)
    rows = [
        [
            str(step),
            f"`{(state.ratchet_commit or '')[:7]}`",
            state.candidate.id,
            signed(state.delta, state.delta_se, decimals),
            *(_gains_cells(part) if known else ()),
            str(state.pairs),
            number(study.value(state.candidate.id), decimals),
            _md(state.candidate.proposal.hypothesis),
        ]
        for step, (state, part) in enumerate(zip(at.steps, parts, strict=True), start=1)
    ]
    more = ["speed", "learning"] if known else []
    head = ["step", "commit", "candidate", "delta ± se", *more, "pairs", metric, "hypothesis"]
    why = "Each delta is from fresh runs in pairs with equal seeds, against the step before."
    return ["### Ratchet", "", *_table(head, rows), "", why + (GAINS if known else ""), ""]


def _gains_cells(part: Gains | None) -> list[str]:
    if part is None:
        return ["–", "–"]
    learning = "–" if part.learning is None else f"≈ {part.learning:+.4f}"
    return [f"{100 * (part.speed - 1):+.1f} %", learning]


def _counts_part(study: Study, slug: str, lines: list[Line]) -> list[str]:
    runs = [run for run in study.trials.values() if run.trial.profile == slug]
    outcomes = Counter(run.outcome.value for run in runs if run.outcome is not None)
    purposes = Counter(run.trial.purpose.value for run in runs if run.outcome is not None)
    fates = Counter(line.fate.value for line in lines if line.fate is not Fate.BASELINE)
    carried = sum(line.fate is Fate.CARRIED and not line.runs for line in lines)
    text = ["### Counts", "", f"- Trials by outcome: {_counted(outcomes)}; by purpose: {_counted(purposes)}."]
    if fates:
        unrun = f" ({carried} of the carried ones before any run)" if carried else ""
        text.append(f"- Candidates: {_counted(fates)}{unrun}.")
    lane = study.lane(slug)
    if lane.futile:
        saved = spelled(lane.saved_s)
        text.append(
            f"- Stopped at half of the budget, far behind: {plural(lane.futile, 'trial')}, which saved {saved}."
        )
    text.append(f"- Of the changes that are tried at this point, about {100 * lane.prior.better():.0f} % help.")
    aside = [f"{event.slot} ({_md(event.reason)})" for event in study.aside.values() if event.profile == slug]
    if aside:
        text.append(f"- Slots set aside: {'; '.join(aside)}.")
    text += [f"- Slot {_md(one.slot)} is {_md(one.reason)}." for one in study.slow_slots(lane)]
    return [*text, ""]


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {word.replace('_', ' ')}" for word, count in counts.most_common()) or "none"


def _time_part(use: TimeUse) -> list[str]:
    if use.slot_s <= 0 or use.trials_per_hour is None:
        return []
    kinds = (
        ("training", use.training_s),
        ("evaluation", use.evaluation_s),
        ("start-up", use.start_s),
        ("other parts of measured trials", use.other_s),
        ("failed trials", use.failed_s),
        ("trials in flight", use.running_s),
        ("idle, or in attempts that were lost", use.idle_s),
    )
    rows = [[kind, f"{100 * seconds / use.slot_s:.1f} %", spelled(seconds)] for kind, seconds in kinds if seconds > 0]
    rate = f"{use.trials_per_hour:.1f} trials an hour on {plural(use.slots, 'slot')}"
    gaps = ""
    if use.gaps_s:
        gaps = (
            f"; between two trials on a slot {spelled(median(use.gaps_s))} (median of {len(use.gaps_s)}, "
            f"longest {spelled(max(use.gaps_s))})"
        )
    return ["### Time", "", f"{rate}{gaps}.", "", *_table(["slot time in", "share", "time"], rows), ""]


def _card_part(use: CardUse | None, heat: dict[str, Heat]) -> list[str]:
    """How well the card was used and what that took, and which trials were throttled."""
    text = _use_lines(use) if use is not None else []
    marked = [trial for one in heat.values() for trial in one.throttled]
    if marked:
        shown = ", ".join(marked[-SHOWN_THROTTLED:])
        more = f"the last {SHOWN_THROTTLED}: " if len(marked) > SHOWN_THROTTLED else ""
        text.append(f"- Throttled, by heat or the power brake: {plural(len(marked), 'trial')} ({more}{shown}).")
        text += [f"  - {_md(slot)}: {_heat_text(one)}." for slot, one in sorted(heat.items()) if one.throttled]
    return ["### Card", "", *text, ""] if text else []


def _use_lines(use: CardUse) -> list[str]:
    text: list[str] = []
    matmul = f" ({use.matmul_tflops:.3g} TFLOPS)" if use.matmul_tflops is not None else ""
    shares = (
        (use.mfu_percent, "of the card's peak by the table"),
        (use.mfu_measured_percent, f"of a matmul measured at the slot's start{matmul}"),
    )
    told = [f"{share:.1f} % {what}" for share, what in shares if share is not None]
    if told:
        text.append(f"- MFU: {', '.join(told)}.")
    if use.energy_kj is not None and use.total_energy_kj is not None:
        power = f", {use.power_w:.0f} W while training" if use.power_w is not None else ""
        text.append(f"- Energy: {use.energy_kj:.1f} kJ a trial{power}; {use.total_energy_kj / 3600:.2f} kWh in all.")
    if use.sm_clock_mhz is not None:
        most = f" of {use.sm_clock_max_mhz:.0f}" if use.sm_clock_max_mhz is not None else ""
        capped = use.power_capped_share
        limit = f", held by the power limit for {100 * capped:.0f} % of the training" if capped is not None else ""
        text.append(f"- Clock: {use.sm_clock_mhz:.0f}{most} MHz{limit}.")
    if use.temperature_c is not None:
        text.append(f"- Temperature: {use.temperature_c:.0f} °C at a trial's hottest, {use.hottest_c:.0f} °C at most.")
    return [*text, f"- These are medians of {plural(use.trials, 'measured trial')}."] if text else []


def _heat_text(one: Heat) -> str:
    share = 100 * one.share / one.trials
    return f"{len(one.throttled)} of {plural(one.trials, 'trial')}, {share:.0f} % of their training"


def _failures_part(lines: list[Line]) -> list[str]:
    failed = [(line, run) for line in lines for run in line.runs if run.measurement is None]
    if not failed:
        return []
    text = ["### Failures", ""]
    if len(failed) > SHOWN_FAILURES:
        text += [f"The last {SHOWN_FAILURES} of {len(failed)}:", ""]
    for line, run in failed[-SHOWN_FAILURES:]:
        outcome = (run.outcome or Outcome.LOST).value.replace("_", " ")
        said = f"- {run.trial.id}: {outcome}: {_md(run.reason)} – {_md(line.state.candidate.proposal.hypothesis)}"
        tail = last_line(run.log_tail)
        text.append(f"{said}. Last line: {_md(tail)}" if tail else said)
    return [*text, ""]


def _proposers_part(study: Study) -> list[str]:
    head, *rows = economics.table(study)
    if not rows:
        return []
    lines = [f"- {_md(line)}" for line in economics.worth_lines(economics.worths(study))]
    cells = [[_md(cell) for cell in row] for row in rows]
    return ["## Proposers", "", *_table(head, cells), "", economics.legend(study), "", *lines, *([""] if lines else [])]


def _travelled_part(study: Study) -> list[str]:
    """Wins that began as a step of another profile's ratchet."""
    rows = [
        [_md(slug), win.candidate, _md(root.source), _md(root.hypothesis)]
        for slug, lane in study.lanes.items()
        for win in lane.wins
        for root in study.roots(study.candidate(win.candidate).candidate.proposal)
        if root.operator is Operator.TRANSFER
    ]
    head = ["won on", "candidate", "from", "hypothesis"]
    return ["## Ideas that travelled", "", *_table(head, rows), ""] if rows else []


def _refusals_part(study: Study) -> list[str]:
    reasons = tally.refusals(study)
    if not reasons:
        return []
    text = ["## Refused proposals", ""]
    text += [f"- {count} × {_md(reason)}" for reason, count in reasons[:SHOWN_REFUSALS]]
    if len(reasons) > SHOWN_REFUSALS:
        text.append(f"- and {plural(len(reasons) - SHOWN_REFUSALS, 'more reason')}")
    return [*text, ""]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _md(text: str) -> str:
    """Text that others wrote, as plain text of a Markdown table or list."""
    return "".join(f"\\{char}" if char in "\\`*[]<>|~$" else char for char in clean(text))


# ---- progress.png ----


def write_progress(study: Study, path: Path, *, metric: str) -> None:
    """Draws progress.png, one panel a profile, atomically."""
    from raysearch.figure import draw_progress  # noqa: PLC0415  matplotlib takes a second to import

    _write_atomically(path, draw_progress(study, metric=metric))


# ---- status ----


class ThrottledStatus(TypedDict):
    """A slot some of whose trials were throttled by heat or the power brake.

    `throttled` names those that are marked, of `trials` that say; `share` is of the training of all of these.
    """

    slot: str
    trials: int
    throttled: list[str]
    share: float


class SlowStatus(TypedDict):
    """A slot whose card reached less than others of its kind as it joined; `share` is how much less, of the usual."""

    slot: str
    share: float
    reason: str


class ProfileStatus(TypedDict):
    """A profile's part of the status; the figures of the card are medians of its measured trials."""

    profile: str
    hardware: str
    budget: str
    sigma: float | None
    sigma_dof: int
    baseline: float | None
    champion: str
    champion_commit: str
    value: float | None
    value_se: float | None
    delta: float | None
    delta_se: float | None
    gain: float | None
    holdout: float | None
    whole: float | None
    wins: int
    frontier: list[str]
    queued: int
    futile: int
    saved_s: float
    slots_aside: list[str]
    throttled_slots: list[ThrottledStatus]
    slow_slots: list[SlowStatus]
    mfu_percent: float | None
    mfu_measured_percent: float | None
    energy_kj: float | None
    temperature_c: float | None
    blocked: str


class RunningStatus(TypedDict):
    """A trial in flight."""

    trial: str
    candidate: str
    profile: str
    purpose: str
    slot: str
    attempt: int
    running_s: float
    hypothesis: str


class VerdictStatus(TypedDict):
    """What was made of a candidate."""

    candidate: str
    profile: str
    fate: str
    verdict: str | None
    value: float | None
    delta: float | None
    delta_se: float | None
    reason: str
    hypothesis: str


class StudyStatus(TypedDict):
    """A study as `raysearch status --json` shows it; times are Unix seconds, numbers that are unknown are null.

    `candidates_tried` counts first runs that have ended, which is what `max_trials` limits; `outcomes` counts trials,
    `fates` candidates. `gain` is `delta` with the sign that makes an improvement positive.
    """

    study: str
    metric: str
    direction: str
    running: bool
    at: float
    started_at: float | None
    last_event_at: float | None
    events: int
    sessions: int
    candidates_tried: int
    max_trials: int | None
    trials_finished: int
    outcomes: dict[str, int]
    fates: dict[str, int]
    proposals: int
    refused: int
    queued: int
    spent_usd: float
    proposers: list[ProposerStatus]
    worth: list[WorthStatus]
    profiles: list[ProfileStatus]
    running_trials: list[RunningStatus]
    last_verdicts: list[VerdictStatus]


def status(study: Study, *, name: str, metric: str, now: float, running: bool) -> StudyStatus:
    """Where the study stands, ready for JSON.

    Args:
        study: What is told of.
        name: Of the study.
        metric: Of the objective.
        now: Unix time.
        running: Whether a coordinator holds the study; without one, trials in flight are lost and will be run again.
    """
    done = tally.finished(study)
    lines = [line for line in tally.lines(study, done) if line.fate is not Fate.BASELINE]
    queued = {slug: schedule.queue_length(study, lane) for slug, lane in study.lanes.items()}
    return StudyStatus(
        study=name,
        metric=metric,
        direction=study.settings.direction.value,
        running=running,
        at=now,
        started_at=study.started_at,
        last_event_at=study.last_at if study.seq else None,
        events=study.seq,
        sessions=len(tally.sessions(study)),
        candidates_tried=tally.tried(study),
        max_trials=study.settings.max_trials,
        trials_finished=len(done),
        outcomes=dict(Counter(run.outcome.value for run in done if run.outcome is not None)),
        fates=dict(Counter(line.fate.value for line in lines)),
        proposals=study.proposals,
        refused=len(study.refused),
        queued=sum(queued.values()),
        spent_usd=study.spent_usd,
        proposers=economics.proposers(study),
        worth=economics.worths(study),
        profiles=[_profile_status(study, slug, queued[slug]) for slug in study.lanes],
        running_trials=[
            RunningStatus(
                trial=run.trial.id,
                candidate=run.trial.candidate,
                profile=run.trial.profile,
                purpose=run.trial.purpose.value,
                slot=run.slot,
                attempt=run.attempt,
                running_s=round(max(0.0, now - run.started_at), 1),
                hypothesis=_about(study, run.trial.candidate),
            )
            for run in study.running.values()
        ],
        last_verdicts=[
            VerdictStatus(
                candidate=line.state.candidate.id,
                profile=line.state.candidate.profile,
                fate=line.fate.value,
                verdict=line.state.verdict.value if line.state.verdict else None,
                value=_finite(line.value),
                delta=_finite(line.state.delta),
                delta_se=_finite(line.state.delta_se),
                reason=clean(line.state.reason),
                hypothesis=_about(study, line.state.candidate.id),
            )
            for line in [line for line in lines if line.state.verdict is not None][-SHOWN_VERDICTS:]
        ],
    )


def _profile_status(study: Study, slug: str, queued: int) -> ProfileStatus:
    at = tally.standing(study, slug)
    use = tally.card_use(study, slug)
    return ProfileStatus(
        profile=slug,
        hardware=at.profile.hardware,
        budget=at.profile.budget,
        sigma=_finite(at.noise.sigma if at.noise else None),
        sigma_dof=round(at.noise.dof) if at.noise else 0,
        baseline=_finite(at.baseline),
        champion=at.champion.candidate.id,
        champion_commit=at.commit,
        value=_finite(at.value),
        value_se=_finite(at.value_se),
        delta=_finite(at.delta),
        delta_se=_finite(at.delta_se),
        gain=_finite(None if at.delta is None else gain(at.delta, study.settings.direction)),
        holdout=_finite(at.holdout),
        whole=_finite(at.whole),
        wins=len(at.steps),
        frontier=[name for name in study.lane(slug).racing if study.lives(study.lane(slug), name)],
        queued=queued,
        futile=study.lane(slug).futile,
        saved_s=round(study.lane(slug).saved_s, 1),
        slots_aside=[slot for slot, event in study.aside.items() if event.profile == slug],
        throttled_slots=[
            ThrottledStatus(
                slot=slot, trials=one.trials, throttled=one.throttled, share=round(one.share / one.trials, 4)
            )
            for slot, one in sorted(study.lane(slug).heat.items())
            if one.throttled
        ],
        slow_slots=[
            SlowStatus(slot=one.slot, share=round(one.share, 4), reason=one.reason)
            for one in study.slow_slots(study.lane(slug))
        ],
        mfu_percent=use.mfu_percent if use else None,
        mfu_measured_percent=use.mfu_measured_percent if use else None,
        energy_kj=use.energy_kj if use else None,
        temperature_c=use.temperature_c if use else None,
        blocked=at.blocked,
    )


def _about(study: Study, candidate: str) -> str:
    return clean(study.candidate(candidate).candidate.proposal.hypothesis)


def _finite(value: float | None) -> float | None:
    """JSON knows no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


def status_text(found: StudyStatus) -> str:
    """A status in a few lines for people."""
    limit = f" of {found['max_trials']}" if found["max_trials"] is not None else ""
    last_at = found["last_event_at"]
    state = "running" if found["running"] else "not running"
    since = f", last event {duration(found['at'] - last_at)} ago" if last_at is not None else ""
    text = [
        f"{clean(found['study'])}: {state}{since}",
        f"{plural(found['candidates_tried'], 'candidate')}{limit} tried, {plural(found['trials_finished'], 'trial')} "
        f"finished, {found['queued']} queued, {plural(found['refused'], 'proposal')} refused",
    ]
    if not found["profiles"]:
        text.append("no profile yet: nothing has been run")
    for one in found["profiles"]:
        text += [_profile_line(one, found["metric"], found["direction"]), *_card_lines(one)]
    text += economics.lines(found["proposers"], found["worth"], found["spent_usd"])
    for run in found["running_trials"]:
        what = "running" if found["running"] else "was in flight, will be run again"
        text.append(f"{run['slot']}: {run['trial']} ({run['purpose']}, {duration(run['running_s'])}), {what}")
    for one in found["last_verdicts"]:
        decimals = places(one["value"], one["delta_se"])
        delta = f" {signed(one['delta'], one['delta_se'], decimals)}" if one["delta"] is not None else ""
        text.append(f"{one['candidate']} {one['fate']}{delta}: {one['hypothesis']}")
    return "\n".join(text)


def _profile_line(one: ProfileStatus, metric: str, direction: str) -> str:
    slug, decimals = one["profile"], places(one["baseline"], one["sigma"])
    if one["blocked"]:
        return f"{slug}: blocked, {clean(one['blocked'])}"
    if one["value"] is None:
        return f"{slug}: the baseline is not measured yet"
    value = f"{clean(metric, 40)} {number(one['value'], decimals)}"
    noise = f", σ {number(one['sigma'], decimals)}" if one["sigma"] is not None else ""
    if one["gain"] is None:
        return f"{slug}: {value}, the baseline{noise}; no win yet"
    told = f"{number(abs(one['gain']), decimals)} {'better' if one['gain'] >= 0 else 'worse'} than the baseline"
    return f"{slug}: {value}{noise}, {told} after {plural(one['wins'], 'win')}; champion {one['champion']}"


def _card_lines(one: ProfileStatus) -> list[str]:
    """The profile's card in a line, and its throttled and its slow slots in one each."""
    figures = (
        ("MFU {:.1f} % of the table's peak", one["mfu_percent"]),
        ("MFU {:.1f} % of the measured matmul", one["mfu_measured_percent"]),
        ("{:.1f} kJ a trial", one["energy_kj"]),
        ("{:.0f} °C", one["temperature_c"]),
    )
    told = ", ".join(words.format(value) for words, value in figures if value is not None)
    text = [f"{one['profile']}: {told}"] if told else []
    for slot in one["throttled_slots"]:
        count = f"{len(slot['throttled'])} of {plural(slot['trials'], 'trial')}"
        last = ", ".join(slot["throttled"][-3:])
        text.append(
            f"{slot['slot']}: throttled in {count}, {100 * slot['share']:.0f} % of their training; last: {last}"
        )
    return text + [f"{slot['slot']}: {slot['reason']}" for slot in one["slow_slots"]]


# ---- files ----


def _write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file in one step: a reader sees the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
