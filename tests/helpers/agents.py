"""Agents for tests: clients of OpenAI's kind, by the standard library alone."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from games import wait_if_told


def ask(base_url: str, api_key: str, content: str = "a", **more) -> dict:
    """What a client of OpenAI's sends and reads. Raises urllib.error.HTTPError."""
    body = {"model": "any", "messages": [{"role": "user", "content": content}], "temperature": 0.7} | more
    request = urllib.request.Request(
        f"{base_url}/chat/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def worth(text: str) -> float:
    """Differs between almost any two answers."""
    return sum(i * ord(c) for i, c in enumerate(text, 1)) % 101 / 7


def run(row, base_url, api_key):
    """Asks row["turns"] times, in one conversation, at moments of its own."""
    messages, total = [], 0.0
    for _ in range(row.get("turns") or 2):
        messages.append({"role": "user", "content": str(random.randint(0, 9))})
        time.sleep(int.from_bytes(os.urandom(1), "little") / 5000)
        message = ask(base_url, api_key, messages=messages)["choices"][0]["message"]
        messages.append(message)
        total += worth(message["content"])
    return {"reward": total, "accuracy": float(total > 10)}


def waiting(row, base_url, api_key, seed):
    """The same; after its first answer it waits, if it is told to."""
    ask(base_url, api_key)
    wait_if_told(row, seed)
    return run(row, base_url, api_key)


async def apart(row, base_url, api_key, seed):
    """Asks twice, in two conversations."""
    answers = [ask(base_url, api_key, content) for content in (str(seed % 10), "b")]
    return worth("".join(one["choices"][0]["message"]["content"] for one in answers))


def tries(row, base_url, api_key):
    """Sends row["requests"] (method, path, more headers, body) and writes what comes back to row["to"]."""
    told = []
    for method, path, headers, body in row["requests"]:
        token = {"Authorization": f"Bearer {api_key}"}
        data = None if body is None else body.encode("latin-1")
        url = base_url.removesuffix("/v1") + path
        request = urllib.request.Request(url, data, token | headers, method=method)
        try:
            with urllib.request.urlopen(request) as answer:
                told.append((answer.status, json.load(answer)))
        except urllib.error.HTTPError as error:
            told.append((error.code, json.load(error)))
    Path(row["to"]).write_text(json.dumps(told))
    return 1


def beyond(row, base_url, api_key):
    """Asks until it is refused."""
    for number in range(100):
        try:
            ask(base_url, api_key, row["asks"] * (number + 1))
        except urllib.error.HTTPError as error:
            if row["gives_up"]:
                raise
            text = json.load(error)["error"]["message"]
            return {"reward": number, "refused": "task." in text}


def reached(row, base_url, api_key):
    """1 where its port is at the loopback address and nowhere else, not even at another of that."""
    port = urlsplit(base_url).port
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        own = probe.getsockname()[0]
    ask(base_url, api_key)
    opened = []
    for address in ("127.0.0.1", "127.0.0.2", own):
        with socket.socket() as one:
            opened.append(one.connect_ex((address, port)) == 0)
    return float(opened == [True, False, False])


def frugal(row, base_url, api_key):
    """Asks far more often than may be asked at a time, but one after another, also while no thread can be had
    for it; then still has an answer. How many found no thread, and its port."""

    def fails() -> bool:
        request = urllib.request.Request(f"{base_url}/models", headers={"Authorization": f"Bearer {api_key}"})
        try:
            with urllib.request.urlopen(request):
                return False
        except OSError:
            return True

    served = sum(not fails() for _ in range(40))
    had = threading.stack_size(2**40)  # a thread would take more memory than an episode may have
    without = sum(fails() for _ in range(40))
    threading.stack_size(had)
    ask(base_url, api_key)
    return {"reward": served, "without": without, "port": urlsplit(base_url).port}


def wicked(row, base_url, api_key):
    """Asks, if the row does not say `at once`; then does what the row says."""
    if not row.get("at_once"):
        ask(base_url, api_key)
    return {
        "nothing": lambda: 1.0,
        "none": lambda: None,
        "text": lambda: "1.0",
        "nan": lambda: float("nan"),
        "no_reward": lambda: {"accuracy": 1.0},
        "raise": lambda: [][1],
        "leave": lambda: (_ for _ in ()).throw(SystemExit(3)),
        "exit": lambda: os._exit(3),
        "spin": lambda: all(iter(lambda: 1, 2)),
        "sleep": lambda: (subprocess.Popen(["sleep", "1000"]), time.sleep(1000)),
        "impatient": lambda: (hang_up(base_url, api_key), ask(base_url, api_key)),
        "crowd": lambda: crowd(base_url, api_key),
        "wrong": lambda: [unwritable(base_url, api_key) for _ in range(1000)],
    }[row["what"]]()


def hang_up(base_url, api_key) -> None:
    """Asks, and does not wait for the answer."""
    body = json.dumps({"messages": [{"role": "user", "content": "a"}]})
    head = f"POST /v1/chat/completions HTTP/1.0\r\nAuthorization: Bearer {api_key}\r\n"
    with socket.create_connection((urlsplit(base_url).hostname, urlsplit(base_url).port)) as one:
        one.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    time.sleep(0.2)  # so that it is heard before what comes next


def crowd(base_url, api_key) -> float:
    """Asks more at a time than may be asked, and connects without asking; 1 if some were answered."""
    host, port = urlsplit(base_url).hostname, urlsplit(base_url).port
    idle = [socket.create_connection((host, port)) for _ in range(4)]
    answers = []

    def one():
        with contextlib.suppress(OSError, http.client.HTTPException):
            answers.append(ask(base_url, api_key))

    threads = [threading.Thread(target=one) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return float(0 < len(answers) < 100 and len(idle) == 4)


def unwritable(base_url, api_key) -> None:
    """Asks what no chat template of the tests' can write."""
    with contextlib.suppress(urllib.error.HTTPError):
        ask(base_url, api_key, messages=[{"role": "tool", "content": "a"}])
