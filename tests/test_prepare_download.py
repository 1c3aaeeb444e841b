"""Downloads, from a real server on this machine that breaks, refuses and lies as it is told."""

import hashlib
import io
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer import datasets, hub, prepare
from trainer.common import DataError
from trainer.hub import Hub

REPO = datasets.CLIMBMIX_REPO
NAME = "shard_00000.parquet"


def parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file, row_group_size=50, compression="none")
    return file.getvalue()


@dataclass
class Server:
    """A hub that serves `contents`; each request takes the next fault of its file, if there is one.

    Faults: a status to answer with; ("break", n) to close the connection after n bytes; "ignore-range" and
    "wrong-range" to answer a Range badly; "garbage" to send bytes that are not the file.
    """

    contents: dict[str, bytes]
    faults: dict[str, Sequence[object]] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None, int]] = field(default_factory=list)  # method, file, range, status
    redirect: bool = True
    promise_sha256: bool = True
    url: str = ""

    def ranges(self, name: str = NAME) -> list[str | None]:
        return [asked for method, file, asked, _status in self.requests if (method, file) == ("GET", name)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Server

    def log_message(self, format: str, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        name = self.path.rpartition("/")[2]
        self._answer(200 if name in self.hub.contents else 404, b"")

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if name not in self.hub.contents:
            self._answer(404, b"no such file")
        elif self.hub.redirect and not self.path.startswith("/storage/"):
            digest = hashlib.sha256(self.hub.contents[name]).hexdigest()
            promised = {"X-Linked-ETag": f'"{digest}"'} if self.hub.promise_sha256 else {}
            self._answer(302, b"", {"Location": f"/storage/{name}", **promised}, note=False)
        else:
            fault, *later = self.hub.faults.get(name) or [None]
            self.hub.faults[name] = later
            self._serve(self.hub.contents[name], fault)

    def _serve(self, content: bytes, fault: object) -> None:
        asked = self.headers.get("Range")
        if isinstance(fault, int):
            self._answer(fault, b"not now", {"Retry-After": "0"} if fault == 429 else {})
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and fault != "ignore-range" else 0
        if fault == "garbage":
            content = b"PAR1" + bytes(len(content) - 8) + b"PAR1"
        if start and start >= len(content):
            self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        headers = {}
        if start:
            shown = start + 1 if fault == "wrong-range" else start
            headers["Content-Range"] = f"bytes {shown}-{len(content) - 1}/{len(content)}"
        cut = fault[1] if isinstance(fault, tuple) else None
        self._answer(206 if start else 200, content[start:], headers, cut=cut)

    def _answer(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        cut: int | None = None,
        note: bool = True,
    ) -> None:
        if note:
            name = self.path.rpartition("/")[2]
            self.hub.requests.append((self.command, name, self.headers.get("Range"), status))
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    texts = [f"Document {number} " + "of many words " * 30 for number in range(500)]
    state = Server({NAME: parquet(texts)})
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": state})) as http:
        state.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        http.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("RAYSEARCH_HUB", raising=False)


def client(server: Server, *, attempts: int = 4) -> Hub:
    return Hub(server.url, attempts=attempts, backoff_s=0.01, timeout_s=5)


@pytest.mark.parametrize("redirect", [True, False])
def test_a_download_is_whole_and_made_once(server: Server, tmp_path: Path, redirect: bool) -> None:
    server.redirect = redirect
    for _ in range(2):
        [path] = client(server).fetch(REPO, [NAME], tmp_path)
        assert path.read_bytes() == server.contents[NAME]
    assert server.ranges() == [None]
    assert not list(tmp_path.glob("*.part"))


def test_a_broken_connection_resumes_where_it_stopped(server: Server, tmp_path: Path) -> None:
    half = len(server.contents[NAME]) // 2
    server.faults[NAME] = [("break", half), ("break", 1000)]
    [path] = client(server).fetch(REPO, [NAME], tmp_path)
    assert path.read_bytes() == server.contents[NAME]
    assert server.ranges() == [None, f"bytes={half}-", f"bytes={half + 1000}-"]


def test_a_file_has_its_name_only_when_it_is_whole(server: Server, tmp_path: Path) -> None:
    server.faults[NAME] = [("break", 1000)] + [500] * 9
    with pytest.raises(DataError) as caught:
        client(server).fetch(REPO, [NAME], tmp_path)
    message = str(caught.value)
    assert (
        "4 attempts failed, the last with: 500 Internal Server Error; run the same command again to resume" in message
    )
    assert f"{server.url}/datasets/{REPO}/resolve/main/{NAME}" in message
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == [f"{NAME}.part"]
    server.faults.clear()
    [path] = client(server).fetch(REPO, [NAME], tmp_path)  # another call resumes what the first one left
    assert path.read_bytes() == server.contents[NAME]
    assert server.ranges()[-1] == "bytes=1000-"


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_an_overloaded_server_is_asked_again(server: Server, tmp_path: Path, status: int) -> None:
    server.faults[NAME] = [status, status]
    [path] = client(server).fetch(REPO, [NAME], tmp_path)
    assert path.read_bytes() == server.contents[NAME]
    assert [request[3] for request in server.requests] == [status, status, 200]


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_not_repeated(server: Server, tmp_path: Path, status: int) -> None:
    server.faults[NAME] = [status]
    with pytest.raises(DataError, match=f"{NAME} answered {status} .*; check RAYSEARCH_HUB and --shards, or take the"):
        client(server).fetch(REPO, [NAME], tmp_path)
    assert len(server.requests) == 1


def test_one_missing_file_ends_the_whole_download(server: Server, tmp_path: Path) -> None:
    server.faults[NAME] = [503] * 50
    with pytest.raises(DataError, match=r"shard_00001\.parquet answered 404 Not Found"):
        Hub(server.url, attempts=50, backoff_s=30).fetch(REPO, [NAME, "shard_00001.parquet"], tmp_path)


@pytest.mark.parametrize("fault", ["ignore-range", "wrong-range"])
def test_a_server_that_cannot_resume_is_read_from_the_start(server: Server, tmp_path: Path, fault: str) -> None:
    server.faults[NAME] = [("break", 1000), fault]
    [path] = client(server).fetch(REPO, [NAME], tmp_path)
    assert path.read_bytes() == server.contents[NAME]


def test_a_part_that_is_already_whole_is_only_renamed(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(server.contents[NAME])
    [path] = client(server).fetch(REPO, [NAME], tmp_path)
    assert path.read_bytes() == server.contents[NAME]
    assert [request[3] for request in server.requests] == [416]


@pytest.mark.parametrize("leftover", [b"x" * 1000, b"x" * 10_000_000])
def test_a_part_of_another_file_is_not_kept(server: Server, tmp_path: Path, leftover: bytes) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(leftover)
    [path] = client(server).fetch(REPO, [NAME], tmp_path)
    assert path.read_bytes() == server.contents[NAME]


def test_content_with_another_sha256_than_promised_is_refused(server: Server, tmp_path: Path) -> None:
    server.faults[NAME] = ["garbage"] * 9
    with pytest.raises(DataError, match="the content is not what the hub promised"):
        client(server).fetch(REPO, [NAME], tmp_path)
    assert not list(tmp_path.glob("*.p*"))


def test_without_a_promise_a_parquet_file_must_at_least_end_as_one(server: Server, tmp_path: Path) -> None:
    server.promise_sha256 = False
    server.contents[NAME] = b"<html>please sign in</html>"
    with pytest.raises(DataError, match="the content is not what the hub promised"):
        client(server).fetch(REPO, [NAME], tmp_path)


def test_a_silent_server_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        assert not Hub(address).answers(REPO, NAME, timeout_s=0.1)
        with pytest.raises(DataError, match="2 attempts failed, the last with: timed out"):
            Hub(address, attempts=2, backoff_s=0.01, timeout_s=0.1).fetch(REPO, [NAME], tmp_path)


@pytest.mark.parametrize("address", ["huggingface.co", "http://[::"])
def test_an_address_that_is_none_is_said_at_once(tmp_path: Path, address: str) -> None:
    assert not Hub(address).answers(REPO, NAME)
    with pytest.raises(DataError, match="set RAYSEARCH_HUB to an https:// address, or unset it"):
        Hub(address).fetch(REPO, [NAME], tmp_path)


def test_the_hub_says_quickly_what_it_has(server: Server) -> None:
    assert client(server).answers(REPO, NAME)
    assert not client(server).answers(REPO, "shard_00001.parquet")


def test_climbmix_prepares_from_a_hub_with_faults(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last = [f"Evaluation {number}: " + "other words here " * 20 for number in range(200)]
    server.contents |= {
        "shard_00001.parquet": parquet([*last[:5], *(f"Second {n} " + "and so on " * 25 for n in range(300))]),
        "shard_06542.parquet": parquet(last),
    }
    server.faults["shard_06542.parquet"] = [("break", 5000), 503]
    monkeypatch.setenv("RAYSEARCH_HUB", server.url)
    monkeypatch.setenv("RAYSEARCH_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.Hub.__init__, "__kwdefaults__", {**(Hub.__init__.__kwdefaults__ or {}), "backoff_s": 0.01})
    command = ["--dataset", "climbmix", "--shards", "2", "--vocab-size", "300", "--row-tokens", "16"]
    assert prepare.main(command) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["data"] == str(tmp_path / "data" / "climbmix-v300-t16")
    manifest = prepare.verify(answer["data"])
    assert manifest.shards == 2
    assert manifest.splits["val"].documents + manifest.splits["holdout"].documents == 200
    assert manifest.splits["train"].documents == 800  # the five that are in the last shard too are left out
    val = np.load(tmp_path / "data" / "climbmix-v300-t16" / "val.rows.npy")
    text = prepare.Tokenizer.from_dir(answer["data"]).decode(val.ravel().tolist())
    assert "Evaluation" in text
    assert "Document" not in text

    requests = len(server.requests)
    assert prepare.main(command) == 0
    assert prepare.main([*command[:3], "1", *command[4:]]) == 2
    assert "prepared with shards 2, but 1 is asked for" in capsys.readouterr().err
    assert len(server.requests) == requests


def test_a_broken_shard_in_the_cache_is_named(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "climbmix"
    folder.mkdir()
    server.contents["shard_06542.parquet"] = server.contents[NAME]
    (folder / NAME).write_bytes(b"PAR1 broken on the disk PAR1")
    with pytest.raises(
        DataError, match=rf"{NAME}: not to be read as Parquet; remove it, and run the same command again"
    ):
        datasets.climbmix(shards=1, downloads=tmp_path, hub=client(server))
    (folder / NAME).unlink()
    assert datasets.climbmix(shards=1, downloads=tmp_path, hub=client(server)).text_bytes > 0


def test_tinystories_is_divided_as_its_authors_suggest(server: Server, tmp_path: Path) -> None:
    stories = [f"story {number}" for number in range(20_500)]
    stories[20_100] = stories[7]  # a repetition
    server.contents[datasets.TINYSTORIES_FILE] = parquet(stories)
    splits: dict[str, list[str]] = {}
    for split, text in datasets.tinystories(downloads=tmp_path, hub=client(server)).documents():
        splits.setdefault(split, []).append(text)
    assert splits["holdout"] == stories[:10_000]
    assert splits["val"] == stories[10_000:20_000]
    assert splits["train"] == stories[20_000:20_100] + stories[20_101:]
