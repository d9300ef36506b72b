"""`--dry-run`: the settings, the sizes of the model and of the data, and an estimate of a worker's memory."""

import json
from collections import Counter

import torch
import yaml

from raytrain2p.config import Settings
from raytrain2p.config.secrets import masked
from raytrain2p.launch.places import bytes_needed, free_space, size
from raytrain2p.models.parameters import count_parameters
from raytrain2p.models.precision import resolve_precision
from raytrain2p.phases.inputs import TRAIN, PhaseInputs, planned_steps

PROCESS_MB = 700  # Python with torch, Ray, Lightning and MLflow imported, measured on Linux
KEPT_BY_MALLOC = 1.1  # memory of a process for each byte of its tensors, measured: freed blocks are not all given back
WEIGHT_AND_MOMENTS = 4 + 8  # bytes per trained parameter: in float32, and two moments of Adam


def dry_run(settings: Settings, inputs: PhaseInputs) -> str:
    """The text that is printed."""
    resolved = json.loads(settings.model_dump_json())
    resolved["tracking"]["uri"] = masked(resolved["tracking"]["uri"])
    counts = count_parameters(inputs.parts())
    steps = planned_steps(settings.training, inputs.records)
    # a worker loads the encoders only if they run within the step
    held = sum(count.frozen for name, count in counts.items() if "encoder" not in name or settings.data.features == "online")
    frozen = sum(count.frozen for count in counts.values())
    trained = sum(count.trained for count in counts.values())
    lines = [yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True).rstrip(), "", f"{'parameters':16}{'frozen':>14}{'trained':>14}"]
    lines += [f"{name:16}{count.frozen:>14,}{count.trained:>14,}" for name, count in counts.items()]
    lines += [
        f"{'together':16}{frozen:>14,}{trained:>14,}",
        "",
        *data_lines(inputs),
        f"feature store      {size(bytes_needed(inputs.jobs))} more; {size(free_space(str(settings.data.feature_store)))} are free there",
        f"tokens per step    {inputs.tokens_per_step():,}",
        f"steps              {steps:,}",
        f"memory per worker  {memory(settings, inputs, held, trained)}",
        "nothing was started",
    ]
    return "\n".join(lines)


def data_lines(inputs: PhaseInputs) -> list[str]:
    """What is in each split, and what a test split shares with the training records."""
    lines, trained = [], set[tuple[str, bytes]]()
    for name, records in inputs.splits.items():
        media = {(ref.modality, inputs.media_keys[ref]) for record in records for ref in record.media()}
        counts = Counter(modality for modality, _ in media)
        text = "".join(f", {count:,} distinct {modality} items" for modality, count in counts.items())
        shared = len(media & trained)
        lines.append(f"{name:18} {len(records):,} records{text}" + (f"; {shared:,} of them in {TRAIN} too" if shared else ""))
        trained = trained or media
    return lines


def memory(settings: Settings, inputs: PhaseInputs, frozen: int, trained: int) -> str:
    """Of a worker that trains: weights, optimizer state, and what a pass over the longest records takes. An estimate.

    Args:
        frozen, trained: parameters.
    """
    chosen, on_cpu = settings.training.precision, resolve_precision(settings.training.precision, torch.device("cpu"))
    precision = "bf16" if settings.launch.gpus and chosen == "auto" else on_cpu
    width = 2 if precision == "bf16" else 4
    sharing = settings.launch.min_workers if settings.launch.strategy == "fsdp" else 1
    held = (frozen * width + trained * WEIGHT_AND_MOMENTS) / sharing
    try:
        of_pass, word, more = inputs.bytes_of_pass(precision), "about", ""
    except Exception as error:  # of a foreign model's own code, which may look at numbers
        of_pass, word, more = 0, "more than", f": what a pass takes cannot be told of this language model ({type(error).__name__})"
    return f"{word} {PROCESS_MB + KEPT_BY_MALLOC * (held + of_pass) / 1e6:,.0f} MB{more}"
