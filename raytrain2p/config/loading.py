"""From a YAML file and `key=value` overrides to checked, frozen settings; all problems are reported at once."""

import contextlib
import copy
import difflib
import errno
import importlib.util
import re
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from raytrain2p.config.metadata import known_keys
from raytrain2p.config.paths import absolute_paths, packaged_config, relative_outputs
from raytrain2p.config.problems import Findings, InputError, Problem
from raytrain2p.config.program import GIVEN
from raytrain2p.config.scratch import EXAMPLE, SCHEMES, is_url, local_path
from raytrain2p.config.secrets import masked
from raytrain2p.config.settings import SETTINGS_OF_PHASE, RunSettings, Settings, Source, cross_field_problems, flatten_tree

# Settings of before, and what to set now.
RENAMED = {
    "training.batch_size": "set training.global_batch_size: batch_size x accumulate x launch.num_workers",
    "training.accumulate": "set training.micro_batch_size: records per worker and forward pass",
    "model.image_encoder": "set model.encoders.image (phase 2 takes the encoders of its aligner)",
    "model.image_size": "set model.encoders.image.size (phase 2 takes the size of its aligner)",
    "model.text_encoder": "set model.encoders.text",
}
ENCODERS = "model.encoders."  # `image: NAME` is short for `image: {name: NAME}`
STORE = re.compile(r"(sqlite|postgresql|mysql|mssql)(\+\w+)?://|https?://|file:|databricks|uc:")  # what MLflow keeps runs in
Kind = TypeVar("Kind", bound=BaseModel)


class SettingsLoader(yaml.SafeLoader):
    """YAML 1.2's core schema (https://yaml.org/spec/1.2.2/#103-core-schema), and no key twice.

    PyYAML reads YAML 1.1, where `010` is 8, `1:30` is 90, `on` is true, `1e-3` is text, and `2026-11-31` an error.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}  # type: ignore[misc]  # PyYAML has it on classes too

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != MERGE]
        if twice := next((key for key, count in Counter(keys).items() if count > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"has `{twice}` twice in one group", node.start_mark)
        return super().construct_mapping(node, deep)

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _expanded(node, {}) > MOST_NODES:
            raise yaml.constructor.ConstructorError(None, None, f"has more than {MOST_NODES:,} values", node.start_mark)
        return node

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and (bad := NO_TEXT.search(value)):
            raise yaml.constructor.ConstructorError(None, None, f"has the character {bad[0]!a}, which no name can have", node.start_mark)
        return value

    def construct_number(self, node: Any) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 0 if text.startswith(("0x", "0o")) else 10)


def _expanded(node: Any, known: dict[int, int]) -> int:
    """Values below a node, those of aliases counted each time: a short file can stand for thousands of millions."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = MOST_NODES + 1  # of an alias inside its own anchor
    inner = node.value if isinstance(node, yaml.CollectionNode) else ()
    count = 1 + sum(sum(_expanded(one, known) for one in (part if isinstance(part, tuple) else (part,))) for part in inner)
    known[id(node)] = count
    return count


