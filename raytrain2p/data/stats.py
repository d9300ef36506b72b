"""What is in a file of records: counts, lengths, sizes of media, duplicates, and what a test file shares with it: `data stats`."""

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raytrain2p.config.escaping import plot_text
from raytrain2p.data.media import MEDIA, MediaRef, decode
from raytrain2p.data.records import Record
from raytrain2p.storage.files import write_file

BINS, BAR = 16, 40
MOST_SIZES = 3


@dataclass(frozen=True)
class Lengths:
    """The length of each record, and what it is counted in."""

    unit: str
    values: Sequence[int]


def describe(
    records: Sequence[Record], keys: Mapping[MediaRef, bytes], lengths: Lengths, supervised: int, test: Mapping[str, Iterable[bytes]]
) -> str:
    """The statistics as lines.

    Args:
        keys: content keys of the media.
        lengths: of the records.
        supervised: learnt tokens; 0 if that does not apply.
        test: content keys of other files' media, by file.
    """
    lines = [("records", f"{len(records):,}"), ("tasks", _counted(Counter(record.task for record in records)))]
    turns = Counter(sum(message.role == "user" for message in record.messages) for record in records)
    lines.append(("turns", _counted(turns)))
    for modality, kind in MEDIA.items():
        refs = list(dict.fromkeys(ref for record in records for ref in record.media() if ref.modality == modality))
        if refs:
            distinct = {keys[ref]: ref for ref in refs}
            per_record = Counter(sum(ref.modality == modality for ref in record.media()) for record in records)
            sizes = Counter(kind.size(decode(ref)) for ref in distinct.values())
            lines.append((modality, f"{len(distinct):,} distinct; per record {_counted(per_record)}; sizes {_counted(sizes, MOST_SIZES)}"))
    values = np.array(lengths.values)
    spread = ", ".join(f"{name} {number:,.0f}" for name, number in zip(("least", "median", "95 %", "most"), _spread(values), strict=True))
    learnt = f"; {supervised:,} learnt" if supervised else ""
    lines.append((lengths.unit, f"{values.sum():,} in all, per record {spread}{learnt}"))
    lines.append(("duplicates", f"{len(records) - len(distinct_records(records, keys)):,} records are equal to an earlier one"))
    own = set(keys.values())
    for name, others in test.items():
        shared = len(own & set(others))
        lines.append(("in both", f"{shared:,} media items are in {name} too"))
    return "\n".join(f"{name:12}{text}" for name, text in lines) + "\n\n" + histogram(lengths)


def distinct_records(records: Iterable[Record], keys: Mapping[MediaRef, bytes]) -> set[int]:
    """Hashes of the records' content."""
    return {
        hash(tuple((one.role, *(part if isinstance(part, str) else keys[part] for part in one.parts)) for one in record.messages))
        for record in records
    }


def histogram(lengths: Lengths) -> str:
    """The lengths as bars of text."""
    least, most = min(lengths.values), max(lengths.values)
    counts, edges = np.histogram(lengths.values, min(BINS, most - least + 1), (least, most + 1))
    starts = np.ceil(edges).astype(int)
    return "\n".join(
        f"{start:8,} to {end - 1:<8,}{count:8,} {'█' * -(-count * BAR // counts.max())}"
        for start, end, count in zip(starts[:-1].tolist(), starts[1:].tolist(), counts.tolist(), strict=True)
    )


def plot_lengths(lengths: Lengths, target: Path, title: str) -> None:
    """The histogram as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths.values, bins=4 * BINS, color="#2b6cb0")
    axes.set_title(plot_text(title), loc="left", fontsize=11)
    axes.set_xlabel(f"{lengths.unit} per record")
    axes.set_ylabel("records")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_file(target, buffer.getvalue())


def _spread(values: np.ndarray) -> list[float]:
    return np.quantile(values, [0, 0.5, 0.95, 1]).tolist()


def _counted(counts: Counter[str] | Counter[int], most: int = 8) -> str:
    """The commonest values, with their counts."""
    shown = [f"{value}: {count:,}" for value, count in counts.most_common(most)]
    return ", ".join(shown) + (f" and {len(counts) - most} more" if len(counts) > most else "")
