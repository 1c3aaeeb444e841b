"""Coding agents: what they find, what counts as their proposal, what is refused by name, and that nothing is left.

The agents here are small programs, run as real ones are; the real ones are at the end, where they are installed.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from agent_stub import LAST, NEW, OLD, TOKENS_IN, TOKENS_OUT, a_home, configured, file_in, installed, stub_mind
from hypothesis import given, settings
from hypothesis import strategies as st

from raysearch import leftovers
from raysearch.directions import Directions
from raysearch.errors import UserError
from raysearch.knobs import fingerprint, syntax_tree
from raysearch.model import Direction, Operator
from raysearch.proposers import Idea, NoIdea, Request, SpentUp
from raysearch.proposers.agent import KEPT, KEPT_LOG_BYTES, AgentProposer, Surroundings
from raysearch.proposers.agent_commands import CodingAgent, Output, arguments, parse_agent, template, templates
from raysearch.proposers.agent_output import HYPOTHESIS_CHARS, MAX_TOKENS, MAX_USD, read_claim, read_output
from raysearch.proposers.agent_run import AGENT_MARK

PROGRAM = "LR = 0.02  # in [0.001, 0.3] log: step size\n\n\ndef train(run):\n    return LR\n"
HARNESS = "def evaluate():\n    return 1.0\n"
EDIT = "text = open('train.py').read()\nopen('train.py', 'w').write(text.replace('0.02', '0.01'))\n"
HANG = "import signal\nsignal.pause()\n"


def request(count: int = 1, known: frozenset[str] = frozenset(), files: Mapping[str, str] | None = None) -> Request:
    files = files or {"train.py": PROGRAM}
    directions = Directions(prose="Small models only.")
    return Request("cpu", "base", files, count, known, Direction.MINIMIZE, directions=directions)


def check(files: Mapping[str, str]) -> None:
    for path, text in files.items():
        syntax_tree(text, path=path)


@dataclass
class Purse:
    """Money that is counted; `left` may not be passed."""

    left: float = float("inf")
    settled: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])

    def reserve(self, usd: float) -> None:
        if usd > self.left:
            raise SpentUp(f"{self.left} USD are left; raise --max-usd")
        self.left -= usd

    def settle(self, reserved: float, actual: float) -> None:
        self.left += reserved - actual
        self.settled.append((reserved, actual))


@dataclass
class Lab:
    """Makes proposers of small programs; closes them at the end."""

    folder: Path
    purse: Purse = field(default_factory=Purse)
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    made: list[AgentProposer] = field(default_factory=list[AgentProposer])

    @property
    def base(self) -> Path:
        return self.folder / "agents"

    def program(self, code: str) -> Path:
        path = self.folder / f"fake{len(list(self.folder.glob('fake*.py')))}.py"
        path.write_text(code)
        return path

    def fake(self, code: str, *extra: str, **settings: Any) -> AgentProposer:
        command = (sys.executable, str(self.program(code)), "{prompt}", *extra)
        return self.proposer(CodingAgent("fake", command, **{"timeout_s": 60.0, **settings}))

    def proposer(self, agent: CodingAgent) -> AgentProposer:
        around = Surroundings(
            base=self.base,
            context=lambda request, tokens: f"Profile {request.profile}, {tokens} tokens.",
            check=check,
            purse=self.purse,
            protected={"lib/harness.py": HARNESS, "prepare.py": "DATA = 1\n"},
            environ=self.environ,
            clock=time.monotonic,
        )
        self.made.append(AgentProposer(agent, around))
        return self.made[-1]

    def answer(self, code: str, **settings: Any) -> Idea | NoIdea:
        (answer,) = self.fake(code, **settings).ask(request())
        return answer

    def idea(self, code: str, **settings: Any) -> Idea:
        answer = self.answer(code, **settings)
        assert isinstance(answer, Idea), answer
        return answer

    def refused(self, code: str, **settings: Any) -> str:
        answer = self.answer(code, **settings)
        assert isinstance(answer, NoIdea), answer
        assert answer.proposer == "fake"
        assert "\n" not in answer.reason
        return answer.reason

    def kept(self) -> list[str]:
        return sorted(path.name for path in (self.base / "fake" / "kept").glob("*"))

    def at_work(self) -> list[Path]:
        return list(self.base.glob("*/at-work/*"))

    def processes(self) -> list[int]:
        return leftovers.marked(lambda marks: marks.get(AGENT_MARK, "").startswith(str(self.base)))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    for proposer in lab.made:
        proposer.close()
    assert lab.processes() == []


def eventually(holds: Callable[[], object], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# ---- the proposal ----


def test_the_edit_is_the_proposal_and_the_last_message_says_why(lab: Lab):
    idea = lab.idea(EDIT + "print('Hypothesis: steps are too long\\nOperator: Tune\\nPredicted delta: −0.02 bpb')")
    assert "-LR = 0.02" in idea.patch
    assert "+LR = 0.01" in idea.patch
    assert (idea.operator, idea.hypothesis, idea.predicted_delta) == (Operator.TUNE, "steps are too long", -0.02)
    assert (idea.proposer, idea.model, idea.cost_usd) == ("fake", "fake", 0.0)
    assert lab.at_work() == []
    assert lab.kept() == []


def test_the_patch_applies(lab: Lab, tmp_path: Path):
    idea = lab.idea(EDIT)
    (tmp_path / "train.py").write_text(PROGRAM)
    subprocess.run(["git", "apply", "-"], input=idea.patch.encode(), cwd=tmp_path, check=True)
    assert (tmp_path / "train.py").read_text() == PROGRAM.replace("0.02", "0.01")


def test_an_edit_counts_whatever_the_exit_status(lab: Lab):
    assert "+LR = 0.01" in lab.idea(EDIT + "raise SystemExit(1)").patch


def test_line_ends_are_the_programs_own(lab: Lab):
    code = "data = open('train.py', 'rb').read()\nopen('train.py', 'wb').write(data.replace(b'0.02', b'0.01'))"
    (idea,) = lab.fake(code).ask(request(files={"train.py": PROGRAM.replace("\n", "\r\n")}))
    assert isinstance(idea, Idea)
    assert "+LR = 0.01  # in [0.001, 0.3] log: step size\r\n" in idea.patch
    assert idea.patch.count("\n-") == 2  # the header's line and the one that was changed


def test_an_agent_finds_what_it_needs_and_nothing_else(lab: Lab):
    told = lab.folder / "told.json"
    lab.environ |= {"ANTHROPIC_API_KEY": "secret", "MY_KEY": "own", "PYTHONPATH": "x", "GIT_DIR": "y"}
    code = f"""
