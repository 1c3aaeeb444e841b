"""A real HTTP server for tests that speaks chat completions and messages, well or badly, as it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Seen:
    """A request as it came."""

    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]

    @property
    def said(self) -> list[str]:
        """What the conversation holds, without the system's part."""
        return [turn["content"] for turn in self.body["messages"] if turn["role"] != "system"]


Act = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    """Does one act a request, in order; the last one again and again.

    Attributes:
        seen: All requests.
        broken: Set when a client went away in the middle of an answer.
        released: Ends what waits for it.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, *acts: Act) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.acts = list(acts)
        self.seen: list[Seen] = []
        self.broken = threading.Event()
        self.released = threading.Event()
        self.arrived = threading.Semaphore(0)
        self._order = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_act(self, seen: Seen) -> Act:
        with self._order:
            self.seen.append(seen)
            return self.acts.pop(0) if len(self.acts) > 1 else self.acts[0]

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.broken.set()

    def end(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    seen: Seen

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen = Seen(self.path, dict(self.headers.items()), body)
        act = self.server.next_act(self.seen)
        self.server.arrived.release()
        act(self)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def is_messages(self) -> bool:
        """Whether it was asked as Anthropic's API is."""
        return self.path.endswith("/messages")

    def head(self, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"content-type": "text/event-stream", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def event(self, data: Mapping[str, Any]) -> None:
        self.wfile.write(f"event: {data.get('type', 'x')}\ndata: {json.dumps(data)}\n\n".encode())


def says(text: str, tokens: tuple[int, int] | None = (1000, 100), cached: int = 0, stop: str = "stop") -> Act:
    """Answers with a text, in a few pieces."""

    def act(handler: Handler) -> None:
        handler.head()
        step = max(1, len(text) // 3)
        pieces = [text[start : start + step] for start in range(0, len(text), step)]
        for event in (messages if handler.is_messages else completion)(pieces, tokens, cached, stop):
            handler.event(event)
        if not handler.is_messages:
            handler.wfile.write(b"data: [DONE]\n\n")

    return act


def completion(
    pieces: Iterable[str], tokens: tuple[int, int] | None, cached: int, stop: str
) -> Iterable[dict[str, Any]]:
    for piece in pieces:
        yield {"choices": [{"index": 0, "delta": {"content": piece}}]}
    yield {"choices": [{"index": 0, "delta": {}, "finish_reason": stop}]}
    if tokens:
        usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
        yield {"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": cached}}}


def messages(pieces: Iterable[str], tokens: tuple[int, int] | None, cached: int, stop: str) -> Iterable[dict[str, Any]]:
    start: dict[str, Any] = {"role": "assistant"}
    if tokens:
        usage = {"input_tokens": tokens[0] - cached, "cache_read_input_tokens": cached, "output_tokens": 1}
        start["usage"] = usage
    yield {"type": "message_start", "message": start}
    for piece in pieces:
        yield {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}}
    reason = {"stop": "end_turn", "length": "max_tokens"}.get(stop, stop)
    end = {"usage": {"output_tokens": tokens[1]}} if tokens else {}
    yield {"type": "message_delta", "delta": {"stop_reason": reason}, **end}
    yield {"type": "message_stop"}


def uses_tool(arguments: str) -> Act:
    """Calls the one tool, as the messages API streams it."""

    def act(handler: Handler) -> None:
        handler.head()
        handler.event({"type": "message_start", "message": {"usage": {"input_tokens": 1000, "output_tokens": 1}}})
        tool = {"type": "tool_use", "id": "1", "name": "propose", "input": {}}
        handler.event({"type": "content_block_start", "index": 0, "content_block": tool})
        for start in range(0, len(arguments), 40):
            part = {"type": "input_json_delta", "partial_json": arguments[start : start + 40]}
            handler.event({"type": "content_block_delta", "index": 0, "delta": part})
        delta = {"stop_reason": "tool_use"}
        handler.event({"type": "message_delta", "delta": delta, "usage": {"output_tokens": 100}})

    return act


def fails(status: int, message: str = "no", **headers: str) -> Act:
    """Answers with an error."""

    def act(handler: Handler) -> None:
        body = json.dumps({"error": {"message": message, "type": "some_error"}}).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        handler.head(status, {"content-type": "application/json", "content-length": str(len(body)), **names})
        handler.wfile.write(body)

    return act


def sends(*parts: bytes, headers: Mapping[str, str] | None = None) -> Act:
    """Answers with any bytes."""

    def act(handler: Handler) -> None:
        handler.head(headers=headers)
        for part in parts:
            handler.wfile.write(part)

    return act


def forever(part: bytes, pause_s: float = 0.01) -> Act:
    """Sends the same bytes again and again until the client goes away."""

    def act(handler: Handler) -> None:
        handler.head()
        while not handler.server.released.wait(pause_s):
            handler.wfile.write(part)

    return act


def hangs(handler: Handler) -> None:
    """Takes the request and says nothing until the server ends."""
    handler.server.released.wait()
