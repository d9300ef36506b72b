"""Text from data, from a model or from a store, made safe for where it is shown: a terminal, JSON lines, Markdown, a plot."""

import json
import re
from typing import Any

# All but tab and newline; two ranges change the direction of text, and half characters cannot be printed.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with its control characters escaped, so that text from data cannot control a terminal.

    >>> printable("red\\x1b[31m")
    'red\\\\x1b[31m'
    """
    return CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def json_line(value: Any) -> str:
    """A value as one line of JSON that a terminal can show too: characters as they are, control characters escaped as JSON does."""
    return CONTROL_CHARACTERS.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))


def code_span(text: str) -> str:
    """Text as inline code of Markdown, whatever it contains. https://spec.commonmark.org/0.31.2/#code-spans"""
    text = " ".join(printable(text).split("\n"))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def code_block(text: str) -> str:
    """Text as an indented block of code of Markdown: no line of it is read as Markdown or HTML."""
    return "\n".join(f"    {line}" for line in printable(text).split("\n"))


def plot_text(text: str) -> str:
    """Text for matplotlib, which reads what is between two dollars as mathematics, and fails if that is not."""
    return printable(text).replace("$", r"\$")
