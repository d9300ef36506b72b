"""`python -m raytrain2p.runs {sync,reconcile} [RUN ...]`: bring MLflow up to date with what is on disk."""

import argparse
import importlib
import sys

from raytrain2p.config import InputError, Problem, load_settings
from raytrain2p.config.cli import FAILED, Parser, exit_code, say

# Verb: module whose `update` does it, and what it does
VERBS = {
    "sync": ("raytrain2p.runs.sync", "send what MLflow does not have yet: points, parameters, artifacts, status"),
    "reconcile": ("raytrain2p.runs.reconcile", "find orphaned runs, set them FAILED, and send what MLflow does not have"),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m raytrain2p.runs",
        description="Bring MLflow up to date with the run directories.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (_, meaning) in VERBS.items():
        one = verbs.add_parser(verb, help=meaning, description=f"{meaning[0].upper()}{meaning[1:]}.")
        one.add_argument(
            "words",
            nargs="*",
            metavar="RUN|key=value",
            help="runs: a directory, a run ID or its start, or `latest` (default: all); and settings: output.root=DIR, tracking.uri=URI",
        )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 (MLflow still lacks something, or a run is damaged) or 2 (bad input); 130 after
    Ctrl-C."""
    options = parse(arguments)
    return exit_code(lambda: update(options.verb, options.words))


def update(verb: str, words: list[str]) -> int:
    """Apply a verb to the runs named, or to all.

    Args:
        words: runs, and settings as `key=value`.

    Raises:
        InputError: a setting is wrong, a name fits no run, or there are no runs at all.
    """
    overrides = [word for word in words if "=" in word]
    settings = load_settings(1, None, overrides)
    from raytrain2p.tracking.find import find_runs
    from raytrain2p.tracking.run import has_launches

    root, damaged = settings.output.root, list[str]()
    runs = find_runs(root, [word for word in words if "=" not in word], damaged.append)
    if not runs and not damaged and not (verb == "reconcile" and has_launches(root)):
        raise InputError(Problem(f"output.root={root}", "has no runs", f"name another: python -m raytrain2p.runs {verb} output.root=DIR"))
    for line in damaged:
        say(line)
    given = settings.tracking.uri if any(override.startswith("tracking.uri=") for override in overrides) else None
    module, _ = VERBS[verb]  # imported here: `--help` does not wait for MLflow
    complete: int = importlib.import_module(module).update(runs, settings, given, say)
    every = len(runs) + len(damaged)
    print(f"{complete} of {every} runs are complete in MLflow")
    return 0 if complete == every else FAILED


if __name__ == "__main__":
    sys.exit(main())
