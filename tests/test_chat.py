"""Chat models as a proposer, against a real HTTP server that answers well, badly, or not at all."""

import asyncio
import gzip
import importlib.util
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_kit import Act, Server, fails, forever, hangs, says, sends, uses_tool

from raysearch.errors import UserError
from raysearch.knobs import fingerprint, read_knobs
from raysearch.model import Direction, Operator
from raysearch.proposers import Idea, NoIdea, Request, SpentUp
from raysearch.proposers.chat import MARGIN, RETRY_AFTER_S, SYSTEM, ChatProposer, Closed
from raysearch.proposers.edits import SCHEMA
from raysearch.proposers.endpoints import Api, ChatModel, EndpointError, Structured, estimated_tokens
from raysearch.proposers.prices import FREE, InUse, Price, Purse, is_local, load_prices, price_of

PROGRAM = (
    "LR = 0.02  # in [0.001, 0.3] log: step size\nDEPTH = 6  # in [1, 12]: layers\n\n\ndef train(run):\n    return LR\n"
)
REQUEST = Request("cpu", "base", {"train.py": PROGRAM}, 1, frozenset(), Direction.MINIMIZE)
KEY = "sk-very-secret-key-0123"
ENVIRON = {"OPENAI_API_KEY": KEY, "ANTHROPIC_API_KEY": KEY}
PRICE = Price(input=10.0, output=50.0, cached_input=1.0)
CALL_USD = PRICE.cost_usd(tokens_in=1000, tokens_out=100)


def proposal(depth: object = 8, **changes: Any) -> str:
    edit = {"path": None, "search": "DEPTH = 6", "replace": f"DEPTH = {depth}"}
    usual = {"hypothesis": "deeper", "operator": "tune", "predicted_delta": -0.02, "edits": [edit], "file": None}
    return json.dumps(usual | changes)


GOOD = proposal()
BAD = proposal(edits=[{"path": None, "search": "WIDTH = 6", "replace": "WIDTH = 8"}])
BAD_REASON = (
    "edit 1: SEARCH does not occur in train.py; not 'WIDTH = 6' but, in line 2, 'DEPTH = 6  # in [1, 12]: layers'"
)


class Pauses:
    """Waits in no time, and knows for how long it would have been."""

    def __init__(self) -> None:
        self.waited: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.waited.append(seconds)
        await asyncio.sleep(0.001)


class Told:
    """Stands for the builder of contexts: the program, and how much more might have been said."""

    def __init__(self) -> None:
        self.budgets: list[int] = []

    def __call__(self, request: Request, budget: int) -> str:
        self.budgets.append(budget)
        return f"train.py, of at most {budget} tokens:\n{request.files['train.py']}"


def check(files: Mapping[str, str]) -> None:
    read_knobs(files["train.py"])


class Bench:
    """A server, and a proposer that asks it."""

    def __init__(self, api: Api, *acts: Act, **options: Any) -> None:
        self.server = Server(*acts)
        names = ("temperature", "timeout_s", "structured", "lines_only", "max_output_tokens", "context_tokens", "price")
        settings: dict[str, Any] = {name: options.pop(name) for name in names if name in options}
        path = "/v1" if api is Api.OPENAI else ""
        settings = {"price": PRICE} | settings
        model = ChatModel("m", api, self.server.url + path, **settings)
        self.pauses, self.told = Pauses(), Told()
        self.purse: Purse = options.pop("purse", Purse(None))
        usual: dict[str, Any] = {"context": self.told, "check": check, "purse": self.purse, "prices": {}}
        usual |= {"environ": ENVIRON, "pause": self.pauses, "limit_s": 20.0}
        self.proposer = ChatProposer(options.pop("models", [model]), **(usual | options))

    def ask(self, **changes: Any) -> list[Idea | NoIdea]:
        return list(self.proposer.ask(replace(REQUEST, **changes)))

    def idea(self, **changes: Any) -> Idea:
        (idea,) = self.ask(**changes)
        assert isinstance(idea, Idea), idea
        return idea

    def none(self, **changes: Any) -> NoIdea:
        (none,) = self.ask(**changes)
        assert isinstance(none, NoIdea), none
        assert none.reason.isprintable()
        assert KEY not in none.reason
        return none

    def failure(self, kind: type[Exception] = EndpointError) -> str:
        with pytest.raises(kind) as error:
            self.ask()
        line = str(error.value)
        assert line.isprintable()
        assert KEY not in line
        return line


