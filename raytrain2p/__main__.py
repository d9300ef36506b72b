"""`raytrain2p VERB ...` and `python -m raytrain2p VERB ...`: every command under one name."""

import importlib
import sys

import raytrain2p
from raytrain2p.config.cli import BAD_INPUT

# Verb: module whose `main` takes the rest of the command line, and what it does
COMMANDS = {
    "train": ("raytrain2p.train", "train one phase"),
    "tune": ("raytrain2p.tune", "sweep settings of a phase"),
    "predict": ("raytrain2p.predict", "ask a trained assistant"),
    "serve": ("raytrain2p.serve", "serve a trained assistant over HTTP"),
    "runs": ("raytrain2p.runs.__main__", "find, compare, check and tidy runs"),
    "data": ("raytrain2p.data.__main__", "check records before training on them"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a verb and return its exit code: BAD_INPUT for an unknown one."""
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb == "--version":
        print(raytrain2p.__version__)
        return 0
    if verb in COMMANDS:
        module, _ = COMMANDS[verb]  # imported here: each verb loads its own libraries only
        code: int = importlib.import_module(module).main(rest)
        return code
    lines = ["usage: raytrain2p VERB ...", "", *(f"  {name:9}{meaning}" for name, (_, meaning) in COMMANDS.items())]
    if verb in ("-h", "--help"):
        print("\n".join([*lines, "", "`raytrain2p VERB --help` lists its options."]))
        return 0
    print("\n".join([f"raytrain2p: {verb!r} is not a verb", *lines]), file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
