"""`python -m raytrain2p.runs {sync,reconcile} [RUN ...]`: bring MLflow up to date with what is on disk."""

import argparse
import sys

from raytrain2p.config import load_settings
from raytrain2p.config.cli import FAILED, exit_code


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m raytrain2p.runs",
        description="Bring MLflow up to date with the run directories.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, meaning in (
        ("sync", "send what MLflow does not have yet: points, parameters, artifacts, status"),
        ("reconcile", "find runs that died without a word, set them FAILED, and send what MLflow does not have"),
    ):
        one = verbs.add_parser(verb, help=meaning, description=f"{meaning[0].upper()}{meaning[1:]}.")
        one.add_argument(
            "words",
            nargs="*",
            metavar="RUN|key=value",
            help="runs: a directory, a run ID or its start, or `latest` (default: all); and settings: output.root=DIR, tracking.uri=URI",
        )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 (MLflow is away, or lacks something still) or 2 (bad input); 130 after Ctrl-C."""
    options = parse(arguments)
    return exit_code(lambda: bring_up_to_date(options.verb, options.words))


def bring_up_to_date(verb: str, words: list[str]) -> int:
    """Look at the runs named, or at all.

    Args:
        verb: `sync` or `reconcile`.
        words: runs, and settings as `key=value`.

    Raises:
        InputError: a setting is wrong, or a name fits no run.
    """
    overrides = [word for word in words if "=" in word]
    settings = load_settings(1, None, overrides)
    from raytrain2p.runs.reconcile import is_store, reconcile, reconcile_unborn
    from raytrain2p.runs.sync import runs_to_look_at, sync

    root, uri = settings.output.root, settings.tracking.uri
    runs = runs_to_look_at(root, [word for word in words if "=" not in word])
    given = uri if any(override.startswith("tracking.uri=") for override in overrides) else None
    whole = [(sync if verb == "sync" else reconcile)(run, root, given, print) for run in runs]
    if verb == "reconcile" and is_store(uri):
        reconcile_unborn(root, uri, print)
    print(f"{sum(whole)} of {len(whole)} runs are whole in MLflow")
    return 0 if all(whole) else FAILED


if __name__ == "__main__":
    sys.exit(main())
