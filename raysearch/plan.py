"""What to do next: reads the state of a study and the slots, and says it in commands. It performs nothing.

Which trial goes to which slot is `schedule`'s business; here are verdicts, moves, merges, questions and the end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from raysearch import bandit, judge, schedule
from raysearch.bandit import Arm
from raysearch.model import (
    Candidate,
    Event,
    Judged,
    Operator,
    Proposal,
    Purpose,
    SlotRestored,
    SlotSetAside,
    Trial,
    Verdict,
)
from raysearch.pace import Pace
from raysearch.schedule import Slot
from raysearch.study import MOVERS, CandidateState, Lane, Study, TrialState, baseline_id, candidate_number, screen_id

MOST_REFUSALS = 10  # in a row, after which the proposers are not asked again before something new is known
ASIDE_TRIALS = 20.0  # durations of a trial for which a slot is set aside
FEW = 8  # changes in line that can be started, under which others are carried before their turn comes
BATCH_SHARE = 32  # a proposer is asked for at least one proposal for so many slots
LINE_SHARE = 8  # one proposal waits for so many slots, where proposers answer at once
RUSH_SHARE = 0.05  # of a trial's duration: what the last slot may wait for its proposal if all trials end together
TIDYING = tuple(operator.value for operator in bandit.TIDYING)  # proposers, called by what they do
TIDY_AFTER = 5  # steps of a ratchet from which they are asked
MOST_DRAWS = 32  # of the bandit, by which the line is shared between those that keep it
SIDE_SHARE = 4  # a proposer beside the first one has one proposal in line for so many slots


# ---- commands: what the coordinator is to do ----


@dataclass(frozen=True)
class StartTrial:
    """Run this attempt on this slot."""

    trial: Trial
    attempt: int
    slot: str


@dataclass(frozen=True)
class Materialise:
    """Make the proposal a commit, or refuse it."""

    proposal: Proposal


@dataclass(frozen=True)
class Conclude:
    """Journal this: a verdict, or what becomes of a slot."""

    event: Event


@dataclass(frozen=True)
class MoveRatchet:
    """Move the branch from `expected` to a commit with the candidate's tree."""

    profile: str
    candidate: Candidate
    expected: str


@dataclass(frozen=True)
class Carry:
    """What the candidates were built on is no more: merge their changes, one after the other, onto `onto`.

    Attributes:
        onto: Commit of the champion, or of a candidate of the frontier.
        champion: Candidate whose tree that is.
    """

    candidates: tuple[Candidate, ...]
    onto: str
    champion: str


@dataclass(frozen=True)
class Ask:
    """Ask a proposer for `count` proposals for a profile, to be built on `base`."""

    profile: str
    proposer: str
    count: int
    base: str


@dataclass(frozen=True)
class Finish:
    """Nothing is left to do."""

    reason: str


Command = StartTrial | Materialise | Conclude | MoveRatchet | Carry | Ask | Finish
Asking = Mapping[tuple[str, str], Pace]  # (profile, proposer) -> how they stand; as at the start where it is missing


def next_commands(
    study: Study,
    slots: Sequence[Slot],
    *,
    asking: Asking,
    accepting: bool = True,
    late: Set[str] = frozenset(),
    draining: bool = False,
) -> list[Command]:
    """What to do now.

    Args:
        study: Its state.
        slots: All slots that are there, busy ones included.
        asking: How the proposers stand to the profiles.
        accepting: False when no further proposal is wanted (a time limit has passed).
        late: Profiles for which none is wanted: the time limit of their directions has passed.
        draining: Start nothing; finish when the runs in flight have.

    Returns:
        Commands in the order in which to perform them. Decisions on the state come first and alone, since each
        of them changes what follows. Carrying is one at a time, behind what can be started without it: it takes
        a tenth of a second, and no slot should wait for the second change when the first is ready.
    """
    decisions = _decisions(study, slots, draining=draining)
    if decisions:
        return decisions
    if draining:
        return [] if study.running else [Finish("stopped: the runs in flight have ended")]
    free: dict[str, list[Slot]] = {}
    present: dict[str, int] = {}
    for slot in slots:
        present[slot.profile] = present.get(slot.profile, 0) + 1
        if slot.id not in study.busy and slot.id not in study.aside:
            free.setdefault(slot.profile, []).append(slot)
    commands: list[Command] = []
    for slug, lane in study.lanes.items():
        for trial, slot in schedule.assign(study, lane, free.get(slug, [])):
            previous = study.trials.get(trial.id)
            commands.append(StartTrial(trial, previous.attempt + 1 if previous else 1, slot.id))
    carry = _carry(study, present, waits=len(commands) < sum(map(len, free.values())))
    if carry is not None:
        return [*commands, carry]
    if accepting:
        for slug, lane in study.lanes.items():
            if slug in late:
                continue
            here, idle = present.get(slug, 0), len(free.get(slug, ()))
            commands += _asks(study, lane, present=here, idle=idle, asking=asking, share=here / max(1, len(slots)))
    if not commands and not study.running:
        commands += _ending(study, [study.lanes[slug] for slug in present], asking, late if accepting else set(present))
    return commands


