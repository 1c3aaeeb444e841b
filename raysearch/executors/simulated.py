"""Slots, proposers and a repository that need no machine: trials end by a virtual clock, with scores from a surrogate.

Everything that decides is the real thing. Nothing here trains, waits or writes; `simulate` puts it together.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from raysearch.asker import Answer, AnyAsker, Result, line_of
from raysearch.errors import UserError
from raysearch.executors import Report, RunEnded, SlotInfo, SlotJoined, SlotLeft
from raysearch.executors.surrogate import PATH, Surrogate, point_of, values_of
from raysearch.knobs import Values
from raysearch.model import Measurement, Outcome
from raysearch.patches import Empty, PatchError, is_converted, unified_diff, with_line_ends
from raysearch.proposers import Proposer, Request, Told
from raysearch.ratchet import GitError, Moved, Ratchet
from raysearch.runner import RunResult, RunSpec

STARTED_AT = 1_800_000_000.0  # Unix time at which simulations begin
STARTUP = 0.4  # of the seconds around training, those before it
UNEVEN = 0.02  # the seconds around training vary by this much
HALFWAY_NOISE = 1.5  # standard deviations of the metric, of what half-time adds to them; assumed
CONTENDED = 1.3  # times longer a step takes at most while somebody else works on the machine
PER_DOUBLING = 0.04  # val_bpb for a doubling of compute, about: what a slow slot loses


# ---- time ----


class VirtualClock:
    """Unix time that jumps from event to event.

    Args:
        now: Unix time in seconds.
    """

    def __init__(self, now: float = STARTED_AT) -> None:
        self.now = now
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def __call__(self) -> float:
        """The time now."""
        return self.now

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Calls `action` at a Unix time; at once when that has passed. Equal times keep their order."""
        heapq.heappush(self._events, (when, self._count, action))
        self._count += 1

    def advance(self, until: float = math.inf) -> bool:
        """Goes to the next event, and does all that is due then; False, and no step, if there is none until then."""
        if not self._events or self._events[0][0] > until:
            return False
        self.now = max(self.now, self._events[0][0])
        while self._events and self._events[0][0] <= self.now:
            heapq.heappop(self._events)[2]()
        return True


# ---- slots ----


@dataclass(frozen=True)
class SimulatedSlot:
    """One imagined GPU.

    Attributes:
        joins_at: Seconds after the simulation's start.
        leaves_at: Likewise; a run that is on it then is lost.
        drift: Added to every metric.
        slowness: How many times longer it takes for a step than others of its kind.
    """

    id: str
    surrogate: Surrogate
    joins_at: float = 0.0
    leaves_at: float = math.inf
    drift: float = 0.0
    slowness: float = 1.0


@dataclass(frozen=True)
class Faults:
    """What goes wrong beside what the program does.

    Attributes:
        crash_rate: Share of the programs that crash for a reason that their knobs do not show.
        loss_rate: Share of the runs that are lost with no fault of theirs.
        contended_rate: Share of the runs during which somebody else works on the machine.
        cold_start: Whether each slot's first run is such a one: the machine has just started.
    """

    crash_rate: float = 0.0
    loss_rate: float = 0.0
    contended_rate: float = 0.0
    cold_start: bool = False


