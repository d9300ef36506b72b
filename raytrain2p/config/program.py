"""Settings that a program gives as Python values, in the forms of the command line, so that both are checked and reported alike."""

import json
import numbers
import os
from collections.abc import Container, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from raytrain2p.config.problems import Findings, InputError, Problem

GIVEN = "settings"  # where values come from that no file has, for messages


def as_overrides(given: Mapping[str, Any], known: Container[str], findings: Findings) -> list[str]:
    """`key=value` for each setting: `{"training": {"max_steps": 5}, "training.log_every": 1}` has two.

    Args:
        given: values by dotted path. A mapping is a group, down to the settings that are `known`: the value of those may be one.
        known: dotted paths of settings.
        findings: gets a problem for each value of a type that no setting has.
    """
    overrides = []
    for key, value in _leaves(given, known, ""):
        try:
            overrides.append(f"{key}={written(value)}")
        except (TypeError, ValueError) as error:
            findings.add(Problem(key, str(error), "give a number, a text, a path, None, or a list or dictionary of these"))
    return overrides


def as_tree(settings: Mapping[str, Any] | BaseModel) -> dict[str, Any]:
    """Settings as nested groups, as a YAML file would have them.

    Raises:
        InputError: a value is of no type that a setting can have.
    """
    try:
        tree: dict[str, Any] = json.loads(written(settings))
    except (TypeError, ValueError) as error:
        raise InputError(Problem(GIVEN, str(error))) from None
    return tree


def written(value: Any) -> str:
    """A value as YAML, which JSON is."""
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _leaves(given: Mapping[str, Any], known: Container[str], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in given.items():
        key = f"{prefix}{name}"
        value = value.model_dump() if isinstance(value, BaseModel) else value
        if isinstance(value, Mapping) and value and key not in known:
            yield from _leaves(value, known, f"{key}.")
        else:
            yield key, value


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, numbers.Integral):  # of NumPy
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"no setting has a value of type {type(value).__name__}")
