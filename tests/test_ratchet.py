"""The study's git repository, with real git: commits, refs, merges, and what hostile or unlucky input does to them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysearch.errors import UserError
from raysearch.knobs import Value, read_knobs, rewrite
from raysearch.ratchet import Conflict, Empty, GitError, Moved, PatchError, Ratchet, step_message, unified_diff

BASE = '''"""A program."""

DEPTH = 8          # in [1, 24]: layers
WIDTH = 64         # in [8, 512]: of the stream
RATE = 0.02        # in [0.001, 0.3] log
BATCH = 2**6       # in [1, 256]
PATTERN = "L"      # in {"L", "SL"}
# rule: WIDTH % DEPTH == 0


def model():
    return "model"


def schedule(progress):
    return 1 - progress


def train(run):
    return model(), schedule(run)
'''
EDITABLE = ["train.py", "extra.py"]


@pytest.fixture
def ratchet(tmp_path: Path) -> Ratchet:
    return Ratchet.create(tmp_path / "repo", {"train.py": BASE, "README.md": "read\n"}, message="base", at=100.0)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Ratchet:
    """One repository for all examples of a property: its commits are named by what is in them."""
    path = tmp_path_factory.mktemp("shared") / "repo"
    return Ratchet.create(path, {"train.py": BASE}, message="base", at=100.0)


def git(where: Path, *arguments: str, stdin: str | None = None) -> str:
    """Plain git, as a user has it."""
    done = subprocess.run(["git", *arguments], cwd=where, input=stdin, capture_output=True, text=True, check=True)
    return done.stdout


def commit(ratchet: Ratchet, text: str, base: str = "main") -> str:
    return ratchet.commit_files(base, {"train.py": text}, message="edit", at=200.0)


def apply(ratchet: Ratchet, patch: str, base: str = "main") -> str:
    made = ratchet.commit_patch(base, patch, editable=EDITABLE, message="m", at=200.0)
    return ratchet.read(made, "train.py")


def step(ratchet: Ratchet, expected: str, candidate: str, *, at: float = 300.0) -> str:
    return ratchet.step("cpu", expected=expected, candidate_commit=candidate, message="a win\n", at=at)


# ---- the repository ----


def test_a_user_can_clone_and_read_the_repository(ratchet: Ratchet, tmp_path: Path):
    git(tmp_path, "clone", "--quiet", str(ratchet.path), "clone")
    assert (tmp_path / "clone" / "train.py").read_text() == BASE
    assert git(tmp_path / "clone", "branch", "--show-current").strip() == "main"
    assert git(ratchet.path, "rev-parse", "--is-bare-repository").strip() == "true"
    assert git(ratchet.path, "fsck", "--strict") == ""
    assert git(ratchet.path, "log", "-1", "--format=%an %cn %at %ct %s", "main") == "raysearch raysearch 100 100 base\n"


def test_creating_again_opens_what_is_there(ratchet: Ratchet):
    ratchet.keep("c0001", "main")
    again = Ratchet.create(ratchet.path, {"README.md": "read\n", "train.py": BASE}, message="other", at=999.0)
    assert again.resolve("main") == ratchet.resolve("main") == again.resolve("c0001")


def test_a_create_that_was_killed_half_way_is_completed(tmp_path: Path):
    partial = tmp_path / "study" / "repo.partial"
    partial.mkdir(parents=True)
    (partial / "HEAD").write_text("ref: refs/heads/ma")
    (partial / "config.lock").write_text("")
    (tmp_path / "study" / "repo").mkdir()
    ratchet = Ratchet.create(tmp_path / "study" / "repo", {"train.py": BASE}, message="base", at=1.0)
    assert ratchet.read("main", "train.py") == BASE
    assert not partial.exists()


def test_another_base_program_or_a_foreign_folder_is_refused(ratchet: Ratchet, tmp_path: Path):
    with pytest.raises(UserError, match="has another base program on `main`"):
        Ratchet.create(ratchet.path, {"train.py": "other"}, message="base", at=1.0)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="move away what is there"):
        Ratchet.create(tmp_path / "foreign", {"train.py": BASE}, message="base", at=1.0)
    assert (tmp_path / "foreign" / "thesis.tex").read_text() == "years of work"


def test_opening_what_is_no_repository_is_a_user_error(tmp_path: Path):
    with pytest.raises(UserError, match="is no repository of a study"):
        Ratchet.open(tmp_path / "missing")
    git(tmp_path, "init", "--quiet", "--bare", "empty")
    with pytest.raises(UserError, match="is no repository of a study"):
        Ratchet.open(tmp_path / "empty")


def test_a_path_with_odd_characters_is_a_path(tmp_path: Path):
    place = tmp_path / "-a $HOME 'b' \"c\" é"
    ratchet = Ratchet.create(place / "repo", {"train.py": BASE}, message="base", at=1.0)
    assert Ratchet.open(place / "repo").read("main", "train.py") == BASE
    assert apply(ratchet, unified_diff("train.py", BASE, "x = 1\n")) == "x = 1\n"


def test_nothing_depends_on_the_users_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def work(place: Path) -> tuple[str, str, str]:
        ratchet = Ratchet.create(place / "repo", {"train.py": BASE, "crlf.py": "a\r\n"}, message="base", at=100.0)
        base = ratchet.resolve("main")
        made = ratchet.commit_patch(
            base, unified_diff("train.py", BASE, BASE + "x = 1  \n"), editable=EDITABLE, message="m", at=200.0
        )
        ratchet.start("cpu", base)
        ratchet.keep("c0001", made)
        onto = commit(ratchet, rewrite(BASE, {"DEPTH": 4}))
        carried = ratchet.carry(made, base=base, onto=onto, editable=EDITABLE)
        return step(ratchet, base, made), ratchet.diff(base, made), carried

    plain = work(tmp_path / "plain")
    home, hooks = tmp_path / "home", tmp_path / "hooks"
    (hooks / "hooks").mkdir(parents=True)
    for name in ("reference-transaction", "hooks/reference-transaction", "pre-commit"):
        (hooks / name).write_text("#!/bin/sh\nexit 1\n")
        (hooks / name).chmod(0o755)
    home.mkdir()
    (home / ".gitattributes").write_text("*.py binary\n")
    (home / ".gitconfig").write_text(
        f"[user]\n\tname = Somebody\n\tsigningkey = none\n[commit]\n\tgpgsign = true\n[init]\n\ttemplateDir = {hooks}\n"
        f"\tdefaultBranch = trunk\n[core]\n\tautocrlf = true\n\thooksPath = {hooks}\n\tquotePath = true\n"
        f"\tattributesFile = {home}/.gitattributes\n[apply]\n\twhitespace = error-all\n\tignoreWhitespace = change\n"
        "[diff]\n\tnoprefix = true\n\texternal = false\n\tmnemonicPrefix = true\n\tcontext = 0\n"
        "[color]\n\tui = always\n[merge]\n\tconflictStyle = diff3\n"
    )
    monkeypatch.setenv("HOME", str(home))
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))  # as in a hook of another repository
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "core.hooksPath")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", str(hooks))
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Somebody")
    monkeypatch.setenv("GIT_COMMITTER_DATE", "@1 +0200")
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", "false")
    monkeypatch.setenv("GIT_DEFAULT_HASH", "sha256")
    monkeypatch.setenv("GIT_NAMESPACE", "other")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert work(tmp_path / "odd") == plain
    assert not (tmp_path / "elsewhere").exists()


def test_a_machine_without_git_is_told_to_install_it(tmp_path: Path):
    code = (
        "from raysearch.ratchet import Ratchet\nfrom raysearch.errors import UserError\n"
        "try:\n    Ratchet.open('x')\nexcept UserError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.count("\n") == 1
    assert "install git" in done.stdout


# ---- commits ----


def test_equal_inputs_make_equal_commits(ratchet: Ratchet, tmp_path: Path):
    other = Ratchet.create(tmp_path / "other", {"README.md": "read\n", "train.py": BASE}, message="base", at=100.9)
    patch = unified_diff("train.py", BASE, BASE.replace("model", "gpt"))
    made = {
        each.commit_patch("main", patch, editable=EDITABLE, message="m", at=200.5)
        for each in (ratchet, other)
        for _ in range(2)
    }
    texts = {"train.py": BASE.replace("model", "gpt")}
    assert made == {ratchet.commit_files("main", texts, message="m", at=200.0)}
    assert made != {ratchet.commit_files("main", texts, message="m", at=201.0)}


def test_a_commit_has_the_texts_byte_for_byte(ratchet: Ratchet):
    texts = {"train.py": "a\r\nb\rc\x0c\u2028é\ud7ff😀", 'sub/é "x".py': "", "new.txt": "\n\n"}
    made = ratchet.commit_files("main", texts, message="m", at=1.0)
    assert ratchet.files(made, list(texts)) == texts
    assert ratchet.read(made, "README.md") == "read\n"
    assert ratchet.changed("main", made) == sorted(texts)


@pytest.mark.parametrize(
    "message", ["", "\n\n", "a\0b", "# x\n---\ndiff --git a/x b/x\n", "\ud800 é", "-m x", "x" * 10**5]
)
def test_a_message_may_be_anything(ratchet: Ratchet, message: str):
    made = ratchet.commit_files("main", {"train.py": "x"}, message=message, at=-5.0)
    shown = git(ratchet.path, "log", "-1", "--format=%B", made).rstrip("\n")
    assert shown == message.replace("\0", "").replace("\ud800", "?").rstrip("\n")


@pytest.mark.parametrize("path", ["../x", "/x", ".git/config", "a\0b", "", "a//b", "./a", "a/../b"])
def test_a_path_that_is_none_is_refused_in_commit_files(ratchet: Ratchet, path: str):
    with pytest.raises(UserError):
        ratchet.commit_files("main", {path: "x"}, message="m", at=1.0)


TEXTS = st.lists(
    st.one_of(
        st.sampled_from(["", "a", "b", "\tc ", "-- d", "++ e", "@@ -1 +1 @@", "\\ No newline"]), st.text(max_size=4)
    ),
    max_size=8,
).flatmap(
    lambda lines: st.sampled_from(["\n", "\r\n"]).map(
        lambda end: end.join(lines).replace("\0", "").encode("utf-8", "ignore")
    )
)


@settings(max_examples=40, deadline=None)
@given(old=TEXTS, new=TEXTS)
def test_any_difference_of_two_texts_applies(shared: Ratchet, old: bytes, new: bytes):
    before, after = old.decode(), new.decode()
    if before == after:
        assert unified_diff("train.py", before, after) == ""
        return
    a, b = commit(shared, before), commit(shared, after)
    for patch in (shared.diff(a, b), unified_diff("train.py", before, after)):
        assert apply(shared, patch, a) == after


@pytest.mark.parametrize("path", ["a b.py", "é.py", 'q"\\.py', "sub/x.py", " x", "-x", "tab\t.py"])
def test_a_difference_names_odd_paths_so_that_it_applies(ratchet: Ratchet, path: str):
    for old in ({path: "1\n2"}, {}):
        base = ratchet.commit_files("main", old, message="m", at=1.0)
        patch = unified_diff(path, old.get(path), "1\n3\n")
        made = ratchet.commit_patch(base, patch, editable=[path], message="m", at=1.0)
        assert ratchet.read(made, path) == "1\n3\n"
        again = ratchet.commit_patch(base, ratchet.diff(base, made), editable=[path], message="m", at=1.0)
        assert again == made


def test_what_models_and_mailers_put_around_a_patch_is_ignored(ratchet: Ratchet):
    patch = unified_diff("train.py", BASE, BASE.replace("RATE = 0.02", "RATE = 0.05"))
    changed = BASE.replace("RATE = 0.02", "RATE = 0.05")
    no_header = patch.split("\n", 1)[1]
    for text in (
        f"Subject: why\n\nBecause.\n---\n{patch}-- \n2.39.5\n",
        f"```diff\n{patch}```\n",
        patch.removesuffix("\n"),
        no_header,
        no_header.replace("a/train.py", "train.py").replace("b/train.py", "train.py"),
        no_header.replace("train.py", "train.py\t2026-01-01 00:00:00"),
    ):
        assert apply(ratchet, text) == changed


@pytest.mark.parametrize("program_ends", ["\n", "\r\n"])
@pytest.mark.parametrize("patch_ends", ["right", "all CRLF", "all LF"])
def test_line_ends_of_a_patch_are_mended_and_those_of_the_program_kept(
    ratchet: Ratchet, program_ends: str, patch_ends: str
):
    for old in (BASE, BASE + "no end"):
        old_text = old.replace("\n", program_ends)
        new_text = old_text.replace("model", "gpt") + "\nlast"
        base = commit(ratchet, old_text)
        patch = unified_diff("train.py", old_text, new_text)
        if patch_ends != "right":
            new_text = new_text.replace("\r\n", "\n").replace("\n", program_ends)
            patch = patch.replace("\r\n", "\n").replace("\n", "\r\n" if patch_ends == "all CRLF" else "\n")
        assert apply(ratchet, patch, base) == new_text


def test_a_patch_that_does_not_fit_says_where(ratchet: Ratchet):
    patch = unified_diff("train.py", BASE.replace("1 - progress", "2 - progress"), BASE.replace("1 - progress", "3"))
    with pytest.raises(PatchError, match=r"^train\.py:\d+: the patch does not fit commit [0-9a-f]{12} there") as error:
        apply(ratchet, patch)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "patch",
    [
        "",
        " \n\n",
        unified_diff("train.py", BASE, BASE),
        '--- a/train.py\n+++ b/train.py\n@@ -1,2 +1,2 @@\n-"""A program."""\n+"""A program."""\n \n',
    ],
)
def test_a_patch_that_changes_nothing_is_empty(ratchet: Ratchet, patch: str):
    with pytest.raises(Empty):
        apply(ratchet, patch)


NEW = "--- /dev/null\n+++ {}\n@@ -0,0 +1 @@\n+x\n"
EDIT = "--- {0}\n+++ {0}\n@@ -1 +1 @@\n-read\n+write\n"


def header(old: str, new: str, *lines: str) -> str:
    return "".join(f"{line}\n" for line in (f"diff --git a/{old} b/{new}", *lines))


def new_file(mode: str, text: str) -> str:
    return header("extra.py", "extra.py", f"new file mode {mode}") + NEW.format("b/extra.py").replace("+x", f"+{text}")


def deletion() -> str:
    hunks = unified_diff("train.py", BASE, "").split("\n", 1)[1].replace("b/train.py", "/dev/null")
    return header("train.py", "train.py", "deleted file mode 100644") + hunks


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        (EDIT.format("a/README.md"), r"touches README\.md; it may only touch train\.py, extra\.py"),
        (EDIT.format("README.md"), r"README\.md"),
        (NEW.format("b/evil.py"), r"touches evil\.py"),
        (NEW.format("b/sub/train.py"), r"touches sub/train\.py"),
        (NEW.format("../evil.py"), r"evil\.py"),
        (NEW.format("b/../evil.py"), r"\.\./evil\.py"),
        (NEW.format("b/../../train.py"), r"train\.py"),
        (NEW.format("/etc/evil"), r"etc/evil"),
        (NEW.format("b//etc/evil"), r"etc/evil"),
        (NEW.format("b/.git/hooks/x"), r"\.git/hooks/x"),
        (NEW.format("b/train.py"), r"train\.py"),
        (NEW.format('"b/tr\\303\\240in.py"'), r"tràin\.py"),
        (
            header("train.py", "extra.py", "similarity index 100%", "rename from train.py", "rename to extra.py"),
            r"deletes or renames train\.py",
        ),
        (
            header("README.md", "train.py", "similarity index 100%", "rename from README.md", "rename to train.py"),
            r"README\.md|train\.py",
        ),
        (
            header("train.py", "t.py", "similarity index 100%", "copy from train.py", "copy to t.py"),
            r"touches t\.py",
        ),
        (header("train.py", "train.py", "old mode 100644", "new mode 100755"), r"kind or mode of train\.py"),
        (header("train.py", "train.py", "old mode 100644", "new mode 120000"), r"train\.py"),
        (new_file("120000", "/etc/passwd"), r"kind or mode of extra\.py"),
        (new_file("100755", "x"), r"kind or mode of extra\.py"),
        (new_file("160000", f"Subproject commit {'1' * 40}"), r"extra\.py|Subproject"),
        (deletion(), r"deletes or renames train\.py"),
        (
            header("train.py", "train.py", "index 12..34 100644", "GIT binary patch", "literal 1", "IcmZPo0", ""),
            "binary",
        ),
        (
            header("train.py", "train.py", "index 12..34 100644", "Binary files a/train.py and b/train.py differ"),
            "train",
        ),
        (unified_diff("train.py", BASE, "a\0b\n"), "binary"),
        (unified_diff("train.py", BASE, "a\ud800b\n"), "UTF-8"),
        ("--- a/train.py\n+++ b/train.py\n@@ -1,9 +1,9 @@\n-x\n", "does not apply"),
        ("I think that the depth should be 9.", "does not apply"),
        ("--output=/tmp/evil", "does not apply"),
    ],
)
def test_a_patch_may_only_change_the_text_of_what_is_editable(ratchet: Ratchet, patch: str, said: str, tmp_path: Path):
    before = sorted(tmp_path.rglob("*.py")), git(ratchet.path, "for-each-ref")
    with pytest.raises(PatchError, match=said) as error:
        apply(ratchet, patch)
    assert "\n" not in str(error.value)
    assert (sorted(tmp_path.rglob("*.py")), git(ratchet.path, "for-each-ref")) == before


def test_an_empty_program_is_a_text_and_no_deletion(ratchet: Ratchet):
    assert apply(ratchet, unified_diff("train.py", BASE, "")) == ""


def test_a_patch_may_add_an_editable_file(ratchet: Ratchet):
    patch = unified_diff("train.py", BASE, "import extra\n") + unified_diff("extra.py", None, "x = 1")
    made = ratchet.commit_patch("main", patch, editable=EDITABLE, message="m", at=1.0)
    assert ratchet.files(made, EDITABLE) == {"train.py": "import extra\n", "extra.py": "x = 1"}


def test_a_typical_patch_is_a_commit_in_a_moment(ratchet: Ratchet):
    seconds: list[float] = []
    for number in range(8):
        began = time.perf_counter()
        apply(ratchet, unified_diff("train.py", BASE, BASE + f"# {number}\n"))
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.25  # about 0.025 on an idle machine; another reading is included


# ---- refs ----


def test_a_kept_candidate_is_found_by_its_id_and_keeping_twice_is_well(ratchet: Ratchet):
    made = commit(ratchet, "x = 1\n")
    for _ in range(2):
        ratchet.keep("c0001", made)
    assert ratchet.resolve("c0001") == ratchet.resolve("refs/trials/c0001") == made
    with pytest.raises(Moved, match="each id is for one commit"):
        ratchet.keep("c0001", "main")
    assert ratchet.resolve("c0001") == made


@pytest.mark.parametrize(
    "name", ["", "a/b", "../x", "-d", "a..b", "a.lock", ".a", "a.", "a b", "a\n", "a~1", "é", "@{1}"]
)
def test_an_id_that_cannot_name_a_ref_is_refused(ratchet: Ratchet, name: str):
    for act in (ratchet.keep, ratchet.start):
        with pytest.raises(UserError, match="cannot name a ref"):
            act(name, "main")


@pytest.mark.parametrize("name", ["c0001", "rtx3060-12gb", "cpu-base", "a.b_c", "a.locks", "a.lockb.c", "0"])
def test_every_id_that_is_allowed_names_a_ref(ratchet: Ratchet, name: str):
    ratchet.keep(name, "main")
    ratchet.start(name, ratchet.resolve("main"))
    assert ratchet.head(name) == ratchet.resolve(name) == ratchet.resolve("main")


def test_a_branch_starts_once(ratchet: Ratchet):
    base, other = ratchet.resolve("main"), commit(ratchet, "x = 1\n")
    assert ratchet.head("cpu") is None
    for _ in range(2):
        ratchet.start("cpu", base)
    assert ratchet.head("cpu") == base
    with pytest.raises(Moved, match=rf"stands at {base[:12]}, not at {other[:12]}"):
        ratchet.start("cpu", other)


def test_a_step_has_the_candidates_tree_and_both_parents(ratchet: Ratchet):
    base, candidate = ratchet.resolve("main"), commit(ratchet, "x = 1\n")
    ratchet.start("cpu", base)
    made = step(ratchet, base, candidate)
    assert ratchet.head("cpu") == made
    assert ratchet.parents(made) == [base, candidate]
    assert ratchet.parents(base) == []
    assert ratchet.diff(made, candidate) == ""
    assert git(ratchet.path, "log", "--first-parent", "--format=%s", "ratchet/cpu") == "a win\nbase\n"
    assert ratchet.head("gpu") is None


def test_after_a_kill_every_effect_is_done_again_without_harm(ratchet: Ratchet):
    base = ratchet.resolve("main")
    patch = unified_diff("train.py", BASE, "x = 1\n")

    def effects(ratchet: Ratchet, until: int) -> str | None:
        made, later = "", None
        for effect in range(until):
            if effect == 0:
                ratchet.start("cpu", base)
            elif effect == 1:
                made = ratchet.commit_patch(base, patch, editable=EDITABLE, message="m", at=200.0)
            elif effect == 2:
                ratchet.keep("c0001", made)
            else:
                later = step(ratchet, base, made, at=300.0 + until + time.monotonic())  # the clock went on
        return later

    for killed_after in (1, 2, 3, 4):
        effects(Ratchet.open(ratchet.path), killed_after)
        if killed_after < 4:
            with_start_only = Ratchet.open(ratchet.path)
            assert with_start_only.head("cpu") == base
    head = ratchet.head("cpu")
    with pytest.raises(Moved):  # `start` alone knows nothing of steps: the journal says that it was done
        ratchet.start("cpu", base)
    assert step(ratchet, base, ratchet.resolve("c0001"), at=999.0) == head == ratchet.head("cpu")
    assert git(ratchet.path, "rev-list", "--count", "--first-parent", "ratchet/cpu").strip() == "2"


def test_a_step_from_where_the_branch_is_no_longer_is_refused(ratchet: Ratchet):
    base, one, two = ratchet.resolve("main"), commit(ratchet, "x = 1\n"), commit(ratchet, "x = 2\n")
    with pytest.raises(Moved, match="stands at None"):
        step(ratchet, base, one)
    ratchet.start("cpu", base)
    first = step(ratchet, base, one)
    with pytest.raises(Moved, match=rf"stands at {first[:12]}, not at {base[:12]}"):
        step(ratchet, base, two)
    assert ratchet.head("cpu") == first
    with pytest.raises(Empty, match="a step must change something"):
        step(ratchet, first, one)


@pytest.mark.parametrize("same", [True, False])
def test_of_two_writers_one_moves_the_branch(ratchet: Ratchet, same: bool):
    base = ratchet.resolve("main")
    ratchet.start("cpu", base)
    candidates = [commit(ratchet, f"x = {0 if same else number}\n") for number in range(4)]
    barrier = threading.Barrier(len(candidates))
    results: list[str | Moved] = []

    def write(number: int) -> None:
        mine = Ratchet.open(ratchet.path)
        barrier.wait()
        try:
            results.append(step(mine, base, candidates[number], at=300.0 + number))
        except Moved as error:
            results.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(candidates))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    moved = [result for result in results if isinstance(result, Moved)]
    made = {result for result in results if isinstance(result, str)}
    assert made == {ratchet.head("cpu")}
    assert len(moved) == (0 if same else 3)
    assert len(results) == 4


def test_a_lock_that_a_killed_git_left_is_removed_and_a_fresh_one_named(ratchet: Ratchet):
    base, candidate = ratchet.resolve("main"), commit(ratchet, "x = 1\n")
    ratchet.start("cpu", base)
    lock = ratchet.path / "refs/heads/ratchet/cpu.lock"
    lock.write_text("")
    with pytest.raises(GitError, match=f"delete {re.escape(str(lock))}"):
        step(ratchet, base, candidate)
    assert ratchet.head("cpu") == base
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    assert step(ratchet, base, candidate) == ratchet.head("cpu")
    assert not lock.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_disk_that_cannot_be_written_is_not_held_against_the_patch(ratchet: Ratchet):
    objects = ratchet.path / "objects"
    objects.chmod(0o500)
    try:
        with pytest.raises(GitError, match="see to the disk and the repository"):
            apply(ratchet, unified_diff("train.py", BASE, "unseen = 1\n"))
    finally:
        objects.chmod(0o700)


def test_a_broken_repository_is_not_held_against_the_patch(ratchet: Ratchet):
    base = ratchet.resolve("main")
    shutil.rmtree(ratchet.path / "objects")
    for act in (
        lambda: apply(ratchet, unified_diff("train.py", BASE, ""), base),
        lambda: ratchet.read(base, "train.py"),
    ):
        with pytest.raises(UserError) as error:
            act()
        assert "\n" not in str(error.value)


# ---- reading ----


def test_what_a_commit_lacks_is_named(ratchet: Ratchet):
    for path in ("missing.py", "sub/train.py", "", "..", "a\nb"):
        with pytest.raises(UserError):
            ratchet.read("main", path)
    with pytest.raises(UserError, match=r"has no file missing\.py"):
        ratchet.files("main", ["train.py", "missing.py", "README.md"])


def test_a_commit_of_a_user_is_read_as_it_is(ratchet: Ratchet, tmp_path: Path):
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(ratchet.path), "clone")
    (clone / "train.py").rename(clone / "moved.py")
    (clone / "latin.py").write_bytes(b"# \xe9\n")
    git(clone, "add", "-A")
    git(clone, "-c", "user.name=u", "-c", "user.email=e", "commit", "-qm", "mine")
    git(clone, "push", "--quiet", "origin", "HEAD:mine")
    assert ratchet.changed("main", "mine") == ["latin.py", "moved.py", "train.py"]
    with pytest.raises(UserError, match=r"latin\.py in commit mine is not UTF-8"):
        ratchet.read("mine", "latin.py")
    with pytest.raises(UserError, match="is not UTF-8"):
        ratchet.diff("main", "mine")
    with pytest.raises(PatchError, match="may only change"):
        ratchet.carry("mine", base="main", onto="main", editable=EDITABLE)
    (clone / "latin.py").unlink()
    git(clone, "-c", "user.name=u", "-c", "user.email=e", "commit", "-qam", "mine")
    git(clone, "push", "--quiet", "origin", "HEAD:mine")
    assert "rename from" not in ratchet.diff("main", "mine")
    with pytest.raises(PatchError, match=r"deletes or renames train\.py"):
        ratchet.commit_patch("main", ratchet.diff("main", "mine"), editable=["train.py", "moved.py"], message="", at=1)
    with pytest.raises(PatchError, match=r"deletes train\.py"):
        ratchet.carry("mine", base="main", onto="main", editable=["train.py", "moved.py"])


@pytest.mark.parametrize(
    "rev",
    [
        "",
        "nope",
        "--all",
        "-h",
        "^main",
        "main^{tree}",
        "main:train.py",
        "main..main",
        "a\0b",
        "a\nb",
        "0" * 39,
        "HEAD~9",
    ],
)
def test_what_is_no_commit_is_refused(ratchet: Ratchet, rev: str):
    with pytest.raises(UserError, match="is no commit of"):
        ratchet.resolve(rev)


def test_a_person_may_name_a_commit_in_any_of_gits_ways(ratchet: Ratchet):
    sha = ratchet.resolve("main")
    ratchet.start("cpu", sha)
    assert {ratchet.resolve(rev) for rev in (sha, sha[:7], "HEAD", "ratchet/cpu", "refs/heads/main", "main~0")} == {sha}
    assert ratchet.files("HEAD", []) == {}


def test_an_id_that_reads_like_a_short_sha_is_the_candidates(ratchet: Ratchet):
    made, other = commit(ratchet, "x = 1\n"), ratchet.resolve("main")
    ratchet.keep(made[:5], other)
    assert ratchet.resolve(made[:5]) == other
    assert ratchet.resolve(made[:8]) == made


# ---- merging ----


def merge(ratchet: Ratchet, *, base: str = BASE, candidate: str, onto: str) -> str:
    origin = commit(ratchet, base)
    ours, theirs = commit(ratchet, candidate, origin), commit(ratchet, onto, origin)
    patch = ratchet.carry(ours, base=origin, onto=theirs, editable=EDITABLE)
    return apply(ratchet, patch, theirs)


def test_different_knobs_of_one_block_merge_by_name(ratchet: Ratchet):
    merged = merge(
        ratchet, candidate=rewrite(BASE, {"DEPTH": 4, "BATCH": 32}), onto=rewrite(BASE, {"WIDTH": 128, "RATE": 0.1})
    )
    assert merged == rewrite(BASE, {"DEPTH": 4, "BATCH": 32, "WIDTH": 128, "RATE": 0.1})


def test_knobs_merge_whatever_the_padding_that_an_editor_left(ratchet: Ratchet):
    candidate = BASE.replace("DEPTH = 8 ", "DEPTH = 16 ").replace("RATE = 0.02 ", "RATE=0.1 ")
    onto = BASE.replace("WIDTH = 64         #", "WIDTH = 256 #").replace("BATCH = 2**6 ", "BATCH = 128 ")
    merged = merge(ratchet, candidate=candidate, onto=onto)
    values = {name: knob.value for name, knob in read_knobs(merged).items()}
    assert values == {"DEPTH": 16, "WIDTH": 256, "RATE": 0.1, "BATCH": 128, "PATTERN": "L"}
    assert "WIDTH = 256 # in [8, 512]: of the stream\n" in merged


def test_a_knob_and_its_range_may_change_on_different_sides(ratchet: Ratchet):
    onto = BASE.replace("in [1, 24]: layers", "in [1, 48]: layers of the model")
    merged = merge(ratchet, candidate=rewrite(BASE, {"DEPTH": 16}), onto=onto)
    assert "DEPTH = 16         # in [1, 48]: layers of the model\n" in merged


def test_code_and_knobs_merge_together(ratchet: Ratchet):
    candidate = rewrite(BASE, {"DEPTH": 4}).replace('"model"', '"gpt"') + "\n\ndef more():\n    pass"
    onto = rewrite(BASE, {"WIDTH": 128}).replace("1 - progress", "2 - progress")
    merged = merge(ratchet, candidate=candidate, onto=onto)
    expected = rewrite(BASE, {"DEPTH": 4, "WIDTH": 128}).replace('"model"', '"gpt"').replace("1 - pro", "2 - pro")
    assert merged == expected + "\n\ndef more():\n    pass"


def test_equal_changes_on_both_sides_are_one(ratchet: Ratchet):
    both = rewrite(BASE, {"DEPTH": 4}).replace('"model"', '"gpt"')
    merged = merge(ratchet, candidate=rewrite(both, {"RATE": 0.1}), onto=both.replace("DEPTH = 4 ", "DEPTH = 2**2 "))
    assert merged == rewrite(both.replace("DEPTH = 4 ", "DEPTH = 2**2 "), {"RATE": 0.1})


def test_a_change_that_is_there_already_is_empty(ratchet: Ratchet):
    changed = rewrite(BASE, {"DEPTH": 4}).replace('"model"', '"gpt"')
    with pytest.raises(Empty, match="already"):
        merge(ratchet, candidate=changed, onto=changed)
    with pytest.raises(Empty, match="already"):
        merge(ratchet, candidate=rewrite(BASE, {"DEPTH": 4}), onto=changed)


F, G = (BASE.replace("1 - progress", f"{name}(progress)") for name in "fg")


def ranged(text: str) -> str:
    return BASE.replace("# in [1, 24]: layers", text)


@pytest.mark.parametrize(
    ("candidate", "onto", "said"),
    [
        (
            rewrite(BASE, {"DEPTH": 4, "RATE": 0.1}),
            rewrite(BASE, {"DEPTH": 16, "WIDTH": 128}),
            r"^train\.py: DEPTH was 8, is 4 in the candidate and 16 in what it is merged onto$",
        ),
        (
            rewrite(BASE, {"RATE": 0.1, "PATTERN": "SL"}),
            BASE.replace("RATE = 0.02 ", "RATE = 1e-1 ").replace('PATTERN = "L"', "PATTERN = 1"),
            r"PATTERN was \"L\", is \"SL\" in the candidate and 1 in",
        ),
        (F, G, r"^train\.py:16: both sides changed 'return g\(progress\)'"),
        (F, f"# moved\n\n\n{G}", r"^train\.py:19: both sides changed 'return g\(progress\)'"),
        (F, BASE.replace("    return 1 - progress\n", ""), r"^train\.py:\d+: both sides changed 'return f"),
        (F.replace("A prog", "Some prog"), G.replace("A prog", "The prog"), r"^train\.py:1: .*, and 1 more$"),
        (f"{BASE}NEW = 1\n", f"NEW = 2\n{BASE}", r"NEW is new on both sides, 1 in the candidate and 2 in"),
        (
            rewrite(BASE, {"DEPTH": 16}),
            rewrite(BASE, {"WIDTH": 72}),
            r"train\.py: the merged knobs break the rule WIDTH % DEPTH == 0",
        ),
        (
            rewrite(BASE, {"DEPTH": 16}),
            ranged("# in [1, 10]"),
            r"the merge is not valid: train\.py:3: DEPTH = 16 is not in its own range",
        ),
        (
            rewrite(BASE, {"DEPTH": 4}),
            BASE.replace("DEPTH = 8          # in [1, 24]: layers\n", ""),
            r"^train\.py:\d+: both sides",
        ),
        (ranged("# in [1, 32]"), ranged("# in [1, 64]"), r"^train\.py:3: both sides"),
    ],
)
def test_a_conflict_names_the_knob_or_the_line(ratchet: Ratchet, candidate: str, onto: str, said: str):
    with pytest.raises(Conflict, match=said) as error:
        merge(ratchet, candidate=candidate, onto=onto)
    assert "\n" not in str(error.value)


def test_two_sides_that_each_parse_may_merge_to_what_does_not(ratchet: Ratchet):
    base = "if a:\n    b = 1\n    c = 1\n    d = 1\n    e = 1\nz = 1\n"
    candidate, onto = base.replace("if a:", "with a:"), base.replace("z = 1", "else:\n    b = 2\nz = 1")
    with pytest.raises(Conflict, match=r"the merge is not valid: train\.py:6: "):
        merge(ratchet, base=base, candidate=candidate, onto=onto)


def test_what_is_no_python_already_is_merged_as_text(ratchet: Ratchet):
    assert merge(ratchet, candidate=BASE + "(\n", onto="# x\n" + BASE) == f"# x\n{BASE}(\n"


def test_files_without_python_merge_as_text_and_new_ones_are_taken(ratchet: Ratchet):
    base = ratchet.commit_files("main", {"notes.txt": "1\n2\n3\n4\n5\n"}, message="m", at=1.0)
    ours = ratchet.commit_files(base, {"notes.txt": "one\n2\n3\n4\n5\n", "extra.py": "x = 1\n"}, message="m", at=1.0)
    onto = ratchet.commit_files(base, {"notes.txt": "1\n2\n3\n4\nfive\n"}, message="m", at=1.0)
    editable = ["notes.txt", "extra.py"]
    patch = ratchet.carry(ours, base=base, onto=onto, editable=editable)
    made = ratchet.commit_patch(onto, patch, editable=editable, message="m", at=1.0)
    assert ratchet.files(made, editable) == {"notes.txt": "one\n2\n3\n4\nfive\n", "extra.py": "x = 1\n"}
    other = ratchet.commit_files(base, {"extra.py": "x = 2\n"}, message="m", at=1.0)
    with pytest.raises(Conflict, match=r"extra\.py: both sides added it"):
        ratchet.carry(ours, base=base, onto=other, editable=editable)


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_other_line_ends_merge_too(ratchet: Ratchet, end: str):
    def sides(values: dict[str, Value]) -> str:
        return rewrite(BASE.replace("\n", end), values)

    merged = merge(ratchet, base=sides({}), candidate=sides({"DEPTH": 4}), onto=sides({"WIDTH": 128}))
    assert merged == sides({"DEPTH": 4, "WIDTH": 128})


NUMBERS = st.integers(1, 9)
SIDES = st.sampled_from(["none", "candidate", "onto"])


@st.composite
def constants(draw: st.DrawFn, number: int) -> tuple[str, str, str, str]:
    padding, comment = " " * draw(NUMBERS), draw(st.sampled_from(["# in [0, 10**6]: é", "# why", ""]))
    values = draw(NUMBERS), draw(st.integers(10, 10**6))
    # a tool keeps the comment in its column, most editors do not
    old, careless = (f"KNOB_{number} = {value}{padding}{comment}\n" for value in values)
    new = draw(st.sampled_from([careless, rewrite(old, {f"KNOB_{number}": values[1]})]))
    return versions(old, new, draw(SIDES))


@st.composite
def functions(draw: st.DrawFn, number: int) -> tuple[str, str, str, str]:
    old = f"\n\ndef function_{number}(x):\n    y = {draw(NUMBERS)}\n    return x + y\n"
    new = old.replace("    y = ", f"    x *= {draw(NUMBERS)}\n    y = 10 + ")
    return versions(old, new, draw(SIDES))


@st.composite
def edits(draw: st.DrawFn) -> tuple[str, str, str, str]:
    """Base, candidate, onto and what they should merge to: each part is changed on one side at most."""
    parts = [draw(constants(number)) for number in range(draw(st.integers(2, 6)))]
    parts += [draw(functions(number)) for number in range(draw(st.integers(1, 4)))]
    base, candidate, onto, union = ("".join(column) for column in zip(*parts, strict=True))
    return base, candidate, onto, union


def versions(old: str, new: str, side: str) -> tuple[str, str, str, str]:
    changed = old if side == "none" else new
    return old, new if side == "candidate" else old, new if side == "onto" else old, changed


@settings(max_examples=40, deadline=None)
@given(edits())
def test_independent_edits_of_knobs_and_code_merge_without_loss(shared: Ratchet, edited: tuple[str, str, str, str]):
    base, candidate, onto, union = edited
    if candidate == base:
        return
    merged = merge(shared, base=base, candidate=candidate, onto=onto)
    # comments keep their column while there is room: padding may differ, nothing else
    assert re.sub(r" +#", " #", merged) == re.sub(r" +#", " #", union)
    if onto == base:
        assert merged == candidate


# ---- messages ----


def test_the_message_of_a_step_reads_as_designed():
    message = step_message(
        "deeper is better", trial="c0007", profile="rtx3060-12gb", val=0.9979, delta=-0.00312, delta_se=0.00041, n=3,
        proposer="tune", cost_usd=0.0, holdout=1.0012, whole=0.9951,
    )  # fmt: skip
    assert message == (
        "deeper is better\n\nTrial: c0007\nProfile: rtx3060-12gb\n"
        "Val-Bpb: 0.997900\nWhole-Bpb: 0.995100\nHoldout: 1.001200\n"
        "Delta: -0.0031 ± 0.0004 (n=3)\nProposer: tune\nCost-Usd: 0.0000\n"
    )


@settings(max_examples=25, deadline=None)
@given(
    subject=st.one_of(st.text(max_size=100), st.sampled_from(["---", "--- a", "#", "Trial: x\n\nTrial: y", "x " * 99])),
    words=st.text(max_size=8),
    numbers=st.tuples(st.floats(-1e6, 1e6), st.floats(-9, 9), st.one_of(st.none(), st.floats(0, 9))),
)
def test_a_message_of_anything_has_a_subject_and_trailers_that_git_parses(
    shared: Ratchet, subject: str, words: str, numbers: tuple[float, float, float | None]
):
    val, delta, spread = numbers
    message = step_message(
        subject, trial="c0007", profile="cpu", val=val, delta=delta, delta_se=spread, n=2, proposer=f"p{words}",
        cost_usd=0.25, metric=f"m_{words}",
    )  # fmt: skip
    made = shared.commit_files("main", {"train.py": "x"}, message=message, at=1.0)
    shown = git(shared.path, "log", "-1", "--format=%B", made)
    parsed = git(shared.path, "interpret-trailers", "--parse", stdin=shown).splitlines()
    assert [line.split(":")[0] for line in parsed][:2] == ["Trial", "Profile"]
    assert [line.split(":")[0] for line in parsed][3:] == ["Delta", "Proposer", "Cost-Usd"]
    assert parsed[2].startswith("M")
    assert f"{float(parsed[3].split()[1]):+.4f}" == f"{delta:+.4f}"
    title = message.split("\n", 1)[0]
    assert 0 < len(title) <= 72
    assert title.isprintable()


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from raysearch.ratchet import Ratchet
signal.signal(signal.SIGINT, lambda *_: None)
ratchet = Ratchet.create(Path(sys.argv[1]), {"train.py": "A = 1\\n"}, message="base", at=0.0)
print("ready", flush=True)
for number in range(15):
    commit = ratchet.commit_files("main", {"train.py": f"A = {number}\\n"}, message="next", at=1.0)
    ratchet.keep(f"c{number:04d}", commit)
os._exit(0)  # without the interpreter's end, in which Ctrl-C kills
"""


def test_ctrl_c_in_a_terminal_ends_no_git_in_the_middle_of_its_work(tmp_path: Path):
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "repo")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    while child.poll() is None:
        os.killpg(child.pid, signal.SIGINT)
        time.sleep(0.01)
    assert child.communicate()[1] == ""
    assert child.returncode == 0
