"""`python -m raytrain2p.predict --run RUN --image FILE "question"`: ask a trained assistant.

It needs model.pt and the base models, but no MLflow store or training data; and no Ray, but for `--workers`.
"""

import argparse
import glob
import sys
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from raytrain2p.config import Findings, Problem
from raytrain2p.config.cli import FAILED, Parser, exit_code, report
from raytrain2p.config.console import Console
from raytrain2p.config.escaping import json_line, printable
from raytrain2p.config.paths import absolute_output, is_embedded, is_kind
from raytrain2p.config.phases import INSTRUCTION
from raytrain2p.data.media import MEDIA
from raytrain2p.data.reading import read_records, records_in_memory
from raytrain2p.data.records import ASSISTANT, Record
from raytrain2p.data.scores import is_exact, token_f1
from raytrain2p.inference.answer_file import ANSWER, KEY, RECORD, AnswerFile, opened, question_key
from raytrain2p.inference.model_file import ModelFile, find_model
from raytrain2p.inference.predictor import Batch, Predictor, in_order
from raytrain2p.interrupts import stoppable
from raytrain2p.models.pretrained import quiet_transformers
from raytrain2p.storage.errors import StorageError

EACH = "to ask about each of several files, give a pattern in quotes, such as --{modality} 'DIRECTORY/*.{kind}'"
KINDS = {"image": "png", "audio": "wav"}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m raytrain2p.predict", description="Ask a trained assistant.")
    parser.add_argument("question", nargs="?", help="what to ask; media come first, unless placeholders such as <image> say where")
    parser.add_argument("--run", default="latest", help="phase 2 run: ID or its start, launch ID, path, or `latest` (default)")
    for modality in MEDIA:
        what = "may be given several times, for one question; a quoted pattern asks about each of its files"
        parser.add_argument(f"--{modality}", action="append", default=[], metavar="FILE", help=what)
    what = "many records, as in phase 2: files, quoted patterns, or emoji:SPLIT; those with answers are scored"
    parser.add_argument("--file", nargs="+", action="extend", default=[], metavar="FILE", help=what)
    parser.add_argument("--root", default="checkpoints", help="where run directories are (output.root of training)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer in tokens (default 32)")
    parser.add_argument("--batch-size", type=int, default=32, help="records per forward pass (default 32)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with `answer`")
    what = "write these objects to a file instead; what it has already is not asked again, so that a killed command can be repeated"
    parser.add_argument("--output", metavar="FILE.jsonl", help=what)
    what = "answer on so many workers of a Ray cluster; by default in this process"
    parser.add_argument("--workers", type=int, metavar="N", help=what)
    options, rest = parser.parse_known_args(arguments)
    options.rest = rest
    if unknown := [word for word in rest if word.startswith("--")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0 or 2 (bad input); 130 after Ctrl-C."""
    options = parse(arguments)
    return exit_code(lambda: predict(options))


def predict(options: argparse.Namespace) -> int:
    """Print or write an answer per record, and how many are as expected.

    Raises:
        InputError: bad records or media, no such run, or a base model that differs from the one in training.
    """
    records = read(options)
    path = find_model(options.run, options.root, "--run")
    if options.run == "latest":
        report(f"--run=latest is {path}")
    quiet_transformers()
    with opened(absolute_output("--output", options.output)) if options.output else nullcontext() as file:
        model = ModelFile(path) if options.workers else Predictor(path)
        media = model.check(records, options.max_new_tokens)
        if file is None:
            answers = show(model, records, options)
        else:
            keys = [question_key(model.digest, record, media, options.max_new_tokens) for record in records]
            try:
                answers = write(model, records, keys, options, file)
            except StorageError as error:
                report(f"{error}. The same command continues")
                return FAILED
            except KeyboardInterrupt:
                report(f"{len(file.answers):,} answers are in {file.path}; the same command continues")
                raise
    for line in scores(records, answers):
        report(line)
    return 0


def show(model: ModelFile, records: Sequence[Record], options: argparse.Namespace) -> list[str]:
    """Print each answer as it is made, and return all."""
    answers = []
    with closing(ask(model, records, options)) as batches:
        for record, answer in zip(records, in_order(batches), strict=True):
            print(json_line(row_of(record, answer)) if options.json else printable(answer), flush=True)
            answers.append(answer)
    return answers


def write(model: ModelFile, records: Sequence[Record], keys: Sequence[str], options: argparse.Namespace, file: AnswerFile) -> list[str]:
    """Answer what the file has no answer to, and return the answers to all records."""
    first = {key: number for number, key in reversed(list(enumerate(keys)))}  # equal questions are asked once
    numbers = sorted(number for key, number in first.items() if key not in file.answers)
    if before := sum(key in file.answers for key in keys):
        report(f"{before:,} of {len(records):,} answers are in {file.path} already")
    with closing(ask(model, [records[number] for number in numbers], options)) as batches:
        for start, found in batches:
            asked = zip(numbers[start:], found, strict=False)
            file.append([row_of(records[number], answer) | {KEY: keys[number]} for number, answer in asked])
    answers = [file.answers[key] for key in keys]
    rows = [row_of(record, answer) | {KEY: key} for record, answer, key in zip(records, answers, keys, strict=True)]
    others = file.finish(rows)
    kept = f"; before them are {others:,} to other questions or of another model" * bool(others)
    report(f"{len(records):,} answers are in {file.path}{kept}")
    return answers


def ask(model: ModelFile, records: Sequence[Record], options: argparse.Namespace) -> Generator[Batch]:
    """Batches of answers as they are made, in any order; shows how many there are."""
    if not records:
        return
    console, limits = Console(), (options.batch_size, options.max_new_tokens)
    shown = len(records) > 1 and not (console.live and options.output is None and sys.stdout.isatty())  # it would stand among the answers
    progress = console.progress_bar("answers") if shown else nullcontext(lambda done, total: None)
    with stoppable(), progress as advance:
        if isinstance(model, Predictor):
            batches = model.batches(records, *limits)
        else:
            from raytrain2p.serving.offline import answer_batches

            batches = answer_batches(model, records, options.workers, *limits)
        advance(done := 0, len(records))
        with closing(batches):  # what is muted while workers answer is heard again
            for start, answers in batches:
                yield start, answers
                advance(done := done + len(answers), len(records))


def row_of(record: Record, answer: str) -> dict[str, Any]:
    """What is written of an answer; with scores, if the record has the one that is expected."""
    row: dict[str, Any] = {RECORD: record.where, "question": record.question, "media": list(map(str, record.media())), ANSWER: answer}
    if (response := expected(record)) is not None:
        row |= {"task": record.task, "response": response, "exact": is_exact(answer, response), "f1": round(token_f1(answer, response), 4)}
    return row


def expected(record: Record) -> str | None:
    """The answer to a record that it has itself."""
    return record.messages[-1].text if record.messages[-1].role == ASSISTANT else None


def scores(records: Sequence[Record], answers: Sequence[str]) -> Iterator[str]:
    """A line for each task with expected answers."""
    found = defaultdict[str, list[tuple[bool, float]]](list)
    for record, answer in zip(records, answers, strict=True):
        if (response := expected(record)) is not None:
            found[record.task].append((is_exact(answer, response), token_f1(answer, response)))
    for task, pairs in sorted(found.items()):
        exact, f1 = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
        yield f"{task}: exact match {100 * exact:.2f} %, token F1 {100 * f1:.2f} % of {len(pairs):,} record{'s' * (len(pairs) > 1)}"


def read(options: argparse.Namespace) -> list[Record]:
    """The records to answer.

    Raises:
        InputError: all that is wrong with them, and with the options.
    """
    findings = Findings()
    findings.extend(check_options(options))
    findings.raise_any()
    if options.file:
        records = []
        for file in options.file:
            with findings:
                path = file if is_embedded(file) else str(Path(file).expanduser().absolute())
                records += read_records(path, INSTRUCTION.number, "--file", answered=False)
        findings.raise_any()
        return records
    media = {modality: getattr(options, modality) for modality in MEDIA if getattr(options, modality)}
    if (pattern := next(((modality, name) for modality, names in media.items() for name in names if is_pattern(name)), None)) is not None:
        modality, name = pattern
        return records_in_memory({file: {"instruction": options.question, modality: file} for file in matching(name)})
    return records_in_memory({"the question": {"instruction": options.question, **media}})


def check_options(options: argparse.Namespace) -> Iterator[Problem]:
    """What a person may have meant otherwise."""
    media = [(modality, name) for modality in MEDIA for name in getattr(options, modality)]
    modality = media[0][0] if media else next(iter(MEDIA))
    each = EACH.format(modality=modality, kind=KINDS.get(modality, "*"))
    for name in ("batch_size", "max_new_tokens", "workers"):
        if (value := getattr(options, name)) is not None and value < 1:
            yield Problem(f"--{name.replace('_', '-')}={value}", "must be at least 1")
    question = options.question
    if options.rest:
        what = f"is {1 + len(options.rest)} words or files: {', '.join([question, *options.rest])[:200]}"
        yield Problem("the question", what, f"put it in quotes; {each}; for several in one question, repeat --{modality}")
    elif options.file and (question is not None or media):
        yield Problem("--file", "has questions and media of its own", "give either --file, or a question")
    elif not options.file and question is None:
        yield Problem("the question", "is missing", 'write it at the end, as in --image FILE "What does it show?", or give --file')
    elif question is not None and is_kind(Path(question), Path.is_file):
        yield Problem("the question", f"is missing: {question} is a file", f"write it at the end, in quotes; {each}")
    elif question is not None and not question.strip():
        yield Problem("the question", "is empty", "write what to ask")
    for modality, name in media:
        where, path = f"--{modality}={name[:200]}", Path(name)
        if is_pattern(name):
            if len(media) > 1:
                yield Problem(where, "is a pattern beside other media", "give the pattern alone, or a --file of records")
            elif not matching(name):
                yield Problem(where, "no file matches the pattern")
        elif is_kind(path, Path.is_dir):
            yield Problem(where, "is a directory", f"give a file; {each}")
        elif not is_kind(path, Path.exists) and "://" not in name and not name.startswith("data:"):
            yield Problem(where, "no such file", "paths are relative to the working directory")


def is_pattern(name: str) -> bool:
    return glob.has_magic(name) and not is_kind(Path(name), Path.exists) and not name.startswith("data:")


def matching(pattern: str) -> list[str]:
    return sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())  # noqa: PTH207 - as data/files.py


if __name__ == "__main__":
    sys.exit(main())
