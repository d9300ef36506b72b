"""`raytrain2p.train(...)`: a launch as a call. It imports nothing that takes time before it is called."""

import importlib
import inspect
import logging
import os
import shlex
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from raytrain2p.config import Findings, InputError, Problem, Settings, load_settings
from raytrain2p.config.loading import root_problems
from raytrain2p.config.metadata import known_keys
from raytrain2p.config.phases import PHASES
from raytrain2p.config.program import as_overrides, as_tree, written
from raytrain2p.config.scratch import is_remote, local_path
from raytrain2p.config.secrets import masked
from raytrain2p.config.settings import SETTINGS_OF_PHASE, RunSettings
from raytrain2p.interrupts import StoppedError
from raytrain2p.launch import PROGRAM_BARS

if TYPE_CHECKING:
    from raytrain2p.config.console import Console
    from raytrain2p.tracking.run import Run
    from raytrain2p.tracking.run_directory import RunDirectory
    from raytrain2p.worker.job import Outcome

_RUNNING = threading.Lock()
GivenSettings = RunSettings | Mapping[str, Any] | str | Path | None


def train(
    settings: GivenSettings = None,
    *,
    phase: int | None = None,
    resume: "str | Path | Run | RunDirectory | Outcome | None" = None,
    launch_id: str | None = None,
    accept_changed_inputs: bool = False,
    quiet: bool = False,
    ray_logs: bool = False,
    **overrides: Any,
) -> "Outcome":
    """Train one phase, as `python -m raytrain2p.train` does.

    >>> outcome = raytrain2p.train(phase=1, training={"max_steps": 200}, seed=3)

    Args:
        settings: path of a YAML file, its groups as a dictionary, or checked settings; None takes the packaged ones of the phase.
        phase: 1 (alignment) or 2 (instruction). Checked settings have it already.
        resume: a run to resume with its own settings: its directory, run ID or the start of one, launch ID, outcome, or `latest`.
        launch_id: stable name of this launch over retries; a launch that has a run already resumes it. By default a new one; in a
            submitted job it follows from its submission ID and these settings.
        accept_changed_inputs: resume although records, models or the aligner have other content.
        quiet: print no progress. Otherwise it goes to standard error.
        ray_logs: print Ray's own output too.
        overrides: settings over those of `settings`: groups as dictionaries, or dotted paths, as in `**{"training.max_steps": 200}`.

    Returns:
        The run, its directory and files, and its metrics.

    Raises:
        InputError: bad input, with every problem; nothing was started.
        TrainingFailedError: training failed. The message has the reason, the run and its directory.
        KeyboardInterrupt: after Ctrl-C (or SIGTERM, while it trains); if it was training, with a checkpoint, from which `resume` goes on.
    """
    number = phase_of(settings, phase)
    problems = Findings()
    given = as_overrides(overrides, known_keys(SETTINGS_OF_PHASE[number]), problems)
    with problems:
        config = config_of(settings)
        checked = load_settings(number, config, given)
    problems.raise_any()
    words = ["--phase", str(number), *(["--launch-id", launch_id] if launch_id is not None else [])]
    if resume is not None:
        from raytrain2p.tracking.find import name_of

        wanted = name_of(resume)
        checked, launch_id = resumed(checked, number, wanted, launch_id, config, given)
        words += ["--resume", wanted]
    words += given if resume is not None and config is None else changed(checked, load_settings(number))

    with quiet_imports():
        from raytrain2p.launch.driver import launch

    command = command_line("train", words)
    with called(quiet) as console:
        return launch(checked, number, launch_id, ray_logs, console, accept_changed_inputs, command)


def resumed(
    settings: Settings, phase: int, wanted: str, launch_id: str | None, config: Any, overrides: Sequence[str]
) -> tuple[Settings, str]:
    """The settings and the launch ID of the run to resume. The settings are the run's own, unless others are given.

    Args:
        settings: of this launch.
        wanted: the run.
        launch_id: None, unless the user gave one.
        config: what the user gave in place of the packaged settings, if anything.

    Raises:
        InputError: no such run, or a launch ID as well.
    """
    from raytrain2p.tracking.find import check_in_place, find_run
    from raytrain2p.tracking.mlflow_store import check_password
    from raytrain2p.tracking.run_objects import open_root

    if launch_id is not None:
        raise InputError(Problem("--resume with --launch-id", "each of them names the run to resume", "give one of them"))
    open_root(settings.output.root)
    run = find_run(settings.output.root, [PHASES[phase].name], wanted, "--resume")
    run.files.check()
    if config is None and run.files.read_config() is not None:
        settings = load_settings(phase, run.files.config, [*run.files.moved_settings(), *overrides])
    check_password(settings.tracking.uri)
    check_in_place(run, settings.output.root, f"--resume {wanted}")
    return settings, run.launch_id


