"""One call of a chat model over HTTP: a conversation goes out, a text and its tokens come back, within set bounds.

It decides nothing about proposals, tries nothing twice and knows no price: `chat` does. The SDKs are imported when the
first call is made.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from raysearch.errors import UserError
from raysearch.proposers.prices import Price, is_local
from raysearch.secrecy import SECRET_CHARS
from raysearch.wording import clean

MAX_BYTES = 16_000_000  # of a response on the wire: each word of an answer comes in an event of some hundred bytes
MAX_ANSWER_CHARS = 400_000
MAX_TOKENS = 10_000_000  # of one call; a server that says more is not believed
LINE_CHARS = 300  # of what a server says, in a message
CONNECT_S = 10.0
OVERHEAD_TOKENS = 1_500  # what every request holds beside what the proposer is told: the task and the schema
BYTES_PER_TOKEN = 3.5  # of English and programs, to estimate

NO_KEY = "none"  # what a server gets that wants none

_NAME = "propose"  # of the schema, and of the tool


class Api(Enum):
    """What the server speaks; the value is the name of the SDK and of our optional extra."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


class Structured(Enum):
    """How the server is told the form of the answer.

    TOOL is a forced call of one tool, for servers of the Anthropic API that know no other way; its newest models
    refuse that. JSON_OBJECT_SCHEMA is how llama-cpp-python has it.
    """

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT_SCHEMA = "json_object_schema"
    TOOL = "tool"
    TEXT = "text"


_URLS = {Api.OPENAI: "https://api.openai.com/v1", Api.ANTHROPIC: "https://api.anthropic.com"}
_KEYS = {Api.OPENAI: "OPENAI_API_KEY", Api.ANTHROPIC: "ANTHROPIC_API_KEY"}
_WAYS = {
    Api.OPENAI: (Structured.JSON_SCHEMA, Structured.JSON_OBJECT_SCHEMA, Structured.TEXT),
    Api.ANTHROPIC: (Structured.JSON_SCHEMA, Structured.TOOL, Structured.TEXT),
}


