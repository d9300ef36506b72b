"""The token that every request to Ray needs: where Ray looks for it, and a new one if there is none."""

import errno
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path


def ensure_token() -> None:
    """Make a token in ~/.ray/auth_token if the user has none. Its owner alone can read it; Ray's own command lets everyone."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if not path.is_file():
        descriptor, aside = tempfile.mkstemp(dir=path.parent)  # mode 600
        try:
            with os.fdopen(descriptor, "w") as stream:
                stream.write(secrets.token_hex(32))
            with suppress(FileExistsError):  # another launch has just made one: all must use the same
                os.link(aside, path)
        finally:
            Path(aside).unlink()
        if not path.is_file():
            raise OSError(errno.EEXIST, "it is there, but is not a file", str(path))
    with suppress(OSError):  # mounted read-only
        path.chmod(0o600)


if __name__ == "__main__":
    ensure_token()
