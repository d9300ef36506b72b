"""`python -m raytrain2p.predict --run RUN --image FILE "question"`: ask a trained assistant.

It needs model.pt and the base models, but no Ray, MLflow store or training data.
"""

import argparse
import sys
from pathlib import Path

from raytrain2p.config import base_directory
from raytrain2p.config.cli import Parser, exit_code, report
from raytrain2p.config.escaping import json_line, printable
from raytrain2p.config.paths import is_embedded
from raytrain2p.config.phases import INSTRUCTION
from raytrain2p.data.media import MEDIA
from raytrain2p.data.reading import question_record, read_records
from raytrain2p.data.records import Record
from raytrain2p.inference.predictor import Predictor
from raytrain2p.models.pretrained import quiet_transformers
from raytrain2p.tracking.find import find_artifact


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m raytrain2p.predict", description="Ask a trained assistant.")
    parser.add_argument("question", nargs="?", help="what to ask; media come first, unless placeholders such as <image> say where")
    parser.add_argument("--run", default="latest", help="phase 2 run: ID or its start, launch ID, path, or `latest` (default)")
    for modality in MEDIA:
        parser.add_argument(f"--{modality}", action="append", default=[], metavar="FILE", help="may be given several times")
    parser.add_argument("--file", metavar="FILE.jsonl", help="many records, as in phase 2, or emoji:SPLIT; answers are not needed")
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
    """Print an answer per record.

    Raises:
        InputError: bad records or media, no such run, or a base model that differs from the one in training.
    """
    records = read(options)
    path = find_artifact(str(base_directory() / options.root), INSTRUCTION, options.run, "--run")
    if options.run == "latest":
        report(f"--run=latest is {path}")
    quiet_transformers()
    predictor = Predictor(path)
    predictor.check(records, options.max_new_tokens)
    answers = predictor.answers(records, options.batch_size, options.max_new_tokens)
    for record, answer in zip(records, answers, strict=True):
        shown = {"question": record.question, "media": [str(ref) for ref in record.media()], "answer": answer}
        print(json_line(shown) if options.json else printable(answer), flush=True)
    return 0


def read(options: argparse.Namespace) -> list[Record]:
    """The records to answer.

    Raises:
        InputError: no such file, or bad records.
    """
    if options.file is not None:
        path = options.file if is_embedded(options.file) else str(Path(options.file).absolute())
        records = read_records(path, INSTRUCTION.number, "--file", answered=False)
    else:
        records = [question_record(options.question, {modality: getattr(options, modality) for modality in MEDIA})]
    return records


if __name__ == "__main__":
    sys.exit(main())
