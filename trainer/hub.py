"""Downloads the files of a Hugging Face dataset: with retries, resuming where it stopped, renamed when whole.

It does not read what it downloads, and it asks for no account: only public datasets.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.common import MB, DataError, Ticker, require_space, say

if TYPE_CHECKING:
    import httpx

DEFAULT_HUB = "https://huggingface.co"
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
PROGRESS_BYTES = 1 << 20  # an attempt that brought this much was no failure of the line
LONGEST_WAIT_S = 60.0


class _Transient(Exception):
    """This attempt failed, another may not. `wait_s` is what the server asked for, if it did."""

    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.wait_s = wait_s


class Hub:
    """A Hugging Face hub, or a mirror of one.

    Args:
        base_url: its address; by default that of the environment variable RAYSEARCH_HUB, else huggingface.co.
        attempts: how often one file is tried without progress before the download is given up.
        backoff_s: seconds before the second attempt; doubles with every further one.
        timeout_s: seconds of silence after which a connection counts as broken.
        workers: files that are downloaded at the same time.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        attempts: int = 6,
        backoff_s: float = 1.0,
        timeout_s: float = 30.0,
        workers: int = 4,
    ):
        self.base_url = (base_url or os.environ.get("RAYSEARCH_HUB") or DEFAULT_HUB).rstrip("/")
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._timeout_s = timeout_s
        self._workers = workers
        self._ticker = Ticker()

    def url(self, repo: str, name: str) -> str:
        """The address of one file of a dataset, as the hub has it."""
        return f"{self.base_url}/datasets/{repo}/resolve/main/{name}"

    def answers(self, repo: str, name: str, *, timeout_s: float = 3.0) -> bool:
        """Whether the hub has this file and says so quickly; any failure is a no."""
        import httpx  # noqa: PLC0415 - late: a tenth of a second that a prepared folder does not need

        try:
            return httpx.head(self.url(repo, name), timeout=timeout_s, follow_redirects=True).is_success
        except (httpx.HTTPError, httpx.InvalidURL):
            return False

    def fetch(self, repo: str, names: Sequence[str], folder: Path) -> list[Path]:
        """Downloads the files that are missing, and returns the paths of all in the order of `names`.

        Raises:
            DataError: a file is not there, the line is down for good, or the disk too small.
        """
        import filelock  # noqa: PLC0415
        import httpx  # noqa: PLC0415

        folder.mkdir(parents=True, exist_ok=True)
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            say(f"downloading {len(missing)} of {len(names)} files of {repo} to {folder}")
            stop = threading.Event()
            # the folder is shared by every vocabulary and row length that is made from these files
            with (
                filelock.FileLock(folder / ".lock"),
                httpx.Client(timeout=self._timeout_s, follow_redirects=True) as client,
                ThreadPoolExecutor(self._workers) as pool,
            ):
                todo = [_File(self.url(repo, name), folder / name, len(missing) - i) for i, name in enumerate(missing)]
                try:
                    for _ in pool.map(lambda file: self._fetch_file(client, file, stop), todo):
                        pass
                finally:
                    stop.set()
        return [folder / name for name in names]

    def _fetch_file(self, client: httpx.Client, file: _File, stop: threading.Event) -> None:
        try:
            self._keep_trying(client, file, stop)
        except BaseException:
            stop.set()  # one file that cannot be had ends the others' downloads and waits as well
            raise

    def _keep_trying(self, client: httpx.Client, file: _File, stop: threading.Event) -> None:
        import httpx  # noqa: PLC0415

        failures = 0
        while not file.path.exists() and not stop.is_set():
            before_bytes = file.have_bytes
            try:
                self._attempt(client, file, stop)
                continue
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise DataError(f"{file.url}: {error}; set RAYSEARCH_HUB to an https:// address, or unset it") from None
            except _Transient as error:
                reason, wait_s = str(error), error.wait_s
            except httpx.RequestError as error:
                reason, wait_s = f"{error or type(error).__name__}", None
            failures = 1 if file.have_bytes - before_bytes >= PROGRESS_BYTES else failures + 1
            if failures >= self._attempts:
                raise DataError(
                    f"{file.url}: {failures} attempts failed, the last with: {reason}; "
                    "run the same command again to resume, or take the embedded corpus with --dataset sotu"
                )
            say(f"  {file.path.name}: {reason}; trying again")
            stop.wait(min(self._backoff_s * 2 ** (failures - 1) if wait_s is None else wait_s, LONGEST_WAIT_S))

    def _attempt(self, client: httpx.Client, file: _File, stop: threading.Event) -> None:
        """Asks for what is missing of the file, appends it, and gives the file its name when it is whole."""
        headers = {"Accept-Encoding": "identity"}
        if file.have_bytes:
            headers["Range"] = f"bytes={file.have_bytes}-"
        with client.stream("GET", file.url, headers=headers) as response:
            total_bytes = _total_bytes(response, file)
            if response.status_code != 416:
                if total_bytes is not None:
                    # the files of a dataset are about equally large, and those behind this one will want room too
                    need_bytes = (total_bytes - file.have_bytes) * min(file.outstanding, self._workers)
                    require_space(file.path.parent, need_bytes, "the download")
                with file.part.open("ab") as part:
                    for chunk in response.iter_raw():
                        part.write(chunk)
                        if stop.is_set():
                            return
                        self._ticker.say(
                            f"  {file.path.name}: {part.tell() / MB:,.0f} of {(total_bytes or 0) / MB:,.0f} MB"
                        )
            if total_bytes is not None and file.have_bytes != total_bytes:
                raise _Transient(f"the connection ended after {file.have_bytes} of {total_bytes} bytes")
            file.finish(_sha256_promised(response))


