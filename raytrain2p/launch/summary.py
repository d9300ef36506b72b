"""The end of a launch, as printed: where the run is, its metrics, and the next commands."""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from raytrain2p.config.console import Console, cell
from raytrain2p.config.phases import PHASES
from raytrain2p.config.scratch import local_path
from raytrain2p.config.secrets import masked
from raytrain2p.interrupts import StoppedError
from raytrain2p.launch.progress import decimal
from raytrain2p.tracking.damage import DamagedFileError
from raytrain2p.tracking.find import read_run
from raytrain2p.tracking.next_commands import next_commands, resume_command, show_command
from raytrain2p.tracking.run import Run
from raytrain2p.worker.job import Outcome

SHARES = ("recall", "chance", "exact_match", "token_f1", "majority")  # metrics between 0 and 1, printed as percentages


def print_summary(outcome: Outcome, phase: int, uri: str, console: Console, base: Path) -> None:
    """Print what came out of a run.

    Args:
        uri: of the tracking store.
        base: directory in which the next commands will be typed.
    """
    run = run_in(outcome.directory, uri)
    made = (run.files.artifact(PHASES[phase]), run.files.answer_sheet, run.files.training_curve, run.files.readme)
    names = ", ".join(str(path.relative_to(run.path)) for path in made if path.is_file())
    console.say(f"\nrun        {outcome.run_id}\ndirectory  {outcome.directory}\nfiles      {names}\n")
    console.draw(metric_table(outcome.metrics))
    for line in next_lines(next_commands(run, base)):
        console.say(line)


def run_in(directory: str, uri: str) -> Run:
    """The run of a directory, with the store that is used now: its database may have been moved."""
    return replace(read_run(Path(local_path(directory))), tracking_uri=masked(uri))


def next_lines(commands: Iterable[str]) -> list[str]:
    """Each command on a line of its own, without a label: the whole line can be pasted."""
    return ["", "next:", *(f"  {command}" for command in commands)]


def stopped_line(stopped: StoppedError, verb: str, *options: str) -> str:
    """The last line of a command that a signal stopped: what can be resumed, where it is, and how.

    Args:
        verb, options: of the command that resumes: `python -m raytrain2p.VERB OPTIONS --resume DIRECTORY`.
    """
    run = stopped.run
    if run is None:
        return f"raytrain2p: {stopped}, before there was a run"
    return f"raytrain2p: {stopped}; run {run.run_id} is in {run.directory}; resume it with: {resume_command(run, verb, *options)}"


def failed_text(reason: str, run: Run | None, base: Path, *options: str) -> str:
    """Why training failed, and where its run is, if it has one. One that diverged, which its status says, would do so again."""
    text = f"raytrain2p: training failed\n{reason}"
    if run is None:
        return text
    diverged = False
    with suppress(DamagedFileError):  # training has failed, whatever else is damaged
        diverged = "reason" in run.files.read_status()
    how = f"see it with: {show_command(run, base)}" if diverged else f"resume it with: {resume_command(run, 'train', *options)}"
    return f"{text}\nrun {run.run_id} is in {run.directory}; {'' if diverged else 'once the cause is gone, '}{how}"


def metric_table(metrics: dict[str, float]) -> Table:
    """Metrics named `<split>/<metric>`, a row per metric and a column per split; `train_loss` is the loss of the last step."""
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    splits: dict[str, None] = {}
    for name, value in sorted(metrics.items(), key=lambda metric: (metric[0] != "train_loss", metric[0] != "val/loss")):
        split, slash, metric = name.partition("/")
        split, metric = (split, metric) if slash else ("train", "loss")
        rows[metric][split], splits[split] = value, None
    table = Table(box=None, pad_edge=False)
    table.add_column("metric", overflow="fold")  # its end may be the name of a task in the records
    for split in splits:
        table.add_column(cell(split), justify="right", overflow="fold")
    for metric, row in rows.items():
        table.add_row(cell(metric), *(format_metric(metric, row[split]) if split in row else "" for split in splits))
    return table


def format_metric(name: str, value: float) -> str:
    return f"{100 * value:.2f} %" if any(word in name for word in SHARES) else decimal(value, 4)
