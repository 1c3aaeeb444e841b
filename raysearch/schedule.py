"""Which trial goes to which free slot: pure. It starts nothing and knows no Ray.

The order of a profile's work: what was lost and is still wanted, baselines, races, a little repetition for the noise,
first runs in the order of the bandit; and when slots would idle, further pairs of races ahead of their time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from raysearch import bandit, futility, judge
from raysearch.bandit import Arm
from raysearch.model import Operator, Outcome, Purpose, Trial
from raysearch.study import (
    REFERENCE_SEEDS,
    SCREEN_SEEDS,
    CandidateState,
    Lane,
    Study,
    TrialState,
    baseline_id,
    candidate_number,
    race_id,
    reference_id,
    screen_id,
)

FRESH_TRIALS = 8.0  # durations of a trial after which a reference run is too old for a new pair
LOOK_BACK = 12  # of a program's fresh runs, the latest ones, that are looked at for a pair
LOST_TOUCH = 8  # hopeless first runs in a row after which the champion is run again
WANTED_DOF = 8.0  # of the champion's noise; the fewer it has, the sooner the champion is run again
NEW_TRIALS = 30  # of a profile, before which the bandit has nothing to go by
PATIENCE = 8  # first runs on a promising candidate that come to nothing, after which it is raced
SPARE_PAIRS = 2  # pairs beyond the cap, in place of those whose other side failed


@dataclass(frozen=True)
class Slot:
    """A place for one trial at a time, as the schedule sees it."""

    id: str
    profile: str


def assign(study: Study, lane: Lane, free: Sequence[Slot]) -> list[tuple[Trial, Slot]]:
    """Gives the profile's free slots a trial each, in the order of its work, as long as there is any."""
    if not free or lane.blocked:
        return []
    return list(zip(_once(_queue(study, lane)), free, strict=False))


def queued(study: Study) -> dict[str, list[Trial]]:
    """Trials that wait for a slot, by profile, in the order in which they would get one, without what idles allow."""
    return {
        slug: [] if lane.blocked else list(_once(_queue(study, lane, ahead=False)))
        for slug, lane in study.lanes.items()
    }


def queue_length(study: Study, lane: Lane) -> int:
    """How many trials wait for a slot, first runs whose change has to be carried first included."""
    return 0 if lane.blocked else len(lane.line) + sum(1 for _ in _once(_urgent(study, lane)))


def _once(trials: Iterator[Trial]) -> Iterator[Trial]:
    """Each trial once: races share the runs of what they are compared with."""
    seen: set[str] = set()
    for trial in trials:
        if trial.id not in seen:
            seen.add(trial.id)
            yield trial


def _queue(study: Study, lane: Lane, *, ahead: bool = True) -> Iterator[Trial]:
    yield from _urgent(study, lane)
    yield from _screens(study, lane)
    if ahead and study.baseline_done(lane):
        yield from _races(study, lane, ahead=True)


def _urgent(study: Study, lane: Lane) -> Iterator[Trial]:
    for name in lane.again:
        if _wanted(study, lane, study.trials[name].trial):
            yield study.trials[name].trial
    if not study.baseline_done(lane):
        yield from _baselines(study, lane)
        return
    yield from _races(study, lane, ahead=False)
    yield from _repeats(study, lane)


def _wanted(study: Study, lane: Lane, trial: Trial) -> bool:
    """Whether a trial that was lost is still of use."""
    if trial.purpose is Purpose.SCREEN:
        return trial.candidate in lane.open
    if trial.purpose is Purpose.BASELINE and not study.baseline_done(lane):
        return True
    if trial.purpose is not Purpose.RACE and trial.candidate == lane.champion:
        return True
    return is_awaited(study, lane, trial)


def is_awaited(study: Study, lane: Lane, trial: Trial) -> bool:
    """Whether a run is a side of a pair in a race that goes on; a candidate's own run may be another's other side."""
    own = (trial.id,) if trial.purpose is Purpose.RACE else ()
    return any(study.trials[race].trial.candidate in lane.racing for race in (*own, *lane.rivals.get(trial.id, ())))


def _baselines(study: Study, lane: Lane) -> Iterator[Trial]:
    commit = study.candidates[lane.base].candidate.commit
    for number in range(1, study.settings.baseline_runs + 1):
        name = baseline_id(lane.base, number)
        if name not in study.trials:
            yield Trial(name, lane.base, lane.profile.slug, commit, Purpose.BASELINE, seed=number, holdout=number == 1)