# ---- decisions ----


def _decisions(study: Study, slots: Sequence[Slot], *, draining: bool) -> list[Command]:
    commands: list[Command] = [Materialise(proposal) for proposal in study.waiting.values()]
    for lane in study.lanes.values():
        winner = _winner(study, lane, draining=draining)
        if winner is not None:  # alone: whatever else was confirmed here is carried onto it afterwards
            commands.append(MoveRatchet(lane.profile.slug, winner.candidate, lane.champion_commit))
            continue
        # what becomes of a slot is said when nothing is to be judged: a verdict may close what a trial was for
        commands += _verdicts(study, lane) or _health(study, lane, slots)
    return commands


def _winner(study: Study, lane: Lane, *, draining: bool) -> CandidateState | None:
    """The best of those that were confirmed against the champion; none while the head stands on something else.

    A small win that moves the ratchet takes away what all that stands beside it was built on: where many slots work on
    a head that promises more, it waits until the head is confirmed or refuted (docs/adr/0028).
    """
    found = [study.candidates[name] for name in lane.confirmed if study.candidates[name].base == lane.champion]
    if found and not draining:
        step = study.next_step(lane)
        found = [state for state in found if step in (state.id, lane.champion)]
    return max(found, key=lambda state: state.gain or 0.0, default=None)


def _verdicts(study: Study, lane: Lane) -> list[Command]:
    commands: list[Command] = []
    for name in list(lane.due):
        event = _verdict(study, lane, study.candidates[name])
        if event is None:
            lane.due.pop(name, None)  # looked at; it is due again when something new is known of it
        else:
            commands.append(Conclude(event))
    return commands


def _verdict(study: Study, lane: Lane, state: CandidateState) -> Judged | None:
    if state.id in lane.screened:
        return _screen_verdict(study, lane, state)
    if state.id in lane.racing:
        return _race_verdict(study, lane, state)
    return None


def _screen_verdict(study: Study, lane: Lane, state: CandidateState) -> Judged | None:
    run = study.trials[screen_id(state.id)]
    if run.value is None:
        outcome = run.outcome.value if run.outcome else ""
        return Judged(state.id, Verdict.DISCARD, f"{outcome}: {run.reason}")
    known = study.judge(lane, state.base)
    base_values = study.base_values(lane, state)
    if known is None or not (base_values or study.settings.rules.greedy):
        return None
    if study.settings.rules.greedy:
        best = study.trials.get(screen_id(lane.champion)) or study.trials[baseline_id(lane.base, 1)]
        assert best.value is not None
        found = judge.greedy(run.value, best.value, known.noise, known.direction)
    else:
        found = known.screen(run.value, base_values, simplifies=study.simplifies(state))
    return Judged(
        state.id,
        found.verdict,
        found.reason,
        found.delta,
        found.delta_se,
        p_better=found.p_better,
        gain=found.gain,
        learned=study.learned(lane, state, found.verdict, known),
    )


def _race_verdict(study: Study, lane: Lane, state: CandidateState) -> Judged | None:
    known = study.judge(lane, state.base)
    runs = [study.trials[name] for name in state.races]
    failed = next((run for run in runs if run.outcome is not None and run.value is None), None)
    if failed is not None:
        outcome = failed.outcome.value if failed.outcome else ""
        return Judged(state.id, Verdict.DISCARD, f"its re-run {outcome}: {failed.reason}", pairs=state.pairs)
    pairs = study.race_pairs(state)
    spoilt = sum(schedule.is_spoilt(study, run) for run in runs)
    last = len(runs) >= study.settings.rules.max_pairs + schedule.SPARE_PAIRS and spoilt + len(pairs) == len(runs)
    failing = "the program that it was built on failed again and again"
    if last and len(pairs) <= state.pairs:
        return Judged(state.id, Verdict.DISCARD, failing, state.delta, state.delta_se, pairs=state.pairs)
    if known is None or len(pairs) <= state.pairs:
        return None
    screened = None if state.candidate.proposal.carries else study.screen_evidence(lane, state, known)
    sound = study.sound_pairs(lane, state)
    found = known.race(sound or pairs, screened=screened, simplifies=study.simplifies(state))
    verdict, reason = found.verdict, found.reason
    if not sound and verdict is Verdict.KEEP:
        verdict, reason = Verdict.RETEST, f"{reason}; but no other run of what it was built on agrees with that one"
    if verdict is Verdict.RETEST and (last or len(pairs) >= study.settings.rules.max_pairs):
        verdict, reason = Verdict.DISCARD, f"{reason}; {failing if last else 'the last pair'}"
    return Judged(
        state.id,
        verdict,
        reason,
        found.delta,
        found.delta_se,
        pairs=len(pairs),
        p_better=found.p_better,
        gain=found.gain,
        learned=study.learned(lane, state, verdict, known),
    )