import json, os, pathlib, subprocess, sys
here = pathlib.Path('.')
files = {{str(p): [p.read_text(), oct(p.stat().st_mode & 0o777)] for p in here.rglob('*')
         if p.is_file() and '.git' not in p.parts}}
git = subprocess.run(['git', 'rev-parse', '--show-toplevel'], capture_output=True, text=True).stdout.strip()
found = dict(files=files, env=dict(os.environ), prompt=sys.argv[1], stdin=sys.stdin.read(), git=git, cwd=os.getcwd(),
             rest=sys.argv[2:], leader=os.getsid(0) == os.getpid())
json.dump(found, open({str(told)!r}, 'w'))
{EDIT}"""
    proposer = lab.fake(code, "{workdir}", "{files}", env=("MY_KEY", "ABSENT", "SET=it"), timeout_s=60)
    assert isinstance(proposer.ask(request())[0], Idea)
    found = json.loads(told.read_text())
    assert found["files"] == {
        "train.py": [PROGRAM, "0o644"],
        "lib/harness.py": [HARNESS, "0o444"],
        "prepare.py": ["DATA = 1\n", "0o444"],
        "program.md": ["Small models only.", "0o444"],
        "CONTEXT.md": ["Profile cpu, 24000 tokens.", "0o444"],
    }
    assert found["stdin"] == ""
    assert found["leader"]
    assert found["cwd"] == found["git"] == found["rest"][0]  # the repository around the study is not the agent's
    assert found["rest"][1:] == ["train.py"]
    assert "edit train.py now" in found["prompt"]
    env = found["env"]
    assert (env["PATH"], env["MY_KEY"], env["SET"]) == (os.environ["PATH"], "own", "it")
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert not {"ANTHROPIC_API_KEY", "PYTHONPATH", "GIT_DIR", "ABSENT"} & env.keys()


def test_an_agent_may_have_a_prompt_of_its_own(lab: Lab):
    reason = lab.refused("import sys\nprint(sys.argv[1])", prompt="Change {files} or {nothing}.")
    assert reason == "it changed nothing: it said 'Change train.py or {nothing}.'"


def test_no_file_holds_the_keys_of_the_environment(lab: Lab):
    lab.environ["MY_KEY"] = "a-secret-key"
    code = "import subprocess\nprint(subprocess.run(['grep', '-rl', 'a-secret-key', '..'], capture_output=True).stdout)"
    assert lab.refused(code, env=("MY_KEY",)) == "it changed nothing: it said \"b''\""


def test_what_an_agent_says_of_its_key_is_taken_out_and_what_it_writes_of_it_is_refused(lab: Lab):
    lab.environ["MY_KEY"] = "a-secret-key"
    said = "import os\nprint('the key is ' + os.environ['MY_KEY'])\n"
    assert lab.refused(said, env=("MY_KEY",)) == "it changed nothing: it said 'the key is …'"
    written = EDIT + "open('train.py', 'a').write('# ' + os.environ['MY_KEY'])"
    assert lab.refused("import os\n" + written, env=("MY_KEY",)).startswith("it wrote a key of its environment")
    beside = "os.mkdir('lib/x'); open('lib/x/notes', 'w').write(os.environ['MY_KEY']); open('plain', 'w')"
    assert lab.refused(f"import os\n{beside}", env=("MY_KEY",)).startswith("it touched")
    assert lab.kept() == ["0001", "0002", "0003"]
    files = [path for path in lab.base.rglob("*") if path.is_file()]
    assert {"run.log", "reason.txt", "plain"} <= {path.name for path in files}
    assert [path for path in files if b"a-secret-key" in path.read_bytes()] == []


# ---- what is refused, by name ----

REPLACE = "import os, shutil\nos.remove('train.py')\n"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('I would rather not')", "it changed nothing: it said 'I would rather not'"),
        ("raise SystemExit(7)", "it changed nothing: exit status 7; it said nothing"),
        (EDIT + "import os; os.chmod('prepare.py', 0o644); open('prepare.py', 'a').write('#')", "prepare.py (changed)"),
        (EDIT + "import os; os.chmod('lib/harness.py', 0o644)", "it touched lib/harness.py (its mode); it may change"),
        (EDIT + "import os; os.remove('program.md')", "it touched program.md (removed); it may change train.py alone"),
        (EDIT + "import os; os.remove('CONTEXT.md'); os.symlink('train.py', 'CONTEXT.md')", "CONTEXT.md (changed)"),
        (EDIT + "open('lib/notes.txt', 'w').write('x')", "it touched lib/notes.txt; it may change train.py alone"),
        ("import os; os.rename('train.py', 'train2.py')", "it touched train2.py; it may change train.py alone"),
        (EDIT + "import os; os.symlink('/etc/passwd', 'link')", "it touched link (a symbolic link); it may change"),
        (EDIT + "import os; os.mkdir('d', 0o700); open('d/x', 'w'); os.chmod('d', 0)", "it touched d/x; it may"),
        (EDIT + "for n in range(9): open(f'{n}.txt', 'w')", "0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 4 more; it may"),
        (EDIT + "open('a\\n\\x1b[31mb', 'w')", "it touched a b; it may change"),
        (REPLACE, "train.py is gone"),
        (REPLACE + "os.symlink('/etc/passwd', 'train.py')", "train.py is no regular file any more"),
        (REPLACE + "os.mkfifo('train.py')", "train.py is no regular file any more"),
        (REPLACE + "os.mkdir('train.py')", "train.py is gone"),
        (REPLACE + "shutil.rmtree(os.getcwd())", "its folder cannot be read"),
        (EDIT + "import os; os.mkdir('lib/.git'); open('lib/.git/config', 'w')", "it touched lib/.git/config; it may"),
        (EDIT + "import os; os.mkdir('d'); [open(f'd/{n}', 'w') for n in range(10_001)]", "more than 10000 files"),
        ("open('train.py', 'ab').write(b'# \\xff')", "train.py is not UTF-8 at byte 78"),
        ("open('train.py', 'ab').write(b'# \\0')", "train.py holds a NUL"),
        ("open('train.py', 'ab').write(b'#' * 2**20)", "train.py is larger than 1 MiB"),
        ("open('train.py', 'a').write('def f(:')", "train.py"),  # as the check says it
        ("open('train.py', 'a').write('# better')", "its program was run before, or is about to be"),
    ],
)
def test_what_is_no_edit_of_train_py_is_refused_by_name(lab: Lab, code: str, reason: str):
    said = lab.refused(code)
    assert reason in said
    assert lab.at_work() == []
    (kept,) = lab.kept()
    assert (lab.base / "fake" / "kept" / kept / "reason.txt").read_text() == f"{said}\n"


def test_what_agents_leave_for_themselves_is_left_alone(lab: Lab):
    code = "import os\nfor n in ('.claude', '.aider.tags', '__pycache__'): os.mkdir(n); open(n + '/x', 'w')\n"
    assert "+LR = 0.01" in lab.idea(code + "open('.aider.chat.history.md', 'w')\n" + EDIT).patch


def test_a_program_that_was_run_is_refused_and_so_is_a_second_of_the_same(lab: Lab):
    edited = fingerprint({"train.py": PROGRAM.replace("0.02", "0.01")})
    (answer,) = lab.fake(EDIT).ask(request(known=frozenset({edited})))
    assert isinstance(answer, NoIdea)
    assert "was run before" in answer.reason
    first, second = lab.fake(EDIT).ask(request(count=2))
    assert isinstance(first, Idea)
    assert isinstance(second, NoIdea)


def test_the_last_folders_that_came_to_nothing_are_kept_across_restarts(lab: Lab):
    for _ in range(KEPT):
        lab.refused("print('x' * 10)")
    assert lab.kept() == ["0001", "0002", "0003", "0004", "0005"]
    kept = lab.base / "fake" / "kept" / "0005"
    assert (kept / "run.log").read_text().strip() == "x" * 10
    assert (kept / "work" / "train.py").read_text() == PROGRAM
    assert not (kept / "order.json").exists()
    lab.refused("import os, signal; os.mkdir('locked'); open('locked/x', 'w'); os.chmod('locked', 0)")
    assert lab.kept() == ["0002", "0003", "0004", "0005", "0006"]


def test_what_is_kept_executes_nothing_for_whoever_looks(lab: Lab):
    lab.refused(
        "import os\nos.makedirs('a/.git')\nopen('a/b', 'w')\nos.symlink('/', 'root')\nopen('a/.git/config', 'w')"
    )
    (kept,) = lab.kept()
    work = lab.base / "fake" / "kept" / kept / "work"
    assert (work / "a" / "b").exists()
    assert not list(work.glob("a/.git"))
    assert not (work / ".git").exists()


def test_an_agent_that_turns_its_folder_into_a_link_has_us_touch_nothing_else(lab: Lab):
    for depth in (".", ".."):
        elsewhere = lab.folder / f"elsewhere{len(depth)}"
        (elsewhere / "work").mkdir(parents=True)
        (elsewhere / "work" / "train.py").write_text(PROGRAM + "X = 1\n")
        for folder in (elsewhere, elsewhere / "work"):
            folder.chmod(0o755)
        target = elsewhere if depth == ".." else elsewhere / "work"
        code = f"import os, shutil\nhere = os.path.abspath({depth!r})\nos.rename(here, here + '-was')\n"
        said = lab.answer(code + f"os.symlink({str(target)!r}, here)\n")
        assert isinstance(said, NoIdea)
        assert (elsewhere / "work" / "train.py").read_text() == PROGRAM + "X = 1\n"
        found = {path.name for path in elsewhere.rglob("*")}
        assert found - {"exit.json"} == {"work", "train.py"}  # the supervisor only knows the one name
        assert {folder.stat().st_mode & 0o777 for folder in (elsewhere, elsewhere / "work")} == {0o755}
    lab.fake(EDIT)
    assert lab.at_work() == []


def test_a_log_that_is_no_file_is_not_read(lab: Lab):
    code = "import os\nfor n in ('run.log', 'last_message.txt', 'reason.txt'):\n    "
    code += "os.path.exists('../' + n) and os.remove('../' + n)\n    os.mkfifo('../' + n)\n"
    assert lab.refused(code) == "it changed nothing: it said nothing"
    assert "+LR = 0.01" in lab.idea(code + EDIT).patch


# ---- limits ----


def child_that_stays(pids: Path, then: str) -> str:
    """A program that leaves a process in a session of its own, with an empty environment, which holds its output."""
    stay = f"import os, signal; os.setsid(); open({str(pids)!r}, 'w').write(str(os.getpid())); signal.pause()"
    return f"""
