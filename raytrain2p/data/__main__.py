"""`python -m raytrain2p.data check FILE --phase N`: check every record and decode every image."""

import argparse
import sys

from raytrain2p.config import Problem
from raytrain2p.config.cli import BAD_INPUT, exit_code
from raytrain2p.config.phases import PHASES
from raytrain2p.data.checks import image_problems
from raytrain2p.data.records import scan_records


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 if a record is bad; 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m raytrain2p.data", description="Check data before training on it.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    check = verbs.add_parser("check", help="list every bad record by line and cause")
    check.add_argument("file", help="a .jsonl or .parquet file, or emoji:SPLIT")
    check.add_argument("--phase", type=int, choices=tuple(PHASES), required=True, help="1: text and image; 2: instruction and response")
    options = parser.parse_args(arguments)
    return exit_code(lambda: check_records(options.file, options.phase))


def check_records(file: str, phase: int) -> int:
    """Print every problem, by record, and the number of good records.

    Raises:
        InputError: the file is missing, or cannot be read at all.
    """
    records, problems = scan_records(file, phase, "FILE")
    problems += image_problems(records)
    if not records and not problems:
        problems.append(Problem(file, "holds no record", "give a file with at least one record"))
    for problem in problems:
        print(problem)
    images = len({record.image for record in records if record.image is not None})
    print(f"{file}: {len(records)} good records with {images} distinct images, {len(problems)} problems")
    return BAD_INPUT if problems else 0


if __name__ == "__main__":
    sys.exit(main())
