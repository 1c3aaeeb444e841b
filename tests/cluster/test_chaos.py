"""A long study under random faults: everything that can be killed is, again and again, and nothing is lost.

`RAYSEARCH_CHAOS_S` says for how long (three minutes if it does not), `RAYSEARCH_TEST_SEED` repeats a run's faults.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import psutil
import pytest
from faulty import LIMIT_S, Cluster, wait
from hosts import Host, bed, named
from session_kit import Session

from raysearch.model import Outcome, TrialFinished

pytestmark = [pytest.mark.cluster]

CHAOS_S = float(os.environ.get("RAYSEARCH_CHAOS_S") or 180)
BETWEEN_S = (5.0, 15.0)
TRIAL_S = 0.4
KINDS = {"alpha": ("Toy Alpha", True), "beta": ("Toy Beta", False)}


@dataclass
class Chaos:
    """Breaks one thing after another, whatever is still broken, and puts back what does not come back by itself."""

    cluster: Cluster
    dice: random.Random
    done: list[tuple[float, str, str]] = field(default_factory=list[tuple[float, str, str]])  # Unix time, fault, host
    later: list[tuple[float, Callable[[], None]]] = field(default_factory=list[tuple[float, Callable[[], None]]])

    def __post_init__(self) -> None:
        self.session = self.search()

    def search(self) -> Session:
        return self.cluster.search("--hours", "24")

    def run(self, limit_s: float) -> None:
        faults = [
            *(self.training_process, self.daemon, self.supervisor, self.slot, self.raylet, self.power),
            *(self.cable, self.freeze, self.coordinator, self.head, self.disk, self.notice),
        ]
        wait(self.cluster.outcomes)  # it has begun
        ends_at, bag = time.time() + limit_s, list[Callable[[str], None]]()
        next_at = time.time()
        while time.time() < ends_at:
            self.mend()
            time.sleep(0.2)
            if time.time() < next_at:
                continue
            if not bag:  # each kind once, in an order of its own, then again
                bag = self.dice.sample(faults, len(faults))
            fault, name = bag.pop(), self.dice.choice(list(KINDS))
            next_at = time.time() + self.dice.uniform(*BETWEEN_S)
            if name in self.cluster.bed.hosts:
                self.done.append((time.time(), fault.__name__, name))
                print(f"{fault.__name__} {name}", flush=True)
                fault(name)

    def rest(self) -> None:
        """Lets everything come back."""
        wait(lambda: self.mend() or not self.later)
        at = len(self.cluster.events())
        try:
            wait(lambda: self.mend() or len(self.measured(at)) == len(KINDS))
        except AssertionError:
            print(self.cluster.bed.nodes(), self.cluster.bed.hosts, self.measured(at), self.session.said()[-5000:])
            raise

    def measured(self, at: int) -> dict[str, float]:
        """When each profile had its first result since an event."""
        events = self.cluster.events()[at:]
        trials = self.cluster.study("quick").replayed().trials  # read later, so it knows them all
        found: dict[str, float] = {}
        for record in events:
            event = record.event
            if isinstance(event, TrialFinished) and event.outcome is Outcome.MEASURED:
                found.setdefault(trials[event.trial_id].trial.profile, record.at)
        return found

    def recovery_s(self) -> list[float]:
        """From each fault to the next result of a run that began after it, of the same profile."""
        study = self.cluster.study("quick").replayed()
        slugs = {lane.profile.hardware: slug for slug, lane in study.lanes.items()}
        runs = sorted(
            (state.finished_at, state.started_at, state.trial.profile)
            for state in study.trials.values()
            if state.outcome is Outcome.MEASURED and state.finished_at is not None
        )
        found: list[float] = []
        for at, _, name in self.done:
            slug = slugs[KINDS[name][0]]
            ends_at = next((end for end, start, profile in runs if profile == slug and start > at), None)
            found += [ends_at - at] if ends_at else []
        return found

    def mend(self) -> None:
        """What a person or an autoscaler does: a new machine for one that is gone, Ray again, the study again."""
        due = [entry for entry in self.later if entry[0] <= time.time()]
        for entry in due:
            self.later.remove(entry)
            entry[1]()
        code = self.session.process.poll()
        if not self.cluster.bed.head_processes("ray.scripts.scripts") and code is not None:
            self.cluster.bed.revive_head()
        if code is not None:
            assert code in (2, -signal.SIGKILL), self.session.said()
            assert "Traceback" not in self.session.said(), self.session.said()
            self.session = self.search()
        self.cluster.bed.see_to_ray()
        for name, (cpu, sees) in KINDS.items():
            if name not in self.cluster.bed.hosts:
                self.cluster.bed.add(name, cpu=cpu, sees_study=sees)

    def after(self, seconds: float, undo: Callable[[], None]) -> None:
        self.later.append((time.time() + seconds, undo))

    # ---- what breaks; `name` is of the host ----

    def training_process(self, name: str) -> None:
        self.kill_one([process for tree in self.cluster.trees(name).values() for process in tree], "score.py")

    def daemon(self, name: str) -> None:
        self.kill_one([process for tree in self.cluster.trees(name).values() for process in tree], "sleep")

    def supervisor(self, name: str) -> None:
        self.kill_one(self.cluster.bed.hosts[name].processes(), "supervisor.py")

    def slot(self, name: str) -> None:
        self.kill_one(self.cluster.bed.hosts[name].processes(), "ray::Slot")

    def raylet(self, name: str) -> None:
        number = self.dice.choice([signal.SIGKILL, signal.SIGTERM])
        for raylet in self.cluster.bed.hosts[name].raylets():
            with contextlib.suppress(psutil.Error):
                raylet.send_signal(number)

    def power(self, name: str) -> None:
        self.cluster.bed.power_off(name)

    def cable(self, name: str) -> None:
        host = self.cluster.bed.hosts[name]
        self.cluster.bed.unplug(host)
        self.after(self.dice.choice([1.0, 3.0, 30.0]), lambda: self.put_back(host, self.cluster.bed.plug))

    def freeze(self, name: str) -> None:
        host = self.cluster.bed.hosts[name]
        host.freeze()
        self.after(self.dice.choice([1.0, 3.0, 30.0]), lambda: self.put_back(host, Host.thaw))

    def put_back(self, host: Host, undo: Callable[[Host], None]) -> None:
        if self.cluster.bed.hosts.get(host.name) is host:
            undo(host)

    def coordinator(self, _name: str) -> None:
        self.session.process.kill()
        self.session.process.wait()

    def head(self, _name: str) -> None:
        for process in self.cluster.bed.head_processes("gcs_server"):
            process.kill()

    def disk(self, name: str) -> None:
        rest = self.cluster.bed.hosts[name].disk / "rest"
        with contextlib.suppress(OSError), rest.open("wb") as file:
            while True:
                file.write(bytes(2**20))
        self.after(self.dice.uniform(1.0, 10.0), lambda: rest.unlink(missing_ok=True))

    def notice(self, name: str) -> None:
        host = self.cluster.bed.hosts[name]
        with contextlib.suppress(KeyError, AssertionError):  # it is no node at this moment, or there is no head
            self.cluster.bed.drain(host, deadline_s=3)
        self.after(3.0, lambda: self.put_back(host, lambda host: self.cluster.bed.power_off(host.name)))

    def kill_one(self, processes: list[psutil.Process], part: str) -> None:
        found = named(processes, part)
        if found:
            with contextlib.suppress(psutil.Error):
                self.dice.choice(found).kill()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with bed() as machines:
        found = Cluster(machines.path / "shared", [], bed=machines)
        found.write(seconds=TRIAL_S)
        found.settle()
        yield found
        found.kill_sessions()


@pytest.mark.timeout(int(CHAOS_S * 2) + 600)
def test_whatever_is_killed_nothing_is_lost_and_nothing_is_doubled(cluster: Cluster):
    seed = int(os.environ.get("RAYSEARCH_TEST_SEED") or random.randrange(10**6))
    print(f"RAYSEARCH_TEST_SEED={seed} RAYSEARCH_CHAOS_S={CHAOS_S:g}")
    began = time.monotonic()
    chaos = Chaos(cluster, random.Random(seed))
    chaos.run(CHAOS_S)
    chaos.rest()
    chaos.session.process.send_signal(signal.SIGINT)  # drains
    assert chaos.session.ends(LIMIT_S) == 0, chaos.session.said()
    wall_s = time.monotonic() - began
    study = cluster.audit().replayed()
    assert not study.running
    ended, took_s = cluster.outcomes(), sorted(chaos.recovery_s())
    figures = {
        "seconds": round(wall_s),
        "trials": ended[Outcome.MEASURED],
        "lost and run again": ended[Outcome.LOST],
        "sessions": len(cluster.sessions),
        "steps": {slug: len(lane.wins) for slug, lane in study.lanes.items()},
        "faults": dict(Counter(fault for _, fault, _ in chaos.done)),
        "recovery": {"median_s": round(took_s[len(took_s) // 2], 1), "longest_s": round(took_s[-1], 1)},
    }
    print(json.dumps(figures))
    assert ended[Outcome.MEASURED] >= CHAOS_S * 500 / 1800
    assert any(study.lanes[slug].wins for slug in study.lanes)