class SimulatedExecutor:
    """Runs nothing: what a program scores is the surrogate's value, with noise, at the time a real run would end.

    The same seed and the same calls give the same results: all that is left to chance is drawn by what it is about.

    Args:
        clock: What `poll` moves on.
        slots: All that will ever join.
        seed: Of everything that is left to chance.
        paired: Share of the noise's variance that all programs have in common that run with one seed on a profile.
        faults: What goes wrong.
    """

    def __init__(
        self,
        clock: VirtualClock,
        slots: Iterable[SimulatedSlot],
        *,
        seed: int = 0,
        paired: float = 0.3,
        faults: Faults | None = None,
    ) -> None:
        self._clock = clock
        self._seed = seed
        self._paired = paired
        self._faults = faults or Faults()
        self._slots: dict[str, SimulatedSlot] = {}
        self._running: dict[str, RunSpec] = {}  # by slot
        self._since: dict[str, float] = {}  # when they started, by slot
        self._warm: set[str] = set()  # slots that had a run
        self._runs: list[tuple[float, float]] = []  # when those that have ended began and ended
        self._reports: list[Report] = []
        self._sound: dict[str, str] = {}  # each profile's first program, which has no hidden fault
        self.polls = 0
        for slot in slots:
            clock.at(clock.now + slot.joins_at, lambda slot=slot: self._join(slot))
            if slot.leaves_at < math.inf:
                clock.at(clock.now + slot.leaves_at, lambda slot=slot: self._leave(slot))

    def start(self, slot_id: str, spec: RunSpec) -> None:
        """Starts an attempt on a slot that is free.

        Raises:
            UserError: The slot is not there.
        """
        slot = self._slots.get(slot_id)
        if slot is None:
            raise UserError(f"slot {slot_id!r} is not there; take one that has joined")
        if slot_id in self._running:
            raise AssertionError(f"{slot_id} is busy with {self._running[slot_id].trial_id}")
        self._running[slot_id], self._since[slot_id] = spec, self._clock.now
        seconds, result = self._outcome(slot, spec)
        self._clock.at(self._clock.now + seconds, lambda: self._end(slot_id, spec, result))

    def poll(self, timeout_s: float) -> list[Report]:
        """What happened since the last call. If nothing did and the caller can wait, time goes on to the next event.

        The event may be somebody else's, a proposer's answer for instance: then there is nothing to report.
        """
        self.polls += 1
        self._clock.advance(self._clock.now)
        if not self._reports and timeout_s > 0 and not self._clock.advance():
            self._clock.now += timeout_s
        reports, self._reports = self._reports, []
        return reports

    def cancel(self, trial_id: str) -> None:
        """Ends an attempt in flight; its `RunEnded` says CANCELLED."""
        for slot_id, spec in list(self._running.items()):
            if spec.trial_id == trial_id:
                self._end(slot_id, spec, RunResult(Outcome.CANCELLED, "stopped by its slot"))

    def want(self, slots: Mapping[str, int]) -> None:
        """Its machines come and go by plan."""

    def starting(self) -> int:
        """No slot is being set up: each joins ready."""
        return 0

    def busy_s(self, until: float, *, since: float = 0.0) -> float:
        """Seconds of slots that runs took, together, from one Unix time to another that is not past."""
        runs = [*self._runs, *((self._since[slot_id], until) for slot_id in self._running)]
        return sum(max(0.0, ended - max(since, began)) for began, ended in runs)

    def close(self) -> None:
        """Ends all attempts in flight and gives the slots back."""
        self._running.clear()
        self._slots.clear()

    # ---- what happens ----

    def _join(self, slot: SimulatedSlot) -> None:
        self._slots[slot.id] = slot
        self._reports.append(SlotJoined(SlotInfo(slot.id, slot.surrogate.hardware, "", None, shares_disk=True)))

    def _leave(self, slot: SimulatedSlot) -> None:
        if self._slots.pop(slot.id, None) is None:
            return
        spec = self._running.get(slot.id)
        if spec is not None:
            self._end(slot.id, spec, RunResult(Outcome.LOST, "its slot left"))
        self._reports.append(SlotLeft(slot.id, "it was taken away"))

    def _end(self, slot_id: str, spec: RunSpec, result: RunResult) -> None:
        if self._running.get(slot_id) is spec:  # else it was ended before its time
            del self._running[slot_id]
            self._runs.append((self._since[slot_id], self._clock.now))
            self._reports.append(RunEnded(spec.trial_id, spec.attempt, result))

    # ---- what comes of a run ----

    def _outcome(self, slot: SimulatedSlot, spec: RunSpec) -> tuple[float, RunResult]:
        """How long an attempt takes, and how it ends."""
        card, text = slot.surrogate, spec.files[PATH]
        chance = random.Random(f"{self._seed} {spec.trial_id} {spec.attempt}")
        around_s = card.around_s * slot.slowness * chance.uniform(1 - UNEVEN, 1 + UNEVEN)
        startup_s = STARTUP * around_s
        if chance.random() < self._faults.loss_rate:
            return chance.uniform(0, around_s + card.budget_s), RunResult(Outcome.LOST, "its machine was restarted")
        if self._is_faulty(card.slug, text):
            return startup_s, RunResult(Outcome.CRASHED, "RuntimeError: a fault that its knobs do not show")
        values = values_of(text)
        failure = card.failure(values)
        if failure is not None:
            return startup_s, RunResult(*failure)
        true = card.value(values)
        value = true + slot.drift + PER_DOUBLING * math.log2(slot.slowness * self._contention(slot, spec))
        sigma = card.sigma_of(true)
        value += sigma * self._noise(card, spec.seed, text)
        halfway = value + card.halfway_gap + HALFWAY_NOISE * sigma * chance.gauss(0.0, 1.0)
        if spec.futile_above is not None and halfway > spec.futile_above:
            reason = f"{halfway:.4f} at half of the budget, above {spec.futile_above:.4f}"
            return startup_s + card.budget_s / 2, RunResult(Outcome.FUTILE, reason, halfway=halfway)
        measured = _measured(slot, values, value, startup_s, around_s)
        return measured.wall_s, RunResult(Outcome.MEASURED, "", measured, halfway=halfway)

    def _contention(self, slot: SimulatedSlot, spec: RunSpec) -> float:
        """How many times longer a step takes in this run for what else goes on there."""
        chance = random.Random(f"{self._seed} contention {spec.trial_id} {spec.attempt}")
        cold = self._faults.cold_start and slot.id not in self._warm
        self._warm.add(slot.id)
        return chance.uniform(1, CONTENDED) if chance.random() < self._faults.contended_rate or cold else 1.0

    def _is_faulty(self, slug: str, text: str) -> bool:
        if text == self._sound.setdefault(slug, text):
            return False
        return random.Random(f"{self._seed} {slug} {_digest(text)}").random() < self._faults.crash_rate

    def _noise(self, card: Surrogate, seed: int, text: str) -> float:
        """Of one run, in standard deviations."""
        common = random.Random(f"{self._seed} {card.slug} {seed}").gauss(0.0, 1.0)
        own = random.Random(f"{self._seed} {card.slug} {seed} {_digest(text)}").gauss(0.0, 1.0)
        return math.sqrt(self._paired) * common + math.sqrt(1 - self._paired) * own