MERGE = "tag:yaml.org,2002:merge"
NO_TEXT = re.compile(r"[\x00\ud800-\udfff]")  # neither paths nor UTF-8 can have them
MOST_NODES = 100_000
LARGEST_FILE = 1 << 20  # bytes
LONGEST_SHOWN = 200  # characters of a setting in a message
for tag, pattern, first in (
    (MERGE, r"<<", "<"),
    ("tag:yaml.org,2002:null", r"null|Null|NULL|~|", [*"nN~", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?\d+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?(\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN",
        "-+.0123456789",
    ),
):
    SettingsLoader.add_implicit_resolver(tag, re.compile(rf"^(?:{pattern})$"), list(first))
SettingsLoader.add_constructor("tag:yaml.org,2002:int", SettingsLoader.construct_number)


def load_settings(phase: int, config: str | Path | dict[str, Any] | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Read, merge and check the settings of one run.

    Args:
        phase: 1 (alignment) or 2 (instruction).
        config: a YAML file, or its groups as a dictionary; None takes the packaged file of the phase.
        overrides: `dotted.key=value` pairs, each value read as YAML; later ones win.

    Raises:
        InputError: the file cannot be read, or keys or values are wrong.
    """
    path = path_of(config, f"phase{phase}")
    typed: dict[str, Any] = {}
    with Findings() as findings:
        merge_overrides(typed, overrides)
    tree = read_tree(config) if config is not None else packaged_tree(phase, typed)
    with contextlib.suppress(InputError):  # collected already
        merge_overrides(tree, overrides)
    settings = None
    with findings:
        settings = settings_of(phase, tree, path, overrides)
    findings.raise_any()
    assert settings is not None
    return settings


def path_of(config: str | Path | dict[str, Any] | None, packaged: str) -> Path:
    """Where settings come from, for messages.

    Args:
        packaged: stem of the file that is used if there is no other.
    """
    if isinstance(config, dict):
        return Path(GIVEN)
    return Path(config) if config is not None else packaged_config(packaged)


def read_tree(config: str | Path | dict[str, Any]) -> dict[str, Any]:
    """Settings as nested groups, which the caller may change.

    Raises:
        InputError: the file cannot be read.
    """
    return copy.deepcopy(config) if isinstance(config, dict) else read_yaml(Path(config))


def packaged_tree(phase: int, over: Mapping[str, Any]) -> dict[str, Any]:
    """The packaged settings of a phase. Their validation and test splits go with their training records, and not with others.

    Args:
        over: settings that will replace some of them.
    """
    tree = read_yaml(packaged_config(f"phase{phase}"))
    data = over.get("data")
    train = data.get("train") if isinstance(data, dict) else None
    sources = train if isinstance(train, list) else [train]
    paths = [source.get("path") if isinstance(source, dict) else source for source in sources]
    if train is not None and any(str(path).partition(":")[0] != tree["data"]["train"].partition(":")[0] for path in paths):
        tree["data"] = {key: value for key, value in tree["data"].items() if key not in ("val", "test")}
    return tree


def settings_of(phase: int, tree: dict[str, Any], path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Check one run's settings.

    Args:
        phase: 1 or 2.
        tree: settings as nested groups, with the overrides merged in.
        path: file that they came from, for messages.
        overrides: for messages.

    Raises:
        InputError: every wrong key and value, and settings that contradict each other.
    """
    kind = SETTINGS_OF_PHASE[phase]
    settings = checked(kind, tree, path, overrides, lambda: _cross_field_problems(kind, tree))
    with Findings() as findings:
        findings.extend(root_problems(settings.output.root))
        if (store := settings.data.feature_store) is not None and is_url(store):
            what = "is not a directory: features are read from a file system"
            findings.add(Problem(f"data.feature_store={store}", what, "give one on storage that all nodes share, or leave it out"))
        if not STORE.match(uri := settings.tracking.uri):
            fix = "write for example sqlite:///mlflow.db, or http://HOST:PORT of `mlflow server`"
            findings.add(Problem(f"tracking.uri={masked(uri)}", "is not a URI of an MLflow store", fix))
        findings.extend(relative_outputs(settings))
    findings.raise_any()
    return absolute_paths(settings)


def root_problems(root: str, setting: str = "output.root") -> list[Problem]:
    """Problems of an output root that is a URL."""
    if not is_url(root):
        return []
    if local_path(root) == root:
        schemes = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        fix = f"give a directory that all nodes share, or one such as {EXAMPLE}; {schemes} are known"
        return [Problem(f"{setting}={root}", "is neither a directory nor a URL of an object storage", fix)]
    if importlib.util.find_spec("obstore") is None:
        return [Problem(f"{setting}={root}", "needs the package obstore", "pip install 'raytrain2p[object-storage]'")]
    return []


def checked(kind: type[Kind], tree: dict[str, Any], path: Path, overrides: Sequence[str], more: Callable[[], list[Problem]] = list) -> Kind:
    """Validate a tree as typed settings.

    Raises:
        InputError: each problem that pydantic found, named as the user wrote it, and those that `more` then finds.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        found = [problem for detail in error.errors() for problem in _problems(kind, detail, path, overrides)]
        raise InputError(list(dict.fromkeys([*found, *more()]))) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        InputError: no such file, not YAML, or not a mapping.
    """
    try:
        if path.exists() and not (path.is_file() and path.stat().st_size <= LARGEST_FILE):
            raise OSError(errno.EFBIG, "it is not a file of at most 1 MiB")  # such as a pipe, which would block
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=SettingsLoader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise InputError(Problem(f"--config {path}", f"cannot be read: {error.strerror}", "give the path of a YAML file")) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(Problem(f"--config {path}", f"is not YAML: {' '.join(str(error).split())}")) from None
    if not isinstance(tree, dict):
        raise InputError(Problem(f"--config {path}", "contains no settings", "write `group:` lines with `  key: value` under them"))
    return tree


def merge_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> None:
    """Write each `dotted.key=value` into the tree.

    Raises:
        InputError: overrides are not of that form; the others are merged nevertheless.
    """
    findings = Findings()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            findings.add(Problem(override, "is not of the form key=value", "write for example training.max_steps=200"))
            continue
        try:
            value = yaml.load(text, Loader=SettingsLoader)  # noqa: S506 - a SafeLoader
        except yaml.constructor.ConstructorError as error:
            findings.add(Problem(_cut(override), f"the value {error.problem}"))
            continue
        except (yaml.YAMLError, ValueError, RecursionError):
            findings.add(Problem(_cut(override), "the value is not YAML", "quote it"))
            continue
        *groups, last = key.split(".")
        node = tree
        for group in groups:
            inner = node.get(group)
            node[group] = (
                inner if isinstance(inner, dict) else {"name": inner} if key.startswith(ENCODERS) and isinstance(inner, str) else {}
            )
            node = node[group]
        node[last] = value
    findings.raise_any()


def _cut(where: str) -> str:
    return where if len(where) <= LONGEST_SHOWN else f"{where[:LONGEST_SHOWN]}..."


def nearest_key(kind: type[BaseModel], key: str) -> str | None:
    """The valid setting whose path, or else whose last part, is most similar to `key`."""
    keys = list(known_keys(kind))
    if close := difflib.get_close_matches(key, keys, n=1, cutoff=0.75):
        return close[0]
    by_name = {path.rsplit(".", 1)[-1]: path for path in reversed(keys)}
    close = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(by_name), n=1, cutoff=0.6)
    return by_name[close[0]] if close else None


def type_name(annotation: Any) -> str:
    """A type as a user reads it: `Literal["a", "b"]` is `a | b`, `int | None` is `int | null`."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(type_name, arguments))
    if origin in (dict, list):
        return f"{origin.__name__} of {type_name(arguments[-1])}"
    names = {type(None): "null", bool: "true | false", str: "text", Source: "path or {path, weight}"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _setting(kind: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """The dotted path that the user wrote: pydantic adds the branches of a union to it."""
    known = known_keys(kind)
    paths = [".".join(map(str, loc[:length])) for length in range(len(loc), 0, -1)]
    return next((path for path in paths if path in known and type(known[path].annotation) is not dict), paths[0] if paths else "")


def _cross_field_problems(kind: type[RunSettings], tree: dict[str, Any]) -> list[Problem]:
    """The checks over several fields, which pydantic skips once a single field is wrong."""
    defaults = {key: field.default for key, field in known_keys(kind).items()}
    return cross_field_problems(defaults | flatten_tree(tree), kind.accumulates)


def _problems(kind: type[BaseModel], detail: Any, path: Path, overrides: Sequence[str]) -> Iterator[Problem]:
    """One pydantic error, named as the user wrote the setting."""
    raised = detail["ctx"]["error"] if detail["type"] == "value_error" else None
    if isinstance(raised, InputError):
        yield from raised.problems
    else:
        yield _problem(kind, detail, path, overrides)


def _problem(kind: type[BaseModel], detail: Any, path: Path, overrides: Sequence[str]) -> Problem:
    key = _setting(kind, detail["loc"])
    origin = next((override for override in reversed(overrides) if override.partition("=")[0] == key), None)
    where = _cut(origin or (f"{key} = {detail['input']!r}" if key else str(path))) + ("" if origin or not key else f" in {path}")
    if detail["type"] == "extra_forbidden":
        nearest = nearest_key(kind, key)
        hint = f"did you mean {nearest}?" if nearest else "`--help` lists every setting"
        return Problem(where, "no such setting", RENAMED.get(key, hint))
    if detail["type"] == "missing":
        return Problem(f"{key} in {path}", "is missing", f"set it: {known_keys(kind)[key].description}" if key in known_keys(kind) else "")
    if detail["type"] == "value_error":
        return Problem(where if origin else f"{key or 'settings'} in {path}", str(detail["ctx"]["error"]))
    field = known_keys(kind).get(key)
    in_union = field is not None and typing.get_origin(field.annotation) in (typing.Union, types.UnionType)
    if field is not None and in_union and len(detail["loc"]) > key.count(".") + 1:
        return Problem(where, f"required: {type_name(field.annotation)}")  # the same for each branch of the union: duplicates are dropped
    required = f" (required: {type_name(field.annotation)})" if field is not None else ""
    return Problem(where, f"{detail['msg']}{required}")