@dataclass(frozen=True)
class ChatModel:
    """A model and where it is.

    Attributes:
        name: As the server knows it.
        base_url: Of the server; None for the API of the model's maker.
        key_env: Environment variable that holds the key; empty for the usual one of the API.
        weight: How often it is asked, relative to the others.
        temperature: None leaves it to the server; many models that reason refuse any other.
        max_output_tokens: Of an answer, hidden reasoning included.
        context_tokens: Of prompt and answer together.
        timeout_s: Seconds that a call may take to the end of its answer.
        structured: How the form of the answer is enforced.
        lines_only: Whether the form lists the lines that an edit may replace, for small models, on servers that enforce
            any schema (llama.cpp, vLLM); the others refuse one so long.
        price: In place of the price table's.
    """

    name: str
    api: Api = Api.OPENAI
    base_url: str | None = None
    key_env: str = ""
    weight: float = 1.0
    temperature: float | None = None
    max_output_tokens: int = 8_000
    context_tokens: int = 64_000
    timeout_s: float = 300.0
    structured: Structured = Structured.JSON_SCHEMA
    lines_only: bool = False
    price: Price | None = None

    def __post_init__(self) -> None:
        """Refuses values that cannot work.

        Raises:
            UserError: One of them.
        """
        name = f"model {self.name!r}"
        if not self.name or clean(self.name) != self.name:
            raise UserError(f"{name} has no proper name; give it as the server knows it")
        url = urlsplit(self.base_url or _URLS[self.api])
        if url.scheme not in ("http", "https") or not url.hostname or url.username or url.password:
            shown = clean((self.base_url or "").rpartition("@")[2])
            raise UserError(f"{name}: base_url {shown!r} is no http(s) address without a password; give one")
        if self.key_env and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):  # it may be the key itself
            raise UserError(f"{name}: key_env is no name of an environment variable; export the key, and give its name")
        if not 0 < self.weight < 1e9:
            raise UserError(f"{name}: weight {self.weight} must be above 0; leave the model out instead")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise UserError(f"{name}: temperature {self.temperature} must lie in [0, 2]; leave it out for the default")
        if not 0 < self.timeout_s < 1e6:
            raise UserError(f"{name}: timeout_s {self.timeout_s} must be above 0 seconds")
        if self.max_output_tokens < 1 or self.prompt_tokens < 1:
            least = 2 * self.max_output_tokens + OVERHEAD_TOKENS
            raise UserError(
                f"{name}: context_tokens {self.context_tokens} leave no room for a prompt beside two answers of "
                f"{self.max_output_tokens} tokens; it must exceed {least}, or max_output_tokens be less"
            )
        if self.structured not in _WAYS[self.api]:
            known = ", ".join(way.value for way in _WAYS[self.api])
            raise UserError(f"{name}: structured {self.structured.value!r} is not for {self.api.value}; known: {known}")
        if self.lines_only and self.structured is Structured.TEXT:
            raise UserError(f"{name}: lines_only needs a form that is enforced; leave structured = 'text' out")

    @property
    def prompt_tokens(self) -> int:
        """How much it can be told: there has to be room for an answer, what was wrong with it, and another."""
        return self.context_tokens - 2 * self.max_output_tokens - OVERHEAD_TOKENS

    def key(self, environ: Mapping[str, str]) -> str:
        """The key, which no message and no journal may hold.

        Raises:
            UserError: It is not set and the server is not a local one, or it is no key.
        """
        name = self.key_env or _KEYS[self.api]
        key = environ.get(name, "").strip()
        if not key and is_local(self.base_url):
            return NO_KEY
        if not key:
            raise UserError(
                f"model {self.name!r} needs a key: {name} is not set; export it, or name another variable by key_env "
                "in a file for --minds"
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(f"model {self.name!r}: {name} holds no key (one word of plain characters); set it again")
        return key


def check_sdk(api: Api) -> None:
    """Sees that the SDK is installed, without importing it.

    Raises:
        UserError: It is not.
    """
    if importlib.util.find_spec(api.value) is None:
        raise UserError(
            f"chat models of the {api.value} API need the package {api.value!r}, which is not installed; "
            f"run: pip install 'autoresearch-ray[{api.value}]'"
        )


@dataclass(frozen=True)
class Turn:
    """What one side said."""

    role: str  # user or assistant
    text: str


@dataclass(frozen=True)
class Usage:
    """Tokens of a call, as the server counted them.

    Attributes:
        cached, written: Those of the prompt that were read from, or put into, the server's cache.
    """

    tokens_in: int
    tokens_out: int
    cached: int = 0
    written: int = 0


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        usage: None when the server did not say.
        cut: Whether the answer ended at `max_output_tokens`.
        refusal: What the model said instead of answering.
    """

    text: str
    usage: Usage | None
    cut: bool = False
    refusal: str = ""


class Fault(Enum):
    """What to do about a call that failed."""

    BUSY = "busy"  # call again later
    OVERFLOW = "overflow"  # say less
    REFUSED = "refused"  # something is wrong with the request: a key, a name, a setting
    BROKEN = "broken"  # the answer broke off or is none


class EndpointError(Exception):
    """A call failed; the message is one line.

    Attributes:
        after_s: What the server asks to wait; None when it does not say.
        may_cost: Whether tokens may have been written and billed all the same.
    """

    def __init__(self, line: str, fault: Fault, *, after_s: float | None = None, may_cost: bool = False) -> None:
        super().__init__(line)
        self.fault = fault
        self.after_s = after_s
        self.may_cost = may_cost


class _Unfit(Exception):
    """The response is not read to its end; the message says why."""


_TOO_LONG = f"an answer of more than {MAX_ANSWER_CHARS} characters or {MAX_BYTES} bytes was broken off"


def estimated_tokens(text: str) -> int:
    """Roughly how many tokens a text is, where no server counted them."""
    return int(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN) + 1


def most_tokens(system: str, turns: Sequence[Turn], schema: str) -> int:
    """More tokens than any tokenizer makes of a request: none makes more of a text than it has bytes."""
    texts = [system, schema, *(turn.text for turn in turns)]
    return OVERHEAD_TOKENS + sum(len(text.encode("utf-8", "replace")) for text in texts)


async def complete(
    model: ChatModel, *, key: str, system: str, turns: Sequence[Turn], schema: Mapping[str, Any]
) -> Reply:
    """Asks a model and reads its answer as it is written.

    What is cancelled ends at once, with its connection: time is the caller's business, length is bounded here.

    Raises:
        EndpointError: No whole answer came.
    """
    sdk = importlib.import_module(model.api.value)
    http = importlib.import_module("httpx2")  # what both SDKs speak HTTP with
    text: list[str] = []
    said = _Said(text)
    try:
        async with _client(sdk, http, model, key) as client:
            if model.api is Api.OPENAI:
                read, create, request = said.openai, client.chat.completions.create, _openai_request
            else:
                read, create, request = said.anthropic, client.messages.create, _anthropic_request
            stream = await create(**request(model, system, turns, schema))
            try:
                async with stream:
                    async for event in stream:
                        read(event)
            except (ValueError, TypeError, AttributeError, KeyError, RecursionError):  # what an SDK makes of garbage
                raise _Unfit(f"the server sent what is no answer of the {model.api.value} API") from None
    except _Unfit as error:
        raise EndpointError(f"{model.name}: {error}", Fault.BROKEN, may_cost=True) from None
    except (sdk.APIError, http.HTTPError) as error:
        raise _fault(model, key, sdk, http, error, begun=bool(text)) from None
    return said.reply()


@asynccontextmanager
async def _client(sdk: Any, http: Any, model: ChatModel, key: str) -> AsyncGenerator[Any]:
    """A client that tries once, follows no redirect (a key would go along) and reads a bounded response."""

    class Bounded(http.AsyncByteStream):
        def __init__(self, response: Any) -> None:
            self._inner = response.stream
            self._packed = response.headers.get("content-encoding", "identity") != "identity"

        async def __aiter__(self) -> AsyncIterator[bytes]:
            if self._packed:  # a few bytes may unpack to gigabytes
                raise _Unfit("the server sent a compressed answer, which was not asked for")
            count = 0
            async for part in self._inner:
                count += len(part)
                if count > MAX_BYTES:
                    raise _Unfit(_TOO_LONG)
                yield part

        async def aclose(self) -> None:
            await self._inner.aclose()

    async def bound(response: Any) -> None:
        response.stream = Bounded(response)

    wire = sdk.DefaultAsyncHttpxClient(
        event_hooks={"response": [bound]},
        follow_redirects=False,
        headers={"accept-encoding": "identity"},
        timeout=http.Timeout(None, connect=CONNECT_S),
        verify=_tls(),
    )
    kind = sdk.AsyncOpenAI if model.api is Api.OPENAI else sdk.AsyncAnthropic
    async with kind(
        api_key=key,
        base_url=model.base_url or _URLS[model.api],  # said, so that no variable of the environment changes it
        max_retries=0,
        timeout=http.Timeout(None, connect=CONNECT_S),
        http_client=wire,
        default_headers={"accept-encoding": "identity"},
    ) as client:
        yield client


@cache  # reading the certificates takes longer than all else before a call
def _tls() -> Any:
    return importlib.import_module("httpx2").create_ssl_context()


def _openai_request(model: ChatModel, system: str, turns: Sequence[Turn], schema: Mapping[str, Any]) -> dict[str, Any]:
    request: dict[str, Any] = {
        "model": model.name,
        "messages": [{"role": "system", "content": system}, *_messages(turns)],
        "stream": True,
        "stream_options": {"include_usage": True},
        # OpenAI's own models know the new name alone, most other servers the old one alone
        "max_tokens" if model.base_url else "max_completion_tokens": model.max_output_tokens,
    }
    if model.temperature is not None:
        request["temperature"] = model.temperature
    if model.structured is Structured.JSON_SCHEMA:
        form = {"name": _NAME, "strict": True, "schema": schema}
        request["response_format"] = {"type": "json_schema", "json_schema": form}
    elif model.structured is Structured.JSON_OBJECT_SCHEMA:
        request["response_format"] = {"type": "json_object", "schema": schema}
    return request


def _anthropic_request(
    model: ChatModel, system: str, turns: Sequence[Turn], schema: Mapping[str, Any]
) -> dict[str, Any]:
    request: dict[str, Any] = {
        "model": model.name,
        "system": system,
        "messages": _messages(turns),
        "stream": True,
        "max_tokens": model.max_output_tokens,
    }
    if model.temperature is not None:
        request["temperature"] = model.temperature
    if model.structured is Structured.JSON_SCHEMA:
        request["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
    elif model.structured is Structured.TOOL:
        request["tools"] = [{"name": _NAME, "description": "Makes the proposal.", "input_schema": schema}]
        request["tool_choice"] = {"type": "tool", "name": _NAME}
    return request


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    # half a character (a lone surrogate, of a log or of an answer) cannot be sent
    return [{"role": turn.role, "content": turn.text.encode("utf-8", "replace").decode()} for turn in turns]


# ---- what comes back: nothing of it is believed to have the form that the SDK's types say ----


class _Said:
    """Gathers what the events of a stream say."""

    def __init__(self, text: list[str]) -> None:
        self._text = text
        self._chars = 0
        self._tool = False
        self._refusal: list[str] = []
        self._stop: object = None
        self._usage: dict[str, int] = {}

    def openai(self, event: object) -> None:
        """An event of a chat completion."""
        choice = _at(event, "choices", 0)
        self._add(_at(choice, "delta", "content"))
        refusal = _at(choice, "delta", "refusal")
        if isinstance(refusal, str):
            self._refusal.append(refusal)
        self._stop = _at(choice, "finish_reason") or self._stop
        usage = _at(event, "usage")
        self._count("in", _at(usage, "prompt_tokens"))
        self._count("out", _at(usage, "completion_tokens"))
        self._count("cached", _at(usage, "prompt_tokens_details", "cached_tokens"))
        self._count("written", _at(usage, "prompt_tokens_details", "cache_write_tokens"))

    def anthropic(self, event: object) -> None:
        """An event of a message."""
        self._add(_at(event, "delta", "text"))
        self._add(_at(event, "delta", "partial_json"))
        self._stop = _at(event, "delta", "stop_reason") or self._stop
        if self._stop == "refusal":
            self._refusal = ["it refuses to answer"]
        for usage in (_at(event, "message", "usage"), _at(event, "usage")):
            self._count("fresh", _at(usage, "input_tokens"))
            self._count("out", _at(usage, "output_tokens"))
            self._count("cached", _at(usage, "cache_read_input_tokens"))
            self._count("written", _at(usage, "cache_creation_input_tokens"))

    def reply(self) -> Reply:
        """All of it."""
        usage = self._usage
        cached, written = usage.get("cached", 0), usage.get("written", 0)
        total = usage.get("in", usage["fresh"] + cached + written if "fresh" in usage else None)
        known = Usage(total, usage["out"], cached, written) if total is not None and "out" in usage else None
        cut = self._stop in ("length", "max_tokens")
        return Reply("".join(self._text), known, cut, clean("".join(self._refusal), LINE_CHARS))

    def _add(self, part: object) -> None:
        if isinstance(part, str) and part:
            self._chars += len(part)
            if self._chars > MAX_ANSWER_CHARS:
                raise _Unfit(_TOO_LONG)
            self._text.append(part)

    def _count(self, name: str, tokens: object) -> None:
        if isinstance(tokens, int) and not isinstance(tokens, bool) and 0 <= tokens <= MAX_TOKENS:
            self._usage[name] = tokens


def _at(thing: Any, *path: str | int) -> Any:
    """What lies at the end of a path of keys, places and attributes; None where it breaks off."""
    for step in path:
        try:
            thing = thing[step]
        except (TypeError, KeyError, IndexError):
            thing = getattr(thing, str(step), None)
    return thing


# ---- what goes wrong ----

_OVERFLOW = (
    *("context_length", "context length", "context window", "context size", "context limit"),
    *("prompt is too long", "too many tokens", "input is too long"),
)
_AGAIN = (408, 409, 429)  # and all from 500


def _fault(model: ChatModel, key: str, sdk: Any, http: Any, error: Exception, *, begun: bool) -> EndpointError:
    """What an error of the SDK or of the HTTP library means, in one line; `begun`: a part of the answer came."""
    status = getattr(error, "status_code", None)
    told = _told(error)
    if len(key) >= SECRET_CHARS:  # some servers say which key they were given
        told = told.replace(key, "…")
    line = clean(f"{model.name}: {f'HTTP {status}: ' if status else ''}{told}", LINE_CHARS)
    if status is None or status == 200:  # within the stream, or without any answer
        unsent = isinstance(error.__cause__ or error, http.ConnectError | http.ConnectTimeout)
        stated = isinstance(error, sdk.APIError) and not isinstance(error, sdk.APIConnectionError)
        if begun:
            return EndpointError(line, Fault.BROKEN, may_cost=True)
        return EndpointError(line, Fault.BUSY, may_cost=not (unsent or stated))
    if status in _AGAIN or status >= 500:
        return EndpointError(line, Fault.BUSY, after_s=_after_s(error))
    if status == 413 or (status in (400, 422) and any(mark in told.lower() for mark in _OVERFLOW)):
        return EndpointError(line, Fault.OVERFLOW)
    return EndpointError(line, Fault.REFUSED)


def _told(error: Exception) -> str:
    """What the server said, or else the error."""
    body: Any = getattr(error, "body", None)
    message = _at(body, "error", "message") or _at(body, "message") or _at(body, "error")
    if isinstance(message, str) and message:
        return message
    cause = error.__cause__
    return (
        f"{error} ({type(cause).__name__}: {cause})" if cause is not None and str(cause) else str(error) or "no answer"
    )


def _after_s(error: Exception) -> float | None:
    """Seconds of the header Retry-After; a date in it is left to our own pauses."""
    value = str(_at(error, "response", "headers", "retry-after") or "")
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if seconds >= 0 else None