BenchOf = Callable[..., Bench]


@pytest.fixture
def bench_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[BenchOf]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    made: list[Bench] = []

    def make(*acts: Act, api: Api = Api.OPENAI, **options: Any) -> Bench:
        made.append(Bench(api, *acts, **options))
        return made[-1]

    yield make
    for bench in made:
        bench.proposer.close()
        bench.server.end()


both = pytest.mark.parametrize("api", list(Api), ids=[api.value for api in Api])


# ---- good answers ----


@both
def test_an_answer_becomes_a_patch_that_git_applies(bench_of: BenchOf, api: Api, tmp_path: Path):
    bench = bench_of(says(GOOD, (1000, 100), cached=400), api=api)
    idea = bench.idea()
    assert (idea.operator, idea.hypothesis, idea.predicted_delta) == (Operator.TUNE, "deeper", -0.02)
    assert (idea.proposer, idea.model, idea.tokens_in, idea.tokens_out) == ("chat", "m", 1000, 100)
    assert idea.cost_usd == pytest.approx((600 * 10 + 400 * 1 + 100 * 50) / 1e6)
    assert bench.purse.spent_usd == pytest.approx(idea.cost_usd)
    (tmp_path / "train.py").write_text(PROGRAM)
    subprocess.run(["git", "apply", "-"], input=idea.patch, text=True, cwd=tmp_path, check=True)
    assert (tmp_path / "train.py").read_text() == PROGRAM.replace("DEPTH = 6", "DEPTH = 8")


def test_what_openai_is_asked_has_the_stable_part_first_and_the_strict_schema(bench_of: BenchOf):
    bench = bench_of(says(GOOD), temperature=0.7)
    bench.idea()
    (seen,) = bench.server.seen
    assert seen.path == "/v1/chat/completions"
    assert seen.headers["authorization"] == f"Bearer {KEY}"
    assert seen.body["messages"] == [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": bench.told(REQUEST, bench.told.budgets[0])},
    ]
    form = {"name": "propose", "strict": True, "schema": SCHEMA}
    assert seen.body["response_format"] == {"type": "json_schema", "json_schema": form}
    assert (seen.body["temperature"], seen.body["max_tokens"]) == (0.7, 8_000)
    assert (seen.body["stream"], seen.body["stream_options"]) == (True, {"include_usage": True})


def test_what_anthropic_is_asked_has_the_system_apart_and_the_schema(bench_of: BenchOf):
    bench = bench_of(says(GOOD), api=Api.ANTHROPIC)
    bench.idea()
    (seen,) = bench.server.seen
    assert (seen.path, seen.body["system"], seen.body["max_tokens"]) == ("/v1/messages", SYSTEM, 8_000)
    assert [turn["role"] for turn in seen.body["messages"]] == ["user"]
    assert seen.body["output_config"] == {"format": {"type": "json_schema", "schema": SCHEMA}}
    assert "temperature" not in seen.body
    assert KEY in " ".join(seen.headers.values())


def test_a_model_may_be_held_to_lines_that_are_there(bench_of: BenchOf):
    bench = bench_of(says(GOOD), lines_only=True)
    bench.idea()
    schema = bench.server.seen[0].body["response_format"]["json_schema"]["schema"]
    (place,) = schema["properties"]["edits"]["items"]["anyOf"]
    assert place["properties"]["path"]["enum"] == ["train.py"]
    assert set(place["properties"]["search"]["enum"]) <= set(PROGRAM.splitlines())
    with pytest.raises(UserError, match="lines_only needs a form that is enforced; leave structured = 'text' out"):
        ChatModel("m", lines_only=True, structured=Structured.TEXT)


