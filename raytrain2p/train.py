"""`python -m raytrain2p.train --phase {1,2} [--config FILE] [key=value ...]`: train one phase. A program calls `raytrain2p.train(...)`,
which is this module too: see launch/api.py.
"""

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from raytrain2p.config import InputError, Problem, base_directory, load_settings
from raytrain2p.config.cli import ACCEPT_HELP, FAILED, Parser, describe_settings, exit_code, say
from raytrain2p.config.phases import INSTRUCTION, PHASES
from raytrain2p.interrupts import StoppedError, stoppable
from raytrain2p.launch.api import TrainModule, fetched, resumed

if TYPE_CHECKING:
    from raytrain2p.launch.cost import Machines

DRY_RUN, ON, CALIBRATE = "--dry-run", "--on", "--calibrate"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m raytrain2p.train",
        description="Train one phase: 1 aligns frozen encoders (aligner.pt), 2 instruction-tunes a language model (model.pt).",
        epilog=describe_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--phase", type=int, choices=tuple(PHASES), required=True, help="1: alignment; 2: instruction")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings (default: configs/phase1.yaml or configs/phase2.yaml)")
    parser.add_argument("--aligner", metavar="A", help="path, run ID (or its start), launch ID or `latest`: short for model.aligner=A")
    parser.add_argument(
        "--launch-id",
        metavar="ID",
        help="stable name of this launch over retries (default: a new one, or that of the submitted job); a launch that has a run already "
        "resumes it",
    )
    parser.add_argument("--resume", metavar="RUN", help="resume a run: directory, run ID (or its start), launch ID, or `latest`")
    parser.add_argument("--accept-changed-inputs", action="store_true", help=ACCEPT_HELP)
    parser.add_argument(DRY_RUN, action="store_true", help="check everything, print what would run, and start nothing")
    parser.add_argument(
        ON,
        metavar="MACHINES",
        help="with --dry-run: what a step takes on nodes=8,gpus=8,gpu=h100, on paper (network=400: Gbit/s of a node)",
    )
    parser.add_argument(CALIBRATE, action="store_true", help="with --dry-run: what a step takes here, by 20 seconds of measurements")
    parser.add_argument("--json", action="store_true", help="print the outcome as one JSON object, the last line on stdout")
    parser.add_argument("--ray-logs", action="store_true", help="print Ray's own output too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings by dotted path, over those of the file")
    options = parser.parse_intermixed_args(arguments)
    if options.aligner is not None:
        options.overrides.append(f"model.aligner={json.dumps(options.aligner)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 (training failed) or 2 (bad input); 129, 130 or 143 if a signal stopped it."""
    options = parse(arguments)
    return exit_code(lambda: train(options))


def train(options: argparse.Namespace) -> int:
    """Load the settings, check, launch, print the summary.

    Raises:
        InputError: bad input; nothing was started.
    """
    machines = machines_of(options)
    settings = load_settings(options.phase, fetched(options.config), options.overrides)
    if options.resume is not None:
        settings, options.launch_id = resumed(settings, options.phase, options.resume, options.launch_id, options.config, options.overrides)

    # Imported here: `--help` and wrong settings need none of them.
    from raytrain2p.launch.driver import check, checked_launch_id, launch, run_to_resume
    from raytrain2p.launch.dry_run import dry_run
    from raytrain2p.launch.monitor import TrainingFailedError, typed_command
    from raytrain2p.launch.progress import Console
    from raytrain2p.launch.summary import failed_text, next_lines, print_summary, stopped_line

    console = Console()
    if options.dry_run:
        run = run_to_resume(settings, checked_launch_id(options.launch_id), options.phase) if options.launch_id else None
        checked = check(settings, options.phase, console, run, options.accept_changed_inputs)
        say(dry_run(*checked, machines, options.calibrate))
        asked = (DRY_RUN, CALIBRATE, ON, options.on, f"{ON}={options.on}")
        more = [f"launch.num_workers={machines.workers}"] if machines else []
        say("\n".join(next_lines([typed_command("raytrain2p.train", asked, more)])))
        return 0
    try:
        with stoppable():
            outcome = launch(settings, options.phase, options.launch_id, options.ray_logs, console, options.accept_changed_inputs)
    except TrainingFailedError as error:
        console.say(failed_text(error.reason, error.run, base_directory(), "--phase", str(options.phase)))
        return FAILED
    except StoppedError as stopped:
        console.say(stopped_line(stopped, "train", "--phase", str(options.phase)))
        return stopped.exit_code
    print_summary(outcome, options.phase, settings.tracking.uri, console, base_directory())
    if options.json:
        print(json.dumps(asdict(outcome)), flush=True)
    return 0


def machines_of(options: argparse.Namespace) -> "Machines | None":
    """What `--on` names.

    Raises:
        InputError: it names no machines, or nothing is told of a step without `--dry-run`, or in phase 1.
    """
    asked = [flag for flag, given in ((ON, options.on is not None), (CALIBRATE, options.calibrate)) if given]
    if asked and not options.dry_run:
        raise InputError(Problem(" ".join(asked), "starts nothing, and so goes with --dry-run alone", f"add {DRY_RUN}"))
    if asked and options.phase != INSTRUCTION.number:
        raise InputError(Problem(" ".join(asked), "tells what a step of phase 2 takes; one of phase 1 is small", "take --phase 2"))
    if options.on is None:
        return None
    from raytrain2p.launch.cost import parsed_machines

    return parsed_machines(options.on)


sys.modules[__name__].__class__ = TrainModule

if __name__ == "__main__":
    sys.exit(main())
