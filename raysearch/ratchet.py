"""The study's git repository: candidates as commits, three-way merges, one branch of confirmed wins a profile.

It decides nothing: what is committed, merged or moved, and when, is said by its caller. Every effect is idempotent.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from raysearch.errors import UserError
from raysearch.patches import (
    Conflict,
    Empty,
    PatchError,
    align_constants,
    check_merge,
    first_conflict,
    is_converted,
    unified_diff,
    with_line_ends,
)
from raysearch.wording import clean

__all__ = ["Conflict", "Empty", "GitError", "Moved", "PatchError", "Ratchet", "step_message", "unified_diff"]

MAIN = "refs/heads/main"
SUBJECT_CHARS = 72
STALE_LOCK_S = 60  # git holds the lock of a branch for milliseconds

_NOWHERE = "0" * 40
_SHA = re.compile(r"[0-9a-f]{40}")
_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.|lock(?:$|\.)|$))*")
# At a line's end, where git puts the system's reason and never a path: a patch must not be able to write this.
_DISK = re.compile(
    r"^(?:error|fatal): .*: (?:No space left on device|Disk quota exceeded|Input/output error|Read-only file system"
    r"|Permission denied|Too many open files|Cannot allocate memory)$",
    re.MULTILINE,
)
_MARKER_SIZE = 40  # longer than any line of = or < that a program is likely to have
_IDENTITY = ("raysearch", "raysearch@localhost")
# In place of what `git init` wrote. Clones of the user do not inherit it, which is right.
_CONFIG = f"""\
[core]
\trepositoryformatversion = 0
\tbare = true
\tautocrlf = false
\tlogAllRefUpdates = true
\tfsync = objects,reference
\tfilesRefLockTimeout = 1000
[user]
\tname = {_IDENTITY[0]}
\temail = {_IDENTITY[1]}
[commit]
\tgpgsign = false
[gc]
\tauto = 0
"""


class GitError(UserError):
    """Git failed for the disk's or the repository's sake: nothing that a proposal could be blamed for."""


class Moved(Exception):
    """A branch or ref stands elsewhere than was expected: somebody else moved it."""


class Ratchet:
    """A bare repository: `main` holds the base program, `ratchet/<profile>` the wins, `refs/trials/<id>` candidates.

    Bare, so that moving a branch never fights with a checkout; people clone it or use `git log`, `show`, `worktree`.
    """

    def __init__(self, path: Path) -> None:
        """For `create` and `open`, which see that there is a repository."""
        self.path = path.absolute()
        self._git = _Git(self.path)

    # ---- the repository ----

    @classmethod
    def create(cls, path: str | os.PathLike[str], files: Mapping[str, str], *, message: str, at: float) -> Ratchet:
        """Makes the repository with the base program on `main`, or opens it when that was done before.

        It is built beside its place and moved there whole, so that a kill leaves a complete repository or none.

        Args:
            path: Of the bare repository.
            files: The base program: text by path.
            message: Of the first commit.
            at: Unix time of the first commit.

        Raises:
            UserError: Something else is at `path`, another base program for instance.
        """
        place = Path(path).absolute()
        if (place / "HEAD").exists():
            return cls._recreate(place, files)
        partial = place.with_name(f"{place.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        ratchet = cls(partial)
        # Not --bare: git refuses that beside a GIT_WORK_TREE, which cannot be unset here. The configuration says it.
        ratchet._git.must("init", "--quiet", "--template=", "--initial-branch=main", "--object-format=sha1")
        (partial / "config").write_text(_CONFIG, encoding="utf-8")
        commit = ratchet._commit(ratchet._tree(None, files), (), message=message, at=at)
        ratchet._git.must("update-ref", MAIN, commit, _NOWHERE)
        try:
            partial.rename(place)
        except OSError as error:
            raise UserError(
                f"{place}: {error.strerror}; the study's repository belongs there: move away what is there"
            ) from None
        return cls.open(place)

    @classmethod
    def _recreate(cls, place: Path, files: Mapping[str, str]) -> Ratchet:
        ratchet = cls.open(place)
        if ratchet._git.must("rev-parse", f"{MAIN}^{{tree}}").strip() != ratchet._tree(None, files):
            raise UserError(
                f"{place} has another base program on `main`; a study keeps its own: give this one another name"
            )
        return ratchet

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Ratchet:
        """Opens a study's repository.

        Raises:
            UserError: There is none.
        """
        ratchet = cls(Path(path))
        if not (ratchet.path / "HEAD").is_file() or ratchet._ref(MAIN) is None:
            raise UserError(
                f"{ratchet.path} is no repository of a study with its base program on `main`; check the study's name"
            )
        return ratchet

    # ---- commits ----

    def commit_files(self, base: str, files: Mapping[str, str], *, message: str, at: float) -> str:
        """Makes a commit on `base` in which these files have these texts.

        Args:
            base: Commit that becomes the parent.
            files: Text by path; other files stay as they are.
            message: Any text.
            at: Unix time; equal arguments give an equal sha.
        """
        base = self._full(base)
        return self._commit(self._tree(base, files), (base,), message=message, at=at)

    def commit_patch(self, base: str, patch: str, *, editable: Sequence[str], message: str, at: float) -> str:
        """Makes a commit on `base` with a unified diff applied.

        What the patch did is read from git's index afterwards, not from the patch, so that no spelling of a header
        gets past the rules. CRLF that a mailer or editor put at all line ends of the patch, or took away, is mended.

        Args:
            base: Commit that becomes the parent.
            patch: As `git diff` or `unified_diff` writes it.
            editable: Paths that it may change or add; nothing else, and nothing but their text.
            message: Any text.
            at: Unix time; equal arguments give an equal sha.

        Raises:
            Empty: It changes nothing.
            PatchError: It does not apply, or touches what it may not.
        """
        base = self._full(base)
        with _index() as index:
            self._git.must("read-tree", base, env=index)
            self._apply(patch, base, editable, index)
            changes = self._git.must(
                *("diff-index", "--cached", "--raw", "-z", "--no-abbrev", "--no-renames", base, "--"), env=index
            )
            _check_changes(changes, base, editable)
            tree = self._git.must("write-tree", env=index).strip()
        return self._commit(tree, (base,), message=message, at=at)

    def _apply(self, patch: str, base: str, editable: Sequence[str], index: Mapping[str, str]) -> None:
        if not patch.strip():
            raise Empty("the patch is empty; write a unified diff")
        if "\0" in patch or re.search(r"^GIT binary patch$", patch, re.MULTILINE):
            raise PatchError("the patch is binary; a patch may only change text")
        text = patch if patch.endswith("\n") else f"{patch}\n"
        if is_converted(text):
            text = with_line_ends(text, crlf=False)
        error = self._try(text, index)
        if error and "\r\n" not in text and self._has_crlf(base, editable):
            error = self._try(with_line_ends(text, crlf=True), index) and error
        if not error:
            return
        failed = re.search(r"^error: patch failed: (.+:\d+)$", error, re.MULTILINE)
        if failed:
            raise PatchError(f"{failed[1]}: the patch does not fit commit {base[:12]} there; make it anew against that")
        raise PatchError(f"the patch does not apply to commit {base[:12]}: {_first_line(error)}")

    def _try(self, patch: str, index: Mapping[str, str]) -> str:
        try:
            data = patch.encode()
        except UnicodeEncodeError:
            raise PatchError("the patch is not UTF-8; a patch may only change text") from None
        status, _, error = self._git.run("apply", "--cached", "--whitespace=nowarn", "-", stdin=data, env=index)
        return (error or f"exit code {status}") if status else ""

    def _has_crlf(self, commit: str, paths: Sequence[str]) -> bool:
        return any(b"\r\n" in (data or b"") for data in self._blobs(commit, paths).values())

    def _tree(self, base: str | None, files: Mapping[str, str]) -> str:
        """Writes the tree of `base` (empty for None) with these texts in it."""
        entries: list[bytes] = []
        with _index() as index:
            if base is not None:
                self._git.must("read-tree", base, env=index)
            for path, sha in self._store(files).items():
                entry = f"100644 {sha}\t{path}\0".encode("utf-8", "replace")
                if entry.count(b"\0") > 1:
                    raise UserError(f"{path!r} is no path of a file; take the NUL out")
                entries.append(entry)
            _, _, ignored = self._git.run(
                *("update-index", "--add", "-z", "--index-info"), stdin=b"".join(entries), env=index, check=True
            )
            if ignored:  # a path such as ../x, which git leaves out and calls it a success
                raise UserError(f"{_first_line(ignored)}: it is no path inside a repository; name it from its root")
            return self._git.must("write-tree", env=index).strip()

    def _store(self, files: Mapping[str, str]) -> dict[str, str]:
        """Writes texts as blobs; their shas by path."""
        with tempfile.TemporaryDirectory(prefix="raysearch-") as folder:
            names: list[str] = []
            for number, (path, text) in enumerate(files.items()):
                names.append(os.path.join(folder, str(number)))
                try:
                    Path(names[-1]).write_bytes(text.encode())
                except UnicodeEncodeError:
                    raise UserError(f"{path} cannot be written as UTF-8; save it as UTF-8") from None
            listed = "".join(f"{name}\n" for name in names).encode()
            shas = self._git.must("hash-object", "-w", "--no-filters", "--stdin-paths", stdin=listed).split()
        return dict(zip(files, shas, strict=True))

    def _commit(self, tree: str, parents: Sequence[str], *, message: str, at: float) -> str:
        date = f"@{max(0, math.floor(at))} +0000"
        text = message.replace("\0", "").encode("utf-8", "replace")
        arguments = [part for parent in parents for part in ("-p", parent)]
        dates = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        return self._git.must("commit-tree", *arguments, "-F", "-", tree, stdin=text, env=dates).strip()

    # ---- refs ----

    def keep(self, candidate_id: str, commit: str) -> None:
        """Keeps a candidate for good under `refs/trials/<candidate_id>`; kept already is well.

        Raises:
            Moved: Another commit is kept under that id.
        """
        self._put(f"refs/trials/{_name(candidate_id)}", self._full(commit))

    def start(self, profile_slug: str, commit: str) -> None:
        """Starts the branch of a profile; started there already is well.

        Raises:
            Moved: The branch stands elsewhere.
        """
        self._put(_branch(profile_slug), self._full(commit))

    def step(self, profile_slug: str, *, expected: str, candidate_commit: str, message: str, at: float) -> str:
        """Moves a profile's branch forward by a commit with exactly the candidate's tree.

        The commit's parents are the branch as it was and the candidate, so that the first-parent history is the list
        of wins and the second parents say where each came from.

        Args:
            profile_slug: Names the branch.
            expected: Where the branch stands.
            candidate_commit: What won.
            message: See `step_message`.
            at: Unix time.

        Returns:
            The new commit; if this very step was made before (same parents, same tree), the one that was made then.

        Raises:
            Moved: The branch stands elsewhere.
            Empty: The candidate's tree is the branch's already.
        """
        ref = _branch(profile_slug)
        expected, candidate = self._full(expected), self._full(candidate_commit)
        tree, before = self._git.must("rev-parse", f"{candidate}^{{tree}}", f"{expected}^{{tree}}").split()
        if tree == before:
            raise Empty(f"candidate {candidate[:12]} has the tree of {expected[:12]}; a step must change something")
        done = self._made(ref, (tree, expected, candidate))
        if done is not None:
            return done
        commit = self._commit(tree, (expected, candidate), message=message, at=at)
        if self._swap(ref, commit, expected):
            return commit
        done = self._made(ref, (tree, expected, candidate))
        if done is not None:  # a second writer was quicker with the same step
            return done
        stands = self._ref(ref)
        raise Moved(f"{ref} stands at {stands and stands[:12]}, not at {expected[:12]}; judge against where it stands")

    def _made(self, ref: str, wanted: tuple[str, ...]) -> str | None:
        """The ref's commit if its tree and parents are the wanted ones."""
        head = self._ref(ref)
        if head is None:
            return None
        facts = self._git.must("rev-parse", f"{head}^{{tree}}", f"{head}^@").split()
        return head if tuple(facts) == wanted else None

    def head(self, profile_slug: str) -> str | None:
        """The newest commit of a profile's branch, or None before `start`."""
        return self._ref(_branch(profile_slug))

    def _ref(self, ref: str) -> str | None:
        status, out, _ = self._git.run("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
        return out.decode().strip() if status == 0 else None

    def _put(self, ref: str, commit: str) -> None:
        if self._ref(ref) == commit or self._swap(ref, commit, _NOWHERE):
            return
        stands = self._ref(ref)
        if stands != commit:  # else a second writer was quicker
            raise Moved(f"{ref} stands at {stands and stands[:12]}, not at {commit[:12]}; each id is for one commit")

    def _swap(self, ref: str, new: str, old: str) -> bool:
        """Moves a ref from `old` to `new`; False when it stands elsewhere."""
        lock = self.path / f"{ref}.lock"
        if _is_stale(lock):
            lock.unlink(missing_ok=True)  # its git was killed, or the machine went down
        status, _, error = self._git.run("update-ref", "-m", "raysearch", ref, new, old)
        if status == 0:
            return True
        if (self._ref(ref) or _NOWHERE) != old:
            return False
        remedy = f"if no git is at work there, delete {lock}" if lock.exists() else "see to the disk and the repository"
        raise GitError(f"{ref} in {self.path} could not be moved: {_first_line(error)}; {remedy}")

    # ---- reading ----

    def read(self, commit: str, path: str) -> str:
        """The text of one file in a commit; see `files`."""
        return self.files(commit, [path])[path]

    def files(self, commit: str, paths: Sequence[str]) -> dict[str, str]:
        """The texts of files in a commit, byte for byte (no line ends converted).

        Raises:
            UserError: The commit has no such file, or it is not UTF-8.
        """
        texts: dict[str, str] = {}
        for path, data in self._blobs(self._full(commit), paths).items():
            if data is None:
                raise UserError(f"commit {commit[:12]} has no file {path}; check the objective's files")
            texts[path] = _decoded(data, f"{path} in commit {commit[:12]}")
        return texts

    def _blobs(self, commit: str, paths: Sequence[str]) -> dict[str, bytes | None]:
        for path in paths:
            if "\n" in path or "\0" in path:
                raise UserError(f"{path!r} is no path that can be read; take the line break out")
        asked = "".join(f"{commit}:{path}\n" for path in paths).encode()
        _, out, _ = self._git.run("cat-file", "--batch", stdin=asked, check=True)
        blobs: dict[str, bytes | None] = {}
        for path in paths:
            header, _, out = out.partition(b"\n")
            kind = header.rsplit(b" ", 2)
            size = int(kind[2]) if kind[-1].isdigit() else None
            blobs[path] = out[:size] if size is not None and kind[1] == b"blob" else None
            out = out if size is None else out[size + 1 :]
        return blobs

    def diff(self, a: str, b: str) -> str:
        """The unified diff from commit `a` to commit `b`, as `commit_patch` takes it on `a`."""
        return self._diff(self._full(a), self._full(b))

    def _diff(self, a: str, b: str) -> str:
        plain = ("--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--text", "--full-index")
        prefixes = ("--src-prefix=a/", "--dst-prefix=b/", "--unified=3")
        _, out, _ = self._git.run("diff-tree", "-r", "-p", *plain, *prefixes, a, b, "--", check=True)
        return _decoded(out, f"the difference from {a[:12]} to {b[:12]}")

    def changed(self, a: str, b: str) -> list[str]:
        """The paths that differ between two commits, sorted."""
        out = self._git.must(
            *("diff-tree", "-r", "-z", "--name-only", "--no-renames"), self._full(a), self._full(b), "--"
        )
        return [path for path in out.split("\0") if path]

    def parents(self, commit: str) -> list[str]:
        """The parents of a commit, the first one first."""
        return self._git.must("rev-list", "--parents", "-n", "1", self._full(commit)).split()[1:]

    def resolve(self, rev: str) -> str:
        """The full sha of what a person calls a commit: a candidate's id, a branch, a short sha.

        Raises:
            UserError: There is no such commit here.
        """
        if _ID.fullmatch(rev):  # first, since an id such as c0001 reads like a short sha as well
            kept = self._ref(f"refs/trials/{rev}")
            if kept is not None:
                return kept
        found = None if rev.startswith("-") or "\0" in rev else self._ref(rev)
        if found is None or not _SHA.fullmatch(found):
            raise UserError(
                f"{rev!r} is no commit of {self.path}; give a sha, a branch such as main, or a candidate's id"
            )
        return found

    def _full(self, commit: str) -> str:
        return commit if _SHA.fullmatch(commit) else self.resolve(commit)

    # ---- merging ----

    def carry(self, candidate_commit: str, *, base: str, onto: str, editable: Sequence[str]) -> str:
        """Merges a candidate's change onto another commit: knobs by name, the rest three-way as text.

        Args:
            candidate_commit: The candidate.
            base: The commit that it was built on.
            onto: The commit to carry its change to.
            editable: Paths that a candidate may change.

        Returns:
            The change as a patch against `onto`, for `commit_patch`.

        Raises:
            Conflict: Both sides changed one thing, or the merge is no valid program.
            Empty: `onto` has the whole change already.
            PatchError: The candidate changes what it may not.
        """
        candidate, base, onto = self._full(candidate_commit), self._full(base), self._full(onto)
        paths = self.changed(base, candidate)
        outside = [path for path in paths if path not in editable]
        if outside:
            raise PatchError(f"candidate {candidate[:12]} changes {outside[0]}; it may only change {_listed(editable)}")
        before, wanted, there = (self._texts(commit, paths) for commit in (base, candidate, onto))
        merged = {path: self._merge(path, before[path], wanted[path], there[path]) for path in paths}
        tree = self._tree(onto, merged)
        patch = self._diff(f"{onto}^{{tree}}", tree)
        if not patch:
            raise Empty(f"the change of candidate {candidate[:12]} is in {onto[:12]} already")
        return patch

    def _texts(self, commit: str, paths: Sequence[str]) -> dict[str, str | None]:
        blobs = self._blobs(commit, paths)
        return {
            path: None if data is None else _decoded(data, f"{path} in commit {commit[:12]}")
            for path, data in blobs.items()
        }

    def _merge(self, path: str, base: str | None, candidate: str | None, onto: str | None) -> str:
        if candidate is None:
            raise PatchError(f"the candidate deletes {path}; a candidate may only change text")
        if onto in (base, candidate):
            return candidate
        if onto is None or base is None:
            raise Conflict(
                f"{path}: {'both sides added it' if base is None else 'it is gone'} in what it is merged onto"
            )
        texts = (base, candidate, onto)
        if path.endswith(".py"):
            texts = align_constants(*texts, path=path)
        merged = self._merge_text(path, *texts)
        check_merge(path, merged, candidate=candidate, onto=onto)
        return merged

    def _merge_text(self, path: str, base: str, candidate: str, onto: str) -> str:
        with tempfile.TemporaryDirectory(prefix="raysearch-") as folder:
            names = [os.path.join(folder, name) for name in ("onto", "base", "candidate")]
            for name, text in zip(names, (onto, base, candidate), strict=True):
                Path(name).write_bytes(text.encode())
            status, out, error = self._git.run(*("merge-file", "-p", "-q", f"--marker-size={_MARKER_SIZE}", *names))
        if status == 0:
            return out.decode()
        if status > 127 or not out:
            raise Conflict(f"{path}: cannot be merged: {_first_line(error)}")
        place = first_conflict(path, out.decode(), onto=onto, marker_size=_MARKER_SIZE)
        raise Conflict(place if status == 1 else f"{place}, and {status - 1} more")


def step_message(
    subject: str,
    *,
    trial: str,
    profile: str,
    val: float,
    delta: float,
    delta_se: float | None,
    n: int,
    proposer: str,
    cost_usd: float,
    holdout: float | None = None,
    whole: float | None = None,
    metric: str = "val_bpb",
) -> str:
    """The message of a step of the ratchet: one line, and trailers as `git interpret-trailers --parse` reads them.

    Args:
        subject: The hypothesis; cut at 72 characters.
        trial: Id of the candidate.
        profile: Slug of the profile.
        val: The metric.
        delta: Its change against the previous champion.
        delta_se: Standard error of `delta`, if known.
        n: Number of pairs behind `delta`.
        proposer: Who had the idea.
        cost_usd: What the idea cost.
        holdout: The metric on the second held-out split.
        whole: The metric on the whole set, where trials are scored on a part of it (`Whole-Bpb`).
        metric: Its name, which becomes a trailer's (`Val-Bpb`).
    """
    title = clean(subject, SUBJECT_CHARS).lstrip("-# ")  # git reads "---" as the start of a patch
    name = "-".join(part.capitalize() for part in re.findall(r"[A-Za-z0-9]+", metric)) or "Metric"
    digits = 4
    if delta_se is not None and 0 < delta_se < math.inf:
        digits = max(digits, min(12, -math.floor(math.log10(delta_se))))
    spread = "" if delta_se is None else f" ± {delta_se:.{digits}f}"
    trailers = {
        "Trial": trial,
        "Profile": profile,
        name: f"{val:.6f}",
        f"Whole-{name.rpartition('-')[2]}": "" if whole is None else f"{whole:.6f}",
        "Holdout": "" if holdout is None else f"{holdout:.6f}",
        "Delta": f"{delta:+.{digits}f}{spread} (n={n})",
        "Proposer": proposer,
        "Cost-Usd": f"{cost_usd:.4f}",
    }
    lines = [f"{key}: {clean(value)}" for key, value in trailers.items() if value]
    return "\n".join([title or clean(trial, SUBJECT_CHARS), "", *lines, ""])


class _Git:
    """GitPython's command object with an environment in which nothing of the user's git shows."""

    def __init__(self, path: Path) -> None:
        try:
            from git import Git  # noqa: PLC0415 - 120 ms, and it fails where git is missing
        except ImportError:
            raise UserError("git was not found on PATH; the study's history is kept in git: install git") from None
        self._path = path
        self._program = Git.GIT_PYTHON_GIT_EXECUTABLE or "git"
        self._command = Git(path)
        self._command.update_environment(**_environment(path))

    def run(
        self, *arguments: str, stdin: bytes = b"", env: Mapping[str, str] | None = None, check: bool = False
    ) -> tuple[int, bytes, str]:
        """Runs git without a shell: its exit status, output and messages.

        Raises:
            GitError: `check` is set and git failed, or the disk did.
        """
        status, out, error = self._once(arguments, stdin, env)
        while status == -signal.SIGINT:  # Ctrl-C came between fork and exec
            status, out, error = self._once(arguments, stdin, env)
        if status and (check or _DISK.search(error)):
            raise GitError(
                f"git {arguments[0]} in {self._path} failed: {_first_line(error)}; see to the disk and the repository"
            )
        return status, out, error

    def _once(self, arguments: Sequence[str], stdin: bytes, env: Mapping[str, str] | None) -> tuple[int, bytes, str]:
        with tempfile.TemporaryFile() as stream:
            stream.write(stdin)
            stream.seek(0)
            return self._command.execute(
                [self._program, *arguments],
                istream=stream,
                with_extended_output=True,
                with_exceptions=False,
                stdout_as_string=False,
                strip_newline_in_stdout=False,
                env=env,
                process_group=0,  # Ctrl-C in a terminal is for us: git ends what it began
            )

    def must(self, *arguments: str, stdin: bytes = b"", env: Mapping[str, str] | None = None) -> str:
        """The output of a git command that only fails when something is wrong with the repository or the disk."""
        return self.run(*arguments, stdin=stdin, env=env, check=True)[1].decode("utf-8", "surrogateescape")


def _environment(path: Path) -> dict[str, str]:
    """What makes git the same for everybody: own repository, own identity, no configuration but the repository's.

    Variables cannot be unset through GitPython, so those that a calling git (a hook, an alias) exports are overridden.
    """
    here = str(path)
    return {
        "GIT_DIR": here,
        "GIT_WORK_TREE": here,
        "GIT_COMMON_DIR": here,
        "GIT_OBJECT_DIRECTORY": os.path.join(here, "objects"),
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": "",
        "GIT_NAMESPACE": "",
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_LITERAL_PATHSPECS": "1",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_COUNT": "0",
        "GIT_CONFIG_PARAMETERS": "",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_DEFAULT_REF_FORMAT": "files",
        "HOME": here,  # git before 2.32 does not know GIT_CONFIG_GLOBAL, and attributes are looked up here as well
        "XDG_CONFIG_HOME": here,
        "GIT_AUTHOR_NAME": _IDENTITY[0],
        "GIT_AUTHOR_EMAIL": _IDENTITY[1],
        "GIT_COMMITTER_NAME": _IDENTITY[0],
        "GIT_COMMITTER_EMAIL": _IDENTITY[1],
    }


@contextmanager
def _index() -> Generator[dict[str, str], None, None]:
    """An index of our own, as environment: the repository has no work tree and no index."""
    with tempfile.TemporaryDirectory(prefix="raysearch-") as folder:
        yield {"GIT_INDEX_FILE": os.path.join(folder, "index")}


def _check_changes(changes: str, base: str, editable: Sequence[str]) -> None:
    """Checks the output of `git diff-index --raw -z`: `:mode mode sha sha status NUL path NUL`, repeated."""
    fields = changes.split("\0")
    if len(fields) < 2:
        raise Empty(f"the patch changes nothing in commit {base[:12]}; drop it")
    for facts, path in zip(fields[::2], fields[1::2], strict=False):
        old_mode, new_mode, _, _, status = facts.removeprefix(":").split(" ")
        if path not in editable:
            raise PatchError(f"the patch touches {clean(path)}; it may only touch {_listed(editable)}")
        if status == "D":
            raise PatchError(f"the patch deletes or renames {path}; it may only change text")
        if new_mode not in ("100644", old_mode) or new_mode == "120000":
            raise PatchError(f"the patch changes the kind or mode of {path}; it may only change text")


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths) or "nothing"


def _name(name: str) -> str:
    if not _ID.fullmatch(name):
        raise UserError(f"{name!r} cannot name a ref; use letters, digits, '-', '_' and single dots")
    return name


def _branch(profile_slug: str) -> str:
    return f"refs/heads/ratchet/{_name(profile_slug)}"


def _is_stale(lock: Path) -> bool:
    try:
        return time.time() - lock.stat().st_mtime > STALE_LOCK_S
    except FileNotFoundError:
        return False


def _decoded(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise UserError(f"{what} is not UTF-8 text; save the file as UTF-8") from None


def _first_line(error: str) -> str:
    line = next((line for line in error.splitlines() if line.strip()), "no message")
    return clean(line.removeprefix("error: ").removeprefix("fatal: "))
