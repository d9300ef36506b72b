"""The formats that records are read from. A further one is a file here and a line below."""

from collections.abc import Collection, Sequence

from raytrain2p.data.formats import instruction, llava, openai, pair, sharegpt
from raytrain2p.data.formats.format import Example, Format

__all__ = ["FORMATS", "Example", "Format", "format_of"]

# Where a file could be in several, the first is taken.
FORMATS: dict[str, Format] = {one.name: one for one in (instruction.FORMAT, llava.FORMAT, openai.FORMAT, sharegpt.FORMAT, pair.FORMAT)}


def format_of(records: Sequence[Collection[str]]) -> Format | None:
    """The format of a file whose first records have these keys: the one that knows most of them."""
    scores = {one: _known(one, records) for one in FORMATS.values()}
    best = max(scores, key=lambda one: scores[one])
    return best if scores[best] else None


def _known(one: Format, records: Sequence[Collection[str]]) -> int:
    marks, keys = set(one.marks()), set(one.keys())
    return sum(len(keys.intersection(record)) for record in records if not marks.isdisjoint(record))
