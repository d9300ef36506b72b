"""`python -m benchmarks.serve_load MODEL`: a server under load, with batches and without, one after the other on the same machine.

Clients ask at once, about the embedded drawings; among their requests are malformed ones. A request that gets 429 or 503 is sent again
until it is answered, as clients of OpenAI's API do. Prints one JSON object.
"""

import argparse
import asyncio
import base64
import json
import os
import re
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from raytrain2p.data.reading import read_records

QUESTIONS = "emoji:test_concept"
ADDRESS = re.compile(r"at (http://\S+?):(\d+)")
SECONDS = 600.0  # for one attempt, as in OpenAI's client
DICE = np.random.default_rng(0)
MISSING, GONE = 0, -1  # in place of a status: no answer came; the client went away on purpose


@dataclass
class Outcome:
    """What became of one request.

    Args:
        status: of the last attempt.
        refusals: attempts that got 429 or 503 before it.
        seconds: from the first attempt to the end of the answer; `attempt` from that of the last one.
    """

    kind: str
    status: int
    refusals: int
    seconds: float
    attempt: float
    text: str = ""


@dataclass
class Load:
    """Requests to send, and what became of them."""

    port: int
    bodies: list[tuple[int, bytes]]
    done: dict[int, Outcome] = field(default_factory=dict)

    async def raw(self, content: bytes, hang_up: bool = False) -> tuple[int, bytes]:
        """Send bytes. Returns the status and the body; `hang_up`: goes away after the first bytes of the answer, or without any."""
        async with asyncio.timeout(SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
            try:
                writer.write(content)
                with suppress(ConnectionError):  # refused before all was sent: the answer is there
                    await writer.drain()
                if hang_up:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(reader.read(1), float(DICE.random()))
                    return GONE, b""
                answer = await reader.read(-1)
            finally:
                writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        return (int(head.split()[1]) if head else MISSING), body

    async def request(self, number: int, kind: str, send: Callable[[], Awaitable[tuple[int, bytes]]]) -> None:
        began, refusals = time.monotonic(), 0
        while True:
            attempt, body = time.monotonic(), b""
            try:
                status, body = await send()
            except (OSError, TimeoutError, ValueError, IndexError):
                status = MISSING
            if status not in (429, 503):
                break
            refusals += 1
            await asyncio.sleep(float(DICE.uniform(0.5, 1.5)))
        now = time.monotonic()
        self.done[number] = Outcome(kind, status, refusals, now - began, now - attempt, text_of(body) if status == 200 else "")

    async def run(self, clients: int, malformed: int) -> None:
        count = len(self.bodies)
        work: list[tuple[int, str]] = [(number, "good") for number in range(count)]
        names = list(MALFORMED)
        work += [(count + number, names[number % len(names)]) for number in range(malformed)]
        waiting = iter([work[place] for place in DICE.permutation(len(work))])

        async def client() -> None:
            for number, kind in waiting:
                if kind == "good":
                    content = post(self.bodies[number][1])
                    await self.request(number, kind, lambda content=content: self.raw(content))  # type: ignore[misc]
                else:
                    content, hang_up, _ = MALFORMED[kind]
                    await self.request(number, kind, lambda content=content, hang_up=hang_up: self.raw(content, hang_up))  # type: ignore[misc]

        await asyncio.gather(*(client() for _ in range(clients)))


def post(body: bytes, path: str = "/v1/chat/completions", length: int | None = None, method: str = "POST") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def question(text: str, image: bytes | str | None = None, **fields: Any) -> bytes:
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not None:
        url = image if isinstance(image, str) else f"data:image/png;base64,{base64.b64encode(image).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 8} | fields).encode()


def black(width: int, height: int) -> bytes:
    """A PNG of black pixels: a few kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    squeeze = zlib.compressobj(9)
    rows = b"".join(squeeze.compress(bytes(width + 1)) for _ in range(height)) + squeeze.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# Name: what is sent, whether the client goes away, and the status that is right
MALFORMED: dict[str, tuple[bytes, bool, int]] = {
    "bad JSON": (post(b'{"messages": [{"role": "user"'), False, 400),
    "torn base64": (post(question("What?", "data:image/png;base64,iVBORw0KGgo=A")), False, 400),
    "huge image": (post(question("What?", black(5000, 5000))), False, 400),
    "zip bomb": (post(question("What?", black(30_000, 20_000))), False, 400),
    "wrong types": (post(b'{"messages": "Hello", "max_tokens": "many"}'), False, 400),
    "a path": (post(question("What?", "/etc/passwd")), False, 400),
    "large body": (post(question("What?", user="x" * (11 << 20))), False, 413),
    "wrong route": (post(b"{}", "/v1/completions"), False, 404),
    "wrong method": (post(b"", method="DELETE"), False, 405),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", False, 400),
    "half a body": (post(question("What?")[:40], length=5000), True, GONE),
    "leaves while streaming": (post(question("What?", stream=True, max_tokens=64)), True, GONE),
    "leaves while waiting": (post(question("What?")), True, GONE),
}


def text_of(body: bytes) -> str:
    """The answer in a body, be it a stream of events, or in chunks."""
    found = re.findall(rb'"content": ?"((?:[^"\\]|\\.)*)"', body)
    return "".join(json.loads(b'"' + part + b'"') for part in found)


class Memory(threading.Thread):
    """The most memory of a process and of all that it started, without what they share, in MB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.over, self.first, self.most = pid, threading.Event(), 0, 0

    def run(self) -> None:
        while not self.over.wait(1.0):
            total = 0
            with suppress(psutil.Error):
                for process in [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]:
                    with suppress(psutil.Error):
                        total += process.memory_full_info().uss
            self.first, self.most = self.first or total >> 20, max(self.most, total >> 20)


@contextmanager
def server(model: str, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Within, a server on a free port; stopped as with Ctrl-C."""
    with tempfile.NamedTemporaryFile("r+") as log:
        command = [sys.executable, "-m", "raytrain2p.serve", model, "--port", "0", *options]
        process = subprocess.Popen(command, stderr=log, env=os.environ | {"RAY_ADDRESS": "local"})
        try:
            while (found := ADDRESS.search(Path(log.name).read_text())) is None:
                if process.poll() is not None:
                    raise RuntimeError(Path(log.name).read_text())
                time.sleep(0.2)
            yield process, int(found[2])
        finally:
            process.send_signal(signal.SIGINT)
            code = process.wait(180)
    assert code == 0, code


def measure(
    model: str, batch_size: int, bodies: list[tuple[int, bytes]], clients: int, malformed: int
) -> tuple[dict[str, Any], dict[int, str]]:
    """Figures of one server, and its answers by question."""
    with server(model, "--batch-size", str(batch_size)) as (process, port):
        memory = Memory(process.pid)
        memory.start()
        asyncio.run(Load(port, bodies[:32]).run(8, 0))  # warm
        load = Load(port, bodies)
        began = time.monotonic()
        asyncio.run(load.run(clients, malformed))
        seconds = time.monotonic() - began
        memory.over.set()
        _, metrics = asyncio.run(load.raw(post(b"", "/metrics", method="GET")))
    good = [one for one in load.done.values() if one.kind == "good"]
    bad = [one for one in load.done.values() if one.kind != "good"]
    quantiles = statistics.quantiles([one.seconds for one in good], n=100)
    attempts = statistics.quantiles([one.attempt for one in good], n=100)
    sums = {
        name: float(value) for name, value in re.findall(r"^(raytrain2p_batch_size_(?:sum|count)) (\S+)", metrics.decode(), re.MULTILINE)
    }
    figures = {
        "batch_size": batch_size,
        "seconds": round(seconds, 1),
        "answers_per_second": round(len(good) / seconds, 2),
        "seconds_to_answer": {f"p{n}": round(quantiles[n - 1], 2) for n in (50, 95, 99)},
        "seconds_of_the_accepted_attempt": {f"p{n}": round(attempts[n - 1], 2) for n in (50, 95, 99)},
        "good": Counter(str(one.status) for one in good),
        "lost": sum(one.status != 200 for one in good) + len(bodies) - len(good),
        "refusals_before_an_answer": sum(one.refusals for one in load.done.values()),
        "malformed": {kind: Counter(str(one.status) for one in bad if one.kind == kind) for kind in MALFORMED},
        "malformed_with_another_answer": sum(one.status != MALFORMED[one.kind][2] for one in bad),
        "mean_batch": round(sums["raytrain2p_batch_size_sum"] / sums["raytrain2p_batch_size_count"], 2),
        "memory_mb": {"at_first": memory.first, "at_most": memory.most},
    }
    return figures, {load.bodies[number][0]: one.text for number, one in load.done.items() if one.kind == "good"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="RUN of raytrain2p.serve: a model of the quickstart")
    parser.add_argument("--requests", type=int, default=1000, help="of them --malformed are; default 1000")
    parser.add_argument("--malformed", type=int, default=100)
    parser.add_argument("--clients", type=int, default=200, help="at once")
    parser.add_argument("--streams", type=int, default=45, help="good requests that stream")
    parser.add_argument("--batch-sizes", type=lambda text: [int(one) for one in text.split(",")], default=[16, 1])
    options = parser.parse_args()
    records = read_records(QUESTIONS, 2)
    bodies = []
    for number in range(options.requests - options.malformed):
        record = records[number % len(records)]
        (image,) = record.media()
        bodies.append((number, question(record.question, image.read(), stream=number % 20 == 0 and number // 20 < options.streams)))
    found = [measure(options.model, size, bodies, options.clients, options.malformed) for size in options.batch_sizes]
    result: dict[str, Any] = {"servers": [figures for figures, _ in found]}
    (first, texts), (last, others) = found[0], found[-1]
    if first is not last:
        result["answers_per_second_ratio"] = round(first["answers_per_second"] / last["answers_per_second"], 2)
        result["answers_that_differ"] = sum(texts[number] != others[number] for number in texts)
    print(json.dumps(result, indent=2))
    return int(any(figures["lost"] or figures["malformed_with_another_answer"] for figures, _ in found))


if __name__ == "__main__":
    sys.exit(main())