def phase_of(settings: GivenSettings, phase: int | None) -> int:
    """The number of the phase to train.

    Raises:
        InputError: it is not known, or is another one than that of the settings.
    """
    of_settings = next((number for number, kind in SETTINGS_OF_PHASE.items() if isinstance(settings, kind)), None)
    if phase is None and of_settings is not None:
        return of_settings
    meaning = " or ".join(f"{number} ({one.meaning})" for number, one in PHASES.items())
    if phase is None or phase not in PHASES:
        raise InputError(Problem(f"phase={phase!r}", f"required is {meaning}", "give phase=1 or phase=2"))
    if of_settings not in (None, phase):
        raise InputError(Problem(f"phase={phase}", f"the settings are of phase {of_settings}", "leave out `phase`"))
    return phase


def config_of(settings: GivenSettings) -> str | Path | dict[str, Any] | None:
    """Settings as they are loaded.

    Raises:
        InputError: they are of another type.
    """
    if settings is None or isinstance(settings, (str, Path)):
        return fetched(settings)
    if isinstance(settings, (RunSettings, Mapping)):
        return as_tree(settings)
    what = f"is a {type(settings).__name__}; required is the path of a YAML file, a dictionary, or checked settings"
    raise InputError(Problem("settings", what))


def fetched(config: str | Path | None) -> str | Path | None:
    """A file of settings as a user gave it; one in an object storage is fetched.

    Raises:
        InputError: the storage does not answer, or refuses it.
    """
    if config is None or not is_remote(path := local_path(str(config))):
        return config
    from raytrain2p.tracking.run_objects import fetch_named, reporting_storage

    if problems := root_problems(str(config), "--config"):
        raise InputError(problems)
    with reporting_storage(f"--config {config}"):
        fetch_named(Path(path))
    return path


def command_line(verb: str, words: Sequence[str]) -> str:
    """A command that does the same as a call, as its run records it; without credentials."""
    return " ".join([f"python -m raytrain2p.{verb}", *(shlex.quote(masked(word)) for word in words)])


def changed(settings: Settings, packaged: Settings) -> list[str]:
    """`key=value` for each setting that differs from the packaged ones, and `group=null` for a group that is not used."""
    after, before = settings.model_dump(mode="json"), packaged.model_dump(mode="json")
    found = [(_at(after, key), _at(before, key)) for key in known_keys(type(settings))]
    return list(dict.fromkeys(f"{key}={written(value)}" for (key, value), (_, default) in found if value != default))


def _at(tree: Any, key: str) -> tuple[str, Any]:
    """A setting and its value, or, if it is not used, the group that is null."""
    done: list[str] = []
    for name in key.split("."):
        if tree is None:
            break
        tree = tree[name]
        done.append(name)
    return ".".join(done), tree


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Within, Ray and tqdm do not report as they are imported that a notebook lacks packages of widgets. The program's own progress bars
    stay: tqdm reads while it is imported whether it shows any.
    """
    widgets = logging.getLogger("ray.widgets")
    level = widgets.level
    widgets.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = os.environ.pop("TQDM_DISABLE", "1")
        if PROGRAM_BARS is not None:
            os.environ["TQDM_DISABLE"] = PROGRAM_BARS
        importlib.import_module("tqdm.auto")
        os.environ["TQDM_DISABLE"] = ours
        yield
    widgets.setLevel(level)


@contextmanager
def called(quiet: bool) -> "Iterator[Console]":
    """Within, a launch runs on behalf of a program, whose loggers are as before in the end; yields the console to print on.

    Errors that end it have no trace of Ray's, and name the run that can be resumed.

    Raises:
        InputError: another thread is in such a call: the session of Ray and standard error are those of the whole process.
    """
    from raytrain2p.config.console import Console
    from raytrain2p.launch.monitor import TrainingFailedError
    from raytrain2p.launch.quiet import LOGGERS

    if not _RUNNING.acquire(blocking=False):
        what = "another call of train or sweep in this process has not ended"
        raise InputError(Problem("raytrain2p", what, "wait for its end, or call from a process of its own"))
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    with Path(os.devnull).open("w") as nowhere:
        try:
            yield Console(nowhere if quiet else None)
        except TrainingFailedError as failed:
            raise failed from None
        except StoppedError as stopped:
            if (run := stopped.run) is not None:
                stopped.add_note(f"run {run.run_id} can be resumed with resume={run.directory!r}")
            raise
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            _RUNNING.release()


class CallableModule(ModuleType):
    """A module that can be called. `import raytrain2p.train` makes the module an attribute of the package, in place of any function of
    that name: so the module itself is the function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (self.__name__,)  # Ray pickles modules by their type


class TrainModule(CallableModule):
    """`raytrain2p.train`."""

    __call__ = staticmethod(train)
    __signature__ = inspect.signature(train)  # Python would leave out the first argument, as if it were `self`
