"""An agent's endpoint: OpenAI's chat completions on the loopback address, for one episode's member.

It is in the episode's process and ends with it. Each connection is a request: what it asks waits for the
process to hear it, and gets its answer from there.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import queue
import secrets
import select
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from mpies.tasks.environments import chat_completions
from mpies.tasks.environments.chat_completions import MODEL, Json, NotServedError, Question

LOOPBACK = "127.0.0.1"
BODY = 2**20  # bytes of a request
PIECE = 2**16
CONNECTIONS = 16  # at a time
SECONDS = 30  # for a client to send its request, or to take its answer
PLACES = "there are /v1/models and /v1/chat/completions"


@dataclass(frozen=True)
class Pending:
    """A request that waits for its answer."""

    question: Question
    connection: socket.socket
    _answer: queue.SimpleQueue[tuple[int, Json]] = field(default_factory=queue.SimpleQueue)

    def answer(self, made: Json) -> None:
        self._answer.put((200, made))

    def refuse(self, why: str) -> None:
        self._answer.put((400, refusal(why)))

    def wait(self) -> tuple[int, Json]:
        """Status and body of what its client is told."""
        return self._answer.get()

    @property
    def left(self) -> bool:
        """Has its client closed the connection?"""
        if not select.select([self.connection], [], [], 0)[0]:
            return False
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True


class Endpoint(ThreadingMixIn, TCPServer):
    """Serves from its making on, at a port that is free. Raises OSError if there is none."""

    daemon_threads = True
    request_queue_size = CONNECTIONS

    def __init__(self) -> None:
        super().__init__((LOOPBACK, 0), _Handler)
        self.token = secrets.token_hex(16)
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        """What the process hears: requests, as Pending; and what else is put here."""
        self._room = threading.Semaphore(CONNECTIONS)
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_address[1]}/v1"

    def _serve(self) -> None:
        while True:
            self.handle_request()  # sleeps until there is one

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            try:
                super().process_request(request, client_address)
            except BaseException:  # no thread can be had
                self._room.release()
                raise
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()


class _Handler(BaseHTTPRequestHandler):
    """A request. HTTP/1.0: its connection is closed after it, so that none holds a thread for long."""

    server: Endpoint
    timeout = SECONDS
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self._may_ask():
            model: Json = {"id": MODEL, "object": "model", "created": 0, "owned_by": MODEL}
            found: dict[str, Json] = {
                "/v1/models": {"object": "list", "data": [model]},
                f"/v1/models/{MODEL}": model,
            }
            if self.path in found:
                self._tell(200, found[self.path])
            else:
                self.send_error(404, PLACES)

    def do_POST(self) -> None:
        if not self._may_ask():
            return
        if self.path != "/v1/chat/completions":
            self._refuse_unread(404, PLACES)
        elif (body := self._body()) is not None:
            try:
                pending = Pending(chat_completions.read(body), self.connection)
            except NotServedError as error:
                self.send_error(400, str(error))
                return
            self.server.events.put(pending)
            self._tell(*pending.wait())

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self._tell(int(code), refusal(message or "the request cannot be read"))

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _may_ask(self) -> bool:
        """Has it the token? Another user of the machine can reach the port, too."""
        given = self.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            self._refuse_unread(401, "the API key is not the one that this episode was given")
            return False
        return True

    def _body(self) -> bytes | None:
        """None: there is none to be read, and its client knows it."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            self._refuse_unread(411, "Content-Length is missing")
        elif len(length) > 9 or int(length) > BODY:
            self._refuse_unread(413, f"a request has up to {BODY:,} bytes")
        else:
            return self.rfile.read(int(length))
        return None

    def _refuse_unread(self, status: int, why: str) -> None:
        """Refuse a request whose body was not read. What is still sent is thrown away, up to a bound: closed
        before, a connection is reset, and its client does not see why."""
        self.send_error(status, why)
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(1)
        with contextlib.suppress(OSError):
            for _ in range(64 * BODY // PIECE):
                if not self.connection.recv(PIECE):
                    break

    def _tell(self, status: int, told: Json) -> None:
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def refusal(why: str) -> Json:
    """An error as OpenAI tells it."""
    return {"error": {"message": why, "type": "invalid_request_error", "param": None, "code": None}}