def _health(study: Study, lane: Lane, slots: Sequence[Slot]) -> list[Command]:
    """Slots to be set aside, never the last ones, and slots that have been aside for long enough."""
    noise = study.noise(lane)
    slug = lane.profile.slug
    commands: list[Command] = []
    if lane.health.changed and noise is not None:
        suspects = lane.health.suspects(noise.sigma)
        here = {slot.id for slot in slots if slot.profile == slug} - set(study.aside) if suspects else set[str]()
        for found in suspects:
            if found.slot in here and len(here) > 1:
                here.discard(found.slot)
                repeat = tuple(trial for trial in found.trials if _matters(study, lane, study.trials[trial]))
                commands.append(Conclude(SlotSetAside(found.slot, slug, found.reason, repeat)))
    if not study.aside:
        return commands
    there = {slot.id for slot in slots if slot.profile == slug}
    over_s = ASIDE_TRIALS * (lane.wall_s or 0.0)
    for slot, event in study.aside.items():
        # those that were better may have left meanwhile: a slot that drifts is better than none
        needed = slot in there and there <= set(study.aside)
        if event.profile == slug and (needed or study.last_at - study.aside_at[slot] > over_s):
            commands.append(Conclude(SlotRestored(slot, slug)))
    return commands


def _matters(study: Study, lane: Lane, run: TrialState) -> bool:
    """Whether something is still to be decided by a trial's result."""
    if run.value is None:
        return False
    if run.trial.purpose is Purpose.SCREEN:
        return run.trial.candidate in lane.screened
    return schedule.is_awaited(study, lane, run.trial)


# ---- carrying ----


def _carry(study: Study, present: Mapping[str, int], *, waits: bool) -> Carry | None:
    """What has to be put onto something newer before anything else is done with it: wins first, together.

    Args:
        study: Its state.
        present: Slots by profile.
        waits: Whether a slot is free and has nothing to do.
    """
    for lane in study.lanes.values():
        names = _stranded_wins(study, lane) or _stranded_race(study, lane)
        if names:
            return _onto(study, lane, names, study.candidates[lane.champion])
    for slug, lane in study.lanes.items():
        name = _next_dead(study, lane, present.get(slug, 0), waits=waits)
        if name is not None:
            return _onto(study, lane, (name,), study.head(lane))
    return None


def _next_dead(study: Study, lane: Lane, present: int, *, waits: bool) -> str | None:
    """The first change in line whose base is no more, if a slot waits for it or few others are ready."""
    ready, dead, enough = 0, None, min(FEW, present)
    for name in lane.line:
        alive = study.lives(lane, study.candidates[name].base)
        ready += alive
        if not alive and dead is None:
            dead = name
        if ready >= enough and not waits:
            return None
        if waits and dead is not None:
            return dead
    return dead if present else None


def _onto(study: Study, lane: Lane, names: Sequence[str], head: CandidateState) -> Carry:
    return Carry(tuple(study.candidates[name].candidate for name in names), _commit_of(lane, head), head.id)


def _stranded_wins(study: Study, lane: Lane) -> tuple[str, ...]:
    """Confirmed changes whose base is no more: all of them, or a part of a union that fell short."""
    parted: set[str] = set()
    for part in lane.splits:
        left = tuple(name for name in part if name in lane.confirmed)
        if left:
            return left
        parted.update(part)
    stranded = [
        name for name in lane.confirmed if name not in parted and not study.lives(lane, study.candidates[name].base)
    ]
    found = tuple(sorted(stranded, key=candidate_number))  # what was built on another of them is merged after it
    bases = {study.candidates[name].base for name in found}
    racing = (study.candidates[name] for name in lane.racing)
    if any(state.races and state.base in bases for state in racing):
        return ()  # others are raced against the same base: they end soon, and what wins is carried together
    return found