import os, subprocess, sys, time
subprocess.Popen([sys.executable, '-c', {stay!r}], env={{}})
while not os.path.exists({str(pids)!r}) or not open({str(pids)!r}).read():
    time.sleep(0.01)
{then}"""


def test_an_agent_that_hangs_is_ended_and_its_half_done_edit_dropped(lab: Lab):
    pids = lab.folder / "pids"
    reason = lab.refused(child_that_stays(pids, EDIT + HANG), timeout_s=1.0)
    assert reason == "not done within 1 s in all; what it had changed by then is dropped"
    assert not is_alive(int(pids.read_text()))


def test_what_an_agent_leaves_running_does_not_hold_the_answer_and_is_ended(lab: Lab):
    pids = lab.folder / "pids"
    assert "+LR = 0.01" in lab.idea(child_that_stays(pids, EDIT)).patch
    assert not is_alive(int(pids.read_text()))


def test_an_agent_that_kills_its_supervisor_takes_nothing_else_with_it(lab: Lab):
    pids = lab.folder / "pids"
    stay = f"import os, signal; os.setsid(); open({str(pids)!r}, 'w').write(str(os.getpid())); signal.pause()"
    code = f"""
import os, signal, subprocess, sys, time
subprocess.Popen([sys.executable, '-c', {stay!r}])
while not os.path.exists({str(pids)!r}) or not open({str(pids)!r}).read():
    time.sleep(0.01)
