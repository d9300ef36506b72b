"""All benchmarks, or some of them, into docs/benchmarks.md and docs/benchmarks.png.

    python -m benchmarks [PART ...] [--short] [--long]

A part that fails is reported, and the others are measured. Results are kept in build/benchmarks/results.json, part by part, and the page is
written from all of them. With --short every part is only tried, in a minute or so, and page and plot go to build/benchmarks/short/.
"""

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.case import Case, write_aligner
from benchmarks.options import Options
from benchmarks.report import Found, draw, keep, page

PARTS = {  # a module each, in the order of the page
    "step": "A step of phase 2",
    "counts": "What a step does, counted",
    "store": "Phase 1 from the feature store, and encoding in each epoch",
    "checkpoints": "Checkpoints",
    "start_up": "Start, end and recovery",
    "mlflow_cost": "MLflow",
    "sweeps": "Eight trials against eight commands",
    "growth": "Growth",
    "on_paper": "On many GPUs",
}
BUILD = Path("build/benchmarks")


def run(name: str, options: Options) -> Found:
    """One part; what it raises is in `errors`."""
    try:
        found: Found = importlib.import_module(f"benchmarks.{name}").measure(options)
    except Exception as error:  # the others are measured all the same
        return Found(errors=[f"{type(error).__name__}: {error}"])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--short", action="store_true", help="only try whether they work")
    parser.add_argument("--long", action="store_true", help="also start with a million records (a quarter of an hour)")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.parts if name not in PARTS]:
        parser.error(f"{', '.join(unknown)}: not a part; there are {', '.join(PARTS)}")
    out = BUILD / "short" if arguments.short else BUILD
    docs = out if arguments.short else Path("docs")
    failed = False
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the contestants end then, too
    folder = Path(tempfile.mkdtemp(prefix="bench", dir=BUILD.parent if BUILD.parent.is_dir() else None))
    try:
        options = Options(folder.resolve(), Case(str(folder.resolve() / "shared")), arguments.short, arguments.long)
        options.say("writing an aligner")
        write_aligner(options.case)
        for name in arguments.parts or PARTS:
            options.say(f"part {name}")
            begin = time.monotonic()
            found = run(name, options)
            results = keep(out / "results.json", name, found, time.monotonic() - begin, arguments.short)
            for error in found.errors:
                options.say(f"part {name} failed: {error}")
            failed |= bool(found.errors)
            (docs / "benchmarks.md").write_text(page(results, PARTS, "benchmarks.png"))
            draw(results, docs / "benchmarks.png")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{docs / 'benchmarks.md'} and {docs / 'benchmarks.png'} are written")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
