"""A proxy in front of an S3 server that breaks what a network, a store and a load balancer break.

Every fault but two is made where it arises in life: connections are reset, answers are cut, late or lost and requests
arrive twice for real. What a store says when it is overloaded, broken or offered old credentials is said in its place.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.objects.servers import Server

FAULTS = ("503", "500", "reset-before", "reset-after", "slow", "truncated", "duplicate", "expired")
REFUSED = ("501", "403")
HANG = "hang"  # takes the request and never answers
TRICKLE = "trickle"  # answers a byte at a time, for ever
_SPOKEN = {
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "501": (501, "NotImplemented", "A header or query you provided implies functionality that is not implemented."),
    "403": (403, "AccessDenied", "Access Denied"),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
}

Decide = Callable[["Request"], "str | None"]


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    target: str
    head: bytes
    body: bytes

    @property
    def is_upload_completion(self) -> bool:
        return self.method == "POST" and "uploadId=" in self.target


@dataclass
class Proxy:
    """`decide` names the fault of the next request, or None; tests exchange it. `injected` counts by fault."""

    server: Server  # reached through the proxy
    direct: Server
    decide: Decide = lambda request: None
    requests: list[str] = field(default_factory=list)  # "METHOD target"
    injected: Counter[str] = field(default_factory=Counter)
    busy: set[asyncio.Task[None] | None] = field(default_factory=set)  # asyncio forgets a task whose client has gone


def randomly(rate: float, seed: int, kinds: tuple[str, ...] = FAULTS) -> Decide:
    """A fault in this share of the requests; the same ones for the same requests in the same order."""
    chance = random.Random(seed)
    return lambda request: chance.choice(kinds) if chance.random() < rate else None


def always(kind: str) -> Decide:
    return lambda request: kind


def once(kind: str, match: Callable[[Request], bool]) -> Decide:
    """This fault in the first request that matches."""
    left = [kind]
    return lambda request: left.pop() if left and match(request) else None


@contextmanager
def faulty(server: Server) -> Iterator[Proxy]:
    """The server behind a proxy that does no harm until it is told to."""
    loop = asyncio.new_event_loop()
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    proxy = Proxy(Server(server.kind, f"http://127.0.0.1:{listener.getsockname()[1]}"), server)
    thread = threading.Thread(target=_serve, args=(loop, listener, proxy))
    thread.start()
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def _serve(loop: asyncio.AbstractEventLoop, listener: socket.socket, proxy: Proxy) -> None:
    asyncio.set_event_loop(loop)
    accepting = loop.run_until_complete(asyncio.start_server(lambda r, w: _connection(proxy, r, w), sock=listener))
    loop.run_forever()
    accepting.close()
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.run_until_complete(asyncio.sleep(0))  # connections close in the next round
    loop.close()


async def _connection(proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    task = asyncio.current_task()
    proxy.busy.add(task)
    try:
        with suppress(ConnectionError, asyncio.IncompleteReadError):  # the client gave up or was done
            request = await _receive(reader, writer)
            proxy.requests.append(f"{request.method} {request.target}")
            fault = proxy.decide(request)
            proxy.injected[fault or "none"] += 1
            await _answer(proxy, request, fault, writer)
    finally:
        proxy.busy.discard(task)
        writer.close()


async def _receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request:
    head = await reader.readuntil(b"\r\n\r\n")
    method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
    fields = {k.lower(): v.strip() for k, _, v in (line.partition(b":") for line in head.split(b"\r\n")[1:])}
    if b"100-continue" in fields.get(b"expect", b""):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if b"chunked" in fields.get(b"transfer-encoding", b""):
        body = b""
        while not body.endswith(b"0\r\n\r\n"):
            body += await reader.readline()
    else:
        body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
    return Request(method, target, head, body)


async def _answer(proxy: Proxy, request: Request, fault: str | None, writer: asyncio.StreamWriter) -> None:
    match fault:
        case "503" | "500" | "501" | "403" | "expired":
            writer.write(_said(request, *_SPOKEN[fault]))
        case "reset-before":
            _reset(writer)
        case "reset-after":
            await _forward(proxy, request)
            _reset(writer)
        case "slow":
            answer = await _forward(proxy, request)
            piece = len(answer) // 8 + 1
            for start in range(0, len(answer), piece):
                writer.write(answer[start : start + piece])
                await writer.drain()
                await asyncio.sleep(0.01)
        case "truncated":
            answer = await _forward(proxy, request)
            head, _, body = answer.partition(b"\r\n\r\n")
            writer.write(head + b"\r\n\r\n" + body[: len(body) // 2] if body else head[: len(head) // 2])
        case "duplicate":
            await _forward(proxy, request)
            writer.write(await _forward(proxy, request))
        case "hang":
            await asyncio.sleep(3600)
        case "trickle":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.2)
        case _:
            writer.write(await _forward(proxy, request))
    if not writer.is_closing():
        await writer.drain()


async def _forward(proxy: Proxy, request: Request) -> bytes:
    """The whole answer, head and body."""
    there = urlsplit(proxy.direct.endpoint)
    reader, writer = await asyncio.open_connection(there.hostname, there.port)
    first, *fields = request.head.rstrip(b"\r\n").split(b"\r\n")
    kept = [line for line in fields if line.partition(b":")[0].lower() not in (b"connection", b"expect")]
    answer = bytearray()

    async def listen() -> None:
        while piece := await reader.read(1 << 16):
            answer.extend(piece)

    # Both at once: a server that refuses a request answers before it has read all of it, and resets the connection.
    listening = asyncio.ensure_future(listen())
    try:
        with suppress(ConnectionError):
            writer.write(b"\r\n".join([first, *kept, b"Connection: close", b"", b""]) + request.body)
            await writer.drain()
        with suppress(ConnectionError):
            await listening
        return bytes(answer)
    finally:
        listening.cancel()
        writer.close()


def _said(request: Request, status: int, code: str, message: str) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + (b"" if request.method == "HEAD" else body)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close so that the client is told that the connection broke."""
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