class _File:
    """One file on its way: `path` when it is whole, `path.part` until then."""

    def __init__(self, url: str, path: Path, outstanding: int):
        self.url = url
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.outstanding = outstanding

    @property
    def have_bytes(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def finish(self, sha256: str | None) -> None:
        """Gives the file its name, if its content is what was promised; otherwise starts over."""
        with self.part.open("rb") as part:
            if sha256 is not None:
                whole = hashlib.file_digest(part, "sha256").hexdigest() == sha256
            else:
                head = part.read(4)
                part.seek(max(0, self.have_bytes - 4))
                whole = head == part.read(4) == b"PAR1" or self.path.suffix != ".parquet"
            os.fsync(part.fileno())
        if not whole:
            self.part.unlink()
            raise _Transient("the content is not what the hub promised (sha256 or the end of the file is wrong)")
        os.replace(self.part, self.path)
        say(f"  {self.path.name}: {self.path.stat().st_size / MB:,.0f} MB")


def _total_bytes(response: httpx.Response, file: _File) -> int | None:
    """The file's length, from an answer that continues where the part file ends; None if the server does not say."""
    status = response.status_code
    if status in TRANSIENT_STATUS:
        asked = response.headers.get("Retry-After", "")
        raise _Transient(f"{status} {response.reason_phrase}", float(asked) if asked.isdigit() else None)
    if status == 200:
        file.part.unlink(missing_ok=True)  # the whole file comes, whatever was asked for
        length = response.headers.get("Content-Length", "")
        return int(length) if length.isdigit() else None
    where = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
    if status in (206, 416):
        continues = where is not None and (where[1] is None or int(where[1]) == file.have_bytes)
        if where is None or not continues or file.have_bytes > int(where[2]):
            file.part.unlink(missing_ok=True)
            raise _Transient(f"{status}: the part on disk does not continue the file of the hub; starting over")
        return int(where[2])
    raise DataError(
        f"{file.url} answered {status} {response.reason_phrase}; check RAYSEARCH_HUB and --shards, "
        "or take the embedded corpus with --dataset sotu"
    )


def _sha256_promised(response: httpx.Response) -> str | None:
    """The hub names a large file's sha256 in X-Linked-ETag, on the answer that redirects to the storage."""
    for answer in (*response.history, response):
        digest = answer.headers.get("X-Linked-ETag", "").strip('"')
        if re.fullmatch(r"[0-9a-f]{64}", digest):
            return digest
    return None