@lru_cache(maxsize=65536)
def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _measured(slot: SimulatedSlot, values: Values, value: float, startup_s: float, around_s: float) -> Measurement:
    card, point = slot.surrogate, point_of(values)
    tokens_per_s = card.tokens_per_s(values) / slot.slowness
    return Measurement(
        value=value,
        wall_s=around_s + card.budget_s,
        training_s=card.budget_s,
        peak_vram_mb=card.vram_mb(values),
        parts_s={"start": startup_s, "train": card.budget_s, "eval": around_s - startup_s},
        facts={
            "tokens_per_s": tokens_per_s,
            "num_steps": float(round(tokens_per_s * card.budget_s / point["TOTAL_BATCH_SIZE"])),
            "total_tokens_M": tokens_per_s * card.budget_s / 1e6,
            "depth": point["DEPTH"],
        },
    )


# ---- proposers ----


class VirtualAsker(AnyAsker):
    """Asks one proposer at once, and hands its answers over when a slow one would have come to them.

    Args:
        proposer: Who is asked; called inline.
        clock: Of the simulation.
        latency_s: Mean of what an ask takes, drawn anew between half and one and a half of it. As many at once as the
            proposer works on, the others after them.
        hang_rate: Share of the asks that never give an answer.
        seed: Of the latencies.
    """

    def __init__(
        self,
        proposer: Proposer,
        clock: VirtualClock,
        *,
        latency_s: float = 0.0,
        hang_rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(proposer, clock)
        self._virtual = clock
        self._latency_s = latency_s
        self._hang_rate = hang_rate
        self._chance = random.Random(f"{seed} {proposer.name}")
        self._free_at = [clock.now] * proposer.parallel  # a heap
        self._waiting = 0
        self._ready: list[Callable[[], list[Answer]]] = []  # what is made of the answers that have come

    def in_flight(self) -> bool:
        """Whether an answer may come at any moment."""
        return self._waiting > 0

    def ask(self, request: Request) -> None:
        """Asks; the answers come by `answers`."""
        for part in self.parts(request):
            self._waiting += 1
            self._ask(part, self._result(part))

    def tell(self, told: Callable[[], Told]) -> None:
        """Tells how a program did, at once."""
        try:
            self.proposer.tell(told())
        except Exception as error:  # noqa: BLE001 - a proposer's own code may fail in any way
            self.standing.note(f"could not be told of a run: {line_of(error)}")

    def answers(self) -> list[Answer]:
        """What has come since the last call, and what is waited for no longer."""
        ready, self._ready = self._ready, []
        answers = [answer for came in ready for answer in came()]
        for answer in answers:
            ready_at = self.standing.ready_at(answer.request.profile)
            if ready_at > self._virtual.now:
                self._virtual.at(ready_at, _nothing)  # so that time stops there, and it is asked again
        return answers

    def close(self) -> None:
        """Waits for nothing."""
        self.proposer.close()

    def _result(self, request: Request) -> Result:
        try:
            return list(self.proposer.ask(request))
        except Exception as error:  # noqa: BLE001 - likewise
            return error

    def _ask(self, request: Request, result: Result) -> None:
        hangs = self._hang_rate > 0 and self._chance.random() < self._hang_rate
        seconds = math.inf if hangs else self._latency_s * self._chance.uniform(0.5, 1.5) if self._latency_s else 0.0
        if not seconds:
            self._ready.append(lambda: self._came(request, result, 0.0))
            return
        limit_s = self.proposer.limit_s
        began = max(heapq.heappop(self._free_at), self._virtual.now)
        heapq.heappush(self._free_at, began + min(seconds, limit_s))
        if seconds <= limit_s:
            self._at(began + seconds, lambda: self._came(request, result, seconds))
            return
        self._at(began + limit_s, lambda: self._gave_up(request))
        if not hangs:
            self._at(began + seconds, lambda: self.came_late(request, result, seconds))

    def _at(self, when: float, came: Callable[[], list[Answer]]) -> None:
        self._virtual.at(when, lambda: self._ready.append(came))

    def _came(self, request: Request, result: Result, seconds: float) -> list[Answer]:
        self._waiting -= 1
        return [self.came(request, result, seconds)]

    def _gave_up(self, request: Request) -> list[Answer]:
        self._waiting -= 1
        return [self.gave_up(request)]


def _nothing() -> None:
    """An event that only stops time."""


# ---- commits ----


@dataclass(frozen=True)
class _Commit:
    tree: str
    parents: tuple[str, ...]


class MemoryRatchet(Ratchet):
    """A `Ratchet` that keeps its commits in dictionaries; for one process, and gone with it.

    It takes what git takes with two exceptions: patches of files whose lines end in CRLF, and paths that git would
    refuse. Only a textual merge of two real changes calls git, which needs no repository for that.

    Args:
        path: Named in messages, and by git for its temporary files.
        files: The base program, which goes to `main`: text by path.
        message: Of the first commit.
        at: Unix time of the first commit.
    """

    def __init__(self, path: Path, files: Mapping[str, str], *, message: str = "The base program\n", at: float) -> None:
        super().__init__(path)
        self._trees: dict[str, Mapping[str, str]] = {}
        self._commits: dict[str, _Commit] = {}
        self._refs: dict[str, str] = {}
        self._refs["refs/heads/main"] = self._commit(self._tree(None, files), (), message=message, at=at)

    def commit_patch(self, base: str, patch: str, *, editable: Sequence[str], message: str, at: float) -> str:
        """Makes a commit on `base` with a unified diff applied.

        Raises:
            Empty: It changes nothing.
            PatchError: It does not apply, or touches what it may not.
        """
        base = self._full(base)
        before = self._contents(base)
        try:
            after = apply_patch(patch, before)
        except PatchError as error:
            raise type(error)(f"{error}; make it anew against commit {base[:12]}") from None
        changed = [path for path, text in after.items() if before.get(path) != text]
        if not changed:
            raise Empty(f"the patch changes nothing in commit {base[:12]}; drop it")
        outside = [path for path in changed if path not in editable]
        if outside:
            raise PatchError(f"the patch touches {outside[0]}; it may only touch {', '.join(editable) or 'nothing'}")
        return self._commit(self._tree(base, after), (base,), message=message, at=at)

    def step(self, profile_slug: str, *, expected: str, candidate_commit: str, message: str, at: float) -> str:
        """Moves a profile's branch forward by a commit with exactly the candidate's tree.

        Raises:
            Moved: The branch stands elsewhere.
            Empty: The candidate's tree is the branch's already.
        """
        stands = self.head(profile_slug)
        expected, candidate = self._full(expected), self._full(candidate_commit)
        tree = self._commits[candidate].tree
        if tree == self._commits[expected].tree:
            raise Empty(f"candidate {candidate[:12]} has the tree of {expected[:12]}; a step must change something")
        if stands is not None and self._commits[stands] == _Commit(tree, (expected, candidate)):
            return stands
        if stands != expected:
            raise Moved(f"ratchet/{profile_slug} stands at {stands and stands[:12]}, not at {expected[:12]}")
        commit = self._commit(tree, (expected, candidate), message=message, at=at)
        self._refs[f"refs/heads/ratchet/{profile_slug}"] = commit
        return commit

    def changed(self, a: str, b: str) -> list[str]:
        """The paths that differ between two commits, sorted."""
        one, other = self._contents(self._full(a)), self._contents(self._full(b))
        return sorted(path for path in {*one, *other} if one.get(path) != other.get(path))

    def parents(self, commit: str) -> list[str]:
        """The parents of a commit, the first one first."""
        return list(self._at(self._full(commit)).parents)

    # ---- what `Ratchet` asks git for ----

    def _at(self, commit: str) -> _Commit:
        if commit not in self._commits:
            raise GitError(f"commit {commit[:12]} is not in {self.path}; give one that was made there")
        return self._commits[commit]

    def _contents(self, name: str) -> Mapping[str, str]:
        """The texts of a commit or of a tree, by path."""
        known = self._trees.get(name)
        return known if known is not None else self._trees[self._at(name.removesuffix("^{tree}")).tree]

    def _tree(self, base: str | None, files: Mapping[str, str]) -> str:
        whole = {**(self._contents(base) if base is not None else {}), **files}
        told = "".join(f"{path}\0{whole[path]}\0" for path in sorted(whole))
        tree = hashlib.sha1(told.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()
        self._trees.setdefault(tree, whole)
        return tree

    def _commit(self, tree: str, parents: Sequence[str], *, message: str, at: float) -> str:
        told = "\0".join((tree, *parents, message, str(math.floor(at))))
        commit = hashlib.sha1(told.encode("utf-8", "replace"), usedforsecurity=False).hexdigest()
        self._commits[commit] = _Commit(tree, tuple(parents))
        return commit

    def _ref(self, ref: str) -> str | None:
        for name in (ref, f"refs/heads/{ref}"):
            if name in self._refs:
                return self._refs[name]
        if ref in self._commits:
            return ref
        short = [sha for sha in self._commits if sha.startswith(ref)] if _SHORT.fullmatch(ref) else []
        return short[0] if len(short) == 1 else None

    def _swap(self, ref: str, new: str, old: str) -> bool:
        stands = self._refs.get(ref)
        if (stands or "0" * 40) != old:
            return False
        self._at(new)
        self._refs[ref] = new
        return True

    def _blobs(self, commit: str, paths: Sequence[str]) -> dict[str, bytes | None]:
        texts = self._contents(commit)
        return {path: texts[path].encode() if path in texts else None for path in paths}

    def _diff(self, a: str, b: str) -> str:
        before, after = self._contents(a), self._contents(b)
        return "".join(unified_diff(path, before.get(path), after[path]) for path in sorted(after))

    def _merge_text(self, path: str, base: str, candidate: str, onto: str) -> str:
        if candidate in (base, onto):
            return onto
        if onto == base:
            return candidate
        self.path.mkdir(parents=True, exist_ok=True)  # git is started there
        return super()._merge_text(path, base, candidate, onto)


_SHORT = re.compile(r"[0-9a-f]{4,40}")
_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_REFUSED = re.compile(r"(?:deleted file|rename|copy|old|new|similarity|Binary|GIT binary)(?: |$)")


def apply_patch(patch: str, files: Mapping[str, str]) -> dict[str, str]:
    """Applies a unified diff: every context line must be there, as for `git apply`.

    Args:
        patch: As `git diff` or `unified_diff` writes it.
        files: Texts by path.

    Returns:
        The texts by path afterwards.

    Raises:
        Empty: There is nothing in the patch.
        PatchError: It does not apply, or does more than to change text.
    """
    if not patch.strip():
        raise Empty("the patch is empty")
    text = patch if patch.endswith("\n") else f"{patch}\n"
    lines = _LINES.findall(with_line_ends(text, crlf=False) if is_converted(text) else text)
    after, place = dict(files), 0
    hunks = 0
    while place < len(lines):
        line = lines[place]
        if line.startswith("--- ") and place + 1 < len(lines) and lines[place + 1].startswith("+++ "):
            path, old = _paths(line, lines[place + 1], after)
            place, changed = _apply_hunks(path, old, lines, place + 2)
            after[path], hunks = changed, hunks + 1
            continue
        if _REFUSED.match(line) and not line.startswith("new file mode 100644"):
            raise PatchError(f"the patch has {line.strip()!r}; a patch may only change text")
        place += 1
    if not hunks:
        raise PatchError("the patch has no change in it")
    return after


_LINES = re.compile(r"[^\n]*\n|[^\n]+")


def _paths(before: str, after: str, files: Mapping[str, str]) -> tuple[str, str]:
    """The path that two header lines name, and the text that is there."""
    names = [line[4:].rstrip("\n").partition("\t")[0] for line in (before, after)]
    if names[1] == "/dev/null":
        raise PatchError(f"the patch deletes {names[0].partition('/')[2]}; a patch may only change text")
    path = names[1].partition("/")[2]
    if names[0] == "/dev/null":
        if path in files:
            raise PatchError(f"{path} is there already")
        return path, ""
    if names[0].partition("/")[2] != path:
        raise PatchError(f"the patch renames {names[0]}; a patch may only change text")
    if path not in files:
        raise PatchError(f"{path} is not there")
    return path, files[path]


def _apply_hunks(path: str, old: str, lines: Sequence[str], place: int) -> tuple[int, str]:
    """Applies the hunks of one file; where the next file's begin, and the text."""
    rest, done, offset = _LINES.findall(old), list[str](), 0  # `done` replaces what stood before `rest`
    gone = 0
    while place < len(lines) and (match := _HUNK.match(lines[place])):
        place, wanted, put = _hunk(lines, place, match)
        start = int(match[1]) - (1 if wanted else 0) + offset - gone
        at = _find(rest, wanted, start)
        if at is None:
            raise PatchError(f"{path}:{match[1]}: the patch does not fit there")
        offset += at - start
        done += [*rest[:at], *put]
        rest = rest[at + len(wanted) :]
        gone += at + len(wanted)
    return place, "".join([*done, *rest])


def _hunk(lines: Sequence[str], place: int, match: re.Match[str]) -> tuple[int, list[str], list[str]]:
    """One hunk: the line after it, what it wants to find, and what it puts there."""
    left = [int(match[2] or 1), int(match[4] or 1)]
    sides: tuple[list[str], list[str]] = ([], [])
    place += 1
    last: list[list[str]] = []
    while place < len(lines) and (any(left) or lines[place].startswith("\\")):
        mark, text = lines[place][0], lines[place][1:]
        if mark == "\\":  # the line before has no newline
            for side in last:
                side[-1] = side[-1].removesuffix("\n")
        elif mark in " -+\n":
            last = [sides[i] for i in (0, 1) if mark != "+-"[i]]
            for i in (0, 1):
                if mark != "+-"[i]:
                    sides[i].append("\n" if mark == "\n" else text)
                    left[i] -= 1
        else:
            break
        place += 1
    if any(left):
        raise PatchError(f"the hunk {match[0]} has other lines than it says")
    return place, sides[0], sides[1]


def _find(lines: Sequence[str], wanted: Sequence[str], start: int) -> int | None:
    """Where the wanted lines are, as near to `start` as possible."""
    places = range(len(lines) - len(wanted) + 1)
    fitting = (at for at in places if lines[at : at + len(wanted)] == wanted)
    return min(fitting, key=lambda at: abs(at - start), default=None)
