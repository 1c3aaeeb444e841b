"""Questions to a cluster's head: what is said when it does not answer; with the marker cluster, a real head."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from test_cli import OBJECTIVE
from toy import Toy

from raysearch import __version__, metrics, remote
from raysearch.errors import UserError
from raysearch.run import main

SCORE = 'import time\n\nLR = 0.1  # in [0.01, 1.0] log: step size\ntime.sleep(0.3)\nprint(f"score: {LR}")\n'


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


# ---- what a head answers ----


@pytest.mark.parametrize("what", ["status", "report"])
def test_the_head_answers_in_a_line_that_is_found_among_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
):
    toy = Toy(tmp_path / "s")
    toy.drive(trials=2)
    code, out, _ = said(capsys, "answer", what, "s", "--studies", str(tmp_path))
    assert code == 0
    found = remote.found_in(f"INFO job_manager\n{out}noise after it\n", "http://head:8265")
    if what == "status":
        assert found["status"]["study"] == "s"
    else:
        written = remote.unpack(found["files"], tmp_path / "report")
        assert [path.read_bytes() for path in written] == [(toy.path / path.name).read_bytes() for path in written]
        assert {path.name for path in written} == {"results.tsv", "report.md", "progress.png"}


def test_a_study_that_is_not_there_is_said_with_those_that_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Toy(tmp_path / "mine").drive(trials=1)
    _, out, _ = said(capsys, "answer", "status", "yours", "--studies", str(tmp_path))
    with pytest.raises(UserError, match=r"study 'yours' is not there; in /.* are: mine; start one"):
        remote.found_in(out, "http://head:8265")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'{remote.MARK}{{"raysearch": "0.0.9", "status": {{}}}}', rf"has raysearch 0\.0\.9, this is {__version__}"),
        (
            "Running entrypoint\n/usr/bin/python: No module named raysearch",
            r"no answer, but: .* No module named raysearch",
        ),
        ("", "no answer, but: nothing"),
    ],
)
def test_a_head_with_another_raysearch_or_none_is_said_in_a_line(text: str, message: str):
    with pytest.raises(UserError, match=message) as error:
        remote.found_in(text, "http://head:8265")
    assert "\n" not in str(error.value)


def test_a_file_s_name_leads_nowhere_else(tmp_path: Path):
    (written,) = remote.unpack({"../../escaped.md": ""}, tmp_path / "here")
    assert written == tmp_path / "here/escaped.md"


# ---- addresses, tokens, heads that are none ----


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("head", "http://head:8265"),
        ("127.0.0.1:8266", "http://127.0.0.1:8266"),
        ("https://ray.example.org", "https://ray.example.org"),
        ("http://head:8265/", "http://head:8265"),
    ],
)
def test_addresses(address: str, url: str):
    assert remote.base_url(address) == url


class Refuses(BaseHTTPRequestHandler):
    """A server of something else, or one that wants another token."""

    status = 401

    def do_POST(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b"two\nlines")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "parts"),
    [
        (401, ("refuses the token", "RAY_AUTH_TOKEN")),
        (404, ("no job server of Ray's", "8265")),
        (500, ("answers 500: two lines",)),
    ],
)
def test_a_server_that_refuses_is_said_in_a_line(
    capsys: pytest.CaptureFixture[str], status: int, parts: tuple[str, ...]
):
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Server", (Refuses,), {"status": status}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        code, _, err = said(capsys, "status", "s", "--address", f"127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert all(part in err for part in parts), err


@pytest.mark.parametrize("command", ["status", "report"])
@pytest.mark.parametrize(
    ("address", "part"),
    [
        ("127.0.0.1:1", "no Ray dashboard answers at http://127.0.0.1:1"),
        ("no-such-host.invalid", "no Ray dashboard answers at http://no-such-host.invalid:8265"),
        ("ray://head:10001", "must be HOST:PORT of Ray's dashboard"),
        ("", "must be HOST:PORT of Ray's dashboard"),
    ],
)
def test_a_head_that_is_not_there_is_said_in_a_line(
    capsys: pytest.CaptureFixture[str], command: str, address: str, part: str
):
    code, out, err = said(capsys, command, "s", "--address", address)
    assert (code, out) == (2, "")
    assert part in err
    assert len(err.strip().splitlines()) == 1


def test_a_study_in_ray_s_copy_of_a_job_s_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    there = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_1/studies"
    code, _, err = said(capsys, "--studies", str(there), "--study", "s")
    assert code == 2
    assert "which Ray deletes" in err
    assert "--studies /absolute/path, or RAYSEARCH_STUDIES" in err
    assert not there.exists()


def test_what_was_submitted_as_a_job_knows_it():
    assert remote.is_job({remote.IN_JOB: '{"metadata": {"job_submission_id": "raysubmit_1"}}'})
    assert not remote.is_job({})
    assert not remote.is_job({remote.IN_JOB: "{}"})


# ---- a real head ----


@dataclass(frozen=True)
class Head:
    """A head of Ray with a dashboard, and what it takes to talk to it."""

    dashboard: str
    metrics_port: int
    token: str
    studies: Path
    environment: Mapping[str, str]

    def call(self, *command: str, cwd: Path, token: str | None = None) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token or self.token}
        env["RAY_API_SERVER_ADDRESS"] = f"http://{self.dashboard}"
        return subprocess.run(
            [sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=120
        )

    def submit(self, folder: Path, *options: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
        flags = ("--working-dir", str(folder), *(() if wait else ("--no-wait",)))
        search = ("python", "-m", "raysearch.run", "--objective", "objective.toml", "--cpu-slots", "2")
        return self.call(*RAY, "job", "submit", *flags, "--", *search, *options, cwd=folder)


RAY = ("-c", "from ray.scripts.scripts import main; main()")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tempfile.mkdtemp(prefix="rs-", dir="/tmp")  # short: Ray's sockets lie in it
    token, studies = secrets.token_hex(32), tmp_path_factory.mktemp("head") / "studies"
    gcs, dashboard, agent, agent_grpc, exported, client = free_ports(6)
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAYSEARCH_STUDIES": str(studies),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "500",
    }
    command = [sys.executable, *RAY, "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}"]
    command += [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"]
    command += [f"--metrics-export-port={exported}", f"--ray-client-server-port={client}"]
    command += ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"]
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen(command, env=env, stdout=nowhere, stderr=nowhere, start_new_session=True)
    found = Head(f"127.0.0.1:{dashboard}", exported, token, studies, env)
    try:
        until_there(found)
        yield found
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def until_there(head: Head) -> None:
    deadline = time.monotonic() + 120
    headers = {"Authorization": f"Bearer {head.token}"}
    while True:
        try:
            done = httpx.post(
                f"http://{head.dashboard}/api/jobs/", json={"entrypoint": "true"}, headers=headers, trust_env=False
            )
            if done.is_success:
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline, "the head does not take jobs"
        time.sleep(0.5)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "objective.toml").write_text(OBJECTIVE)
    (folder / "score.py").write_text(SCORE)
    return folder


@pytest.mark.cluster
def test_a_study_is_submitted_and_asked_about_from_elsewhere(head: Head, job: Path, tmp_path: Path):
    submitted = head.submit(job, "--study", "far", "--trials", "4")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert (head.studies / "far/journal.db").exists()

    status = head.call("-m", "raysearch.run", "status", "far", "--address", head.dashboard, "--json", cwd=tmp_path)
    assert status.returncode == 0, status.stderr
    there = Toy(head.studies / "far").replayed()
    assert json.loads(status.stdout)["trials_finished"] == len(there.trials) > 4
    text = head.call("-m", "raysearch.run", "status", "far", "--address", head.dashboard, cwd=tmp_path)
    assert text.stdout.startswith("far: not running")

    report = head.call("-m", "raysearch.run", "report", "far", "--address", head.dashboard, cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    assert report.stdout.startswith("# far")
    for name in ("results.tsv", "report.md", "progress.png"):
        assert (tmp_path / "far-report" / name).read_bytes() == (head.studies / "far" / name).read_bytes()

    other = head.call("-m", "raysearch.run", "status", "near", "--address", head.dashboard, cwd=tmp_path)
    assert other.returncode == 2
    assert re.fullmatch(r"raysearch: .*study 'near' is not there; in .* are: .*far.*\n", other.stderr)
    wrong = head.call(
        "-m", "raysearch.run", "status", "far", "--address", head.dashboard, cwd=tmp_path, token=secrets.token_hex(32)
    )
    assert "refuses the token" in wrong.stderr
    shown = httpx.get(f"http://127.0.0.1:{head.metrics_port}/metrics", trust_env=False).text
    assert f"{metrics.TRIALS.series}{{" in shown  # of a process that has ended
    left = httpx.get(
        f"http://{head.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"}, trust_env=False
    ).json()
    assert not [one for one in left if " answer " in one["entrypoint"]], "what was only a question leaves no job behind"


@pytest.mark.cluster
def test_a_job_that_is_stopped_ends_its_study_in_order(head: Head, job: Path, tmp_path: Path):
    submitted = head.submit(job, "--study", "stopped", wait=False)
    found = re.search(r"raysubmit_\w+", submitted.stdout + submitted.stderr)
    assert found is not None
    deadline = time.monotonic() + 120
    place = head.studies / "stopped"
    while not (place / "journal.db").exists() or not Toy(place).replayed().finished:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    status = head.call("-m", "raysearch.run", "status", "stopped", "--address", head.dashboard, "--json", cwd=tmp_path)
    assert status.returncode == 0, status.stderr
    assert json.loads(status.stdout)["running"] is True
    stopped = head.call(*RAY, "job", "stop", found[0], cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    status = head.call("-m", "raysearch.run", "status", "stopped", "--address", head.dashboard, "--json", cwd=tmp_path)
    assert status.returncode == 0, status.stderr
    assert json.loads(status.stdout)["running"] is False


@pytest.mark.cluster
def test_a_job_whose_study_would_lie_in_ray_s_copy_is_refused(head: Head, job: Path):
    submitted = head.submit(job, "--study", "lost", "--studies", "studies", "--trials", "1")
    assert submitted.returncode != 0
    assert "which Ray deletes" in submitted.stdout + submitted.stderr
