"""Masks credentials in what others can read: parameters, pages, logs, recorded commands, messages."""

import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, quote_plus

from raytrain2p.config.scratch import public

MASK = "***"

_PORT = r"(?!\d+(?:[/?#\s\"',)\]]|$))"
# user:password@host, with any scheme; not host:port. Up to the last @ of the word: a password may have one.
PASSWORD = re.compile(rf"(//[^\s:/@\[]*:){_PORT}(?:\S{{0,500}}|(?:(?!//)[^@\n]){{0,500}})(?=@)")
# https://token@host
USER = re.compile(r"(\bhttps?://)[^\s:/@]+(?=@)")
_NAME = (  # of a credential, at its end: `MLFLOW_TRACKING_TOKEN`, `AccountKey`, `X-Amz-Signature`, but not `max_new_tokens`
    r"[\w.-]*(?:token|password|passwd|passphrase|[._-]pass|pwd|secret|credentials?|signature|apikey|api[_-]key|[._-]key|"
    r"(?:access|account|private|shared|client|encryption)key)|sig|SAS|pass"
)
# What follows a name: in quotes up to the closing one, else up to a space or the next parameter of a URL
_VALUE = rf"(?:\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'|(?!{re.escape(MASK)}|(?:none|null|true|false|value)\b)[^\s'\"&]+)"
NAMED = re.compile(rf"(?i)(?<![\w.-])({_NAME})([\"']?\s*=\s*|[\"']?\s*:\s*(?=[\"']|\S{{4}}))({_VALUE})")
FLAG = re.compile(rf"(?i)(?<![\w-])(--(?:{_NAME}))(\s+)({_VALUE})")
HEADER = re.compile(r"(?i)(\b(?:proxy-)?authorization[\"']?\s*[=:]\s*[\"']?(?:(?:bearer|basic|digest|token)\s+)?)[^\s'\"]+")
BEARER = re.compile(r"(\b[Bb]earer\s+)(?:[\w.~+/=-]{20,}|(?=\S*\d)[\w.~+/=-]{8,})")
# Tokens that show what they are: Hugging Face, GitHub, GitLab, Databricks, OpenAI, Slack; JSON web tokens
KNOWN = re.compile(
    r"\b(?:(?:hf_|gh[a-z]_|github_pat_|glpat-|sk-|xox[a-z]-)[\w-]{16,}|dapi[0-9a-f]{32}|eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?)"
)
# Environment variables whose values are credentials; a path to one is not. Those of the second kind may be words, such as a name
VARIABLE = re.compile(r"(?i)PASSWORD|PASSWD|PASSPHRASE|(?<!^)_PWD")
TOKEN_VARIABLE = re.compile(r"(?i)TOKEN(?!IZER)|SECRET|KEY$|CREDENTIAL")
PATH_VARIABLE = re.compile(r"(?i)(PATH|FILE|DIR|SOCK)$")
TOKEN = re.compile(r"(?=.*\d).{8,}|.{16,}")
PASSWORD_VALUE = re.compile(".{6,}")  # shorter ones are words, such as `true`


def masked(text: str) -> str:
    """The text as others may read it: with `***` in place of each password in a URI, each value of a token, and each credential of the
    environment; and with the URL of an object in place of its path in scratch.

    >>> masked("postgresql://me:hunter2@db/mlflow")
    'postgresql://me:***@db/mlflow'
    """
    return masker()(text)


def masker() -> Callable[[str], str]:
    """`masked` for many texts: the environment is looked through once."""
    secrets = list(_of_environment())

    def mask(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, MASK)
        return public(_masked_by_form(text))

    return mask


def _masked_by_form(text: str) -> str:
    text = USER.sub(rf"\1{MASK}", PASSWORD.sub(rf"\1{MASK}", text))
    text = BEARER.sub(rf"\1{MASK}", HEADER.sub(rf"\1{MASK}", text))
    return KNOWN.sub(MASK, FLAG.sub(_without_value, NAMED.sub(_without_value, text)))


def _without_value(match: re.Match[str]) -> str:
    mark = match[3][0] if match[3][0] in "\"'" else ""
    return f"{match[1]}{match[2]}{mark}{MASK}{mark}"


def _of_environment() -> Iterator[str]:
    """The credentials in environment variables, also as they are written in JSON and in URLs; the longest first."""
    values = {
        value
        for name, value in os.environ.items()
        if (kind := _value_of(name)) is not None and kind.match(value) and value != MASK and not value.startswith("/")
    }
    written = {form for value in values for form in (value, json.dumps(value)[1:-1], repr(value)[1:-1], quote(value), quote_plus(value))}
    return iter(sorted(written, key=len, reverse=True))


@functools.cache
def _value_of(variable: str) -> re.Pattern[str] | None:
    """What a credential in this environment variable looks like; None if it has none."""
    if PATH_VARIABLE.search(variable):
        return None
    return PASSWORD_VALUE if VARIABLE.search(variable) else TOKEN if TOKEN_VARIABLE.search(variable) else None


def one_line(error: object, most: int = 200) -> str:
    """An error as one line of at most `most` characters, without credentials."""
    return masked(" ".join(str(error).split()))[:most]


def without_passwords(value: Any) -> Any:
    """Settings with credentials in URIs masked. All else stays: a resumed run reads these settings."""
    if isinstance(value, dict):
        return {key: without_passwords(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_passwords(inner) for inner in value]
    return _masked_by_form(value) if isinstance(value, str) and "://" in value else value


def mask_error(error: BaseException) -> None:
    """Mask the messages of an error that leaves a worker, and of those that caused it: Ray writes them into its logs."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.args = tuple(masked(argument) if isinstance(argument, str) else argument for argument in error.args)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
