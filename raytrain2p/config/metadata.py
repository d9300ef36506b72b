"""What a setting means beyond its value: whether it may change on resume, what depends on it, whether trials may vary it."""

from collections.abc import Callable, Iterable
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
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= known_keys(field.annotation, f"{path}.")
        else:
            keys[path] = field
    return keys


def settings_where(kind: type[BaseModel], wanted: Callable[[Metadata], bool], prefix: str = "") -> tuple[str, ...]:
    """Dotted paths of the settings whose metadata is wanted, in the order of definition."""
    return tuple(key for key, field in known_keys(kind, prefix).items() if wanted(metadata_of(field)))


def belongs_to(key: str, settings: Iterable[str]) -> bool:
    """Whether a flattened key is one of these settings, or an entry of one that is a mapping (`data.test.NAME`)."""
    return any(key == setting or key.startswith(f"{setting}.") for setting in settings)
