"""Everything that can break under a study on several machines, each on its own; then one audit for all.

The machines are namespaces of this one (`hosts`), with their own network, processes, host name, CPU and disk: `alpha`
sees the study's folder, `beta` does not, and their CPUs make two profiles.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

import pytest
from faulty import LIMIT_S, Cluster, ends, wait
from hosts import Bed, bed
from session_kit import Session, until

from raysearch.model import Outcome, SessionStarted

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def machines() -> Iterator[Bed]:
    with bed() as found:
        yield found


@pytest.fixture
def cluster(machines: Bed) -> Iterator[Cluster]:
    path = machines.path / "shared" / f"t{len(list((machines.path / 'shared').iterdir()))}"
    path.mkdir()
    found = Cluster(path, [], bed=machines)
    found.write(seconds=2.5)
    found.settle()
    yield found
    found.kill_sessions()


def busy(cluster: Cluster, host: str = "alpha", *, trials: int = 3) -> Session:
    """A session with both slots of a host at work, and the other host too."""
    session = cluster.search("--trials", str(trials))
    until(lambda: len(cluster.running(host)) == 2 and len(cluster.running()) > 2, session, LIMIT_S)
    return session


def sessions(cluster: Cluster) -> int:
    return sum(isinstance(record.event, SessionStarted) for record in cluster.events())


def ends_well(session: Session) -> None:
    assert session.ends(LIMIT_S) == 0, session.said()


def made_good(cluster: Cluster, host: str) -> bool:
    """Whether a host is at work, and what was lost has been run again, or is of no more use."""
    lost = {event.trial_id for event in ends(cluster.events()) if event.outcome is Outcome.LOST}
    study = cluster.study("quick").replayed()
    waits = any(lane.again for lane in study.lanes.values()) or any(study.trials[name].running for name in lost)
    return bool(cluster.running(host)) and not waits


def goes_on_and_ends_well(cluster: Cluster, session: Session, host: str) -> None:
    until(lambda: made_good(cluster, host), session, LIMIT_S)
    session.press_ctrl_c()
    ends_well(session)
    cluster.audit(lost=2)


def test_two_kinds_of_machine_have_a_profile_each_and_two_ratchets(cluster: Cluster):
    ends_well(busy(cluster))
    study = cluster.audit(lost=0).replayed()
    kinds = {lane.profile.hardware: lane for lane in study.lanes.values()}
    assert set(kinds) == {"Toy Alpha", "Toy Beta"}
    for state in study.trials.values():
        host = "alpha" if study.lanes[state.trial.profile].profile.hardware == "Toy Alpha" else "beta"
        assert state.slot.startswith(f"{host}:")


@pytest.mark.parametrize("host", ["alpha", "beta"])
def test_a_training_process_that_is_killed_is_run_again(cluster: Cluster, host: str):
    session = busy(cluster)
    trial, tree = until(lambda: next(iter(cluster.trees(host).items()), None), session)
    next(process for process in tree if "score.py" in " ".join(process.cmdline())).kill()
    ends_well(session)
    study = cluster.audit(lost=1).replayed()
    assert study.trials[trial].attempt == 2


def test_a_daemon_of_a_trial_that_is_killed_costs_nothing(cluster: Cluster):
    session = busy(cluster)
    tree = until(lambda: next((tree for tree in cluster.trees("alpha").values() if len(tree) == 2), None), session)
    next(process for process in tree if "sleep" in process.cmdline()).kill()
    ends_well(session)
    cluster.audit(lost=0)


@pytest.mark.parametrize("host", ["alpha", "beta"])
def test_a_slot_that_is_killed_comes_back_and_its_run_is_run_again(cluster: Cluster, host: str):
    session = busy(cluster)
    actor = cluster.bed.hosts[host].named("ray::Slot")[0]
    actor.kill()
    until(lambda: cluster.outcomes()[Outcome.LOST], session)
    until(lambda: not cluster.orphans(), session)
    ends_well(session)
    cluster.audit(lost=1)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "asked to end"])
def test_a_raylet_that_ends_takes_its_slots_along_and_the_machine_comes_back(cluster: Cluster, how: signal.Signals):
    session = busy(cluster, trials=1000)
    (raylet,) = cluster.bed.hosts["alpha"].raylets()
    raylet.send_signal(how)
    until(lambda: cluster.outcomes()[Outcome.LOST], session)
    wait(lambda: not cluster.trees("alpha"))
    cluster.settle()
    goes_on_and_ends_well(cluster, session, "alpha")


def test_a_machine_that_loses_power_is_replaced_by_another(cluster: Cluster):
    session = busy(cluster, "beta", trials=1000)
    cluster.bed.power_off("beta")
    until(lambda: cluster.outcomes()[Outcome.LOST], session)
    cluster.settle()
    goes_on_and_ends_well(cluster, session, "beta")


def test_a_machine_that_is_cut_off_for_good_is_left_and_ends_its_runs_by_itself(cluster: Cluster):
    cluster.write(seconds=500)
    session = busy(cluster)
    alpha = cluster.bed.hosts["alpha"]
    cluster.bed.unplug(alpha)
    until(lambda: cluster.outcomes()[Outcome.LOST] == 2, session, LIMIT_S)
    wait(lambda: not cluster.trees("alpha"))
    session.process.terminate()
    assert session.ends() == 130, session.said()
    cluster.bed.power_off("alpha")
    cluster.audit(lost=2)


def test_a_machine_that_freezes_is_left_and_what_it_brings_later_is_not_taken(cluster: Cluster):
    cluster.write(seconds=6)
    session = busy(cluster)
    alpha, stale = cluster.bed.hosts["alpha"], cluster.running("alpha")
    folder = cluster.study("quick").folder
    alpha.freeze()
    until(lambda: cluster.outcomes()[Outcome.LOST] == 2, session, LIMIT_S)
    cluster.bed.add("alpha2", cpu="Toy Alpha")
    again = until(lambda: cluster.running("alpha2") if len(cluster.running("alpha2")) == 2 else None, session, LIMIT_S)
    assert {name: event.attempt for name, event in again.items()} == dict.fromkeys(stale, 2)
    alpha.thaw()
    for name in stale:  # beside the second attempt, which sees the same disk
        until(lambda name=name: (folder.run(name, 1) / "exit.json").exists(), session)
    ends_well(session)
    study = cluster.audit(lost=2).replayed()
    for name in stale:
        assert study.trials[name].attempt == 2
        assert study.trials[name].slot.startswith("alpha2:")


@pytest.mark.parametrize("times", [1, 3])
def test_a_coordinator_that_is_killed_goes_on_where_it_was(cluster: Cluster, times: int):
    for number in range(times):
        session = cluster.search("--trials", "4")
        until(lambda number=number: number < sessions(cluster) and cluster.running(), session, LIMIT_S)
        session.process.kill()
        session.process.wait()
    before = cluster.events()
    ends_well(cluster.search("--trials", "4"))
    assert cluster.events()[: len(before)] == before
    cluster.audit(lost=0)


@pytest.mark.parametrize("back", ["later", "at once"])
def test_a_head_whose_gcs_dies_is_said_and_the_study_goes_on_with_the_next(cluster: Cluster, back: str):
    session = busy(cluster)
    (gcs,) = cluster.bed.head_processes("gcs_server")
    gcs.kill()
    if back == "at once":
        wait(lambda: not cluster.bed.head_processes("ray.scripts.scripts"))
        cluster.bed.start_head()
    assert session.ends(LIMIT_S) == 2, session.said()
    last = session.said().splitlines()[-1]
    assert last.startswith("raysearch: Ray is gone:"), session.said()
    assert "start the study again, it goes on where it was" in last
    assert "Traceback" not in session.said()
    wait(lambda: not cluster.processes())
    cluster.settle()
    ends_well(cluster.search("--trials", "3"))
    cluster.audit()


def test_a_machine_whose_disk_is_full_is_left_until_it_has_room(cluster: Cluster):
    session = busy(cluster, "beta", trials=1000)
    rest = cluster.bed.hosts["beta"].disk / "rest"
    with contextlib.suppress(OSError), rest.open("wb") as file:
        while True:
            file.write(bytes(2**20))
    until(lambda: all(f"slot beta:cpu{index} left" in session.said() for index in (0, 1)), session, LIMIT_S)
    assert "a run needs" in session.said()
    rest.unlink()
    goes_on_and_ends_well(cluster, session, "beta")


def test_a_spot_notice_loses_no_more_than_the_runs_in_flight(cluster: Cluster):
    session = busy(cluster, "beta", trials=1000)
    beta = cluster.bed.hosts["beta"]
    cluster.bed.drain(beta, deadline_s=5)
    cluster.bed.add("beta2", cpu="Toy Beta", sees_study=False)
    until(lambda: cluster.running("beta2"), session, LIMIT_S)
    cluster.bed.power_off("beta")
    goes_on_and_ends_well(cluster, session, "beta2")


def test_machines_join_and_leave_at_any_time(cluster: Cluster):
    cluster.bed.power_off("beta")
    wait(lambda: len(cluster.bed.nodes() or {}) == 2)
    session = cluster.search("--trials", "12")
    until(lambda: cluster.running("alpha"), session, LIMIT_S)
    cluster.bed.add("beta", cpu="Toy Beta", sees_study=False)
    until(lambda: cluster.running("beta"), session, LIMIT_S)
    cluster.bed.power_off("alpha")
    until(lambda: not cluster.running("alpha"), session, LIMIT_S)
    cluster.bed.add("alpha", cpu="Toy Alpha")
    until(lambda: cluster.running("alpha"), session, LIMIT_S)
    ends_well(session)
    study = cluster.audit(lost=2).replayed()
    assert {lane.profile.hardware for lane in study.lanes.values()} == {"Toy Alpha", "Toy Beta"}


@pytest.mark.parametrize("where", ["head", "alpha"])
def test_two_coordinators_never_drive_one_study(cluster: Cluster, where: str):
    session = busy(cluster)
    cluster.host = cluster.bed.hosts.get(where)
    second = cluster.call("--study", "quick", "--address", cluster.bed.address)
    cluster.host = None
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert "'quick' is driven by another coordinator" in line
    ends_well(session)
    cluster.audit(lost=0)
    assert sessions(cluster) == 1


def test_a_cable_that_is_out_for_30_s_costs_no_more_than_the_runs_in_flight():
    """With Ray's own patience: a node is given up when it has not answered for about a minute."""
    with bed({}) as machines:
        cluster = Cluster(machines.path / "shared", [], bed=machines)
        cluster.write(seconds=4)
        cluster.settle()
        session = busy(cluster, "beta")
        machines.unplug(machines.hosts["beta"])
        time.sleep(30)
        machines.plug(machines.hosts["beta"])
        ends_well(session)
        cluster.audit(lost=2)
