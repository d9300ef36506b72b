"""What a request may ask for, and the errors of one that asks for more, in the form of OpenAI's API."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from raytrain2p.data.media import MEDIA, MediaRef

RETRY_AFTER = 1  # seconds, of a server that is busy or not ready


@dataclass(frozen=True)
class Limits:
    """What one request, and all that wait, may take. They bound the memory of the server.

    Args:
        max_queue: requests that are read, wait or are answered; one more gets 429.
        max_tokens: of an answer; also of one whose request does not say.
        request_bytes: of a body.
        values: pixels of all images of a request, and samples of all its clips.
        characters: of all texts of a request.
        seconds_to_send: in which a body must be here.
    """

    max_queue: int = 256
    max_tokens: int = 256
    request_bytes: int = 10 << 20
    values: int = 1 << 24
    characters: int = 200_000
    seconds_to_send: float = 30.0


class RefusedError(Exception):
    """A request gets no answer. The message is for the client: no paths, no tracebacks.

    Args:
        status: of HTTP.
        code: what is wrong, for programs.
        param: of the request, if one is wrong.
    """

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def __reduce__(self) -> tuple[type["RefusedError"], tuple[int, str, str, str | None]]:
        return type(self), (self.status, self.code, str(self), self.param)  # pickled between the processes of a server

    @property
    def body(self) -> dict[str, Any]:
        """https://platform.openai.com/docs/guides/error-codes"""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_AFTER)} if self.status in (429, 503) else {}


def check_size(media: Iterable[MediaRef], limits: Limits) -> None:
    """Check media by their headers: a few bytes may stand for gigabytes of pixels.

    Raises:
        RefusedError: one is not what it says, or they are too large together.
    """
    total = 0
    for ref in media:
        try:
            total += MEDIA[ref.modality].stated(ref.read())
        except Exception as error:  # a foreign decoder may raise anything for damaged bytes
            what = " ".join(str(error).split()) or type(error).__name__
            raise RefusedError(400, "invalid_media", f"`{ref.place}` does not decode as {ref.modality}: {what}", ref.place) from None
        if total > limits.values:
            what = f"the media hold {total:,} pixels or samples, the most are {limits.values:,}: send smaller ones"
            raise RefusedError(400, "media_too_large", what, ref.place)
