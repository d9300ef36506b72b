"""Whole objects under a URL such as s3://bucket/prefix, read and written with conditions. No other module talks to an object storage.

A server that is away or overloaded is tried again for a while; what it refuses for good raises at once.
"""

import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from raytrain2p.config.scratch import URL
from raytrain2p.config.secrets import one_line
from raytrain2p.storage.errors import StorageError
from raytrain2p.storage.files import written_aside

PATIENCE = 300.0  # seconds for which a server may be away while training continues
AT_THE_START = 10.0  # and before it begins
LONGEST_WAIT = 5.0  # seconds between two tries
PART = 16 * 2**20  # bytes: larger objects are sent in parts of this size
PARTS_AT_ONCE = 4
VARIABLES = ("AWS_", "GOOGLE_", "AZURE_")  # of the environment: endpoint, region, credentials
TEMPORARY = (408, 409, 425, 429)  # statuses beside 5xx after which the same request may succeed

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Version:
    """What a conditional write expects to replace. `number`: stores that count generations have one."""

    e_tag: str | None
    number: str | None = None

    def same_as(self, other: "Version") -> bool:
        return self.e_tag == other.e_tag and self.number in (None, other.number)


@dataclass(frozen=True)
class Object:
    """One object of a listing; `modified` in seconds since 1970, by the server's clock."""

    key: str
    size: int
    version: Version
    modified: float


class ChangedError(Exception):
    """The object is not the one that a conditional write expected: another process wrote it."""


ABSENT = "absent"  # what a write that creates an object expects


def environment() -> dict[str, str]:
    """The variables that a process on another node needs to reach the same storage, perhaps with credentials."""
    return {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}


class ObjectStore:
    """The objects under a URL. Keys are relative to it.

    Args:
        url: s3://, gs:// or az:// with a bucket, and perhaps a prefix. Endpoint and credentials come from the environment.
        patience: seconds for which requests are tried again while the server is away.
    """

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        from obstore.store import AzureStore, GCSStore, S3Store

        found = URL.fullmatch(url)
        assert found is not None, url
        bucket, _, prefix = found[2].partition("/")
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT", "")
        options: dict[str, Any] = {
            "prefix": prefix or None,
            "client_options": {"timeout": timedelta(seconds=60), "connect_timeout": timedelta(seconds=5)},
            "retry_config": {"max_retries": 2, "retry_timeout": timedelta(seconds=10)},
        }
        if found[1] == "s3" and endpoint.startswith("http://"):
            options["client_options"]["allow_http"] = True
        self.url, self.patience = f"{found[1]}://{found[2]}", patience
        self.store: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[found[1]](bucket, **options)

    def read(self, key: str) -> tuple[bytes, Version] | None:
        """The content of an object; None if there is none."""
        import obstore

        def request() -> tuple[bytes, Version]:
            answer = obstore.get(self.store, key)
            return bytes(answer.bytes()), _version(answer.meta)

        return self._tried(key, request, missing=None)

    def download(self, key: str, path: Path) -> Version | None:
        """Replace a file by an object, atomically. Returns None, and leaves the file, if there is no such object."""
        import obstore

        def request() -> Version:
            answer = obstore.get(self.store, key)
            with written_aside(path) as aside, aside.open("wb") as stream:
                for part in answer.stream(min_chunk_size=PART):
                    stream.write(part)
            return _version(answer.meta)

        return self._tried(key, request, missing=None)

    def write(self, key: str, content: bytes | Path, expected: Version | str | None = None) -> Version:
        """Write an object. It is replaced in one step.

        Args:
            content: bytes, or a file, which may be of any size.
            expected: ABSENT, or the version to replace; None replaces whatever is there. Only bytes are written with a condition. An object
                that has this very content counts as written: a first try may have arrived although its answer did not.

        Raises:
            ChangedError: the object is another one than expected.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        mode: Any = None
        if expected == ABSENT:
            mode = "create"
        elif isinstance(expected, Version):
            mode = {"e_tag": expected.e_tag} | ({"version": expected.number} if expected.number else {})
        try:
            if isinstance(content, Path):
                answer = self._tried(
                    key, lambda: obstore.put(self.store, key, content, use_multipart=True, chunk_size=PART, max_concurrency=PARTS_AT_ONCE)
                )
            else:
                answer = self._tried(key, lambda: obstore.put(self.store, key, content, mode=mode, use_multipart=False))
            return _version(answer)
        except (AlreadyExistsError, PreconditionError):
            if (found := self.read(key)) is not None and found[0] == content:
                return found[1]
            raise ChangedError(f"{self.url}/{key} was written by another process") from None
        except FileNotFoundError:
            if isinstance(expected, Version):
                raise ChangedError(f"{self.url}/{key} was deleted by another process") from None
            raise self._error(key, "its bucket does not exist") from None

    def copy(self, source: str, key: str) -> Version:
        """Copy an object to another key, on the server."""
        import obstore

        def request() -> Version:
            obstore.copy(self.store, source, key)
            return _version(obstore.head(self.store, key))

        return self._tried(key, request)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, those that are gone already too."""
        import obstore

        for key in keys:
            self._tried(key, lambda key=key: obstore.delete(self.store, key), missing=None)  # type: ignore[misc]

    def list(self, prefix: str = "") -> list[Object]:
        """The objects under a prefix, which ends at a `/`."""
        import obstore

        def request() -> list[Object]:
            pages = obstore.list(self.store, prefix or None, chunk_size=1000)
            return [Object(one["path"], one["size"], _version(one), one["last_modified"].timestamp()) for page in pages for one in page]

        return self._tried(prefix, request)

    def _tried(self, key: str, request: Callable[[], Answer], **missing: Any) -> Answer:
        """The answer to a request, which is sent again while the server is away.

        Args:
            missing: `missing=VALUE` returns that if there is no such object.

        Raises:
            StorageError: the server refuses it, or has been away for too long.
        """
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        began, wait = time.monotonic(), 0.2
        while True:
            try:
                return request()
            except (AlreadyExistsError, PreconditionError):
                raise
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise self._error(key, "its bucket does not exist") from None
                if missing:
                    return missing["missing"]
                raise
            except (BaseError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the disk's
                reason, is_final = _reason(str(error))
                if is_final or time.monotonic() - began + wait > self.patience:
                    raise self._error(key, reason) from None
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def _error(self, key: str, reason: str) -> StorageError:
        where = f"{self.url}/{key}" if key else self.url
        return StorageError(f"{where} cannot be reached: {reason}")


def _version(answer: Any) -> Version:
    number = answer.get("version")
    return Version(answer["e_tag"], None if number == "null" else number)


def _reason(text: str) -> tuple[str, bool]:
    """What an error says, in a few words, and whether the same request will fail again."""
    text = text.partition("Debug source")[0]
    status = int(found[1]) if (found := re.search(r"status code: (\d{3})", text)) else None
    code = found[1] if (found := re.search(r"<Code>(\w+)</Code>", text)) else ""
    if code == "NoSuchBucket":
        return "its bucket does not exist", True
    if status in (401, 403):
        return f"the credentials are not accepted ({status} {code}".rstrip() + ")", True
    if status is not None:
        return f"the server answers {status} {code}".rstrip(), status < 500 and status not in TEMPORARY
    # `Generic S3 error: Error performing PUT http://... in 3ms, after 2 retries, ... - HTTP error: error sending request`
    return one_line(text.rpartition(" - ")[2] or text, 150), False
