"""`python -m raytrain2p.tune [--config FILE] [key=value ...]`: sweep settings of a phase with Ray Tune."""

import argparse
import json
import sys
from dataclasses import asdict

from raytrain2p.config import base_directory
from raytrain2p.config.cli import ACCEPT_HELP, FAILED, Parser, describe_settings, exit_code
from raytrain2p.interrupts import StoppedError, stoppable
from raytrain2p.launch.api import fetched
from raytrain2p.sweep.load import load_sweep
from raytrain2p.sweep.settings import SweepSettings


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m raytrain2p.tune",
        description="Sweep settings of a phase. Each trial is a run of its own, under one parent run.",
        epilog=describe_settings({"sweep": SweepSettings}),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file: a `sweep` group, and settings of the trials (default: configs/sweep.yaml)"
    )
    parser.add_argument("--resume", metavar="SWEEP", help="resume a sweep: directory, run ID (or its start), launch ID, or `latest`")
    parser.add_argument("--accept-changed-inputs", action="store_true", help=ACCEPT_HELP)
    parser.add_argument("--json", action="store_true", help="print the outcome as one JSON object, the last line on stdout")
    parser.add_argument("--ray-logs", action="store_true", help="show Ray's own output")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings by dotted path: sweep.num_trials=4, training.max_steps=60"
    )
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 (a trial did not end, or none succeeded) or 2; 129, 130 and 143 if stopped."""
    options = parse(arguments)
    return exit_code(lambda: tune(options))


def tune(options: argparse.Namespace) -> int:
    """Load the sweep, run it, print the summary.

    Raises:
        InputError: bad input; nothing was started.
    """
    sweep, run = load_sweep(fetched(options.config), options.overrides), None
    if options.resume is not None:
        from raytrain2p.sweep.resume import resumed

        sweep, run = resumed(sweep, options.resume, options.config, options.overrides)

    from raytrain2p.launch.progress import Console
    from raytrain2p.launch.summary import stopped_line
    from raytrain2p.sweep.run import SweepFailedError, run_sweep
    from raytrain2p.sweep.summary import sweep_summary

    console = Console()
    try:
        with stoppable():
            outcome = run_sweep(sweep, run, options.ray_logs, console, options.accept_changed_inputs)
    except StoppedError as stopped:
        console.say(stopped_line(stopped, "tune"))
        return stopped.exit_code
    except SweepFailedError as failed:
        console.say(f"raytrain2p: the sweep failed; once the cause is gone, resume with --resume latest\n{failed}")
        return FAILED
    console.say(sweep_summary(outcome, sweep, base_directory()))
    if options.json:
        print(json.dumps(asdict(outcome)), flush=True)
    done = outcome.finished + outcome.stopped_early > 0 and not outcome.unfinished
    return 0 if done else FAILED


if __name__ == "__main__":
    sys.exit(main())
