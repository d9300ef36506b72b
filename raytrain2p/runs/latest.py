"""`latest`: the path of the newest run's directory or artifact, for scripts."""

import argparse

from raytrain2p.config import InputError, Problem
from raytrain2p.config.phases import PHASES, SWEEPS
from raytrain2p.config.scratch import public
from raytrain2p.runs.output import print_json
from raytrain2p.runs.request import Request
from raytrain2p.tracking.damage import DamagedFileError
from raytrain2p.tracking.find import find_artifact, find_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--phase", choices=[*map(str, PHASES), SWEEPS], required=True, help="of this phase, or the newest sweep")
    parser.add_argument("--artifact", action="store_true", help="the path of its aligner.pt or model.pt; never of a run that failed")


def run(request: Request) -> int:
    """Print the path.

    Raises:
        InputError: there is none.
    """
    options, root = request.options, request.root
    phase = PHASES.get(int(options.phase)) if options.phase != SWEEPS else None
    if request.names:
        raise InputError(Problem(f"latest {' '.join(request.names)}", "takes no run", "give `--phase` alone"))
    if options.artifact and phase is None:
        raise InputError(Problem("--artifact", "a sweep has none", "its best.json names the best trial"))
    if options.artifact and phase is not None:
        path = str(find_artifact(root, phase, "latest", "--artifact"))
    else:
        name = phase.name if phase is not None else SWEEPS
        try:
            path = find_run(root, [name], "latest", "latest").directory
        except DamagedFileError:
            raise
        except InputError:
            fix = f"run `python -m raytrain2p.{'tune' if phase is None else f'train --phase {phase.number}'}`, or give output.root=DIR"
            raise InputError(Problem(f"--phase {options.phase}", f"there is no run in {root}/{name}", fix)) from None
    if options.json:
        print_json({"path": path})
    else:
        print(public(path))
    return 0
