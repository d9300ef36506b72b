"""Masks passwords in what others can read: parameters, pages, logs, recorded commands."""

import re
from typing import Any

# scheme://user:password@host, but not scheme://host:port
PASSWORD = re.compile(r"(\b[\w.+-]+://[^\s:/@]*:)(?!\d+(?:[/?\s\"',]|$))[^\s]*(?=@)")
# a token or key with its value: `token=...`, `api_key: ...`
TOKEN = re.compile(r"(?i)\b([\w-]*(?:token|password|secret|api_key|apikey))(\s*[=:]\s*)(['\"]?)[^\s'\"&]{4,}")
# https://token@host
USER = re.compile(r"(\bhttps?://)[^\s:/@]+(?=@)")
MASK = "***"


def masked(text: str) -> str:
    """The text with `***` in place of each password in a URI and each value of a token.

    >>> masked("postgresql://me:hunter2@db/mlflow")
    'postgresql://me:***@db/mlflow'
    """
    return TOKEN.sub(rf"\1\2\3{MASK}", USER.sub(rf"\1{MASK}", PASSWORD.sub(rf"\1{MASK}", text)))


def one_line(error: object, most: int = 200) -> str:
    """An error as one line of at most `most` characters, without passwords."""
    return masked(" ".join(str(error).split()))[:most]


def without_passwords(value: Any) -> Any:
    """Settings with passwords in URIs masked. All else stays: a resumed run reads these settings."""
    if isinstance(value, dict):
        return {key: without_passwords(inner) for key, inner in value.items()}
    return masked(value) if isinstance(value, str) and "://" in value else value
