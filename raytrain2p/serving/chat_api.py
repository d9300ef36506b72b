"""The HTTP side of a server: OpenAI's chat completions, health, metrics and a page. It knows a model only by what it asks of it."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from raytrain2p.serving.chat_request import ChatRequest, read_chat_request
from raytrain2p.serving.guard import COMPLETIONS, GONE, HEALTH, METRICS, MODELS, PAGE, READY, Guard
from raytrain2p.serving.limits import Limits, RefusedError
from raytrain2p.serving.metrics import Metrics
from raytrain2p.serving.model import Answer, Model, Question
from raytrain2p.serving.page import page, page_policy

SECONDS_TO_BE_READY = 5.0


class ChatApi:
    """The application of one server.

    Args:
        name: of the model, for clients.
        token: digest of the token that requests must bring, if any.
    """

    def __init__(self, model: Model, name: str, limits: Limits, token: str | None = None) -> None:
        self.model, self.name, self.limits, self.metrics = model, name, limits, Metrics()
        self.busy, self.draining, self.began = 0, False, int(time.time())
        self.idle = asyncio.Event()
        self.idle.set()
        self.routes = self._routes()
        self.app: ASGIApp = Guard(self._admitted, self.metrics, token, page_policy())

    def _routes(self) -> FastAPI:
        app = FastAPI(title="raytrain2p", docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route(PAGE, self.show_page, methods=["GET"], response_class=HTMLResponse)
        app.add_api_route(HEALTH, self.health, methods=["GET"])
        app.add_api_route(READY, self.ready, methods=["GET"])
        app.add_api_route(METRICS, self.show_metrics, methods=["GET"])
        app.add_api_route(MODELS, self.models, methods=["GET"])
        app.add_api_route(COMPLETIONS, self.complete, methods=["POST"])
        app.add_exception_handler(HTTPException, no_such_route)
        app.add_exception_handler(RefusedError, refusal)
        app.add_exception_handler(Exception, failure)
        return app

    async def show_page(self) -> HTMLResponse:
        return HTMLResponse(page())

    async def health(self) -> JSONResponse:
        """The server lives; its model may still be loading."""
        return JSONResponse({"status": "alive"})

    async def ready(self) -> JSONResponse:
        """The model has answered, and requests are taken."""
        if self.draining:
            raise RefusedError(503, "stopping", "the server is being stopped")
        try:
            async with asyncio.timeout(SECONDS_TO_BE_READY):
                await self.model.ready()
        except TimeoutError:
            raise RefusedError(503, "model_not_ready", "the model does not answer yet") from None
        return JSONResponse({"status": "ready", "model": self.name})

    async def show_metrics(self) -> Response:
        self.metrics.queue.set(self.busy)
        return Response(self.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> JSONResponse:
        model = {"id": self.name, "object": "model", "created": self.began, "owned_by": "raytrain2p"}
        return JSONResponse({"object": "list", "data": [model]})

    async def complete(self, request: Request) -> Response:
        """One chat completion, at once or as a stream."""
        try:
            asked = await asyncio.to_thread(read_chat_request, await self._body(request), self.name, self.limits)
        except ClientDisconnect:
            return Response(status_code=GONE)  # nobody reads it
        question = Question(asked.record, asked.max_tokens)
        if not asked.stream:
            answer = await self.model.answer(question)
            self.metrics.answer(answer)
            return JSONResponse(self._completion(answer))
        pieces = self.model.stream(question)
        await anext(pieces)  # accepted, or RefusedError while there is a status to send
        return StreamingResponse(self._events(pieces, asked), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    async def _admitted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts the completions that are under way, from the head of the request to the end of the answer."""
        if scope["type"] != "http" or scope["path"] != COMPLETIONS:
            await self.routes(scope, receive, send)
            return
        if self.draining:
            raise RefusedError(503, "stopping", "the server is being stopped")
        if self.busy >= self.limits.max_queue:
            raise RefusedError(429, "queue_full", f"{self.busy} requests wait already: try again")
        self.busy += 1
        self.idle.clear()
        try:
            await self.routes(scope, receive, send)
        finally:
            self.busy -= 1
            if not self.busy:
                self.idle.set()

    async def drain(self, seconds: float) -> bool:
        """Take no more requests, and wait for the answers in flight. Returns whether all were sent."""
        self.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self.idle.wait()
        except TimeoutError:
            return False
        return True

    async def _body(self, request: Request) -> bytes:
        most = self.limits.request_bytes
        too_large = RefusedError(413, "request_too_large", f"the body is larger than {most:,} bytes")
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusedError(415, "unsupported_media_type", "send `Content-Type: application/json`")  # else any web page could ask
        if (length := request.headers.get("content-length", "0")).isdecimal() and int(length[:20]) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.seconds_to_send):
                async for piece in request.stream():
                    body += piece
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            what = f"the body did not arrive within {self.limits.seconds_to_send:g} seconds"
            raise RefusedError(408, "request_timeout", what) from None
        return bytes(body)

    def _completion(self, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(answer)}
        return self._head("chat.completion") | {"choices": [choice], "usage": usage(answer)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.name}

    async def _events(self, pieces: AsyncIterator[str | Answer], asked: ChatRequest) -> AsyncIterator[str]:
        """Server-sent events; an error while the answer is written is one too."""
        head = self._head("chat.completion.chunk")

        def event(delta: dict[str, Any], reason: str | None = None) -> str:
            return line(head | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]})

        try:
            async with aclosing(pieces):  # type: ignore[type-var]  # an async generator
                yield event({"role": "assistant", "content": ""})
                async for piece in pieces:
                    if isinstance(piece, str):
                        yield event({"content": piece})
                        continue
                    self.metrics.answer(piece)
                    yield event({}, finish_reason(piece))
                    if asked.include_usage:
                        yield line(head | {"choices": [], "usage": usage(piece)})
            yield "data: [DONE]\n\n"
        except RefusedError as error:
            yield line(error.body)


def line(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def finish_reason(answer: Answer) -> str:
    return "length" if answer.is_cut else "stop"


def usage(answer: Answer) -> dict[str, int]:
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def no_such_route(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    what = f"there is no {request.method} of this address" if error.status_code in (404, 405) else str(error.detail)
    found = RefusedError(error.status_code, "unknown_url" if error.status_code == 404 else "invalid_request", what)
    return JSONResponse(found.body, error.status_code, dict(error.headers or {}))


async def refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RefusedError)
    return JSONResponse(error.body, error.status, error.headers)


async def failure(request: Request, error: Exception) -> JSONResponse:
    """Of a bug, which Guard writes into the log."""
    return await refusal(request, RefusedError(500, "internal_error", "the server failed on this request"))
