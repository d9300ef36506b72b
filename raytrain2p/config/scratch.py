"""Where the objects of an `output.root` such as s3://bucket/prefix lie on this machine while they are worked with.

Each has one path: `<scratch>/s3/bucket/prefix/...`. All code works with that path; what people read, and what is written down, has the URL.
"""

import os
import re
from pathlib import Path

SCHEMES = ("s3", "gs", "az")
URL = re.compile(rf"({'|'.join(SCHEMES)})://([\w.=+@-]+(?:/[\w.=+@-]+)*)/*")
SCRATCH = "RAYTRAIN2P_SCRATCH"  # the variable that names another place
EXAMPLE = "s3://BUCKET/PREFIX"


def cache_directory() -> Path:
    """The directory of models and features, shared by all runs: `$RAYTRAIN2P_CACHE`, else the user's cache directory."""
    if explicit := os.environ.get("RAYTRAIN2P_CACHE"):
        return Path(explicit).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "raytrain2p"


def scratch_directory() -> Path:
    """`$RAYTRAIN2P_SCRATCH`, else a folder of the cache. It may be removed whenever nothing runs."""
    if explicit := os.environ.get(SCRATCH):
        return Path(explicit).expanduser().absolute()
    return cache_directory() / "scratch"


def is_url(text: str) -> bool:
    return "://" in text


def local_path(text: str) -> str:
    """The path in scratch of an object's URL, which is valid; any other text as it is."""
    if (found := URL.fullmatch(text)) is None or ".." in text:
        return text
    return str(scratch_directory() / found[1] / found[2])


def is_remote(path: Path | str) -> bool:
    """Whether a path in scratch stands for objects."""
    try:
        return any(Path(path).is_relative_to(scratch_directory() / scheme) for scheme in SCHEMES)
    except RuntimeError:  # the user has no home directory, and so no cache
        return False


def public(text: str) -> str:
    """The text with URLs in place of paths in scratch."""
    try:
        scratch = str(scratch_directory())
    except RuntimeError:
        return text
    if scratch not in text:
        return text
    for scheme in SCHEMES:
        text = text.replace(f"{scratch}/{scheme}/", f"{scheme}://")
    return text
