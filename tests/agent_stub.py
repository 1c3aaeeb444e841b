"""A scripted mind behind the streams that coding agents speak: it edits a line of a file with their own tools.

It is no model: it shows that a real agent program, started as we start it, comes to an edit and says what it cost.
What real programs need to be started here is at the end.
"""

import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

LAST = "I lowered the step size.\n\nHypothesis: a smaller step ends lower\nOperator: tune\nPredicted delta: -0.01"
OLD, NEW = "LR = 0.02", "LR = 0.01"
TOKENS_IN, TOKENS_OUT = 1000, 50  # of each answer

Events = Iterator[tuple[str, dict[str, Any]]]
Speak = Callable[[dict[str, Any], str], Events]


def messages(body: dict[str, Any], file: str) -> Events:
    """Anthropic's stream: read the file, edit it, say so."""
    done = json.dumps(body["messages"]).count('"type": "tool_result"')
    steps = [("Read", {"file_path": file}), ("Edit", {"file_path": file, "old_string": OLD, "new_string": NEW})]
    usage = {"input_tokens": TOKENS_IN, "output_tokens": 0}
    message = {"id": f"msg_{done}", "type": "message", "role": "assistant", "content": [], "model": body["model"]}
    yield "message_start", {"message": message | {"usage": usage, "stop_reason": None, "stop_sequence": None}}
    if body.get("tools") and done < len(steps):
        name, arguments = steps[done]
        block = {"type": "tool_use", "id": f"toolu_{done}", "name": name, "input": {}}
        delta = {"type": "input_json_delta", "partial_json": json.dumps(arguments)}
    else:
        block, delta = {"type": "text", "text": ""}, {"type": "text_delta", "text": LAST}
    yield "content_block_start", {"index": 0, "content_block": block}
    yield "content_block_delta", {"index": 0, "delta": delta}
    yield "content_block_stop", {"index": 0}
    reason = "tool_use" if block["type"] == "tool_use" else "end_turn"
    yield "message_delta", {"delta": {"stop_reason": reason}, "usage": {"output_tokens": TOKENS_OUT}}
    yield "message_stop", {}


def responses(body: dict[str, Any], file: str) -> Events:
    """OpenAI's Responses stream: edit the file by a shell command, say so."""
    done = any(item.get("type") == "function_call_output" for item in body["input"])
    command = f"sed -i 's/{OLD}/{NEW}/' {file}"
    call = {"type": "function_call", "call_id": "call_1", "name": "exec_command", "id": "fc_1"}
    content = [{"type": "output_text", "text": LAST, "annotations": []}]
    item = (
        {"type": "message", "role": "assistant", "id": "msg_1", "content": content}
        if done
        else call | {"arguments": json.dumps({"cmd": command})}
    )
    usage = {"input_tokens": TOKENS_IN, "output_tokens": TOKENS_OUT, "total_tokens": TOKENS_IN + TOKENS_OUT}
    yield "response.created", {"response": {"id": "resp_1"}}
    yield "response.output_item.done", {"output_index": 0, "item": item}
    yield "response.completed", {"response": {"id": "resp_1", "output": [item], "usage": usage}}


def chat(body: dict[str, Any], file: str) -> Events:
    """Chat completions: read the file, edit it, say so."""
    done = sum(message["role"] == "tool" for message in body["messages"])
    steps = [("read", {"filePath": file}), ("edit", {"filePath": file, "oldString": OLD, "newString": NEW})]
    finish, delta = "stop", {"role": "assistant", "content": LAST}
    if body.get("tools") and done < len(steps):
        name, arguments = steps[done]
        function = {"name": name, "arguments": json.dumps(arguments)}
        finish, delta = "tool_calls", {"tool_calls": [{"index": 0, "id": f"c{done}", "type": "function"}]}
        delta["tool_calls"][0]["function"] = function
    base = {"id": "chat_1", "object": "chat.completion.chunk", "created": 1, "model": "stub"}
    yield "", base | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    usage = {"prompt_tokens": TOKENS_IN, "completion_tokens": TOKENS_OUT, "total_tokens": TOKENS_IN + TOKENS_OUT}
    yield "", base | {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}], "usage": usage}