def test_other_servers_are_told_the_schema_as_they_know_it(bench_of: BenchOf):
    bench = bench_of(says(GOOD), structured=Structured.JSON_OBJECT_SCHEMA)
    bench.idea()
    assert bench.server.seen[0].body["response_format"] == {"type": "json_object", "schema": SCHEMA}
    for api in Api:
        bench = bench_of(says(f"Deeper it is.\n```json\n{GOOD}\n```"), api=api, structured=Structured.TEXT)
        bench.idea()
        assert not {"response_format", "output_config", "tools"} & bench.server.seen[0].body.keys()
    bench = bench_of(uses_tool(GOOD), api=Api.ANTHROPIC, structured=Structured.TOOL)
    assert bench.idea().tokens_out == 100
    body = bench.server.seen[0].body
    assert body["tool_choice"] == {"type": "tool", "name": "propose"}
    assert body["tools"][0]["input_schema"] == SCHEMA


def test_as_many_answers_as_are_asked_for_and_no_call_for_none(bench_of: BenchOf):
    bench = bench_of(says(GOOD), says(proposal(9)), says(proposal(10)))
    assert bench.ask(count=0) == []
    assert bench.server.seen == []
    assert len({idea.patch for idea in bench.ask(count=3) if isinstance(idea, Idea)}) == 3


def test_tokens_are_estimated_where_the_server_counts_none(bench_of: BenchOf):
    for api in Api:
        idea = bench_of(says(GOOD, None), api=api).idea()
        assert idea.tokens_out == estimated_tokens(GOOD)
        assert 500 < idea.tokens_in < 5_000
        assert idea.cost_usd == pytest.approx(PRICE.cost_usd(tokens_in=idea.tokens_in, tokens_out=idea.tokens_out))
    for junk in ((-5, 10), (10**12, 10), ("9", 10), (True, 10), (1.5, 10), (None, None)):
        chunk = {
            "choices": [{"delta": {"content": GOOD}}],
            "usage": dict(zip(("prompt_tokens", "completion_tokens"), junk, strict=True)),
        }
        idea = bench_of(sends(f"data: {json.dumps(chunk)}\n\n".encode())).idea()
        assert idea.tokens_out == estimated_tokens(GOOD)


# ---- answers that cannot be used ----


@both
def test_the_retry_goes_on_in_the_same_conversation_with_the_exact_error(bench_of: BenchOf, api: Api):
    bench = bench_of(says(BAD), says(GOOD, (1300, 100)), api=api)
    idea = bench.idea()
    first, second = bench.server.seen
    assert second.said[:2] == [*first.said, BAD]
    assert f": {BAD_REASON}\n" in second.said[2]
    assert len(second.said) == 3
    assert (idea.tokens_in, idea.tokens_out) == (2300, 200)
    assert idea.cost_usd == pytest.approx(2 * CALL_USD + 300 * 10 / 1e6)


def test_after_one_retry_it_is_no_idea_and_has_cost_both_calls(bench_of: BenchOf):
    bench = bench_of(says(GOOD[:50]), says(BAD))
    assert bench.none() == NoIdea(BAD_REASON, "chat", "m", 2 * CALL_USD, 2000, 200)
    assert len(bench.server.seen) == 2


