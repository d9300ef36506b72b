"""`tag`: add and remove tags of runs, in their directories and in MLflow."""

import argparse
import re

from raytrain2p.config import Findings, Problem
from raytrain2p.config.cli import FAILED, report, say
from raytrain2p.config.secrets import masked
from raytrain2p.runs.output import print_json
from raytrain2p.runs.request import Request
from raytrain2p.runs.summary import OWN_TAGS
from raytrain2p.storage.errors import StorageError, reporting_disk_errors
from raytrain2p.tracking.damage import DamagedFileError
from raytrain2p.tracking.find import is_alive
from raytrain2p.tracking.run import Run, original_of

KEY, VALUE_LENGTH = re.compile(r"[\w.\- /]{1,250}"), 8000  # what MLflow takes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "The tag `keep` protects a run from `prune`."
    parser.add_argument("--set", action="append", default=[], metavar="KEY[=VALUE]", help="add a tag, or change it (default value: true)")
    parser.add_argument("--remove", action="append", default=[], metavar="KEY", help="remove a tag")


def run(request: Request) -> int:
    """Tag the runs. Returns 0, or 1 if one is damaged, a copy or under way; that MLflow is away does not count: `sync` sends it later.

    Raises:
        InputError: no run is named, a name fits none, or there is nothing to set or to remove.
    """
    added, removed = read_tags(request)
    runs, damaged = request.runs()
    tagged = list[Run]()
    for one in runs:
        try:
            why = change(one, request.root, added, removed)
        except DamagedFileError as error:
            why = f"is damaged: {error.line}"
        except StorageError as error:
            why = str(error)
        if why:
            damaged.append(f"{one.phase} {one.run_id[:8]}  {why}")
        else:
            tagged.append(one)
    for line in damaged:
        report(line)
    if tagged:
        from raytrain2p.runs.sync import sync  # with MLflow, whose import takes 2 s

        for one in tagged:
            sync(one, request.root, request.uri, report if request.options.json else say)
    if request.options.json:
        print_json([{"run_id": one.run_id, "tags": one.files.tags()} for one in tagged])
    return FAILED if damaged else 0


def change(run: Run, root: str, added: dict[str, str], removed: list[str]) -> str:
    """Change the tags in a run's directory. Returns why they must not be changed now; empty if they were.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    if (original := original_of(run)) is not None:
        return f"{run.directory} is a copy; tag the run itself, {original}"
    if not is_alive(run, root):
        with reporting_disk_errors(run.files.record, 10_000), run.files.lock.held() as holder:
            if holder is None:
                run.change_tags(added, removed)
                return ""
    return "is under way, and writes its own record: tag it when it has ended, or in MLflow"


def read_tags(request: Request) -> tuple[dict[str, str], list[str]]:
    """The tags to add, without credentials, and the names of those to remove.

    Raises:
        InputError: everything that is wrong.
    """
    options, findings = request.options, Findings()
    added = {key: value if given else "true" for key, given, value in (text.partition("=") for text in map(masked, options.set))}
    if not request.names:
        findings.add(Problem("RUN", "is missing", "name a run: a directory, a run ID or its start, or `latest`"))
    if not added and not options.remove:
        findings.add(Problem("tag", "nothing says which tag", "add --set KEY[=VALUE] or --remove KEY, as in --set keep"))
    for key in [*added, *options.remove]:
        if not KEY.fullmatch(key):
            findings.add(Problem(f"{key!r}", "is not a name for a tag", "take up to 250 letters, digits, `_`, `.`, `-`, `/` and blanks"))
        elif key.startswith(OWN_TAGS):
            findings.add(Problem(key, "is written by the program itself", "take a name of your own"))
        elif len(added.get(key, "")) > VALUE_LENGTH:
            findings.add(Problem(key, f"its value has {len(added[key])} characters", f"take at most {VALUE_LENGTH}"))
        elif key in added and key in options.remove:
            findings.add(Problem(key, "is to be set and to be removed", "leave one out"))
    findings.raise_any()
    return added, options.remove
