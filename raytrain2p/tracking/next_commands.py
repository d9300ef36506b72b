"""The commands that make sense after a run, as terminals and README.md show them: each can be pasted into a shell."""

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from raytrain2p.config.escaping import printable
from raytrain2p.config.paths import where_runs_are
from raytrain2p.config.phases import INSTRUCTION
from raytrain2p.config.secrets import MASK, masked
from raytrain2p.tracking.damage import DamagedFileError
from raytrain2p.tracking.find import is_trial, run_directories
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_directory import RunDirectory

QUESTION = "QUESTION"  # for the user to replace: a run of an earlier version has recorded none


def next_commands(run: Run, base: Path) -> list[str]:
    """What to do with a run that is finished.

    Args:
        base: directory in which the commands will be typed.
    """
    return [use_command(run, base), look_command(run, base), store_command(run.tracking_uri)]


def use_command(run: Run, base: Path, arguments: Sequence[str] | None = None) -> str:
    """Train phase 2 on an aligner, or ask a model.

    Args:
        arguments: that name records, or a question and its media; None takes those that run.json has.
    """
    if arguments is None:
        arguments = (run.files.read_record() or {}).get("use", [QUESTION] if run.phase == INSTRUCTION.name else [])
    if run.phase == INSTRUCTION.name:  # it needs model.pt alone, and so takes no settings
        root = [word for key, value in _where(run, base).items() if key == "output.root" for word in ("--root", value)]
        return command("predict", "--run", run.run_id[:8], *root, *arguments)
    return command("train", "--phase", str(INSTRUCTION.number), "--aligner", run.run_id[:8], *settings_of(run, base), *arguments)


def look_command(run: Run, base: Path) -> str:
    """Compare a run with the one of its phase before it, or show it if it is the first."""
    if (before := run_before(run)) is None:
        return show_command(run, base)
    return command("runs", "compare", before[:8], run.run_id[:8], *settings_of(run, base))


def show_command(run: Run, base: Path) -> str:
    return command("runs", "show", run.run_id[:8], *settings_of(run, base))


def store_command(uri: str) -> str:
    """Open MLflow's pages; of a server, their address."""
    return masked(uri) if uri.startswith("http") else f"mlflow ui --backend-store-uri {_quoted(masked(uri))}"


def resume_command(run: Run, verb: str, *options: str) -> str:
    """Resume a run or a sweep with its own settings."""
    return command(verb, *options, "--resume", run.directory, *password_of(run))


def password_of(run: Run) -> list[str]:
    """What a command with the settings of a run must be given all the same: they hold no password, for which `***` stands."""
    return [f"tracking.uri={run.tracking_uri}"] if MASK in run.tracking_uri else []


def run_before(run: Run) -> str | None:
    """The ID of the finished run of the same phase that was made last before this one; trials of sweeps are passed over."""
    directories = run_directories(str(run.path.parent.parent), [run.phase])
    for directory in reversed(directories[: directories.index(run.path)] if run.path in directories else []):
        with suppress(DamagedFileError):
            if RunDirectory(directory).read_status()["status"] == "FINISHED" and not is_trial(directory):
                return RunDirectory(directory).run_id
    return None


def command(verb: str, *words: str) -> str:
    return " ".join([f"python -m raytrain2p.{verb}", *map(_quoted, words)])


def settings_of(run: Run, base: Path) -> list[str]:
    """What a command that is typed in `base` must be given to find the run."""
    return [f"{key}={value}" for key, value in _where(run, base).items()]


def _where(run: Run, base: Path) -> dict[str, str]:
    return where_runs_are(str(run.path.parent.parent), run.tracking_uri, base)


def _quoted(word: str) -> str:
    """A word for a shell; an apostrophe alone does not make it unreadable."""
    word = printable(word)
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)
