"""What a setting means beyond its value: whether it may change on resume, what depends on it, whether trials may vary it."""

import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

FIXED: Final = "fixed"
FREE: Final = "free"
SHARED: Final = "shared"
VARIES: Final = "varies"
LIVE: Final = "live"


@dataclass(frozen=True)
class Metadata:
    """Properties of a setting. None has a default: whoever adds a setting decides each.

    Args:
        resume: FIXED if a resumed run must keep the value: its checkpoint is made from it, or the run is found by it.
        splits: whether the prepared splits depend on it. Trials that agree in these settings share their splits.
        trial: SHARED by all trials of a sweep, VARIES between trials, or LIVE: may change while weights stay (PBT).
        sweep_resume: FIXED if a resumed sweep must keep the value.
    """

    resume: Literal["fixed", "free"]
    splits: bool
    trial: Literal["shared", "varies", "live"]
    sweep_resume: Literal["fixed", "free"]

    def but(self, **changes: Any) -> "Metadata":
        """The same with some properties changed."""
        return replace(self, **changes)


def setting(default: Any, description: str, metadata: Metadata) -> Any:
    """A pydantic field with metadata. A default of `...` makes it required."""
    return Field(default, description=description, json_schema_extra=asdict(metadata))


def metadata_of(field: FieldInfo) -> Metadata:
    """The metadata of a field.

    Raises:
        TypeError: it was not made by `setting`.
    """
    if not isinstance(field.json_schema_extra, dict):
        raise TypeError("the field has no metadata: define it with `setting`")
    extra: dict[str, Any] = field.json_schema_extra
    return Metadata(**extra)


def known_keys(kind: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every setting's dotted path and its pydantic field."""
    keys: dict[str, FieldInfo] = {}
    for name, field in kind.model_fields.items():
        path = f"{prefix}{name}"
        if (group := _group(field.annotation)) is not None:
            keys |= known_keys(group, f"{path}.")
        else:
            keys[path] = field
    return keys


def _group(annotation: Any) -> type[BaseModel] | None:
    """The class of a group of settings, which may be null."""
    kinds = [kind for kind in typing.get_args(annotation) or (annotation,) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return kinds[0] if kinds and typing.get_origin(annotation) in (None, typing.Union, types.UnionType) else None


def settings_where(kind: type[BaseModel], wanted: Callable[[Metadata], bool], prefix: str = "") -> tuple[str, ...]:
    """Dotted paths of the settings whose metadata is wanted, in the order of definition."""
    return tuple(key for key, field in known_keys(kind, prefix).items() if wanted(metadata_of(field)))


def belongs_to(key: str, settings: Iterable[str]) -> bool:
    """Whether a flattened key is one of these settings, an entry of one that is a mapping (`data.test.NAME`), or a group of them."""
    return any(key == setting or key.startswith(f"{setting}.") or setting.startswith(f"{key}.") for setting in settings)


def with_defaults(before: Mapping[str, Any], kind: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Flattened settings as a run has recorded them, and the defaults of those that its version did not have: it did as they say."""
    found = defaults(kind, prefix)
    return {**before, **{key: value for key, value in found.items() if not any(belongs_to(one, [key]) for one in before)}}


def defaults(kind: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Of every setting, by its dotted path; null at the path of a group that is null unless it is set."""
    found: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        group = _group(field.annotation)
        found |= {f"{prefix}{name}": field.default} if group is None or field.default is None else defaults(group, f"{prefix}{name}.")
    return found


def value_at(flat: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of a flattened key: null if a group that it belongs to is null."""
    while key not in flat:
        key, dot, _ = key.rpartition(".")
        if not dot:
            return default
    return flat[key]