def _races(study: Study, lane: Lane, *, ahead: bool) -> Iterator[Trial]:
    """The runs that races need now, the other side of each pair first; with `ahead`, up to the cap on pairs."""
    if not study.baseline_done(lane):
        return
    cap = study.settings.rules.max_pairs
    covered = covered_links(study, lane)
    planned: dict[str, list[Trial]] = {}
    seeds: dict[str, set[int]] = {}
    more = dict.fromkeys(lane.racing, 0)  # pairs that were planned here
    # what is run ahead is planned on top of what is needed: a program may be raced and be another's other side at once
    for further in (False, True) if ahead else (False,):
        for name in lane.racing:
            state = study.candidates[name]
            base = study.opponent(state)
            if not state.races and not study.lives(lane, state.base):
                continue  # it is carried instead, and raced there
            if name in covered or (not further and waits(study, lane, state)):
                continue
            for run in state.races:
                rival = study.trials[run].trial.rival
                if rival is not None and rival not in study.trials:
                    yield _reference(lane, base, rival)
            good = sum(not is_spoilt(study, study.trials[run]) for run in state.races)
            known = study.judge(lane, base.id)
            if known is None:
                return
            wanted = cap if further else known.wanted_pairs(study.whole_gain(lane, state), state.pairs)
            while good + more[name] < wanted and len(state.races) + more[name] < cap + SPARE_PAIRS:
                for program in (name, base.id):
                    if program not in seeds:
                        seeds[program] = _seeds(study, lane, program)
                theirs = _other_side(study, lane, base, seeds, but=seeds[name], planned=planned.setdefault(base.id, []))
                seeds[base.id].add(theirs.seed)
                seeds[name].add(theirs.seed)
                more[name] += 1
                if theirs.id not in study.trials:
                    yield theirs
                yield _race(state, theirs, len(state.races) + more[name])


def covered_links(study: Study, lane: Lane, *, begun: bool = False) -> set[str]:
    """Candidates that are raced with another one that was built on them; with `begun`, where that race has begun."""
    tips = (study.candidates[name] for name in lane.racing)
    return {link.id for tip in tips if tip.races or not begun for link in study.links(tip)}


def waits(study: Study, lane: Lane, state: CandidateState) -> bool:
    """Whether a promising candidate is built on further before it is raced: together several changes take fewer pairs.

    It is raced once a single pair may show what it and its links are worth, or when nothing built on it looks good.
    """
    if state.races or not study.settings.frontier or state.candidate.proposal.carries:
        return False
    if state.fruitless >= PATIENCE or (state.p_better or 0.0) < study.settings.rules.frontier_probability:
        return False
    known = study.judge(lane, study.opponent(state).id)
    return known is not None and study.whole_gain(lane, state) < known.paired.sigma


def _race(state: CandidateState, theirs: Trial, pair: int) -> Trial:
    return Trial(
        race_id(state.id, pair),
        state.id,
        theirs.profile,
        state.candidate.commit,
        Purpose.RACE,
        theirs.seed,
        rival=theirs.id,
        pair=pair,
        holdout=pair == 1,
    )


def is_spoilt(study: Study, run: TrialState) -> bool:
    """Whether the other side of a pair failed, so that it is no pair."""
    theirs = study.trials.get(run.trial.rival or "")
    return theirs is not None and theirs.outcome is not None and theirs.value is None


def _other_side(
    study: Study, lane: Lane, base: CandidateState, seeds: dict[str, set[int]], *, but: set[int], planned: list[Trial]
) -> Trial:
    """A run of the base for one more pair: one that is recent, in flight or planned, else a new one.

    None that was the first on its slot: the candidate's own has better conditions than that.

    Races of several candidates share them: each pair still has its own seed, and is two runs of about the same time.

    Args:
        study: Its state.
        lane: The profile's.
        base: What the candidate was built on.
        seeds: Of the fresh runs of programs, what is planned included.
        but: Seeds that the candidate has had: a program that ran twice with one seed would know too little noise.
        planned: Runs of the base that are new; one more may be added.
    """
    oldest = study.last_at - FRESH_TRIALS * (lane.wall_s or 0.0)
    runs = lane.fresh_runs.get(base.id, [])
    for name in reversed(runs[-LOOK_BACK:]):
        run = study.trials[name]
        recent = run.finished_at is None or run.finished_at >= oldest
        if run.trial.seed not in but and run.outcome in (None, Outcome.MEASURED) and recent and not run.cold:
            return run.trial
    for trial in planned:
        if trial.seed not in but:
            return trial
    planned.append(_new_reference(lane, base, seeds[base.id] | but))
    return planned[-1]


