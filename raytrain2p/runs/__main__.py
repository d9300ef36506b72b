"""`python -m raytrain2p.runs VERB [RUN ...] [key=value ...]`: what the run directories and MLflow hold, and keeping the two alike."""

import gc
import importlib
import sys

from raytrain2p.config.cli import BAD_INPUT, exit_code
from raytrain2p.config.escaping import printable
from raytrain2p.config.secrets import masked
from raytrain2p.runs.request import parse, read_request

# Verb: module whose `run` does it, and what it does
VERBS = {
    "list": ("raytrain2p.runs.list", "list runs: status, age, best metric, steps, size, tags"),
    "show": ("raytrain2p.runs.show", "show everything about a run: settings, metrics, files, lineage, inputs, MLflow"),
    "latest": ("raytrain2p.runs.latest", "print the path of the newest run, for scripts"),
    "find": ("raytrain2p.runs.find", "find the directory and the MLflow run of each other; by sweep, aligner, initial weights or data"),
    "tree": ("raytrain2p.runs.tree", "show which runs came from which: aligner, phase 2, warm starts, registered versions; sweep, trials"),
    "compare": ("raytrain2p.runs.compare", "compare runs: settings and inputs that differ, metrics, learning curves in one plot"),
    "verify": ("raytrain2p.runs.verify", "check that directories and MLflow are whole, and hold the same"),
    "register": ("raytrain2p.runs.register", "register a run's model in MLflow's Model Registry, which loads and serves it"),
    "tag": ("raytrain2p.runs.tag", "add and remove tags, such as `keep`, which protects a run from prune"),
    "export": ("raytrain2p.runs.export", "write a phase 2 run as a Hugging Face directory, and push it to a model hub"),
    "parity": ("raytrain2p.runs.parity", "ask a model in every way that it is used, and compare the answers"),
    "prune": ("raytrain2p.runs.prune", "delete runs that are not needed any more; without --yes, show which"),
    "sync": ("raytrain2p.runs.sync", "send what MLflow does not have yet: points, parameters, artifacts, status"),
    "reconcile": ("raytrain2p.runs.reconcile", "find orphaned runs, set them FAILED, and send what MLflow does not have"),
    "migrate": ("raytrain2p.runs.migrate", "take directories of older layouts into this one, with an MLflow run for each; and back"),
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
    gc.set_threshold(200_000, 20, 100)  # MLflow makes a hundred objects for each run, which stay: collections took a quarter of the time
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
