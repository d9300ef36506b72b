"""`python -m raytrain2p.runs VERB [RUN ...] [key=value ...]`: what the run directories and MLflow hold, and keeping the two alike."""

import importlib
import sys

from raytrain2p.config.cli import BAD_INPUT, exit_code
from raytrain2p.config.escaping import printable
from raytrain2p.config.secrets import masked
from raytrain2p.runs.request import parse, read_request

# Verb: module whose `run` does it, and what it does
VERBS = {
    "list": ("raytrain2p.runs.list", "list runs: status, age, best metric, steps, size, tags"),
    "sync": ("raytrain2p.runs.sync", "send what MLflow does not have yet: points, parameters, artifacts, status"),
    "reconcile": ("raytrain2p.runs.reconcile", "find orphaned runs, set them FAILED, and send what MLflow does not have"),
}
USAGE = "\n".join(
    [
        "usage: python -m raytrain2p.runs VERB [RUN ...] [key=value ...] [--json]",
        "",
        "Find, compare, check and tidy runs, in their directories and in MLflow.",
        "",
        *(f"  {verb:11}{meaning}" for verb, (_, meaning) in VERBS.items()),
        "",
        "`python -m raytrain2p.runs VERB --help` lists its options.",
    ]
)


def main(arguments: list[str] | None = None) -> int:
    """Run a verb and return its exit code: 0, 1 (something is missing, differs or is damaged) or 2 (bad input); 130 after Ctrl-C."""
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help"):
        print(USAGE)
        return 0
    if verb not in VERBS:
        print(f"raytrain2p: {printable(masked(repr(verb)))} is not a verb\n{USAGE}", file=sys.stderr)
        return BAD_INPUT
    name, meaning = VERBS[verb]
    module = importlib.import_module(name)  # here: each verb loads its own libraries only
    options = parse(verb, meaning, module.add_arguments, rest)
    return exit_code(lambda: module.run(read_request(options)))


if __name__ == "__main__":
    sys.exit(main())
