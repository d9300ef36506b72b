"""What each request passes on its way in and out: the token, the name of the host, headers for browsers, and the counters."""

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raytrain2p.serving.limits import RefusedError
from raytrain2p.serving.metrics import Metrics

PAGE, HEALTH, READY, METRICS, MODELS, COMPLETIONS = "/", "/healthz", "/readyz", "/metrics", "/v1/models", "/v1/chat/completions"
WITHOUT_TOKEN = {PAGE, HEALTH, READY}
ROUTES = {*WITHOUT_TOKEN, METRICS, MODELS, COMPLETIONS}
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]"}
SECONDS_TO_DISCARD, MOST_DISCARDED = 2.0, 1 << 26
GONE = 499  # the client went away: no answer was sent
log = logging.getLogger("raytrain2p.serving")


def digest_of_token(token: str) -> str:
    """What is given to the server in place of the token, so that no file of Ray has it."""
    return hashlib.sha256(token.encode()).hexdigest()


class Guard:
    """An ASGI application around another one.

    Args:
        token: the digest of the one that each request must bring; None: none, and only the names of this machine are served, since a
            page of a stranger can have its own name lead here.
        page_policy: the Content-Security-Policy of the page.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, token: str | None, page_policy: str) -> None:
        self.app, self.metrics, self.token, self.page_policy = app, metrics, token, page_policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1000})
            return
        began, status = time.monotonic(), GONE
        path, body = scope["path"], Body(receive)

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status >= 400:
                    await body.discard()
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Cache-Control"] = "no-store"
                headers["Content-Security-Policy"] = self.page_policy if path == PAGE and status == 200 else "default-src 'none'"
            await send(message)

        try:
            self._check(path, Headers(scope=scope))
            await self.app(scope, body.receive, noting)
        except RefusedError as refused:
            await send_json(noting, refused.status, refused.body, refused.headers)
        except Exception:
            log.exception("%s %s", scope["method"], path)
        finally:
            self.metrics.request(path if path in ROUTES else "other", status, time.monotonic() - began)

    def _check(self, path: str, headers: Mapping[str, str]) -> None:
        """Raises RefusedError."""
        if self.token is None:
            name = headers.get("host", "")
            if (name if name.endswith("]") else name.rpartition(":")[0] or name).lower() not in LOOPBACK_NAMES:
                raise RefusedError(403, "wrong_host", "without a token, only the names of this machine are served, such as localhost")
        elif path not in WITHOUT_TOKEN:
            kind, _, given = headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(digest_of_token(given.strip()), self.token)
            if kind.lower() != "bearer" or not same:
                raise RefusedError(401, "invalid_api_key", "send the server's token: `Authorization: Bearer TOKEN`")


class Body:
    """The body of a request, and how to be rid of it: a connection that is closed before all was read loses the answer on its way."""

    def __init__(self, receive: Receive) -> None:
        self.receive_next, self.more = receive, True

    async def receive(self) -> Message:
        message = await self.receive_next()
        self.more = message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def discard(self) -> None:
        taken = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(SECONDS_TO_DISCARD):
                while self.more and taken < MOST_DISCARDED:
                    taken += len((await self.receive()).get("body", b""))


async def send_json(send: Send, status: int, body: Mapping[str, object], headers: Mapping[str, str] | None = None) -> None:
    content = json.dumps(body).encode()
    heads = {"Content-Type": "application/json", "Content-Length": str(len(content))} | dict(headers or {})
    raw = [(name.lower().encode(), value.encode()) for name, value in heads.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": content})