def generate(body: dict[str, Any], file: str) -> Events:
    """Gemini's stream: edit the file, say so."""
    parts = [part for content in body["contents"] for part in content["parts"]]
    done = any("functionResponse" in part for part in parts)
    arguments = {"file_path": file, "old_string": OLD, "new_string": NEW, "instruction": "Lower the step size."}
    part = (
        {"functionCall": {"name": "replace", "args": arguments}} if body.get("tools") and not done else {"text": LAST}
    )
    usage = {"promptTokenCount": TOKENS_IN, "candidatesTokenCount": TOKENS_OUT}
    answer = {"content": {"role": "model", "parts": [part]}, "finishReason": "STOP", "index": 0}
    yield "", {"candidates": [answer], "usageMetadata": usage | {"totalTokenCount": TOKENS_IN + TOKENS_OUT}}


PATHS: dict[str, Speak] = {
    "/v1/messages": messages,
    "/v1/responses": responses,
    "/v1/chat/completions": chat,
    ":streamGenerateContent": generate,
}


@contextmanager
def stub_mind(file_in: Callable[[dict[str, Any]], str]) -> Iterator[str]:
    """Serves on a free port; gives its address.

    Args:
        file_in: The file that a request is about.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            path = self.path.partition("?")[0]
            speak = next((speak for end, speak in PATHS.items() if path.endswith(end)), None)
            self.send_response(200 if speak else 404)
            self.send_header("content-type", "text/event-stream")
            self.send_header("connection", "close")
            self.end_headers()
            for name, data in speak(body, file_in(body)) if speak else ():
                head = f"event: {name}\n" if name else ""
                event = {"type": name, **data} if name else data
                self.wfile.write(f"{head}data: {json.dumps(event)}\n\n".encode())

        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# ---- real programs ----


def installed(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"the coding agent {name} is not on PATH; install it to see it edit")
    return found


def file_in(body: dict[str, Any], name: str = "train.py") -> str:
    """The program that a request is about, by the folder that the agent says it works in."""
    found = re.search(r"/[\w./-]*?/at-work/\d+/work", json.dumps(body))
    return f"{found[0]}/{name}" if found else name


def configured(name: str, home: Path, url: str) -> tuple[dict[str, str], str]:
    """Environment and model that make an agent ask the stub, and keep to a home of its own."""
    home.mkdir(exist_ok=True)
    environ = {"PATH": os.environ["PATH"], "HOME": str(home)}
    match name:
        case "claude":
            return environ | {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "x"}, ""
        case "codex":
            provider = f'[model_providers.stub]\nname = "stub"\nbase_url = "{url}/v1"\nwire_api = "responses"\n'
            (home / "config.toml").write_text(f'model = "stub"\nmodel_provider = "stub"\n{provider}')
            return environ | {"CODEX_HOME": str(home)}, ""
        case "opencode":
            options = {"baseURL": f"{url}/v1", "apiKey": "x"}
            local = {"npm": "@ai-sdk/openai-compatible", "options": options, "models": {"stub": {"name": "stub"}}}
            return environ | {"OPENCODE_CONFIG_CONTENT": json.dumps({"provider": {"local": local}})}, "local/stub"
        case _:
            settings = {"security": {"auth": {"selectedType": "gemini-api-key"}}}
            (home / ".gemini").mkdir(exist_ok=True)
            (home / ".gemini" / "settings.json").write_text(json.dumps(settings))
            return environ | {"GEMINI_API_KEY": "x", "GOOGLE_GEMINI_BASE_URL": url}, ""


@contextmanager
def a_home() -> Iterator[Path]:
    """Codex wants no home among temporary files."""
    with tempfile.TemporaryDirectory(prefix=".raysearch-agent-", dir=Path.home()) as folder:
        yield Path(folder)
