"""A server in this process: the real application around a small model, behind a real socket, without Ray."""

import asyncio
import base64
import http.client
import io
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from PIL import Image

from raytrain2p.serving.chat_api import ChatApi
from raytrain2p.serving.limits import Limits
from raytrain2p.serving.model import Answer, LoadedModel, Question


class ModelHere:
    """The model in this process. `held`: its answers wait for this event."""

    def __init__(self, model: LoadedModel) -> None:
        self.model, self.held = model, threading.Event()
        self.held.set()
        self.asked: list[Question] = []
        self.closed = 0

    async def ready(self) -> None:
        await self.model.ready()

    async def answer(self, question: Question) -> Answer:
        await self._hold(question)
        return await self.model.answer(question)

    async def stream(self, question: Question) -> AsyncIterator[str | Answer]:
        await self._hold(question)
        try:
            async for piece in self.model.stream(question):
                yield piece
        finally:
            self.closed += 1

    async def _hold(self, question: Question) -> None:
        await self.model.check(question)
        self.asked.append(question)
        await asyncio.to_thread(self.held.wait)


@dataclass
class Reply:
    """What a server sent."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's form, which every error has, and nothing of the server's inside."""
        (error,) = [self.json["error"]]
        assert set(error) == {"message", "type", "param", "code"}
        assert "Traceback" not in error["message"]
        assert "/" not in error["message"].replace("application/json", ""), "no path"
        return dict(error)

    @property
    def events(self) -> list[Any]:
        lines = [line.removeprefix("data: ") for line in self.content.decode().split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    @property
    def text(self) -> str:
        if self.headers["content-type"].startswith("text/event-stream"):
            return "".join(choice["delta"].get("content", "") for event in self.events for choice in event["choices"])
        return str(self.json["choices"][0]["message"]["content"])


@dataclass
class Server:
    """An address, and requests to it."""

    port: int
    host: str = "127.0.0.1"
    token: str | None = None
    loop: asyncio.AbstractEventLoop | None = None

    def connection(self, timeout: float = 60.0) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        connection = self.connection()
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.token is not None:
            given.setdefault("Authorization", f"Bearer {self.token}")
        try:
            connection.request(method, path, body, given)
            reply = connection.getresponse()
            return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.send("GET", path, None, **headers)

    def post(self, body: bytes, **headers: str) -> Reply:
        return self.send("POST", "/v1/chat/completions", body, **({"Content_Type": "application/json"} | headers))

    def ask(self, content: Any, **fields: Any) -> Reply:
        return self.post(request(content, **fields))


def request(content: Any, **fields: Any) -> bytes:
    """The body of a question."""
    return json.dumps({"messages": [{"role": "user", "content": content}]} | fields).encode()


def image_url(encoded: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(encoded).decode()}"


def png(colour: str = "red", size: tuple[int, int] = (32, 32)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def with_image(question: str, url: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]


@contextmanager
def served(model: Any, limits: Limits, token: str | None = None) -> Iterator[tuple[Server, ChatApi]]:
    """Within, a server on a free port of this machine.

    Args:
        token: digest.
    """
    api = ChatApi(model, "tiny", limits, token)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(api.app, log_level="critical", lifespan="off"))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=[server.serve([listener])], daemon=True)
    thread.start()
    try:
        yield Server(listener.getsockname()[1], loop=loop), api
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