def _stranded_race(study: Study, lane: Lane) -> tuple[str, ...]:
    """A promising change whose race has not begun and whose base is no more, or whose base never had a fresh run."""
    for name in lane.racing:
        if not study.candidates[name].races and not study.lives(lane, study.candidates[name].base):
            return (name,)
    for name in lane.screened:
        base = study.candidates[name].base
        if not lane.fresh.values(base) and not study.lives(lane, base):
            return (name,)
    return ()


# ---- asking and ending ----


def _asks(study: Study, lane: Lane, *, present: int, idle: int, asking: Asking, share: float) -> Iterator[Ask]:
    """Proposals in line, so that each slot finds its next trial: as many as are needed, since what waits grows stale.

    The first one that answers at once keeps the line filled, whoever has proposals in it; the two that move knobs
    do it together, in the shares that the bandit gives them (docs/adr/0030, 0034). Those that take their time
    are asked ahead (docs/adr/0022), for lines of their own: what others have in line does not hold them back.

    Args:
        study: Its state.
        lane: The profile's.
        present: Its slots.
        idle: Those of them that are free.
        asking: How the proposers stand.
        share: Of the slots of all profiles, those of this one.
    """
    slug = lane.profile.slug
    if not present or lane.blocked or lane.refusals >= MOST_REFUSALS:
        return
    paces = {name: _pace(asking, slug, name) for name in _askable(study, lane)}
    names = [name for name, pace in paces.items() if not pace.rests]
    quick = [name for name in names if _is_quick(paces[name], lane, present)]
    lead = next((name for name, pace in paces.items() if not pace.is_out and not pace.trouble), None)
    leads = [name for name in quick if name in MOVERS] if quick and quick[0] in MOVERS else quick[:1]
    lines, side = Counter(lane.line.values()), -(-present // SIDE_SHARE)
    others = sum(count for name, count in lines.items() if name not in leads and name not in TIDYING)
    # one at least: the bandit is to choose, and what only tidies takes nobody's place
    wanted = max(1, idle + _line([paces[name] for name in leads], lane, present) - others)
    shares = _shares(study, lane, leads, wanted)
    left = _left(study, lane, asking)
    base: str | None = None
    for name in names:
        pace = paces[name]
        if name in quick:
            target, have = shares[name] if name in leads else side, lines[name]
        else:
            target, slots = (idle + present, present) if name == lead else (side, side)
            target, have = target + _ahead(pace, lane, slots), lines[name] + pace.asked
        most = left
        if left is not None and quick and name not in quick:
            most = -(-left // 2)  # the slots' next trials cannot wait for it
        count = _count(pace, wanted=target - have, most=most, present=present, share=share)
        if count > 0:
            left = None if left is None else left - count
            base = base or _commit_of(lane, study.head(lane))
            yield Ask(slug, name, count, base)


def _shares(study: Study, lane: Lane, leads: Sequence[str], wanted: int) -> Mapping[str, int]:
    """How many proposals in line each of them has: one at least, else as often as the bandit names it first."""
    if len(leads) < 2:
        return dict.fromkeys(leads, wanted)
    draws, draw = min(wanted, MOST_DRAWS), schedule.chance(study.settings.seed, lane.started)
    arms = [Arm(name, Operator.TUNE) for name in leads]
    first = Counter(bandit.order(lane.tallies, arms, draw)[0].proposer for _ in range(draws))
    return {name: max(1, -(-wanted * first[name] // draws)) for name in leads}


def _line(leads: Sequence[Pace], lane: Lane, slots: int) -> int:
    """How many proposals wait for slots where proposers answer at once: few, each made of what is known by then.

    More where answers take so long that slots whose trials all end together would wait for them (docs/adr/0031).
    """
    proposal_s = max((pace.proposal_s for pace in leads), default=0.0)
    in_time = RUSH_SHARE * lane.wall_s / proposal_s if lane.wall_s and proposal_s else slots
    return max(-(-slots // LINE_SHARE), slots - int(min(in_time, slots)))


def _count(pace: Pace, *, wanted: int, most: int | None, present: int, share: float) -> int:
    """How many proposals it is worth to ask for now; for none if it is not positive."""
    count = wanted if most is None else min(wanted, most)
    if pace.one_by_one:
        return min(count, max(1, round(pace.places * share)) - pace.asked)
    if pace.asked:
        return 0
    least = -(-present // BATCH_SHARE)  # many at once: a searcher makes several proposals of one suggestion
    return count if count >= (least if most is None else min(least, max(1, most))) else 0


def _pace(asking: Asking, profile: str, proposer: str) -> Pace:
    return asking.get((profile, proposer), Pace())


def _left(study: Study, lane: Lane, asking: Asking) -> int | None:
    """How many proposals may still be asked for, None without a limit."""
    limit, slug = study.max_trials(lane), lane.profile.slug
    on_its_way = sum(pace.asked for (profile, _), pace in asking.items() if profile == slug)
    return None if limit is None else limit - lane.screens - on_its_way


def _is_quick(pace: Pace, lane: Lane, slots: int) -> bool:
    """Whether a proposer makes proposals faster than the slots can take them."""
    return not pace.one_by_one and pace.proposal_s * slots <= (lane.wall_s or math.inf)


def _ahead(pace: Pace, lane: Lane, slots: int) -> int:
    """How many proposals the slots take while one is made."""
    return math.ceil(slots * pace.proposal_s / lane.wall_s) if lane.wall_s else 0


def _askable(study: Study, lane: Lane) -> Sequence[str]:
    """The proposers that are of use now: a ratchet of a few steps needs no tidying, unless nobody else is there."""
    forbidden = {operator.value for operator in study.directions(lane).forbidden}  # some are called by what they do
    if Operator.TUNE.value in forbidden:
        forbidden |= set(MOVERS)
    names = [name for name in study.settings.proposers if name not in forbidden] or study.settings.proposers
    if len(lane.wins) >= TIDY_AFTER:
        return names
    return [name for name in names if name not in TIDYING] or names


def _commit_of(lane: Lane, head: CandidateState) -> str:
    return lane.champion_commit if head.id == lane.champion else head.candidate.commit


def _ending(study: Study, served: Sequence[Lane], asking: Asking, late: Set[str]) -> list[Command]:
    """Whether the search is over, as far as the profiles that have slots go."""
    slugs = {lane.profile.slug for lane in served}
    # answers that take their time are not waited for after the time limit, with slots that idle
    waited = (
        pace.asked for (slug, _), pace in asking.items() if slug in slugs and not (slug in late and pace.one_by_one)
    )
    if not served or any(waited) or any(lane.open and not lane.blocked for lane in served):
        return []
    if all(lane.blocked for lane in served):
        return [Finish("; ".join(f"{lane.profile.slug} is blocked, {lane.blocked}" for lane in served))]
    if slugs <= late:
        return [Finish("the time limit has passed")]
    over = [lane for lane in served if lane.blocked or lane.profile.slug in late or _is_full(study, lane)]
    if len(over) == len(served):
        limit = next((study.max_trials(lane) for lane in served if _is_full(study, lane)), None)
        done = "the time limit has passed" if limit is None else f"all {limit} trials are done"
        return [Finish(done + _left_behind(study, slugs))]
    stuck = [lane for lane in served if lane.refusals >= MOST_REFUSALS]
    if stuck and all(lane in stuck or lane in over for lane in served):
        slug = stuck[0].profile.slug
        reason = next(reason for proposal, reason in reversed(study.refused) if proposal.profile == slug)
        return [Finish(f"the last {MOST_REFUSALS} proposals for {slug} were all refused; the last one: {reason}")]
    return []


def _left_behind(study: Study, served: Set[str]) -> str:
    """What is said of profiles whose machines have left before they had all of their trials."""
    away = [slug for slug, lane in study.lanes.items() if slug not in served and not lane.blocked]
    short = [slug for slug in away if study.lanes[slug].open or not _is_full(study, study.lanes[slug])]
    names = ", ".join(short)
    return f"; not those of {names}, which has no slot now: start the study again when it has" if short else ""


def _is_full(study: Study, lane: Lane) -> bool:
    """Whether a profile has as many proposals as there may be."""
    limit = study.max_trials(lane)
    return limit is not None and lane.screens >= limit


def out_of_ideas(study: Study, served: Iterable[str], asking: Asking, *, late: Set[str] = frozenset()) -> Finish | None:
    """The end, if nothing is open and nobody who can be asked has an idea.

    Args:
        study: Its state.
        served: Profiles that have slots.
        asking: How the proposers stand to them.
        late: See `next_commands`.
    """
    lanes = [study.lanes[slug] for slug in served if not study.lanes[slug].blocked]
    if study.running or not lanes or any(lane.open for lane in lanes):
        return None
    asked = [
        (name, _pace(asking, lane.profile.slug, name))
        for lane in lanes
        if lane.refusals < MOST_REFUSALS and lane.profile.slug not in late and not _is_full(study, lane)
        for name in _askable(study, lane)
    ]
    if not all(pace.is_out and not pace.asked for _, pace in asked):
        return None
    troubles = dict.fromkeys(f"{name}: {pace.trouble}" for name, pace in asked if pace.trouble)
    return Finish("; ".join(["no proposer has anything new to try", *troubles]))
