"""Asks the raysearch on a cluster's head about its studies: a short Ray job through the dashboard's port.

Nothing but HTTP is needed here: no Ray, no equal Python. It starts no study and changes none.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from raysearch import __version__
from raysearch.errors import UserError
from raysearch.wording import clean

PORT = 8265  # of Ray's dashboard
MARK = "raysearch-answer: "
LIMIT_S = 120.0
POLL_S = 0.2
REACH_LIMIT_S = 10.0
ANSWER_LIMIT_S = 60.0  # for one request: a head whose cores are all busy takes its time
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for what `ray job submit` runs


def is_job(environment: Mapping[str, str]) -> bool:
    """Whether this process was started by `ray job submit`."""
    return "job_submission_id" in environment.get(IN_JOB, "")


def ask(address: str, what: str, name: str, *, studies: Path | None) -> dict[str, Any]:
    """What the head says of a study.

    Args:
        address: HOST:PORT of Ray's dashboard, or its URL.
        what: `status` or `report`.
        name: Of the study.
        studies: Folder of studies on the head; None for the one that it has by itself.

    Raises:
        UserError: There is no cluster, it refuses, its raysearch is another version, or it says what is wrong.
    """
    where = [] if studies is None else ["--studies", str(studies)]
    command = ["python", "-m", "raysearch.run", "answer", what, name, *where]
    base = base_url(address)
    try:
        patience = httpx.Timeout(ANSWER_LIMIT_S, connect=REACH_LIMIT_S)
        with httpx.Client(base_url=base, headers=_headers(os.environ), timeout=patience, trust_env=False) as head:
            text = _run(head, shlex.join(command))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(
            f"no Ray dashboard answers at {base} ({clean(str(error), 120) or type(error).__name__}); --address is its "
            f"HOST:PORT, {PORT} by default; `ray dashboard cluster.yaml` brings a cluster's to 127.0.0.1:{PORT}"
        ) from None
    return found_in(text, base)


def base_url(address: str) -> str:
    """The dashboard's URL of what a user names: HOST, HOST:PORT or a URL."""
    scheme, found, rest = address.rpartition("://")
    if found and scheme not in ("http", "https"):
        raise UserError(f"--address {address!r}: it must be HOST:PORT of Ray's dashboard, or its http(s) URL")
    host = rest.rstrip("/")
    if not host or any(part in host for part in "/@ "):
        raise UserError(f"--address {address!r}: it must be HOST:PORT of Ray's dashboard, or its http(s) URL")
    has_port = found or host.rpartition(":")[2].isdecimal()
    return f"{scheme or 'http'}://{host}" if has_port else f"http://{host}:{PORT}"


def _headers(environment: Mapping[str, str]) -> dict[str, str]:
    token = environment.get("RAY_AUTH_TOKEN") or ""
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if not token and path.is_file():
        token = path.read_text().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _run(head: httpx.Client, command: str) -> str:
    """Runs a command on the head; what it printed."""
    job = _said(head.post("/api/jobs/", json={"entrypoint": command})).json()["submission_id"]
    try:
        deadline = time.monotonic() + LIMIT_S
        while (found := _said(head.get(f"/api/jobs/{job}")).json())["status"] in ("PENDING", "RUNNING"):
            if time.monotonic() > deadline:
                head.post(f"/api/jobs/{job}/stop")
                raise UserError(f"{head.base_url}: job {job} has not answered within {LIMIT_S:g} s; see its log there")
            time.sleep(POLL_S)
        logs: str = _said(head.get(f"/api/jobs/{job}/logs")).json()["logs"]
        return logs or str(found.get("message", ""))
    finally:
        head.delete(f"/api/jobs/{job}")


def _said(response: httpx.Response) -> httpx.Response:
    if response.status_code in (401, 403):
        raise UserError(
            f"{response.url.host} refuses the token; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's "
            "(`ray get-auth-token` on the head shows it)"
        )
    if response.status_code in (404, 405):
        raise UserError(f"{response.url} is no job server of Ray's; name the port of its dashboard, {PORT} by default")
    if not response.is_success:
        raise UserError(f"{response.url.host} answers {response.status_code}: {clean(response.text, 200)}")
    return response


def found_in(text: str, base: str) -> dict[str, Any]:
    """The answer in what a job has printed.

    Raises:
        UserError: There is none, it is of another version, or it says what is wrong.
    """
    line = next((line for line in text.splitlines() if line.startswith(MARK)), None)
    if line is None:
        said = clean((text.strip().splitlines() or ["nothing"])[-1], 200)
        raise UserError(
            f"{base}: the head's raysearch gives no answer, but: {said}; the same version must be installed there, "
            "and its python first on the PATH of `ray start`"
        )
    found: dict[str, Any] = json.loads(line.removeprefix(MARK))
    if found["raysearch"] != __version__:
        raise UserError(f"{base} has raysearch {found['raysearch']}, this is {__version__}; install the same on both")
    if "error" in found:
        raise UserError(f"{base}: {found['error']}")
    return found


# ---- on the head ----


def answered(**found: Any) -> str:
    """The line in which the head answers."""
    return f"{MARK}{json.dumps({'raysearch': __version__, **found})}"


def packed(files: list[Path]) -> dict[str, str]:
    """Files as text, by name."""
    return {path.name: base64.b64encode(path.read_bytes()).decode() for path in files}


def unpack(files: Mapping[str, str], into: Path) -> list[Path]:
    """Writes what `packed` has made of files into a folder."""
    into.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name, text in files.items():
        written.append(into / Path(name).name)  # whatever the other side says, into this folder
        written[-1].write_bytes(base64.b64decode(text))
    return written
