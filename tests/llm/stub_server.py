"""A server that speaks as much of the OpenAI protocol as is needed, and does what a test tells it."""

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Reply = tuple[int, dict[str, str], Any]  # status, headers, body: bytes are sent as they are; status 0: hang up
Behave = Callable[[int, dict[str, Any]], Reply | None]
Lora = Callable[["StubServer", str, dict[str, Any]], Reply]
NO_SUCH_CALL: Reply = (404, {}, {"detail": "Not Found"})  # as FastAPI says it


def completion(text: str | None, *, prompt_tokens: int = 7, tokens: int = 3, finish: str = "stop") -> dict[str, Any]:
    """A chat completion with one choice."""
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens},
    }


def vllm_lora(stub: "StubServer", call: str, body: dict[str, Any]) -> Reply:
    """Loads and unloads adapters, and answers in the words of vLLM's own code."""

    def error(status: int, kind: str, message: str) -> Reply:
        return status, {}, {"error": {"message": message, "type": kind, "param": None, "code": status}}

    name, path = body.get("lora_name"), body.get("lora_path")
    if call == "load":
        if not name or not path:
            return error(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
        if name in stub.models:
            return error(400, "InvalidUserInput", f"The lora adapter '{name}' has already been loaded.")
        if not (Path(path) / "adapter_config.json").is_file():
            return error(404, "NotFoundError", f"Loading lora {name} failed: No adapter found for {path}")
        stub.models = (*stub.models, name)
        return 200, {"Content-Type": "text/plain"}, f"Success: LoRA adapter '{name}' added successfully.".encode()
    if name not in stub.models:
        return error(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
    stub.models = tuple(model for model in stub.models if model != name)
    return 200, {"Content-Type": "text/plain"}, f"Success: LoRA adapter '{name}' removed successfully.".encode()


def echo(body: dict[str, Any]) -> str:
    """What the stub answers: a function of prompt, seed and settings."""
    content = json.dumps([body[k] for k in ("messages", "seed", "temperature", "top_p", "max_tokens")])
    return hashlib.sha256(content.encode()).hexdigest()[:8]


class StubServer(ThreadingHTTPServer):
    """Answers with `echo` unless `behave(number of the request, body)` says otherwise.

    Attributes:
        asked: Bodies of the chat requests, in order.
        keys: Authorization headers seen.
        adapters: Calls that load and unload adapters: (name of the call, body), in order.
        lora: What answers them; None: a server that has no such calls.
        most: Most chat requests under way at a time.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self, behave: Behave | None = None, *, delay: float = 0.0, models: Any = ("m",), port: int = 0
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.behave, self.delay, self.models = behave, delay, models
        self.asked: list[dict[str, Any]] = []
        self.adapters: list[tuple[str, dict[str, Any]]] = []
        self.lora: Lora | None = None
        self.keys: set[str] = set()
        self.listed = self.in_flight = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement
    server: StubServer

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, status: int, headers: dict[str, str], body: Any) -> None:
        if status == 0:
            self.close_connection = True
            return
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        stub = self.server
        stub.listed += 1
        if not self.path.endswith("/v1/models"):
            self.send(404, {}, {"error": {"message": "no such path"}})
        elif isinstance(stub.models, tuple) and stub.models and isinstance(stub.models[0], int):
            self.send(*stub.models)
        else:
            self.send(200, {}, {"object": "list", "data": [{"id": m, "object": "model"} for m in stub.models]})

    def do_POST(self) -> None:
        stub = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "_lora_adapter" in self.path:
            call = self.path.removeprefix("/v1/").removesuffix("_lora_adapter")
            with stub.lock:
                stub.keys.add(self.headers["Authorization"])
                stub.adapters.append((call, body))
                reply = stub.lora(stub, call, body) if stub.lora is not None else NO_SUCH_CALL
            self.send(*reply)
            return
        with stub.lock:
            stub.keys.add(self.headers["Authorization"])
            number = len(stub.asked)
            stub.asked.append(body)
            stub.in_flight += 1
            stub.most = max(stub.most, stub.in_flight)
        try:
            reply = stub.behave(number, body) if stub.behave is not None else None
            time.sleep(stub.delay)
        finally:
            with stub.lock:
                stub.in_flight -= 1
        self.send(*(reply or (200, {}, completion(echo(body)))))


@contextmanager
def serving(*args: Any, **options: Any) -> Iterator[StubServer]:
    """Run a stub in threads."""
    stub = StubServer(*args, **options)
    thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.shutdown()
        stub.server_close()
        thread.join()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