os.kill(os.getppid(), signal.SIGKILL)
signal.pause()"""
    assert lab.refused(code).startswith("its supervisor failed: it was killed")
    assert leftovers.marks(int(pids.read_text())) == {}  # a zombie has none


def test_a_flood_of_output_does_no_harm(lab: Lab):
    flood = "import sys\nfor _ in range(50): sys.stdout.write('x' * 2**20)\n"
    idea = lab.idea(EDIT + flood + "print('\\nHypothesis: loud')")
    assert idea.hypothesis == "loud"
    reason = lab.refused(EDIT + "import sys\nwhile True: sys.stdout.write('x' * 2**20)\n")
    assert reason == "it printed more than 64 MiB; what it had changed by then is dropped"
    (kept,) = lab.kept()
    assert (lab.base / "fake" / "kept" / kept / "run.log").stat().st_size == KEPT_LOG_BYTES


def test_close_ends_what_is_at_work_and_nothing_is_started_afterwards(lab: Lab):
    pids = lab.folder / "pids"
    proposer = lab.fake(child_that_stays(pids, EDIT + HANG), max_usd=0.5)
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(proposer.ask(request(count=3)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    eventually(lambda: pids.exists() and pids.read_text() and len(lab.at_work()) == 2)
    eventually(lambda: all((root / "supervisor.log").exists() for root in lab.at_work()))  # both were started
    proposer.close()
    for thread in threads:
        thread.join()
    assert answers == [[], []]
    assert lab.processes() == []
    assert lab.at_work() == []
    assert not is_alive(int(pids.read_text()))
    assert lab.purse.settled == [(0.5, 0.5)] * 2  # nobody knows what they had cost
    assert proposer.ask(request()) == []
    assert lab.purse.settled[2:] == [(0.5, 0.0)]


def test_what_a_killed_coordinator_left_is_ended_at_the_next_start(lab: Lab):
    root = lab.base / "fake" / "at-work" / "0007"
    root.mkdir(parents=True)
    env = {**os.environ, AGENT_MARK: str(root)}
    left = subprocess.Popen([sys.executable, "-c", HANG], env=env)
    other = subprocess.Popen([sys.executable, "-c", HANG], env=env | {AGENT_MARK: str(lab.folder / "elsewhere")})
    try:
        lab.fake(EDIT)
        assert left.wait() == -9
        assert other.poll() is None
        assert lab.at_work() == []
    finally:
        other.kill()
        other.wait()


def test_several_ideas_share_the_time_limit_of_one_ask(lab: Lab):
    count = lab.folder / "count"
    code = f"import pathlib, time\np = pathlib.Path({str(count)!r})\nn = len(p.read_text()) if p.exists() else 0\n"
    code += "p.write_text('x' * (n + 1))\nopen('train.py', 'a').write(f'X = {n}\\n')\n"
    proposer = lab.fake(code)
    assert len(proposer.ask(request(count=3))) == 3
    times = iter([0.0, 31.0])  # the first took more than half of the 60 s
    proposer._around = replace(proposer._around, clock=lambda: next(times))  # pyright: ignore[reportPrivateUsage]
    assert len(proposer.ask(request(count=3))) == 1
    assert proposer.limit_s > 60.0


# ---- money ----

RESULT = {"type": "result", "subtype": "success", "result": "Hypothesis: paid", "total_cost_usd": 0.125}


def test_what_is_reported_is_settled_and_else_the_most_that_it_may_cost(lab: Lab):
    idea = lab.idea(EDIT + f"print({json.dumps(RESULT)!r})", max_usd=0.5, output=Output.CLAUDE)
    assert (idea.cost_usd, idea.hypothesis) == (0.125, "paid")
    assert lab.idea(EDIT, max_usd=0.5, output=Output.CLAUDE).cost_usd == 0.5
    answer = lab.answer(HANG, max_usd=0.5, output=Output.CLAUDE, timeout_s=0.5)
    assert isinstance(answer, NoIdea)
    assert answer.cost_usd == 0.5
    assert lab.idea(EDIT).cost_usd == 0.0
    assert lab.purse.settled == [(0.5, 0.125), (0.5, 0.5), (0.5, 0.5), (0.0, 0.0)]


def test_tokens_are_priced_where_an_agent_names_no_cost(lab: Lab):
    turn = {"type": "turn.completed", "usage": {"input_tokens": 3000, "output_tokens": 200}}
    proposer = lab.fake(EDIT + f"print({json.dumps(turn)!r})", max_usd=0.5, output=Output.CODEX, model="m")
    prices = {"m": (1e-6, 1e-5)}
    proposer._around = replace(  # pyright: ignore[reportPrivateUsage]
        proposer._around,  # pyright: ignore[reportPrivateUsage]
        price=lambda model, read, written: read * prices[model][0] + written * prices[model][1],
    )
    (idea,) = proposer.ask(request())
    assert idea.cost_usd == pytest.approx(0.005)
    assert lab.purse.settled == [(0.5, idea.cost_usd)]


def test_nothing_is_run_that_cannot_be_paid_and_what_was_paid_is_kept(lab: Lab):
    lab.purse.left = 0.6
    proposer = lab.fake(EDIT, max_usd=0.5)
    assert len(proposer.ask(request(count=2))) == 1
    with pytest.raises(SpentUp, match="raise --max-usd"):
        proposer.ask(request())
    assert lab.purse.settled == [(0.5, 0.5)]


def test_a_run_that_cannot_begin_costs_nothing_and_is_said(lab: Lab):
    proposer = lab.fake(EDIT, max_usd=0.5)
    (lab.base / "fake").parent.mkdir(parents=True, exist_ok=True)
    (lab.base / "fake").write_text("a file in the way")
    with pytest.raises(OSError, match="fake"):
        proposer.ask(request())
    assert lab.purse.settled == [(0.5, 0.0)]


# ---- what they say ----


def test_the_last_claim_counts_cleaned_and_short():
    message = (
        "Hypothesis: an earlier one\n> **Hypothesis:** **more\x1b[31m \u202eheads\x00**\r\n- `Operator: simplify`.\n"
    )
    claim = read_claim(message + "Predicted delta: nan")
    assert (claim.hypothesis, claim.operator, claim.predicted_delta) == ("more heads", Operator.SIMPLIFY, None)
    assert len(read_claim("Hypothesis: " + "x" * 10_000).hypothesis) == HYPOTHESIS_CHARS
    assert read_claim("I did it.\n\n").hypothesis == "I did it."
    assert read_claim("").hypothesis == "(no hypothesis given)"


@pytest.mark.parametrize("word", ["transfer", "replicate", "keep", "", "tune everything"])
def test_an_operator_that_says_where_a_change_came_from_is_not_an_agents_to_claim(word: str):
    assert read_claim(f"Operator: {word}").operator is Operator.DRAFT


@pytest.mark.parametrize("cost", ["NaN", "-1", "1e99", '"1"', "true", "null", "[]", "{}"])
def test_a_cost_that_cannot_be_is_none(cost: str):
    usage = f'"usage": {{"input_tokens": {cost}, "output_tokens": 1{"0" * 400}}}'
    said = read_output(Output.CLAUDE, f'warning\n{{"type": "result", "total_cost_usd": {cost}, {usage}}}\nbye')
    assert (said.cost_usd, said.tokens_in, said.tokens_out) == (None, 0, 0)


HOSTILE = [
    *("Hypothesis:" + " " * 10**6, "\n" * 10**6, '{"a":' * 10**5, '{"a":\n' * 10**5, "{\n" * 10**6, "`" * 10**6),
    *("Tokens: 1 sent, " + ", 1" * 10**5, "Tokens: 1k sent, ..,, received. Cost: $1.2.3 session"),
    *('{"type": "result", "modelUsage": [1], "usage": 3}', '{"type": "item.completed", "item": "x"}', '{"error": []}'),
    *('{"type": "error", "error": {"data": 1}, "part": []}', '{"response": {}, "stats": {"models": {"m": null}}}'),
]


@pytest.mark.parametrize("output", Output)
@settings(max_examples=25)
@given(text=st.text() | st.sampled_from(["{}", "[]", '{"type": "result"}', '{"type": "turn.completed"}']))
def test_any_output_is_read(output: Output, text: str):
    said = read_output(output, text)
    read_claim(said.message)


@pytest.mark.parametrize("output", Output)
def test_hostile_output_is_read_in_no_time(output: Output):
    for text in HOSTILE:
        said = read_output(output, text)
        assert said.cost_usd is None or 0 <= said.cost_usd <= MAX_USD
        assert 0 <= said.tokens_in <= MAX_TOKENS
        assert "\n" not in read_claim(said.message + text).hypothesis


# ---- command lines ----


def test_templates_fill_their_places_and_leave_out_what_is_empty():
    for name, agent in templates().items():
        plain = arguments(
            agent, prompt="P {model}", workdir=Path("/w"), last_message=Path("/l"), files=["a.py", "b.py"]
        )
        assert plain[0] == name
        assert "P {model}" in plain  # the prompt's own braces are no places
        assert not any("{" in word for word in plain if word != "P {model}")
        assert not {"--model", "-m", "--max-budget-usd"} & {*plain}
        chosen = replace(agent, model="best", max_usd=0.25)
        full = arguments(chosen, prompt="P", workdir=Path("/w"), last_message=Path("/l"), files=["a.py", "b.py"])
        assert "best" in full
        assert ("0.2500" in full) == (name == "claude")


def test_a_users_table_begins_from_a_known_agent_or_stands_alone():
    mine = parse_agent("mine", {"like": "codex", "model": "m", "timeout_s": 60})
    assert (mine.name, mine.model, mine.timeout_s) == ("mine", "m", 60.0)
    assert (mine.command, mine.output) == (template("codex").command, Output.CODEX)
    assert parse_agent("claude", {"max_usd": 0.5}) == replace(template("claude"), max_usd=0.5)
    alone = parse_agent("own", {"command": ["own", ["-m", "{model}"], "{prompt}"]})
    assert alone == CodingAgent("own", ("own", ("-m", "{model}"), "{prompt}"))


@pytest.mark.parametrize(
    ("name", "table", "words"),
    [
        ("codexx", {}, ["'codexx' is not known", "known: claude, codex, gemini, opencode, aider", "take one of"]),
        ("x", {"like": "y"}, ["'y' is not known"]),
        ("claude", {"modell": "m"}, ["'modell' is not known", "model"]),
        ("claude", {"timeout_s": "long"}, ["[agents.claude]", "timeout_s"]),
        ("claude", {"timeout_s": 0}, ["timeout_s = 0", "above 0"]),
        ("claude", {"max_usd": -1}, ["max_usd = -1", "0 or more"]),
        ("own", {"command": []}, ["`command` must begin with the program"]),
        ("own", {"command": ["own", "{promt}"]}, ["{promt}", "known: {prompt}"]),
        ("../own", {"command": ["own"]}, ["'../own'", "rename"]),
    ],
)
def test_a_wrong_table_is_one_line_with_the_remedy(name: str, table: dict[str, Any], words: list[str]):
    with pytest.raises(UserError) as caught:
        parse_agent(name, table)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_program_that_is_not_there_is_said_at_the_start(lab: Lab):
    with pytest.raises(UserError, match=r"'no-such-agent' is not on PATH.*install it there"):
        lab.proposer(CodingAgent("fake", ("no-such-agent", "{prompt}")))


# ---- real programs ----


@pytest.fixture
def home() -> Iterator[Path]:
    with a_home() as folder:
        yield folder


ANSWERS = {"claude": 3, "codex": 2, "opencode": 3, "gemini": 2}  # that the stub gives each


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_a_real_agent_edits_by_its_own_tools_and_says_why(lab: Lab, home: Path, name: str):
    installed(name)
    with stub_mind(file_in) as url:
        lab.environ, model = configured(name, home, url)
        agent = replace(template(name), model=model, max_usd=1.0 if name == "claude" else 0.0, timeout_s=120.0)
        (idea,) = lab.proposer(agent).ask(request())
    assert isinstance(idea, Idea), idea
    assert f"-{OLD}" in idea.patch
    assert f"+{NEW}" in idea.patch
    assert LAST.endswith("-0.01")
    assert idea.hypothesis == "a smaller step ends lower"
    assert (idea.operator, idea.predicted_delta) == (Operator.TUNE, -0.01)
    assert (idea.tokens_in, idea.tokens_out) == (ANSWERS[name] * TOKENS_IN, ANSWERS[name] * TOKENS_OUT)
    assert (0 < idea.cost_usd < 1) == (name == "claude")
    assert idea.model


SMALL = """\
LR = 0.02  # in [0.001, 0.3] log: step size
DEPTH = 4  # in [1, 8]: layers


def train(run):
    return LR * DEPTH
"""


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_aider_with_a_real_model_proposes_an_edit(lab: Lab, home: Path):
    """A small model often says what it would do and does not do it: it is asked until it does, a few times."""
    installed("aider")
    url = os.environ.get("RAYSEARCH_LLM_BASE_URL")
    if not url:
        pytest.skip("no model: set RAYSEARCH_LLM_BASE_URL to an OpenAI-compatible endpoint, as http://…/v1")
    lab.environ = {"PATH": os.environ["PATH"], "HOME": str(home), "OPENAI_API_BASE": url, "OPENAI_API_KEY": "x"}
    proposer = lab.proposer(replace(template("aider"), model="openai/local", timeout_s=120.0))
    answers: list[Idea | NoIdea] = []
    while len(answers) < 8 and not any(isinstance(answer, Idea) for answer in answers):
        answers += proposer.ask(request(files={"train.py": SMALL}))
    print(f"asked {len(answers)} times: {answers}")
    assert isinstance(answers[-1], Idea)
    assert answers[-1].tokens_in
    assert answers[-1].tokens_out
