"""Passwords do not belong where many can read them: parameters, pages, logs, recorded commands."""

import re

# scheme://user:password@host, but not scheme://host:port
PASSWORD = re.compile(r"(\b[\w.+-]+://[^\s:/@]*:)(?!\d+(?:[/?\s\"',]|$))[^\s]*(?=@)")
# a token or key that is given as a value: `token=...`, `api_key: ...`
TOKEN = re.compile(r"(?i)\b([\w-]*(?:token|password|secret|api_key|apikey))(\s*[=:]\s*)(['\"]?)[^\s'\"&]{4,}")
MASK = "***"


def masked(text: str) -> str:
    """The text with `***` in place of each password in a URI and each value of a token.

    >>> masked("postgresql://me:hunter2@db/mlflow")
    'postgresql://me:***@db/mlflow'
    """
    return TOKEN.sub(rf"\1\2\3{MASK}", PASSWORD.sub(rf"\1{MASK}", text))
