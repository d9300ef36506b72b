"""The page at `/`. It loads nothing: a browser runs the script and the style of these very bytes alone."""

import base64
import functools
import hashlib
import re
from pathlib import Path


@functools.cache
def page() -> str:
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8")


@functools.cache
def page_policy() -> str:
    """Its Content-Security-Policy. https://www.w3.org/TR/CSP3/"""
    script, style = (_hash(re.search(f"<{tag}>(.*?)</{tag}>", page(), re.DOTALL)) for tag in ("script", "style"))
    allowed = f"script-src {script}; style-src {style}; img-src data:; connect-src 'self'"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def _hash(found: re.Match[str] | None) -> str:
    assert found is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"
