"""`register`: put a run's model into MLflow's Model Registry, as a pyfunc that MLflow loads and serves."""

import argparse
import base64
import shlex
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain2p.config import Findings, InputError, Problem
from raytrain2p.config.cli import FAILED, report, say
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION, SWEEPS
from raytrain2p.config.secrets import masked
from raytrain2p.interrupts import stoppable
from raytrain2p.runs.find import run_of
from raytrain2p.runs.known import summaries
from raytrain2p.runs.output import number, print_json
from raytrain2p.runs.prune_plan import best_first, value_of
from raytrain2p.runs.request import Request
from raytrain2p.runs.summary import RunSummary, summary_of
from raytrain2p.storage.errors import StorageError, reporting_disk_errors
from raytrain2p.tracking.find import find_model_run, read_run
from raytrain2p.tracking.metrics_file import LOSSES
from raytrain2p.tracking.run import DIRECTORY_TAG, RUN_FOLDERS, Run, original_of
from raytrain2p.tracking.run_directory import RunDirectory

if TYPE_CHECKING:  # MLflow takes 2 s
    from raytrain2p.tracking.model_package import ModelContent
    from raytrain2p.tracking.registry import Registered

PARAMETERS = {"max_new_tokens": 32, "batch_size": 32}  # of an answer, as `predict` has them
QUESTION = "What does it show?"  # of the input example, if the run has recorded none


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "The same model is registered once under each name: again, the command says which version it is, and moves the alias."
    parser.add_argument("--name", help="of the registered model")
    parser.add_argument("--alias", action="append", default=[], help="that is to mean this version, such as champion")
    parser.add_argument("--best", metavar="METRIC", help="instead of RUN: the best of the finished runs of phase 2")
    among = parser.add_mutually_exclusive_group()
    among.add_argument("--experiment", metavar="NAME", help="the best of this experiment")
    among.add_argument("--sweep", metavar="RUN", help="the best of this sweep")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--min", dest="mode", action="store_const", const="min", help="less of that metric is better (losses: the default)")
    mode.add_argument("--max", dest="mode", action="store_const", const="max", help="more of it is better (exact match: the default)")


def run(request: Request) -> int:
    """Register a model. Returns 0, or 1 if MLflow does not take it.

    Raises:
        InputError: the options are wrong; no run fits; or the run has no model that can be registered.
    """
    check_options(request)
    chosen = best(request) if request.options.best else find_model_run(request.root, RUN_FOLDERS, request.names[0], "RUN")
    try:
        with ExitStack() as stack:
            with reporting_disk_errors(chosen.files.lock.path, 10_000):
                holder = stack.enter_context(chosen.files.lock.held(5.0))  # another registration may have it
            check_run(chosen, request.root, holder)
            content = content_of(chosen)
            stack.enter_context(stoppable())  # Ctrl-C leaves nothing behind, either
            registered = register(chosen, content, request)
    except StorageError as error:
        report(f"not registered: {error}")
        return FAILED
    if request.options.json:
        print_json(described(registered, chosen, content, request))
    else:
        for line in lines(registered, chosen, request):
            say(line)
    return 0


def check_options(request: Request) -> None:
    """Check that the options say which run, and as what it is registered."""
    from raytrain2p.tracking.registry import check_names

    options, findings = request.options, Findings()
    if options.name is None:
        findings.add(Problem("--name", "is missing", "name the registered model: --name NAME"))
    else:
        findings.extend(check_names(options.name, options.alias))
    if options.best is None and len(request.names) != 1:
        findings.add(Problem("RUN", f"{len(request.names)} were given, required is one", "name a run, or give --best METRIC"))
    if options.best is not None and request.names:
        findings.add(Problem(f"RUN {request.names[0]}", "contradicts --best", "leave one of them out"))
    for option, value in {"--experiment": options.experiment, "--sweep": options.sweep, f"--{options.mode}": options.mode}.items():
        if value and options.best is None:
            findings.add(Problem(option, "is about the best run", "add --best METRIC"))
    findings.raise_any()


def best(request: Request) -> Run:
    """The finished run of phase 2 that has a model and the best value of a metric. It is reported.

    Raises:
        InputError: there is none; or nothing says whether less of the metric is better.
    """
    options = request.options
    runs, damaged = request.runs()
    known = summaries(runs, request.root, damaged)
    for line in damaged:
        report(f"left out, it is damaged: {line}")
    found = {Path(one.directory): one for one in known if one.directory and has_model(one)}
    if options.experiment:
        found = {path: one for path, one in found.items() if one.experiment == options.experiment}
    if options.sweep:
        sweep = run_of(options.sweep, [one for one in known if one.phase == SWEEPS], [one.sweep for one in known], "--sweep")
        found = {path: one for path, one in found.items() if one.sweep == sweep}
    if not found:
        which = next((f"--{key} {value}" for key in ("experiment", "sweep") if (value := getattr(options, key))), f"--best {options.best}")
        raise InputError(Problem(which, f"no finished run of phase 2 there has a {INSTRUCTION.artifact}", "see `runs list --phase 2`"))
    path = best_first(found, options.best, options.mode or "", "--best")[0]
    report(f"the best of {len(found)} by {options.best}: {found[path].run_id}, {number(value_of(found[path], options.best))}")
    return read_run(path)


def has_model(one: RunSummary) -> bool:
    return (
        one.phase == INSTRUCTION.name
        and one.status == "FINISHED"
        and RunDirectory(Path(str(one.directory))).artifact(INSTRUCTION).is_file()
    )


