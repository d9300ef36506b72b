"""`python -m raytrain2p.data check|show|stats FILE --phase N`: look at records before training on them."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from raytrain2p.config import Findings, InputError, Problem
from raytrain2p.config.cli import BAD_INPUT, Parser, exit_code, say
from raytrain2p.config.escaping import printable
from raytrain2p.config.paths import is_kind
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION, PHASES
from raytrain2p.config.problems import grouped
from raytrain2p.config.settings import DEFAULT_SOFT_TOKENS, InstructionModelSettings
from raytrain2p.data.chat import ChatFormat, Encoded, load_chat_format
from raytrain2p.data.checks import check_media, foreign_marks
from raytrain2p.data.media import MEDIA
from raytrain2p.data.reading import read_records, scan_source
from raytrain2p.data.records import Record
from raytrain2p.data.show import LEGEND, show_messages, show_pair
from raytrain2p.data.stats import Lengths, describe, plot_lengths
from raytrain2p.models.pretrained import model_directory


def positive(text: str) -> int:
    """A number from 1 to a million, for argparse."""
    if not 1 <= (number := int(text)) <= 10**6:
        raise ValueError
    return number


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m raytrain2p.data", description="Look at data before training on it.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    kinds = {
        "check": (check_records, "list every bad record by place and cause; decodes all media"),
        "show": (show_records, "print records as the model will see them"),
        "stats": (describe_records, "print counts, lengths, sizes and duplicates"),
    }
    for name, (function, text) in kinds.items():
        verb = verbs.add_parser(name, help=text, description=text)
        verb.set_defaults(function=function)
        verb.add_argument("file", help="a .jsonl, .json or .parquet file, a quoted pattern of several, or emoji:SPLIT")
        verb.add_argument("--phase", type=int, choices=tuple(PHASES), required=name == "check", default=INSTRUCTION.number)
        if name == "check":
            continue
        model = InstructionModelSettings()
        verb.add_argument("--language-model", default=model.language_model, help=f"its tokenizer is used (default {model.language_model})")
        verb.add_argument(
            "--soft-tokens", type=positive, default=DEFAULT_SOFT_TOKENS, help=f"per media item (default {DEFAULT_SOFT_TOKENS})"
        )
        verb.add_argument("--system-prompt", help="as model.system_prompt")
        if name == "show":
            verb.add_argument("--records", type=positive, default=3, help="how many, from the beginning (default 3)")
            verb.add_argument("--loss-on", choices=("all", "last"), default="all", help="as data.loss_on")
        else:
            verb.add_argument("--test", action="append", default=[], metavar="FILE", help="count the media that are in this file too")
            verb.add_argument("--png", metavar="FILE", help="write the histogram of lengths as an image")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 if a record is bad; 130 after Ctrl-C."""
    options = parse(arguments)
    return exit_code(lambda: options.function(options))


def show_records(options: argparse.Namespace) -> int:
    """Print the first records.

    Raises:
        InputError: bad records, or no such language model.
    """
    records = read_records(options.file, options.phase, "FILE")[: options.records]
    if options.phase == ALIGNMENT.number:
        texts = [show_pair(record) for record in records]
    else:
        chat = chat_format(options, options.loss_on)
        texts = [show_messages(record, one, chat) for record, one in zip(records, encoded_records(records, chat), strict=True)] + [LEGEND]
    print(printable("\n\n".join(texts)))
    return 0


def describe_records(options: argparse.Namespace) -> int:
    """Print the statistics of a file.

    Raises:
        InputError: bad records or media, no such language model, or --png is no place for a file.
    """
    if options.png and (is_kind(Path(options.png), Path.is_dir) or not is_kind(Path(options.png).absolute().parent, Path.is_dir)):
        raise InputError(Problem(f"--png {options.png}", "is a directory, or in one that does not exist", "give the path of a file"))
    records = read_records(options.file, options.phase, "FILE")
    checked = {file: check_media(read_records(file, options.phase, "--test")) for file in options.test}
    media = check_media(records)
    if problems := [problem for one in (media, *checked.values()) for problem in one.problems]:
        raise InputError(problems)
    test = {file: one.keys.values() for file, one in checked.items()}
    if options.phase == ALIGNMENT.number:
        lengths, learnt = Lengths("characters", [len("".join(record.answers)) for record in records]), 0
    else:
        chat = chat_format(options)
        encoded = encoded_records(records, chat)
        lengths, learnt = Lengths("tokens", [len(one.ids) for one in encoded]), sum(sum(one.supervised) for one in encoded)
    print(printable(describe(records, media.keys, lengths, learnt, test)))
    if options.png:
        try:
            plot_lengths(lengths, Path(options.png), options.file)
        except OSError as error:
            raise InputError(Problem(f"--png {options.png}", f"cannot be written: {error.strerror}", "give another path")) from None
    return 0


def encoded_records(records: Iterable[Record], chat: ChatFormat) -> list[Encoded]:
    """The records in tokens.

    Raises:
        InputError: the template cannot render a record, or an answer has no token.
    """
    findings = Findings()
    encoded = [one for _, _, one in chat.encode_each(records, findings)]
    findings.raise_any()
    return encoded


def chat_format(options: argparse.Namespace, loss_on: Literal["all", "last"] = "all") -> ChatFormat:
    """Of --language-model.

    Raises:
        InputError: it has no tokenizer that could end an answer.
    """
    where, directory = f"--language-model={options.language_model}", model_directory(options.language_model, "--language-model")
    try:
        return load_chat_format(directory, dict.fromkeys(MEDIA, options.soft_tokens), options.system_prompt, loss_on)
    except Exception as error:  # transformers and foreign files: anything
        raise InputError(
            Problem(where, f"has no usable tokenizer: {' '.join(str(error).split())[:300]}", "take a language model")
        ) from None


def check_records(options: argparse.Namespace) -> int:
    """Print each file's format, the problems by cause, and the number of good records.

    Raises:
        InputError: the file is missing, or of an unknown kind.
    """
    file = options.file
    scan = scan_source(file, options.phase, "FILE")
    problems = scan.problems + check_media(scan.records).problems
    lines = [f"{path}: {name} format, {count:,} good records" for path, name, count in scan.files]
    lines += grouped(problems)
    if marks := foreign_marks(scan.records):
        lines.append(f"{file}: {marks}")
    counts = Counter(ref.modality for ref in {ref for record in scan.records for ref in record.media()})
    media = ", ".join(f"{count:,} distinct {modality} items" for modality, count in counts.items()) or "no media"
    lines.append(f"{file}: {len(scan.records):,} good records with {media}, {len(problems):,} problem{'s' * (len(problems) != 1)}")
    say("\n".join(lines))
    return BAD_INPUT if problems else 0


if __name__ == "__main__":
    sys.exit(main())
