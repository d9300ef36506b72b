"""What was typed behind `raytrain2p runs`: runs, settings and the options of the verb."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from raytrain2p.config import InputError, Problem, Settings, load_settings
from raytrain2p.config.cli import Parser
from raytrain2p.config.scratch import is_remote, public
from raytrain2p.tracking.find import find_runs
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_objects import open_root

READING = ("list", "show", "latest", "find", "tree", "compare", "verify", "export")  # verbs that only read runs
WRITING = ("log", "repair")  # but for these options


@dataclass(frozen=True)
class Request:
    """A verb's command line.

    Args:
        names: runs as typed: a directory, a run ID or its start, a launch ID, or `latest`.
        settings: of them `output.root` and `tracking.uri` count.
        uri: the tracking URI, if it was given; else each run has its own on record.
        options: of the verb; `json` is one of all verbs.
    """

    names: list[str]
    settings: Settings
    uri: str | None
    options: argparse.Namespace

    @property
    def root(self) -> str:
        return self.settings.output.root

    def runs(self, none_is_fine: bool = False) -> tuple[list[Run], list[str]]:
        """The runs named, or all, the oldest first; and a line for each damaged one, which is left out.

        Raises:
            InputError: a name fits no run, or several; or there are no runs at all.
        """
        damaged = list[str]()
        runs = find_runs(self.root, self.names, damaged.append)
        if not runs and not damaged and not none_is_fine:
            raise self.nothing_here()
        return runs, damaged

    def nothing_here(self) -> InputError:
        fix = f"name another: python -m raytrain2p.runs {self.options.verb} output.root=DIR"
        return InputError(Problem(f"output.root={self.root}", "has no runs", fix))


def parse(verb: str, meaning: str, add_arguments: Callable[[argparse.ArgumentParser], None], arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog=f"python -m raytrain2p.runs {verb}", description=f"{meaning[0].upper()}{meaning[1:]}.")
    help_text = "runs: a directory, a run ID or its start, a launch ID, or `latest`; and settings: output.root=DIR, tracking.uri=URI"
    parser.add_argument("words", nargs="*", metavar="RUN|key=value", help=help_text)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_arguments(parser)
    parser.set_defaults(verb=verb)
    return parser.parse_intermixed_args(arguments)


def read_request(options: argparse.Namespace) -> Request:
    """The request of a command line.

    Raises:
        InputError: a setting is wrong.
    """
    overrides = [word for word in options.words if "=" in word.partition("/")[0]]  # else in a path, as in /old/lr=0.1
    settings = load_settings(1, None, overrides)
    if is_remote(settings.output.root):
        writes = next((f"{options.verb} --{option}" for option in WRITING if getattr(options, option, False)), None)
        if options.verb not in READING or writes:
            what = f"is an object storage, where `{writes or options.verb}` does not work"
            fix = f"these do: {', '.join(READING)}; or copy the runs to a directory, and give that one"
            raise InputError(Problem(f"output.root={public(settings.output.root)}", what, fix))
        open_root(settings.output.root, everything=options.verb == "verify" and not options.fast)
    uri = settings.tracking.uri if any(override.startswith("tracking.uri=") for override in overrides) else None
    return Request([word for word in options.words if word not in overrides], settings, uri, options)


@contextmanager
def reporting_root(root: str, unchanged: str) -> Iterator[None]:
    """Within, a verb writes its own records under an output root.

    Args:
        unchanged: what was not done, if it cannot.

    Raises:
        InputError: they cannot be written.
    """
    try:
        yield
    except OSError as error:
        what = f"cannot be written: {error.strerror}; {unchanged}"
        raise InputError(Problem(f"output.root={root}", what, "set another output.root, or free space")) from None