def check_run(run: Run, root: str, holder: str | None) -> None:
    """Check that a run has a model that will not change.

    Args:
        holder: the process that writes to its directory.

    Raises:
        InputError: it has none.
    """
    name = f"RUN {run.run_id[:8]}"
    if run.phase == SWEEPS:
        raise InputError(Problem(name, "is a sweep", f"register the best of its trials: --best METRIC --sweep {run.run_id[:8]}"))
    if run.phase == ALIGNMENT.name:
        raise InputError(Problem(name, "is a run of phase 1, and an aligner answers nothing", "register a run of phase 2"))
    if (original := original_of(run)) is not None:
        raise InputError(Problem(name, f"{run.directory} is a copy", f"register the run itself, {original}"))
    status = summary_of(run, root).status if holder is None else f"in use by {holder}"
    if status != "FINISHED":
        raise InputError(Problem(name, f"is {status}, required is FINISHED", "resume it to its end, or choose another run"))
    if not run.files.artifact(INSTRUCTION).is_file():
        raise InputError(Problem(name, f"has no {INSTRUCTION.artifact}: it was stopped early, or is not whole", "choose another run"))


def content_of(run: Run) -> "ModelContent":
    """What the registered model is made from.

    Raises:
        InputError: the artifact is damaged; or a base model that is a local directory is gone, or not the one in training.
    """
    from raytrain2p.data.formats.instruction import INSTRUCTION as QUESTION_FIELD
    from raytrain2p.models.artifacts import check_fingerprint, load_artifact
    from raytrain2p.models.pretrained import files_of, local_directory, model_directory
    from raytrain2p.models.quantization import PACKAGE, package_problem
    from raytrain2p.tracking.model_package import ModelContent

    path = run.files.artifact(INSTRUCTION)
    artifact, copied = load_artifact(path, INSTRUCTION), dict[str, list[Path]]()
    models = {"model.language_model": artifact["language_model"]}
    models |= {f"model.encoders.{modality}.name": encoder for modality, encoder in artifact["encoders"].items()}
    for setting, needed in models.items():
        name = needed["name"]
        directory = model_directory(name, setting) if Path(name).is_absolute() else local_directory(name)
        if directory is not None:
            check_fingerprint(path, needed, name, directory, setting)
            copied[name] = files_of(directory)
    media = list(artifact["encoders"])
    packages = [PACKAGE] if artifact["shape"].get("quantization") else []
    if packages and (problem := package_problem(str(path))):
        raise InputError(problem)
    return ModelContent(run.run_id, path, artifact["digest"], copied, media, QUESTION_FIELD, example_of(run, media), PARAMETERS, packages)


def example_of(run: Run, media: list[str]) -> dict[str, str]:
    """A row of the model's input: the question that the run has recorded, of small media of the embedded sets."""
    from raytrain2p.data.embedded import clips, images
    from raytrain2p.data.formats.instruction import INSTRUCTION as QUESTION_FIELD

    *flags, question = (run.files.read_record() or {}).get("use") or [*(f"--{name}" for name in media[:1]), QUESTION]
    asked = [name for name in media if flags.count(f"--{name}") == 1]
    if len(asked) != len([word for word in flags if word.startswith("--")]):  # several of a kind: the question has placeholders
        asked, question = media[:1], QUESTION
    embedded = {"image": images, "audio": clips}
    found = {name: embedded[name]("test_drawing" if name == "image" else "train")[0].ref.read() for name in asked if name in embedded}
    return {QUESTION_FIELD: question, **{name: base64.b64encode(content).decode() for name, content in found.items()}}


def register(run: Run, content: "ModelContent", request: Request) -> "Registered":
    from raytrain2p.runs.sync import tracking_uri
    from raytrain2p.tracking.mlflow_pages import run_description
    from raytrain2p.tracking.registry import METRIC_TAG
    from raytrain2p.tracking.registry import register as to_registry

    summary, options = summary_of(run, request.root), request.options
    metrics = {name: value for name, value in summary.metrics.items() if name in LOSSES or ("/" in name and not name.startswith("system/"))}
    if summary.best is not None:
        metrics[f"best/{summary.monitor}"] = summary.best
    tags = {DIRECTORY_TAG: run.directory} | {f"{METRIC_TAG}{name}": str(value) for name, value in metrics.items()}
    with tempfile.TemporaryDirectory(prefix="raytrain2p-") as scratch:
        description = run_description(run, run.files.tags())
        uri = tracking_uri(run, request.uri)
        return to_registry(uri, content, options.name, options.alias, tags, description, Path(scratch))


def described(registered: "Registered", run: Run, content: "ModelContent", request: Request) -> dict[str, Any]:
    return {
        "name": registered.name,
        "version": registered.version,
        "is_new": registered.is_new,
        "aliases": request.options.alias,
        "uri": uri_of(registered, request),
        "run_id": run.run_id,
        "digest": content.digest,
        "tracking_uri": request.uri or run.tracking_uri,
    }


def uri_of(registered: "Registered", request: Request) -> str:
    """As MLflow's commands take it."""
    end = f"@{request.options.alias[0]}" if request.options.alias else f"/{registered.version}"
    return f"models:/{registered.name}{end}"


def lines(registered: "Registered", run: Run, request: Request) -> list[str]:
    new = "is" if registered.is_new else "was already"
    aliases = f", and has the alias {' and '.join(request.options.alias)}" if request.options.alias else ""
    store = f"MLFLOW_TRACKING_URI={shlex.quote(masked(request.uri or run.tracking_uri))}"
    return [
        f"run {run.run_id[:8]} {new} version {registered.version} of {registered.name}{aliases}",
        f"  load it    mlflow.pyfunc.load_model({uri_of(registered, request)!r})",
        f"  serve it   {store} mlflow models serve -m {shlex.quote(uri_of(registered, request))} --env-manager local",
    ]