COMMENT = {"path": None, "search": "layers", "replace": "deep"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\x00\x1b[31m no idea, sorry \ud83d", "the answer holds 0 JSON objects"),
        ("", "the answer is empty"),
        (GOOD[: len(GOOD) // 2], "the answer is no valid JSON"),
        (GOOD.replace("-0.02", "NaN"), "the answer holds NaN"),
        (proposal(edits=[{"path": "harness.py", "search": "a", "replace": "b"}]), "edit 1: 'harness.py' may not be"),
        (proposal(edits=[{"path": "../train.py", "search": "a", "replace": "b"}]), "edit 1: '../train.py' may not be"),
        (proposal(edits=[{"path": "/etc/passwd", "search": "a", "replace": "b"}]), "editable: train.py"),
        (proposal(operator="replicate"), "operator 'replicate' is not allowed"),
        (proposal(6), "the result is the program as it is"),
        (proposal(edits=[COMMENT]), "but for comments and layout that is the program as it is"),
        (proposal(99), "train.py:2: DEPTH = 99 is not in its own range"),
        (proposal("("), "the program must be valid Python"),
        (proposal(edits=[], file="x" * 100_000 + "("), "the program must be valid Python"),
        (proposal(7), "that very program was already tried here"),
        (proposal(hypothesis="\ud83d"), "hypothesis holds half a character"),
    ],
)
def test_an_answer_that_cannot_be_used_says_why(bench_of: BenchOf, text: str, reason: str):
    bench = bench_of(says(text))
    known = {fingerprint({"train.py": PROGRAM.replace("DEPTH = 6", "DEPTH = 7")})}
    none = bench.none(known=known)
    assert reason in none.reason
    assert len(bench.server.seen) == 2
    assert none.reason in bench.server.seen[1].said[2]
    assert REQUEST.files == {"train.py": PROGRAM}


@both
def test_an_answer_that_was_cut_off_says_so(bench_of: BenchOf, api: Api):
    none = bench_of(says(GOOD[:50], stop="length"), api=api).none()
    assert none.reason.startswith("the answer was cut off at 8000 tokens: the answer is no valid JSON")


def test_what_breaks_the_directions_is_refused_with_their_words(bench_of: BenchOf):
    def refusal(request: Request, files: Mapping[str, str], operator: Operator) -> str | None:
        frozen = read_knobs(files["train.py"])["DEPTH"].value != 6
        return f"DEPTH is frozen, and {operator.value} moves it" if frozen else None

    bench = bench_of(says(GOOD), says(proposal(edits=[{"search": "0.02 ", "replace": "0.03 "}])), refusal=refusal)
    assert "LR = 0.03" in bench.idea().patch
    assert "DEPTH is frozen, and tune moves it" in bench.server.seen[1].said[2]


def test_a_model_that_refuses_is_told_that_this_is_no_proposal(bench_of: BenchOf):
    chunk = {"choices": [{"delta": {"refusal": "I will\nnot."}}]}
    assert bench_of(sends(f"data: {json.dumps(chunk)}\n\n".encode())).none().reason == (
        "it holds no proposal: I will not."
    )


# ---- hostile streams ----

EMPTY_EVENT = b'data: {"choices": [{"delta": {"content": ""}}]}\n\n'
PIECE = json.dumps(
    {"type": "content_block_delta", "delta": {"text": "x" * 50_000}, "choices": [{"delta": {"content": "x" * 50_000}}]}
)


@both
@pytest.mark.parametrize(
    "act",
    [
        sends(*[b"event: content_block_delta\ndata: " + PIECE.encode() + b"\n\n"] * 200),
        sends(b"data: " + b"x" * 60_000_000),
        forever(b": " + b"x" * 1_000_000 + b"\n\n", 0),
    ],
    ids=["10 MB in pieces", "one endless line", "comments for ever"],
)
def test_an_answer_that_is_too_long_is_broken_off(
    bench_of: BenchOf, api: Api, act: Act, caplog: pytest.LogCaptureFixture
):
    bench = bench_of(act, api=api)
    none = bench.none()
    assert caplog.text == ""  # nothing that an SDK's generators say of it gets onto the console
    assert none.reason == "m: an answer of more than 400000 characters or 16000000 bytes was broken off"
    assert bench.server.broken.wait(10)
    assert len(bench.server.seen) == 1


@both
@pytest.mark.parametrize(
    "sent",
    [
        b"\xff\xfe\x00garbage" * 100,
        b"<html><body>Please log in</body></html>",
        b"data: {half\n\n",
        b"event: content_block_delta\ndata: {half\n\n",
        b"data: " + b"[" * 200_000 + b"\n\n",
        b"event: message_start\ndata: " + b"[" * 200_000 + b"\n\n",
        b"".join(
            b"event: message_delta\ndata: %b\n\n" % data for data in (b"5", b"[1]", b'"s"', b"null", b'{"choices": 3}')
        ),
        b'event: message_delta\ndata: {"choices": [{"delta": {"content": {}}, "finish_reason": []}], "usage": []}\n\n',
        b'event: message_delta\ndata: {"delta": {"text": 7, "stop_reason": {}}, "usage": "x"}\n\n',
        b"",
    ],
)
def test_what_is_no_stream_of_answers_is_no_idea(bench_of: BenchOf, api: Api, sent: bytes):
    bench = bench_of(sends(sent), api=api)
    none = bench.none()
    assert none.reason in (
        f"m: the server sent what is no answer of the {api.value} API",
        "the answer is empty; answer with exactly one, alone or in a fenced block",
    )
    assert none.cost_usd > 0
    assert bench.purse.spent_usd == pytest.approx(none.cost_usd)


def test_a_compressed_response_is_not_unpacked(bench_of: BenchOf):
    bomb = gzip.compress(b"data: " + b"x" * 50_000_000)
    bench = bench_of(sends(bomb, headers={"content-encoding": "gzip"}))
    assert bench.none().reason == "m: the server sent a compressed answer, which was not asked for"
    assert bench.server.seen[0].headers["accept-encoding"] == "identity"
    bench = bench_of(fails(500, content_encoding="gzip"), api=Api.ANTHROPIC)
    assert "compressed" in bench.none().reason
    assert bench.server.seen[0].headers["accept-encoding"] == "identity"


@both
@pytest.mark.parametrize(
    "act",
    [
        forever(EMPTY_EVENT),
        forever(b"event: ping\ndata: {}\n\n"),
        forever(b": still here\n\n"),
        forever(b"d"),
        hangs,
    ],
    ids=["empty events", "pings", "comments", "a byte at a time", "nothing"],
)
def test_a_stream_without_end_is_ended(bench_of: BenchOf, api: Api, act: Act):
    bench = bench_of(act, api=api, timeout_s=0.3)
    none = bench.none()
    assert none.reason == "m: no whole answer within 0.3 s"
    assert none.cost_usd == pytest.approx(bench.purse.spent_usd)
    assert none.cost_usd > PRICE.worst_usd(tokens_in=0, tokens_out=8_000)  # all of it may have been written
    assert len(bench.server.seen) == 1


def test_an_ask_ends_before_its_limit_whatever_a_call_may_take(bench_of: BenchOf):
    bench = bench_of(says(BAD), forever(EMPTY_EVENT), limit_s=1.0)
    none = bench.none()
    assert none.reason == "no answer within 1 s"
    assert none.cost_usd > CALL_USD + PRICE.worst_usd(tokens_in=0, tokens_out=8_000)
    assert none.tokens_in > 1000
    assert bench.server.broken.wait(10)


def test_what_came_before_the_limit_is_kept(bench_of: BenchOf):
    bench = bench_of(says(GOOD), hangs, limit_s=1.0)
    idea, none = bench.ask(count=5)
    assert isinstance(idea, Idea)
    assert isinstance(none, NoIdea)


# ---- servers in trouble ----


@both
def test_a_busy_server_is_asked_again_when_it_says(bench_of: BenchOf, api: Api):
    bench = bench_of(fails(429, "slow down", retry_after="7"), fails(503, retry_after="0"), says(GOOD), api=api)
    idea = bench.idea()
    assert idea.cost_usd == pytest.approx(CALL_USD)  # a refused call costs nothing
    assert bench.pauses.waited[0] == 7.0
    assert 1.0 <= bench.pauses.waited[1] <= 2.0


def test_pauses_grow_and_no_server_sets_them_at_will(bench_of: BenchOf):
    acts = [fails(status) for status in (500, 502, 503, 504, 529, 408, 409, 429)]
    bench = bench_of(*acts, fails(429, retry_after="86400"), fails(429, retry_after="soon"), says(GOOD), limit_s=3600.0)
    bench.idea()
    waited = bench.pauses.waited
    assert all(2**n / 2 <= pause <= 2**n for n, pause in enumerate(waited[:5]))
    assert waited[8] == RETRY_AFTER_S
    assert 15.0 <= waited[9] <= 30.0


@both
def test_a_server_that_stays_busy_is_given_up_before_the_limit(bench_of: BenchOf, api: Api):
    bench = bench_of(fails(429, "too many requests"), api=api, limit_s=20.0)
    assert bench.failure() == "m: HTTP 429: too many requests"
    assert 4 <= len(bench.server.seen) <= 8
    assert bench.purse.spent_usd == 0.0


def test_what_was_spent_before_the_trouble_is_told(bench_of: BenchOf):
    bench = bench_of(says(BAD), fails(429))
    assert bench.none() == NoIdea("m: HTTP 429: no", "chat", "m", CALL_USD, 1000, 100)


def test_no_server_at_all_is_said_in_a_line(bench_of: BenchOf):
    for api in Api:
        bench = bench_of(says(GOOD), api=api, limit_s=3.0)
        bench.server.end()
        assert bench.failure().startswith("m: Connection error") or api is Api.ANTHROPIC
        assert bench.pauses.waited
        assert bench.purse.spent_usd == 0.0


@both
@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "This model's maximum context length is 4096 tokens. However, you requested 9000 tokens."),
        (400, "the request exceeds the available context size"),
        (400, "prompt is too long: 210000 tokens > 200000 maximum"),
        (413, "payload too large"),
    ],
)
def test_an_overflowing_context_is_halved_once(bench_of: BenchOf, api: Api, status: int, message: str):
    bench = bench_of(fails(status, message), says(GOOD), api=api)
    bench.idea()
    whole, half = bench.told.budgets
    assert (whole, half) == (64_000 - 2 * 8_000 - 1_500, whole // 2)
    assert f"at most {half} tokens" in bench.server.seen[1].said[0]
    bench = bench_of(fails(status, message), api=api)
    assert message in bench.failure()
    assert len(bench.server.seen) == 2


@both
@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_a_server_refuses_is_said_once_in_a_line_without_the_key(bench_of: BenchOf, api: Api, status: int):
    bench = bench_of(fails(status, f"wrong \x1b[31mkey {KEY}\nsee\x00 {'x' * 5_000}"), api=api)
    line = bench.failure()
    assert line.startswith(f"m: HTTP {status}: wrong key … see xxx")
    assert len(line) == 300
    assert len(bench.server.seen) == 1


def test_errors_that_are_no_json_or_have_no_end_are_errors_all_the_same(bench_of: BenchOf):
    def page(handler: Any) -> None:
        handler.head(404, {"content-type": "text/html"})
        handler.wfile.write(b"<h1>not\nfound</h1>")

    assert "HTTP 404" in bench_of(page).failure()

    def endless(handler: Any) -> None:
        handler.head(500)
        while True:
            handler.wfile.write(b"x" * 1_000_000)

    assert "was broken off" in bench_of(endless).none().reason


@both
def test_a_redirect_is_not_followed_with_the_key(bench_of: BenchOf, api: Api):
    other = bench_of(says(GOOD))
    bench = bench_of(fails(307, "elsewhere", location=f"{other.server.url}/v1/chat/completions"), api=api)
    assert "HTTP 307" in bench.failure()
    assert other.server.seen == []


def test_an_error_within_the_stream_is_tried_again_if_nothing_was_said(bench_of: BenchOf):
    said = b'data: {"error": {"message": "overloaded", "type": "overloaded_error"}}\n\n'
    bench = bench_of(sends(said), says(GOOD))
    assert bench.idea().cost_usd == pytest.approx(CALL_USD)
    said = b'event: error\ndata: {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}\n\n'
    bench = bench_of(sends(said), says(GOOD), api=Api.ANTHROPIC)
    assert bench.idea().cost_usd == pytest.approx(CALL_USD)
    begun = b'data: {"choices": [{"delta": {"content": "{"}}]}\n\ndata: {"error": {"message": "overloaded"}}\n\n'
    bench = bench_of(sends(begun), says(GOOD))
    none = bench.none()
    assert none.reason == "m: overloaded"
    assert none.cost_usd > PRICE.worst_usd(tokens_in=0, tokens_out=8_000)


def test_closing_ends_all_calls_in_flight(bench_of: BenchOf):
    bench = bench_of(hangs)
    with ThreadPoolExecutor(4) as threads:
        asks = [threads.submit(bench.ask) for _ in range(4)]
        for _ in asks:
            assert bench.server.arrived.acquire(timeout=10)
        bench.proposer.close()
        for ask in asks:
            with pytest.raises(Closed, match=r"closed while it was asked; \$0.4\d+ was spent on that"):
                ask.result(timeout=10)
    assert bench.purse.spent_usd > 4 * PRICE.worst_usd(tokens_in=0, tokens_out=8_000)
    assert bench.failure(Closed) == "the proposer is closed"
    assert len(bench.server.seen) == 4


# ---- several models ----


def test_models_are_drawn_by_their_weights(bench_of: BenchOf):
    server = bench_of(says(GOOD)).server
    models = [ChatModel(name, base_url=server.url, weight=weight) for name, weight in (("a", 3.0), ("b", 1.0))]
    asked: list[list[str]] = []
    for _ in range(2):
        bench = bench_of(says(GOOD), models=models, seed=7)
        asked.append([bench.idea().model for _ in range(20)])
    assert asked[0] == asked[1]
    assert 11 <= asked[0].count("a") <= 18
    assert [seen.body["model"] for seen in server.seen] == asked[0] + asked[1]


# ---- money ----


def test_the_cap_holds_with_many_calls_in_flight_and_is_used_up(bench_of: BenchOf):
    """Each call may cost $0.5 or so and costs $0.4: of a cap of $3, five or six calls are made, whoever comes first."""
    bench = bench_of(says(GOOD, (2_000, 7_600)), purse=Purse(3.0))
    with ThreadPoolExecutor(16) as threads:
        asks = [threads.submit(bench.ask) for _ in range(16)]
        errors = [ask.exception(timeout=30) for ask in asks]
    made = len(bench.server.seen)
    assert made == 16 - sum(isinstance(error, SpentUp) for error in errors)
    assert bench.purse.spent_usd == pytest.approx(made * 0.4)
    assert 2.4 <= bench.purse.spent_usd <= 3.0
    line = bench.failure(SpentUp)
    assert line.startswith(f"${bench.purse.spent_usd:.2f} of $3.00 spent; the next call may cost $0.")
    assert line.endswith("; raise --max-usd")
    assert len(bench.server.seen) == made


def test_what_was_spent_before_the_cap_was_reached_is_told(bench_of: BenchOf):
    bench = bench_of(says(BAD, (2_000, 7_600)), purse=Purse(0.6))
    none = bench.none()
    assert none.reason.startswith("$0.40 of $0.60 spent")
    assert (none.cost_usd, none.tokens_out) == (pytest.approx(0.4), 7_600)
    bench.failure(SpentUp)


def test_a_purse_adds_up_what_is_spent_and_set_aside():
    purse = Purse(1.0, 0.25)
    purse.reserve(0.5)
    with pytest.raises(InUse) as error:
        purse.reserve(0.5)
    assert str(error.value) == (
        "$0.25 of $1.00 spent, $0.50 set aside for calls in flight; the next call may cost $0.50; raise --max-usd"
    )
    purse.settle(0.5, 0.1)
    purse.reserve(0.65)
    purse.settle(0.65, 0.65)
    assert purse.spent_usd == pytest.approx(1.0)
    with pytest.raises(SpentUp) as error:
        purse.reserve(0.01)
    assert not isinstance(error.value, InUse)
    purse.reserve(0.0)
    free = Purse(None)
    free.reserve(1e9)
    free.settle(1e9, 2.0)
    assert free.spent_usd == 2.0


def test_the_users_prices_come_before_ours(tmp_path: Path):
    path = tmp_path / "prices.toml"
    path.write_text('["gpt-5.5"]\ninput = 1\noutput = 2.5\n\n[mine]\ninput = 0.1\noutput = 0.2\ncached_input = 0.01\n')
    ours, prices = load_prices(), load_prices(path)
    assert prices["mine"] == Price(0.1, 0.2, 0.01)
    assert prices["gpt-5.5"] == Price(1.0, 2.5)
    assert prices["claude-opus-5-5"] == ours["claude-opus-5-5"] == Price(4.0, 20.0, 0.2, 5.0)
    assert all(price.output >= price.input >= (price.cached_input or 0.0) > 0 for price in ours.values())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[m", "price file"),
        ("m = 3", "Expected `object`"),
        ("[m]\ninput = 1", "missing required field `output`"),
        ("[m]\ninput = '1'\noutput = 1", "Expected `float`"),
        ("[m]\ninput = 1\noutput = 1\ncached = 1", "unknown field `cached`"),
        ("[m]\ninput = -1\noutput = 1", "input of 'm' is -1"),
        ("[m]\ninput = 1\noutput = nan", "output of 'm' is nan"),
    ],
)
def test_a_price_file_that_is_none_is_refused_in_a_line(tmp_path: Path, text: str, said: str):
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_prices(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        load_prices(tmp_path / "none.toml")


def test_a_price_that_is_not_known_is_free_nearby_and_refused_under_a_cap():
    notes: list[str] = []
    prices = {"m": PRICE}

    def of(name: str, url: str | None = None, *, capped: bool = True) -> Price:
        return price_of(name, base_url=url, prices=prices, capped=capped, note=notes.append)

    assert of("m") == of("m-20260423") == of("m-2026-04-23", "http://localhost:8080/v1") == PRICE
    assert of("other", "http://localhost:8080/v1") == FREE
    assert notes == []
    with pytest.raises(UserError) as error:
        of("a/other", "https://openrouter.ai/api/v1")
    assert str(error.value) == (
        "the price of model 'a/other' is not known, so a spend cap cannot hold; "
        'add ["a/other"] with input and output in USD per million tokens to a file for --prices'
    )
    assert of("other", capped=False) == FREE
    assert notes[0].startswith("the price of model 'other' is not known, its cost counts as 0; add [other]")


def test_a_model_without_a_price_is_not_asked_any_more_when_a_cap_comes():
    purse = Purse(None)
    proposer = made(models=[ChatModel("unheard-of")], purse=purse)
    purse.limit_usd = 5.0
    with pytest.raises(SpentUp, match="the price of model 'unheard-of' is not known, so a spend cap cannot hold; add"):
        proposer.ask(REQUEST)
    proposer.close()


def test_what_is_local():
    near = ("127.0.0.1", "[::1]", "localhost", "10.0.0.7", "192.168.1.2", "172.16.0.1", "gpu-box", "gpu-box.local")
    far = ("api.openai.com", "8.8.8.8", "172.32.0.1", "example.org", "[2606:4700::1111]")
    assert [host for host in near if not is_local(f"http://{host}:8000/v1")] == []
    assert [host for host in far if is_local(f"https://{host}/v1")] == []
    assert not is_local(None)


# ---- at the start ----


def made(**options: Any) -> ChatProposer:
    usual: dict[str, Any] = {"models": [ChatModel("m", price=PRICE)], "context": Told(), "check": check}
    usual |= {"purse": Purse(None), "prices": {}, "environ": ENVIRON}
    return ChatProposer(**(usual | options))


def test_what_cannot_work_is_refused_before_the_first_ask(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="proposer 'chat' has no model"):
        made(models=[])
    with pytest.raises(UserError, match="model 'm' needs a key: OPENAI_API_KEY is not set"):
        made(environ={})
    with pytest.raises(UserError, match="MY_KEY is not set"):
        made(models=[ChatModel("m", key_env="MY_KEY")])
    with pytest.raises(UserError, match="MY_KEY holds no key") as error:
        made(models=[ChatModel("m", key_env="MY_KEY")], environ={"MY_KEY": f"{KEY}\nx"})
    assert KEY not in str(error.value)
    with pytest.raises(UserError, match="a spend cap cannot hold"):
        made(models=[ChatModel("unheard-of")], purse=Purse(1.0))
    notes: list[str] = []
    made(models=[ChatModel("unheard-of")], note=notes.append)
    assert len(notes) == 1
    made(models=[ChatModel("local", base_url="http://localhost:8080/v1")], environ={}, purse=Purse(1.0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"run: pip install 'autoresearch-ray\[openai\]'"):
        made()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": ""}, "has no proper name"),
        ({"name": "a\nb"}, "has no proper name"),
        ({"base_url": "localhost:8080"}, "is no http(s) address"),
        ({"base_url": "http://me:secret@host/v1"}, "base_url 'host/v1' is no http(s) address without a password"),
        ({"weight": 0.0}, "weight 0.0 must be above 0"),
        ({"weight": float("nan")}, "weight nan must be above 0"),
        ({"temperature": 2.5}, "temperature 2.5 must lie in [0, 2]"),
        ({"timeout_s": 0.0}, "timeout_s 0.0 must be above 0"),
        ({"context_tokens": 8_192}, "it must exceed 17500, or max_output_tokens be less"),
        ({"structured": Structured.TOOL}, "known: json_schema, json_object_schema, text"),
    ],
)
def test_a_model_that_cannot_work_is_refused(settings: dict[str, Any], said: str):
    with pytest.raises(UserError) as error:
        ChatModel(**{"name": "m", **settings})
    assert said in str(error.value)
    assert "secret" not in str(error.value)


def test_a_proposer_says_what_it_is():
    proposer = made(parallel=7, limit_s=90.0)
    assert (proposer.name, proposer.parallel, proposer.limit_s, proposer.wants_brief) == ("chat", 7, 90.0, True)
    assert MARGIN < 1
