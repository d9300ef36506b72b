"""Commands of the files and of README.md in cluster/, read by the programs that will run them."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from click import Command, Group

from raytrain2p.config import load_settings
from raytrain2p.config.settings import Settings
from raytrain2p.train import parse


def check_training(words: Sequence[str]) -> tuple[Namespace, Settings]:
    """Read `python -m raytrain2p.train ...`: its options, and its settings as the command loads them."""
    assert [*words[:3]] == ["python", "-m", "raytrain2p.train"], words
    options = parse([*words[3:]])
    return options, load_settings(options.phase, options.config, options.overrides)


def check_click(command: Command, words: Sequence[str]) -> dict[str, Any]:
    """Read the arguments of a program that is written with click, down to its subcommand; returns the parameters of that one."""
    if isinstance(command, Group):
        inner = command.commands[words[0]]
        return check_click(inner, words[1:])
    return command.make_context(command.name, [*words]).params