def _seeds(study: Study, lane: Lane, program: str) -> set[int]:
    return {study.trials[name].trial.seed for name in lane.fresh_runs.get(program, ())}


def _new_reference(lane: Lane, base: CandidateState, seeds: set[int]) -> Trial:
    number = next(number for number in count(1) if REFERENCE_SEEDS + number not in seeds)
    return _reference(lane, base, reference_id(base.id, number))


def _reference(lane: Lane, base: CandidateState, name: str) -> Trial:
    seed = REFERENCE_SEEDS + int(name.rpartition("reference")[2])
    return Trial(name, base.id, lane.profile.slug, base.candidate.commit, Purpose.REFERENCE, seed)


def _repeats(study: Study, lane: Lane) -> Iterator[Trial]:
    """A run of the champion now and then: for σ, for its value, and for the slots' health; races use it as well."""
    noise = study.noise(lane)
    share = study.settings.noise_share * max(1.0, WANTED_DOF / noise.dof if noise else 1.0)
    if study.settings.rules.greedy or not lane.line or not (_is_due(lane, share) or _is_alone(study, lane)):
        return
    champion = study.candidates[lane.champion]
    yield _new_reference(lane, champion, _seeds(study, lane, champion.id))


def _is_alone(study: Study, lane: Lane) -> bool:
    """Whether no other run of the champion agrees with its latest one: either it is spoilt, or the machine differs."""
    values, noise = lane.fresh.values(lane.champion), study.noise(lane)
    if noise is None or len(values) < 2 or judge.backed(values, noise.sigma)[-1]:
        return False
    last = study.trials[lane.fresh_runs[lane.champion][-1]]  # another is on its way
    return last.outcome is not None


def _is_due(lane: Lane, share: float) -> bool:
    """Whether the champion was not run for so long, or whether nothing looks any good since: the machine may differ."""
    since = lane.started - lane.repeated_at
    return share > 0 and (since * share >= 1 or lane.hopeless >= since >= LOST_TOUCH)


def _screens(study: Study, lane: Lane) -> Iterator[Trial]:
    """First runs, the arm that the bandit names first.

    Before all others come a person's proposals; then, on a profile that has hardly begun, what won on other cards.
    """
    lines = _lines(study, lane)
    first = [arm for arm in lines if arm.proposer not in study.settings.proposers]
    if lane.started < NEW_TRIALS:
        first += [arm for arm in lines if arm.operator is Operator.TRANSFER and arm not in first]
    for arm in first:
        for name in lines.pop(arm):
            yield _screen(study, lane, study.candidates[name])
    draw = chance(study.settings.seed, lane.started)
    places = dict.fromkeys(lines, 0)
    while lines:
        arm = bandit.order(lane.tallies, list(lines), draw)[0] if len(lines) > 1 else next(iter(lines))
        names, place = lines[arm], places[arm]
        places[arm] += 1
        if place + 1 >= len(names):
            del lines[arm]
        yield _screen(study, lane, study.candidates[names[place]])


def _lines(study: Study, lane: Lane) -> dict[Arm, list[str]]:
    """The candidates that may have their first run, by arm, oldest first."""
    lines: dict[Arm, list[str]] = {}
    for name in lane.line:
        state = study.candidates[name]
        if study.lives(lane, state.base):
            proposal = state.candidate.proposal
            lines.setdefault(Arm(proposal.proposer, proposal.operator), []).append(name)
    return lines


def _screen(study: Study, lane: Lane, state: CandidateState) -> Trial:
    number = candidate_number(state.id)
    trial = Trial(
        screen_id(state.id),
        state.id,
        lane.profile.slug,
        state.candidate.commit,
        Purpose.SCREEN,
        seed=SCREEN_SEEDS + number,
    )
    noise = study.noise(lane, state.base)
    rules = study.settings.rules
    if rules.greedy or not study.settings.futility or noise is None or futility.spared(state.id):
        return trial
    half = lane.halves.mean(state.base)
    return replace(trial, futile_above=lane.futility.bound(half, noise.sigma))


def chance(seed: int, place: int) -> Callable[[], float]:
    """Numbers that are uniform in [0, 1) and the same for the same state (SplitMix64: Steele et al., OOPSLA 2014)."""
    state = (seed * 0x9E3779B97F4A7C15 + place * 0xD1342543DE82EF95) & 0xFFFFFFFFFFFFFFFF

    def draw() -> float:
        nonlocal state
        state = (state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return ((mixed ^ (mixed >> 31)) >> 11) / 2**53

    return draw
