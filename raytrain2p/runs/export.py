"""`export`: a phase 2 run as a directory of Hugging Face's form, which may be pushed to a model hub."""

import argparse
import os
from pathlib import Path

from raytrain2p.config import InputError, Problem
from raytrain2p.config.cli import FAILED, report, say
from raytrain2p.config.phases import INSTRUCTION
from raytrain2p.runs.output import human_bytes, print_json
from raytrain2p.runs.request import Request
from raytrain2p.runs.summary import test_metrics
from raytrain2p.storage.errors import StorageError
from raytrain2p.storage.remote import fetch
from raytrain2p.tracking.find import find_model_run
from raytrain2p.tracking.run_objects import reporting_storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} RUN DIR [options] [key=value ...]"
    parser.epilog = "The first word is a phase 2 run, the second a directory that is new, or holds an earlier export of the same run."
    parser.add_argument(
        "--adapter", action="store_true", help="keep LoRA as a peft adapter beside the language model, instead of merging it"
    )
    parser.add_argument("--llava", action="store_true", help="as a LlavaForConditionalGeneration, which plain transformers loads")
    parser.add_argument("--dtype", choices=["bf16", "float32"], help="of the language model's weights (default: as in training)")
    parser.add_argument("--push", metavar="REPO", help="upload it to a model hub as OWNER/NAME; HF_TOKEN and HF_ENDPOINT count")


def run(request: Request) -> int:
    """Write the directory, and push it if asked. Returns 0, or 1 if the disk is full, read-only or gone.

    Raises:
        InputError: no such run, it has no model, it has not the form that is wanted, something else is in the directory, or the hub
            refuses it.
    """
    options = request.options
    if len(request.names) != 2:
        raise InputError(
            Problem("export", f"takes a run and a directory, not {len(request.names)} words", "as in `export latest my_model`")
        )
    if options.adapter and options.llava:
        raise InputError(Problem("--adapter --llava", "LLaVA's form has no adapter: LoRA is merged", "leave one out"))
    name, target = request.names[0], Path(request.names[1]).expanduser().absolute()
    found = find_model_run(request.root, [INSTRUCTION.name], name, "RUN")
    marker = {"run_id": found.run_id}

    from raytrain2p.inference.export import Form, check_target, export, push  # with transformers, whose import takes seconds
    from raytrain2p.inference.model_card import model_card
    from raytrain2p.inference.predictor import Predictor
    from raytrain2p.models.artifacts import load_artifact
    from raytrain2p.models.pretrained import quiet_transformers

    quiet_transformers()
    check_target(target, marker)
    model = found.files.artifact(INSTRUCTION)
    with reporting_storage(str(model)):
        fetch(model)
    artifact = load_artifact(model, INSTRUCTION)
    card = model_card(found, artifact, test_metrics(found), options.llava, options.adapter)
    marker |= {"model": artifact["digest"]}
    try:
        size = export(Predictor(model), Form(options.llava, options.adapter, options.dtype), target, marker, card)
    except StorageError as error:
        report(str(error))
        return FAILED
    address = None
    if options.push:
        address = push(target, options.push, os.environ.get("HF_ENDPOINT"), os.environ.get("HF_TOKEN"))
    if options.json:
        print_json({"run_id": found.run_id, "directory": str(target), "bytes": size, "pushed": address})
        return 0
    say(f"exported run {found.run_id[:8]} to {target}: {human_bytes(size)}; README.md in it says how to load it")
    if address:
        say(f"pushed to {address}")
    return 0
