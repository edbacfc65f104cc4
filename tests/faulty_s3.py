"""A proxy before an S3 server that does to requests what networks and busy servers do.

Every request comes on a connection of its own. It is passed on as it is (its signature stays good), or one of FAULTS
happens to it: the next of `faults`, else, with the probability `share`, one that a seed draws.
"""

from __future__ import annotations

import contextlib
import random
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple
from urllib.parse import urlsplit

FAULTS = {
    "busy": "503 SlowDown, nothing done",
    "broken": "500 InternalError, nothing done",
    "expired": "403 ExpiredToken, nothing done",
    "cut request": "the connection breaks while the server reads the request's body",
    "cut answer": "done, but the connection breaks in the midst of the answer",
    "lost answer": "done, but the connection breaks before the answer",
    "busy answer": "done, but the answer is 503 SlowDown",
    "slow": "the answer comes in pieces, with pauses",
    "hang": "no answer, ever",
    "deaf": "the body is never read, and no answer comes",
}
DRAWN = tuple(name for name in FAULTS if name not in ("hang", "deaf", "expired"))  # these cost a client its patience
ANSWERS = {
    "busy": ("503 Slow Down", "SlowDown"),
    "broken": ("500 Internal", "InternalError"),
    "expired": ("403 Forbidden", "ExpiredToken"),
}
ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
PIECE_BYTES = 1 << 16


class _Request(NamedTuple):
    head: bytes  # request line and headers, up to the empty line
    body: bytes

    @property
    def method(self) -> str:
        return self.head.split(b" ", 1)[0].decode()


class FaultyProxy(socketserver.ThreadingTCPServer):
    """Listens on a free port of 127.0.0.1; `done` counts what happened, faults by name and "passed"."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = (urlsplit(upstream).hostname or "", urlsplit(upstream).port or 80)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: list[str] = []
        self.lasting: str | None = None  # what happens to every request
        self.share = 0.0
        self.draw = random.Random(0)
        self.done: Counter[str] = Counter()
        self.sent = 0  # bytes of answers
        self.closing = threading.Event()

    def next_fault(self) -> str:
        """What happens to the request at hand."""
        fault = "passed"
        if self.lasting:
            fault = self.lasting
        elif self.faults:
            fault = self.faults.pop(0)
        elif self.draw.random() < self.share:
            fault = self.draw.choice(DRAWN)
        self.done[fault] += 1
        return fault


@contextlib.contextmanager
def running_proxy(upstream: str) -> Iterator[FaultyProxy]:
    """A proxy before the server `upstream`, http://HOST:PORT."""
    with FaultyProxy(upstream) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield proxy
        proxy.closing.set()
        proxy.shutdown()
        thread.join()


class _Handler(socketserver.BaseRequestHandler):
    server: FaultyProxy
    request: socket.socket

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError), self.request.makefile("rb") as reader:
            head = b"".join(iter(reader.readline, b"\r\n"))
            if head:
                self.answer(head, reader)

    def answer(self, head: bytes, reader: BinaryIO) -> None:
        fault = self.server.next_fault()
        if fault == "deaf":
            self.server.closing.wait()
            return
        headers = dict(line.lower().split(b":", 1) for line in head.splitlines()[1:])
        if b"100-continue" in headers.get(b"expect", b""):
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if headers.get(b"transfer-encoding", b"").strip() == b"chunked":
            body = b"".join(read_chunks(reader))
        else:
            body = reader.read(int(headers.get(b"content-length", 0)))
        if fault == "cut request":
            self.pass_on(_Request(head, body[: len(body) // 2]), answered=False)
        else:
            self.carry_out(fault, _Request(head, body))

    def carry_out(self, fault: str, request: _Request) -> None:
        if fault == "hang":
            self.server.closing.wait()
        elif fault in ANSWERS:
            self.refuse(request, fault)
        elif fault in ("lost answer", "busy answer"):
            self.pass_on(request)
            if fault == "busy answer":
                self.refuse(request, "busy")
        else:
            answer = self.pass_on(request)
            self.send(answer[: len(answer) // 2] if fault == "cut answer" else answer, slowly=fault == "slow")

    def pass_on(self, request: _Request, *, answered: bool = True) -> bytes:
        """The server's whole answer, as bytes."""
        hops = (b"expect:", b"connection:")
        lines = [line for line in request.head.splitlines() if not line.lower().startswith(hops)]
        with socket.create_connection(self.server.upstream, timeout=60) as upstream:
            upstream.sendall(b"\r\n".join([*lines, b"Connection: close", b"", b""]) + request.body)
            if not answered:
                return b""
            pieces = iter(lambda: upstream.recv(PIECE_BYTES), b"")
            return b"".join(pieces)

    def refuse(self, request: _Request, fault: str) -> None:
        status, code = ANSWERS[fault]
        body = b"" if request.method == "HEAD" else ERROR.format(code=code).encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        self.request.sendall(f"{head}Connection: close\r\n\r\n".encode() + body)

    def send(self, answer: bytes, *, slowly: bool) -> None:
        pieces = 5 if slowly else 1
        step = max(1, -(-len(answer) // pieces))
        for start in range(0, len(answer), step):
            if slowly:
                time.sleep(0.02)
            self.request.sendall(answer[start : start + step])
        self.server.sent += len(answer)


def read_chunks(reader: BinaryIO) -> Iterator[bytes]:
    """A chunked body as it is on the wire, trailers included."""
    while line := reader.readline():
        yield line
        size = int(line.split(b";")[0], 16)
        if size == 0:
            yield from iter(reader.readline, b"\r\n")
            yield b"\r\n"
            return
        yield reader.read(size + 2)
