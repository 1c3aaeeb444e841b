"""The only loop and the only clock: performs what `study` commands, and journals what comes of it.

The intent is in the journal before the effect, the outcome after it, and every effect can be repeated by its id; a
coordinator that was killed anywhere is started again and goes on. It decides nothing that `study` could decide.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from raysearch import __version__, directions, duplicates, joining, objective, plan
from raysearch.asker import Asking
from raysearch.brief import brief
from raysearch.config import StudyConfig, write_config
from raysearch.console import Console
from raysearch.errors import UserError
from raysearch.executors import Executor, Report, RunEnded, SlotFailed, SlotInfo, SlotJoined, SlotLeft, SlotProgress
from raysearch.folder import Folder
from raysearch.journal import Journal
from raysearch.knobs import fingerprint, size
from raysearch.model import (
    Directed,
    Dropped,
    Event,
    Judged,
    Materialised,
    Measurement,
    Operator,
    Outcome,
    Profile,
    ProfileAdded,
    Proposal,
    Proposed,
    Purpose,
    RatchetMoved,
    Record,
    Refused,
    SessionEnded,
    SessionStarted,
    SlotGauged,
    Trial,
    TrialFinished,
    TrialStarted,
    Verdict,
)
from raysearch.objective import Budget
from raysearch.patches import Conflict, Empty, PatchError
from raysearch.plan import Ask, Carry, Command, Conclude, Finish, Materialise, MoveRatchet, StartTrial, next_commands
from raysearch.profile import base_slug, same_profile, with_slug
from raysearch.programs import Programs
from raysearch.proposers import Idea, NoIdea, Request, Step, Told, inbox
from raysearch.proposers.prices import Purse
from raysearch.ratchet import GitError, Moved, Ratchet, step_message
from raysearch.runner import RunResult, RunSpec, read_result
from raysearch.schedule import Slot
from raysearch.study import CandidateState, Lane, Study, candidate_id
from raysearch.task import task
from raysearch.wording import clean

POLL_S = 0.25
POLL_WHILE_ASKING_S = 0.02
INBOX_EVERY_S = 1.0  # and the human's directions
SUBJECT_LENGTH = 72
LEAST_USD = 1e-9  # that is worth a line
STEPS = 30  # of other ratchets, the latest ones, that a proposer is shown
PROGRAMS = 500  # whose texts are kept at hand
REMEMBERED = 2000  # candidates of an earlier session among which near duplicates are looked for
NEAR = (Operator.TUNE, Operator.COMBINE, Operator.TRANSFER)  # what is refused when nearly the same was tried


@dataclass(frozen=True)
class Session:
    """Marks of this run of the coordinator.

    Attributes:
        study: Id of the study, by which its processes are found.
        id: Of this session, by which they are told from an earlier one's.
        deadline: Unix time after which nothing new is proposed; None for no limit.
        wanted: Slots to have a cluster start, by the slug of their hardware.
    """

    study: str
    id: str
    deadline: float | None = None
    wanted: Mapping[str, int] = field(default_factory=dict[str, int])


class Onlooker(Protocol):
    """Is told what happens beside the console (metrics, mirrors), and keeps nobody waiting."""

    def record(self, record: Record) -> None:
        """An event was applied to the study."""
        ...

    def refresh(self, now: float, slots: Sequence[Slot]) -> None:
        """A round of the loop is over: Unix time in seconds, and the slots that are there."""
        ...


class Coordinator:
    """Drives one study.

    Args:
        folder: Of the study.
        config: Of the study.
        study: Its state, replayed from the journal.
        journal: Opened for writing.
        repo: The study's git repository.
        executor: Where trials run.
        askers: Each asks one proposer.
        console: Shows what happens.
        session: Of this run.
        onlookers: Who else is told.
        purse: Of what proposers may cost in this session, its cap as the command line has it; what was spent in earlier
            ones is counted here. None where none costs anything.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        *,
        folder: Folder,
        config: StudyConfig,
        study: Study,
        journal: Journal,
        repo: Ratchet,
        executor: Executor,
        askers: Sequence[Asking],
        console: Console,
        session: Session,
        onlookers: Sequence[Onlooker] = (),
        purse: Purse | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._config = config
        self._objective = config.to_objective()
        self._study = study
        self._journal = journal
        self._repo = repo
        self._executor = executor
        self._askers = {asker.name: asker for asker in askers}
        self._console = console
        self._session = session
        self._onlookers = onlookers
        self._purse = purse if purse is not None else Purse(None)
        self._purse.count(study.spent_usd)
        self._max_usd = self._purse.limit_usd
        self._clock = clock
        self._tuned = objective.tuned_file(self._objective.editable)
        self._presets = objective.load_presets() if self._objective.has_presets else {}
        self._programs = Programs(folder.path, self._presets)
        self._slots: dict[str, SlotInfo] = {}
        self._profile_of: dict[str, str] = {}  # slot id -> profile slug
        self._progress: dict[str, SlotProgress] = {}
        self._wall_s: dict[str, float] = {}  # of the last measured trial, by profile
        self._failed_slots: list[str] = []
        self._places: list[Slot] | None = None  # made anew when a slot joins or leaves
        self._wanted: Mapping[str, int] = {}  # slots, as the executor was told
        self._inbox_at = 0.0
        self._said: set[str] = set()  # about a node, or about what the directions name that is not there
        self._texts: OrderedDict[str, Mapping[str, str]] = OrderedDict()
        self._known: dict[str, duplicates.Known] = {}
        self._draining = False
        self._stopping = False

    # ---- what the outside may do ----

    def interrupt(self) -> None:
        """Ctrl-C: once drains, twice stops."""
        self._draining, self._stopping = True, self._draining

    def stop(self) -> None:
        """Stops now; runs in flight are run again when the study is continued."""
        self._stopping = True

    def run(self) -> str:
        """Works until nothing is left to do; returns why it ended.

        Raises:
            UserError: No slot can be used, the study's folder can no longer be written, or its directions are not
                valid.
        """
        directed = self._programs.begin(self._study.directed)
        self._recover()
        self._record(SessionStarted(platform.node(), os.getpid(), __version__))
        self._direct(directed)
        self._obey()
        self._teach()
        try:
            reason = self._loop()
        finally:
            for asker in self._askers.values():
                asker.close()
                for line in asker.notes():
                    self._console.note(line)
            self._settle()
        return self._end(reason)

    def _loop(self) -> str:
        said_draining = False
        while not self._stopping:
            if self._draining and not said_draining:
                said_draining = True
                self._console.note("draining: the runs in flight end, nothing new starts; Ctrl-C again stops now")
            commands = self._next_commands()
            for command in commands:
                if isinstance(command, Finish):
                    return command.reason
                self._perform(command)
            asked = any(asker.in_flight() for asker in self._askers.values())
            self._wait(0.0 if commands else POLL_WHILE_ASKING_S if asked else POLL_S)
        return "stopped at once: runs in flight are run again when the study goes on"

    # ---- the loop's parts ----

    def _next_commands(self) -> list[Command]:
        accepting = self._session.deadline is None or self._clock() < self._session.deadline
        asking = {(slug, name): asker.pace(slug) for name, asker in self._askers.items() for slug in self._study.lanes}
        late = self._late()
        self._ask_for_slots(late, accepting=accepting and not self._draining)
        commands = next_commands(
            self._study,
            self._slots_by_profile(),
            asking=asking,
            accepting=accepting,
            late=late,
            draining=self._draining,
        )
        served = {self._profile_of[slot_id] for slot_id in self._slots}
        finish = None if commands else plan.out_of_ideas(self._study, served, asking, late=late)
        if finish:
            return [finish]
        if self._failed_slots and not self._slots and self._executor.starting() == 0:
            raise UserError(f"no slot can be used: {self._failed_slots[-1]}")
        return commands

    def _ask_for_slots(self, late: set[str], *, accepting: bool) -> None:
        """Has the cluster start what was wanted, as long as something new may be run there."""
        blocked = {slug for slug, lane in self._study.lanes.items() if lane.blocked}
        no_more = late | blocked if accepting else self._session.wanted.keys()
        wanted = {slug: count for slug, count in self._session.wanted.items() if slug not in no_more}
        if wanted != self._wanted:
            self._executor.want(wanted)
            self._wanted = wanted

    def _late(self) -> set[str]:
        """Profiles for which this session has had the hours that their directions give it."""
        hours = (self._clock() - self._study.sessions[-1].at) / 3600
        limits = {slug: self._study.directions(lane).budget.hours for slug, lane in self._study.lanes.items()}
        return {slug for slug, limit in limits.items() if limit is not None and hours >= limit}

    def _wait(self, timeout_s: float) -> None:
        for report in self._executor.poll(timeout_s):
            self._handle(report)
        for asker in self._askers.values():
            self._take_answers(asker)
        if self._clock() - self._inbox_at >= INBOX_EVERY_S:
            self._inbox_at = self._clock()
            self._take_directions()
            self._take_inbox()
        slots = self._slots_by_profile()
        self._console.refresh(self._clock(), slots=slots, progress=self._progress, draining=self._draining)
        for onlooker in self._onlookers:
            onlooker.refresh(self._clock(), slots)

    def _take_answers(self, asker: Asking) -> None:
        for answer in asker.answers():
            for idea in answer.ideas:
                seconds = answer.seconds / len(answer.ideas)
                if isinstance(idea, NoIdea):
                    self._drop_answer(idea, answer.request.profile, seconds)
                else:
                    self._propose(idea, answer.request.profile, answer.request.base, seconds)
        for line in asker.notes():
            self._console.note(line)

    def _slots_by_profile(self) -> list[Slot]:
        if self._places is None:
            self._places = [Slot(slot_id, self._profile_of[slot_id]) for slot_id in self._slots]
        return self._places

    def _record(self, event: Event) -> None:
        record = self._journal.append(event, seq=self._study.seq + 1, at=self._clock())
        self._study.apply(record)
        self._console.record(record)
        for onlooker in self._onlookers:
            onlooker.record(record)

    def _end(self, reason: str) -> str:
        self._record(SessionEnded(reason))
        return reason

    # ---- commands ----

    def _perform(self, command: Command) -> None:
        match command:
            case Materialise(proposal=proposal):
                self._materialise(proposal)
            case Conclude(event=event):
                self._record(event)
            case MoveRatchet():
                self._move(command)
            case Carry():
                self._carry(command)
            case StartTrial():
                self._start(command)
            case Ask():
                self._ask(command)
            case Finish():
                raise AssertionError("the loop ends on Finish")

    def _materialise(self, proposal: Proposal) -> None:
        lane = self._study.lane(proposal.profile)
        editable = self._objective.editable
        message = f"{_subject(proposal)}\n\nTrial: {proposal.id}\nProposer: {proposal.proposer}\n"
        try:
            commit = self._repo.commit_patch(
                proposal.base,
                proposal.patch,
                editable=editable,
                message=message,
                at=self._study.proposed_at[proposal.id],
            )
            files = self._repo.files(commit, editable)
            objective.check_program(files, self._objective)
            against = self._against(proposal, files)
        except GitError:
            raise  # the repository, not the patch
        except (PatchError, UserError) as error:
            self._record(Refused(proposal.id, str(error)))
            return
        if against is not None:
            self._record(Refused(proposal.id, against))
            return
        digest = fingerprint(files)
        same = lane.fingerprints.get(digest)
        if same is not None and same not in self._carried(proposal):  # what holds the new step already stays as it is
            self._record(Refused(proposal.id, f"the same program as {same}"))
            return
        near = self._near(lane, proposal, files)
        if near is not None:
            self._record(Refused(proposal.id, f"nearly the same program as {near}"))
            return
        self._repo.keep(proposal.id, commit)
        self._record(Materialised(proposal.id, commit, digest, size(files)))

    def _carried(self, proposal: Proposal) -> set[str]:
        """All candidates that a proposal carries, and those that they carried."""
        names = set(proposal.carries)
        return names.union(*(self._carried(self._study.candidate(name).candidate.proposal) for name in names))

    def _against(self, proposal: Proposal, files: Mapping[str, str]) -> str | None:
        """Which of the human's directions a proposal breaks; what was confirmed before they came stays a win."""
        wanted = self._study.directions(self._study.lane(proposal.profile))
        carried = [self._study.candidate(name) for name in proposal.carries]
        if not wanted.bars or (carried and all(state.verdict is Verdict.KEEP for state in carried)):
            return None
        is_own = all(inbox.is_from(root.source) for root in self._study.roots(proposal))
        return directions.refusal(
            wanted,
            before=self._files(proposal.base),
            after=files,
            operator=None if is_own else proposal.operator,
        )

    def _near(self, lane: Lane, proposal: Proposal, files: Mapping[str, str]) -> str | None:
        """A candidate, run or in line, whose knobs are all but equal; else the program is remembered."""
        slug = lane.profile.slug
        known = self._known.get(slug)
        if known is None:
            known = self._known[slug] = duplicates.Known()
            for name in lane_candidates(self._study, slug)[-REMEMBERED:]:
                commit = self._study.candidates[name].candidate.commit
                known.add(name, duplicates.signature(self._files(commit), self._tuned))
        signature = duplicates.signature(files, self._tuned)
        near = known.near(signature) if proposal.operator in NEAR and not proposal.carries else None
        if near is None:
            known.add(proposal.id, signature)
        return near

    def _files(self, commit: str) -> Mapping[str, str]:
        """The editable files of a commit, from memory where they were asked for lately."""
        if commit not in self._texts:
            self._texts[commit] = self._repo.files(commit, self._objective.editable)
            if len(self._texts) > PROGRAMS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(commit)
        return self._texts[commit]

    def _move(self, command: MoveRatchet) -> None:
        state = self._study.candidate(command.candidate.id)
        proposal = state.candidate.proposal
        value = self._study.value(proposal.id)
        assert value is not None
        assert state.delta is not None
        message = step_message(
            proposal.hypothesis,
            trial=proposal.id,
            profile=command.profile,
            metric=self._objective.metric,
            val=value,
            delta=state.delta,
            delta_se=state.delta_se,
            n=state.pairs,
            holdout=self._study.holdout(proposal.id),
            whole=self._study.whole(proposal.id),
            proposer=proposal.proposer,
            cost_usd=proposal.cost_usd,
        )
        try:
            commit = self._repo.step(
                command.profile,
                expected=command.expected,
                candidate_commit=command.candidate.commit,
                message=message,
                at=state.judged_at,
            )
        except Moved as error:
            raise UserError(
                f"{error}; a ratchet is moved by its study alone: set the branch back and start again"
            ) from None
        self._record(RatchetMoved(command.profile, proposal.id, commit, command.expected))
        for asker in self._askers.values():
            asker.retry(command.profile)

    def _carry(self, command: Carry) -> None:
        """Merges the changes onto the newer program, one after the other; what cannot be merged is dropped and said."""
        tip, carried = command.onto, list[Proposal]()
        for candidate in command.candidates:
            proposal = candidate.proposal
            try:
                patch = self._repo.carry(
                    candidate.commit, base=proposal.base, onto=tip, editable=self._objective.editable
                )
                tip = self._repo.commit_patch(
                    tip, patch, editable=self._objective.editable, message="A merge\n", at=self._study.last_at
                )
            except Empty:
                self._drop(candidate.id, f"its change is in {command.champion} already")
            except (Conflict, PatchError) as error:
                self._drop(candidate.id, f"it conflicts with {command.champion}: {error}", conflict=True)
            else:
                carried.append(proposal)
        if not carried:
            return
        first = carried[0]
        confirmed = self._study.candidate(first.id).verdict is Verdict.KEEP
        self._record(
            Proposed(
                Proposal(
                    id=candidate_id(self._study.proposals + 1),
                    profile=first.profile,
                    base=command.onto,
                    patch=self._repo.diff(command.onto, tip),
                    operator=Operator.COMBINE if confirmed else first.operator,
                    hypothesis=" + ".join(proposal.hypothesis for proposal in carried),
                    proposer=first.proposer,
                    predicted_delta=first.predicted_delta if len(carried) == 1 else None,
                    carries=tuple(proposal.id for proposal in carried),
                )
            )
        )

    def _drop(self, candidate: str, reason: str, *, conflict: bool = False) -> None:
        state = self._study.candidate(candidate)
        self._record(
            Judged(
                candidate,
                Verdict.DISCARD,
                reason,
                state.delta,
                state.delta_se,
                pairs=state.pairs,
                p_better=state.p_better,
                gain=state.gain,
                conflict=conflict,
            )
        )

    def _start(self, command: StartTrial) -> None:
        trial = command.trial
        lane = self._study.lane(trial.profile)
        preset = self._presets.get(lane.profile.preset)
        how = objective.plan_trial(
            self._objective,
            preset,
            self._budget(lane.profile.preset),
            device=lane.profile.device,
            threads=lane.profile.threads,
            holdout=trial.holdout,
            futile_above=trial.futile_above,
        )
        spec = RunSpec(
            trial_id=trial.id,
            attempt=command.attempt,
            study=self._session.study,
            session=self._session.id,
            files=self._repo.files(trial.commit, (*self._objective.editable, *self._objective.protected)),
            command=how.command,
            metric=self._objective.metric,
            seed=trial.seed,
            startup_limit_s=how.startup_limit_s,
            total_limit_s=how.total_limit_s,
            threads=lane.profile.threads,
            niceness=self._config.slots.niceness,
            out=str(self._folder.run(trial.id, command.attempt)),
            futile_above=trial.futile_above,
            waiting=how.waiting,
            withheld=self._config.key_names,
        )
        self._record(TrialStarted(trial, command.attempt, command.slot))
        try:
            self._executor.start(command.slot, spec)
        except UserError as error:  # the slot left a moment ago
            self._record(TrialFinished(trial.id, command.attempt, Outcome.LOST, str(error)))

    def _ask(self, command: Ask) -> None:
        lane, asker = self._study.lane(command.profile), self._askers[command.proposer]
        asker.ask(
            Request(
                profile=command.profile,
                base=command.base,
                files=self._files(command.base),
                count=command.count,
                known=frozenset(lane.fingerprints),
                direction=self._objective.direction,
                origin=self._files(self._study.candidate(lane.base).candidate.commit),
                elsewhere=self._elsewhere(lane),
                unmerged=[self._step_of(self._study.candidate(name)) for name in lane.unmerged[-STEPS:]],
                sources=frozenset(lane.sources),
                brief=brief(self._study, command.profile) if asker.wants_brief else None,
                task=task(self._objective, budget=lane.profile.budget),
                directions=self._study.directions(lane),
            )
        )

    def _elsewhere(self, lane: Lane) -> list[Step]:
        """The latest steps of the other ratchets."""
        others = [other for other in self._study.lanes.values() if other is not lane]
        found = [win for other in others for win in other.wins[-STEPS:]]
        # what came here from another profile reaches this one from there
        own = [win for win in found if not self._came_over(win.candidate)]
        wins = sorted((win.at, win.candidate) for win in own)
        return [self._step_of(self._study.candidate(name)) for _, name in wins[-STEPS:]]

    def _came_over(self, candidate: str) -> bool:
        proposal = self._study.candidate(candidate).candidate.proposal
        return all(root.operator is Operator.TRANSFER for root in self._study.roots(proposal))

    def _step_of(self, state: CandidateState) -> Step:
        proposal = state.candidate.proposal
        return Step(
            candidate=proposal.id,
            profile=proposal.profile,
            hypothesis=proposal.hypothesis,
            delta=state.delta or 0.0,
            before=self._files(proposal.base),
            after=self._files(state.candidate.commit),
        )

    def _propose(self, idea: Idea, profile: str, base: str, seconds: float) -> None:
        self._record(
            Proposed(
                Proposal(
                    id=candidate_id(self._study.proposals + 1),
                    profile=profile,
                    base=base,
                    patch=idea.patch,
                    operator=idea.operator,
                    hypothesis=idea.hypothesis,
                    proposer=idea.proposer,
                    predicted_delta=idea.predicted_delta,
                    cost_usd=idea.cost_usd,
                    proposal_s=round(seconds, 3),
                    source=idea.source,
                    model=idea.model,
                    tokens_in=idea.tokens_in,
                    tokens_out=idea.tokens_out,
                )
            )
        )

    def _settle(self) -> None:
        """Journals what was spent on answers that nobody waited for: a later session has to know."""
        unseen = self._purse.at_most_usd - self._study.spent_usd
        if unseen > LEAST_USD:
            slug = next(iter(self._study.lanes))
            self._record(Dropped(slug, "ended", "what was in flight when the session ended", cost_usd=unseen))

    def _cap(self) -> None:
        """Takes over what the directions say of money; whoever had spent all is asked again when it is more."""
        wanted = [limit for limit in (self._max_usd, self._study.max_usd()) if limit is not None]
        before, now = self._purse.limit_usd, min(wanted, default=None)
        self._purse.limit_usd = now
        if before is not None and (now is None or now > before):
            for asker in self._askers.values():
                asker.revive()

    def _drop_answer(self, answer: NoIdea, profile: str, seconds: float) -> None:
        self._record(
            Dropped(
                profile=profile,
                proposer=answer.proposer,
                reason=answer.reason,
                model=answer.model,
                cost_usd=answer.cost_usd,
                tokens_in=answer.tokens_in,
                tokens_out=answer.tokens_out,
                proposal_s=round(seconds, 3),
            )
        )

    def _take_directions(self) -> None:
        changed, notes = self._programs.news(self._study.directed)
        for note in notes:
            self._console.note(note)
        self._direct(changed)
        if changed:
            self._obey()

    def _direct(self, texts: Mapping[str, str]) -> None:
        for file, text in texts.items():
            self._record(Directed(file, text))

    def _obey(self) -> None:
        """Drops what waits for its first run and is against the directions, and ends the pauses of who is asked."""
        self._cap()
        for slug, lane in self._study.lanes.items():
            self._say_unknown_names(lane)
            for name in list(lane.line):
                candidate = self._study.candidate(name).candidate
                against = self._against(candidate.proposal, self._files(candidate.commit))
                if against is not None:
                    self._drop(name, against)
            for asker in self._askers.values():
                asker.retry(slug)

    def _say_unknown_names(self, lane: Lane) -> None:
        wanted = self._study.directions(lane)
        names = directions.unknown_names(wanted, self._files(lane.champion_commit))
        said = f"{', '.join(names)}, which the program of {lane.profile.slug} does not set"
        if names and said not in self._said:
            self._said.add(said)
            self._console.note(f"{wanted.where}: the directions name {said}; mend the name, or leave it out")

    def _take_inbox(self) -> None:
        items, bad = inbox.waiting(self._folder.inbox)
        for item in items:
            for slug in item.profiles:
                if slug in self._study.lanes:
                    self._propose(item.idea, slug, self._study.lanes[slug].champion_commit, 0.0)
                else:
                    self._console.note(f"inbox: {item.path.name} is for profile {slug!r}, which is not in the study")
            inbox.take(item.path)
        for path, reason in bad:
            self._console.note(f"inbox: {path.name} is no proposal ({reason}); drop patches with `raysearch propose`")
            inbox.take(path)

    # ---- reports ----

    def _handle(self, report: Report) -> None:
        match report:
            case SlotJoined(slot=slot):
                self._join(slot)
            case SlotLeft(slot_id=slot_id, reason=reason):
                self._slots.pop(slot_id, None)
                self._places = None
                self._progress.pop(slot_id, None)
                self._console.note(f"slot {slot_id} left: {reason}")
            case SlotFailed(place=place, reason=reason):
                self._failed_slots.append(f"{place}: {reason}")
                self._console.note(f"slot {place} cannot be used: {reason}")
            case SlotProgress(slot_id=slot_id):
                self._progress[slot_id] = dataclasses.replace(report, seconds_left=self._seconds_left(slot_id))
            case RunEnded(trial_id=trial_id, attempt=attempt, result=result):
                self._ended(trial_id, attempt, result)

    def _seconds_left(self, slot_id: str) -> float | None:
        """Until the trial on a slot ends, going by the last one of its profile."""
        state = next((state for state in self._study.running.values() if state.slot == slot_id), None)
        wall_s = self._wall_s.get(self._profile_of[slot_id])
        return max(0.0, wall_s - (self._clock() - state.started_at)) if state and wall_s else None

    def _join(self, slot: SlotInfo) -> None:
        found = self._profile(slot)
        known = next((lane for lane in self._study.lanes.values() if same_profile(lane.profile, found)), None)
        if known is None:
            self._add_profile(with_slug(found, base_slug(slot.hardware), self._study.lanes))
            known = next(lane for lane in self._study.lanes.values() if same_profile(lane.profile, found))
        self._settle_data(slot)
        self._slots[slot.id] = slot
        self._profile_of[slot.id] = known.profile.slug
        self._places = None
        self._console.note(f"slot {slot.id} joined as {known.profile.slug}: {joining.described(slot)}")
        mislabelled = joining.mislabelled(slot)
        if mislabelled and mislabelled not in self._said:  # each slot of the node would say it
            self._said.add(mislabelled)
            self._console.note(mislabelled)
        if slot.speed:
            self._record(SlotGauged(slot.id, known.profile.slug, slot.speed.matmul_tflops, slot.speed.copy_gb_per_s))

    def _settle_data(self, slot: SlotInfo) -> None:
        """Writes down what data a preset has, so that a later session takes the same."""
        if not slot.data:
            return
        datasets = self._config.datasets | {slot.preset: slot.data.dataset}
        manifests = self._config.manifests | {slot.preset: slot.data.manifest_sha256}
        if (datasets, manifests) != (self._config.datasets, self._config.manifests):
            self._config = self._config.model_copy(update={"datasets": datasets, "manifests": manifests})
            write_config(self._folder.config, self._config)

    def _profile(self, slot: SlotInfo) -> Profile:
        hardware, preset = slot.hardware, self._presets.get(slot.preset)
        software = {"torch": hardware.torch, "driver": hardware.driver, "capability": hardware.capability}
        data, evaluation = "", ""
        if slot.data and preset:
            data = f"{slot.data.dataset}-v{preset.vocab_size}-t{preset.row_tokens} {slot.data.manifest_sha256[:12]}"
            evaluation = f"{slot.data.evaluation_version}-{objective.evaluation_sizes(preset)}"
        return Profile(
            slug="",
            device=hardware.device,
            hardware=hardware.name,
            memory_mb=hardware.memory_mb,
            cores=hardware.cores if hardware.device == "cpu" else 0,
            software={name: version for name, version in software.items() if version},
            preset=slot.preset,
            budget=str(self._budget(slot.preset)),
            data=data,
            evaluation=evaluation,
            threads=self._config.slots.threads if hardware.device == "cpu" else 0,
        )

    def _budget(self, preset: str) -> Budget:
        section = self._config.budget
        if section.tokens is not None:
            return Budget(tokens=section.tokens)
        if section.seconds is not None:
            return Budget(seconds=section.seconds)
        return Budget(seconds=self._presets[preset].budget_s if preset else self._objective.timeout_s)

    def _add_profile(self, profile: Profile) -> None:
        base = self._repo.resolve("main")
        files = self._repo.files(base, self._objective.editable)
        commit = base
        preset = self._presets.get(profile.preset)
        if preset is not None:
            path = objective.TRAIN_FILE
            files = {**files, path: objective.base_program(files[path], preset)}
            started = self._study.started_at or self._clock()
            message = f"Preset {preset.name}, for {profile.hardware}\n"
            commit = self._repo.commit_files(base, files, message=message, at=started)
        self._repo.start(profile.slug, commit)
        self._record(ProfileAdded(profile, commit, fingerprint(files), size(files)))
        if preset is not None:
            self._programs.add(preset.name, objective.preset_directions(preset.name))
        self._take_directions()
        self._cap()
        self._say_unknown_names(self._study.lanes[profile.slug])

    def _ended(self, trial_id: str, attempt: int, result: RunResult) -> None:
        state = self._study.running.get(trial_id)
        if state is None or state.attempt != attempt:
            self._console.note(f"a result of {trial_id}, attempt {attempt}, came too late and is left out")
            return
        self._progress.pop(state.slot, None)
        for name, content in result.files.items():
            target = self._folder.run(trial_id, attempt) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        self._record(_finished(trial_id, attempt, result))
        if result.measurement:
            self._wall_s[state.trial.profile] = result.measurement.wall_s
        self._tell(state.trial, result.outcome, result.measurement)

    def _tell(self, trial: Trial, outcome: Outcome, measurement: Measurement | None) -> None:
        """Lets the proposers learn from a run; those of races are marked, since they would count a program twice."""
        if outcome.is_infrastructure:
            return
        value = measurement.value if measurement else None
        is_replicate = trial.purpose not in (Purpose.SCREEN, Purpose.BASELINE)
        repo, editable = self._repo, self._objective.editable
        # read by the first of the proposers' threads that comes to it, once for all of them
        told = functools.cache(
            lambda: Told(trial.profile, repo.files(trial.commit, editable), outcome, value, trial.id, is_replicate)
        )
        for asker in self._askers.values():
            asker.tell(told)

    # ---- after a restart ----

    def _recover(self) -> None:
        """Takes in results that a killed coordinator did not come to journal."""
        for trial_id, state in list(self._study.running.items()):
            out = self._folder.run(trial_id, state.attempt)
            result = read_result(out, metric=self._objective.metric, attempt=state.attempt)
            if result is not None and not result.outcome.is_infrastructure:
                self._record(_finished(trial_id, state.attempt, result))

    def _teach(self) -> None:
        for state in self._study.trials.values():
            if state.outcome is not None:
                self._tell(state.trial, state.outcome, state.measurement)


def _finished(trial_id: str, attempt: int, result: RunResult) -> TrialFinished:
    return TrialFinished(
        trial_id,
        attempt,
        result.outcome,
        result.reason,
        result.measurement,
        log_tail=result.log_tail,
        halfway=result.halfway,
    )


def lane_candidates(study: Study, profile: str) -> list[str]:
    """Ids of a profile's candidates, oldest first."""
    return [name for name, state in study.candidates.items() if state.candidate.profile == profile]


def _subject(proposal: Proposal) -> str:
    """First line of a commit's message."""
    return clean(proposal.hypothesis, SUBJECT_LENGTH) or proposal.operator.value
