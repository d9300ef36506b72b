"""`python -m raytrain2p.predict --run RUN --image FILE "question"`: ask a trained assistant.

It needs model.pt and the base models alone: no Ray, no MLflow store, no training data.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raytrain2p.config import InputError, Problem, base_directory
from raytrain2p.config.exits import exit_code
from raytrain2p.data.batches import Ragged
from raytrain2p.data.chat import load_chat_format
from raytrain2p.data.checks import image_problems
from raytrain2p.data.images import ImageRef, decode_image
from raytrain2p.data.records import Record, read_records
from raytrain2p.data.tokens import TokenRecords, left_padded
from raytrain2p.models.artifacts import check_fingerprint, load_artifact
from raytrain2p.models.assistant import AssistantBatch, AssistantShape, build_assistant
from raytrain2p.models.encoders import ImageEncoder
from raytrain2p.models.precision import resolve_precision
from raytrain2p.models.pretrained import fingerprint, model_directory
from raytrain2p.tracking.lookup import find_artifact


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m raytrain2p.predict", description="Ask a trained assistant about pictures.")
    parser.add_argument("question", nargs="?", help="what to ask about the picture")
    parser.add_argument("--run", default="latest", help="phase 2 run ID or its start, a directory, a model.pt, or `latest` (default)")
    parser.add_argument("--image", metavar="FILE", help="the picture (none: ask the language model alone)")
    parser.add_argument("--file", metavar="FILE.jsonl", help="many records, as in phase 2; responses are not needed")
    parser.add_argument("--root", default="checkpoints", help="where run directories are (output.root of training)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer in tokens (default 32)")
    parser.add_argument("--batch-size", type=int, default=32, help="records per forward pass (default 32)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with `answer`")
    options = parser.parse_args(arguments)
    if options.batch_size < 1 or options.max_new_tokens < 1:
        parser.error("--batch-size and --max-new-tokens must be at least 1")
    if (options.file is None) == (options.question is None):
        parser.error("give either a question or --file")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0 or 2 (bad input); 130 after Ctrl-C."""
    options = parse(arguments)
    return exit_code(lambda: predict(options))


def predict(options: argparse.Namespace) -> int:
    """Records, model, an answer a line.

    Raises:
        InputError: bad records or pictures, no such run, or a base model that is another one than in training.
    """
    records = read(options)
    path = find_artifact(str(base_directory() / options.root), "phase2", "model.pt", options.run, "--run")
    answers = Predictor(path).answers(records, options.batch_size, options.max_new_tokens)
    try:
        for record, answer in zip(records, answers, strict=True):
            shown = {"instruction": record.instruction, "image": record.image.source if record.image else None, "answer": answer}
            print(json.dumps(shown, ensure_ascii=False) if options.json else answer, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has seen enough, as `head` does
    return 0


def read(options: argparse.Namespace) -> list[Record]:
    """The records to answer, checked.

    Raises:
        InputError: no such file, or bad records or pictures.
    """
    if options.file is not None:
        records = read_records(str(Path(options.file).absolute()), 2, "--file", answered=False)
    else:
        image = None
        if options.image is not None:
            if not Path(options.image).is_file():
                raise InputError(Problem(f"--image {options.image}", "no such file"))
            image = ImageRef(str(Path(options.image).absolute()))
        records = [Record("the question", image, instruction=options.question)]
    if problems := image_problems(records):
        raise InputError(problems)
    return records


class Predictor:
    """A trained assistant with its image encoder.

    Args:
        path: of model.pt.

    Raises:
        InputError: the artifact is not readable, or a base model is another than it was trained with.
    """

    def __init__(self, path: Path) -> None:
        artifact = load_artifact(path, "phase2")
        for role, needed in artifact["models"].items():
            found = fingerprint(model_directory(needed["name"], role))
            check_fingerprint(path, artifact, role, needed["name"], found, f"model.{role}")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = resolve_precision(artifact["config"]["training"]["precision"], self.device) == "bf16"
        shape = AssistantShape(**artifact["shape"])
        attention = "sdpa" if self.device.type == "cuda" else "eager"
        assistant = build_assistant(shape, attention, torch.bfloat16 if self.bf16 else torch.float32)
        unexpected = assistant.load_state_dict(artifact["state_dict"], strict=False).unexpected_keys
        assert not unexpected, f"model.pt has weights that the assistant has no place for: {unexpected[:3]}"
        self.assistant = assistant.to(self.device).eval()
        self.encoder = ImageEncoder(artifact["models"]["image_encoder"]["name"], artifact["image_size"], self.device.type)
        directory = model_directory(shape.language_model)
        self.chat = load_chat_format(directory, shape.soft_tokens, artifact["system_prompt"])

    def answers(self, records: Sequence[Record], batch_size: int = 32, max_new_tokens: int = 32) -> Iterator[str]:
        """Greedy answers, in the order of the records."""
        for start in range(0, len(records), batch_size):
            yield from self._answer(records[start : start + batch_size], max_new_tokens)

    @torch.inference_mode()
    def _answer(self, records: Sequence[Record], max_new_tokens: int) -> list[str]:
        prompts = Ragged([self.chat.prompt(record.instruction, record.image is not None) for record in records])
        padded = left_padded(TokenRecords(prompts, Ragged([[] for _ in records])), np.arange(len(records)))
        images = [decode_image(record.image.read()) for record in records if record.image is not None]
        features = self.encoder(images) if images else torch.empty(0, 1, 1)
        batch = AssistantBatch(features=features.to(self.device), **{name: value.to(self.device) for name, value in padded.items()})
        stop = list(self.chat.stop_ids)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            ids: Any = self.assistant.generate(batch, max_new_tokens, stop, stop[0])
        return [self.chat.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]


if __name__ == "__main__":
    sys.exit(main())
