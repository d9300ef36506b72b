"""Kills between operations: an action in a child process, which ends at once before its n-th change of a file or of MLflow."""

import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

AUDITED = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.utime", "os.link", "os.symlink", "os.truncate", "shutil.copyfile"}
NEVER, KILLED = 1 << 30, 9


def in_child(folders: Iterable[Path], kill_at: int, action: Callable[[], int | None], requests: Any = None) -> tuple[int, int]:
    """Run an action in a child process.

    Args:
        folders: changes below them are counted.
        kill_at: number of the operation before which it ends.
        requests: class whose methods that change something are counted, too: MlflowClient.

    Returns:
        Its exit code, and how many operations there were.
    """
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        count = 0

        def operation() -> None:
            nonlocal count
            if count == kill_at:
                os._exit(KILLED)
            count += 1
            os.write(writing, b".")

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event not in AUDITED and not writes:
                return
            relative = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # to a directory that is being removed
            if relative or any(str(arguments[0]).startswith(str(folder)) for folder in folders):
                operation()

        def counting(send: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **options: Any) -> Any:
                operation()
                return send(*arguments, **options)

            return counted

        try:
            for name in dir(requests):
                if name.startswith(("create_", "set_", "log_", "update_", "delete_", "restore_")):
                    setattr(requests, name, counting(getattr(requests, name)))
            sys.addaudithook(audit)
            os._exit(action() or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(99)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        operations = len(stream.read())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), operations
