"""On PYTHONPATH, this kills a process once, at the moment that RAYTRAIN2P_CHAOS_MOMENT names, and creates the file
RAYTRAIN2P_CHAOS_DONE. With RAYTRAIN2P_CHAOS_MEMORY, in GB, the process takes so much memory instead, and Ray kills it.
RAYTRAIN2P_CHAOS_FAILS names a function, as MODULE:FUNCTION, that always raises. The package has no code for it.
"""

import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

# moment: module, function in it, whether to kill before it, after it or half-way through its file, in which call
MOMENTS = {
    "before the run exists": ("raytrain2p.tracking.create_run", "_find_or_make", "before", 1),
    "between making the run and recording it": ("raytrain2p.tracking.create_run", "_find_or_make", "after", 1),
    "after recording it, before its settings are written": ("raytrain2p.tracking.run_writer", "describe_run", "before", 1),
    "before the first report": ("raytrain2p.worker.ray_reports", "RayReports._report", "before", 1),
    "between two checkpoints": ("raytrain2p.tracking.checkpoints", "write_checkpoint", "after", 2),
    "while a checkpoint is written": ("raytrain2p.tracking.checkpoints", "write_checkpoint", "half", 2),
    "between the last checkpoint and the best": ("raytrain2p.tracking.checkpoints", "make_best", "before", 2),
    "between sending points and noting it": ("raytrain2p.tracking.mlflow_sync", "MlflowSync._note_sent", "before", 2),
    "while the artifact is written": ("raytrain2p.models.artifacts", "save_artifact", "half", 1),
    "between the artifact and the outcome": ("raytrain2p.worker.finalize", "last_values", "before", 1),
}


def kill_once() -> None:
    try:
        os.close(os.open(os.environ["RAYTRAIN2P_CHAOS_DONE"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    kept = []
    for _ in range(int(10 * float(os.environ.get("RAYTRAIN2P_CHAOS_MEMORY", "0")))):
        kept.append(b"x" * 100_000_000)
        time.sleep(0.05)  # Ray looks every tenth of a second
    if kept:
        time.sleep(20)
        os._exit(3)  # it was not killed
    os.kill(os.getpid(), signal.SIGKILL)


def wrapped(function: Any, when: str, wanted: int) -> Any:
    calls = 0

    def killing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if when == "fails":
            raise RuntimeError("broken for a test")
        if calls == wanted and when == "before":
            kill_once()
        if calls == wanted and when == "half":
            path = next(argument for argument in arguments if isinstance(argument, Path))
            path.with_name(f".{path.name}.aside-{os.getpid()}").write_bytes(b"PK half of a file")
            kill_once()
        result = function(*arguments, **options)
        if calls == wanted and when == "after":
            kill_once()
        return result

    return killing


class Patching(importlib.abc.MetaPathFinder):
    """Patches one function of a module when that is loaded."""

    def __init__(self, module: str, name: str, when: str, wanted: int) -> None:
        self.module, self.name, self.when, self.wanted = module, name, when, wanted

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            *owners, last = self.name.split(".")
            owner = module
            for part in owners:
                owner = getattr(owner, part)
            setattr(owner, last, wrapped(getattr(owner, last), self.when, self.wanted))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("RAYTRAIN2P_CHAOS_MOMENT"):
    sys.meta_path.insert(0, Patching(*MOMENTS[os.environ["RAYTRAIN2P_CHAOS_MOMENT"]]))
if os.environ.get("RAYTRAIN2P_CHAOS_FAILS"):
    module, name = os.environ["RAYTRAIN2P_CHAOS_FAILS"].split(":")
    sys.meta_path.insert(0, Patching(module, name, "fails", 1))
