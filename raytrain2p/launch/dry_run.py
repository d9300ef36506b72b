"""`--dry-run`: the settings, the sizes of the model and of the data, and an estimate of a worker's memory."""

import json
from collections import Counter

import torch
import yaml

from raytrain2p.config import Settings
from raytrain2p.config.secrets import masked
from raytrain2p.launch.cost import Machines, Weights, cost_of, settings_on, weights_of
from raytrain2p.launch.places import bytes_needed, free_space, size
from raytrain2p.models.parameters import count_parameters
from raytrain2p.models.precision import resolve_precision
from raytrain2p.models.quantization import BYTES
from raytrain2p.phases.inputs import TRAIN, PhaseInputs, planned_steps

PROCESS = 930e6  # measured on Linux: 780 MB with all imported and a tiny model; the rest is oneDNN's, and left over from loading
KEPT_BY_MALLOC = 1.1  # memory of a process for each byte of its tensors, measured: freed blocks are not all given back
WEIGHT_AND_MOMENTS = 4 + 8  # bytes per trained parameter: in float32, and two moments of Adam


def dry_run(settings: Settings, inputs: PhaseInputs, machines: Machines | None = None, calibrate: bool = False) -> str:
    """The text that is printed.

    Args:
        machines, calibrate: for what a step would take, see `cost.py`.

    Raises:
        InputError: that cannot be told.
    """
    resolved = json.loads(settings.model_dump_json())
    resolved["tracking"]["uri"] = masked(resolved["tracking"]["uri"])
    parts = inputs.parts()
    counts, weights = count_parameters(parts), weights_of(settings, parts)
    steps = planned_steps(settings.training, inputs.records)
    frozen = sum(count.frozen for count in counts.values())
    trained = sum(count.trained for count in counts.values())
    needed, lacks = memory(settings, inputs, weights)
    lines = [yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True).rstrip(), "", f"{'parameters':16}{'frozen':>14}{'trained':>14}"]
    lines += [f"{name:16}{count.frozen:>14,}{count.trained:>14,}" for name, count in counts.items()]
    lines += [
        f"{'together':16}{frozen:>14,}{trained:>14,}",
        *([f"{'in 4 bits':16}{weights.quantized:>14,}"] if weights.quantized else []),
        "",
        *data_lines(inputs),
        f"feature store      {size(bytes_needed(inputs.jobs))} more; {size(free_space(str(settings.data.feature_store)))} are free there",
        f"tokens per step    {inputs.tokens_per_step():,}",
        f"steps              {steps:,}",
        f"memory per worker  {'more than' if lacks else 'about'} {needed / 1e6:,.0f} MB{lacks and ': ' + lacks}",
    ]
    if machines or calibrate:
        there, of_there = settings, inputs
        if machines:
            there = settings_on(settings, machines)
            of_there = inputs.with_settings(there)
        lines += ["", *cost_of(there, of_there, weights, machines, calibrate).lines(memory(there, of_there, weights)[0]), ""]
    lines.append("nothing was started")
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


def memory(settings: Settings, inputs: PhaseInputs, weights: Weights) -> tuple[float, str]:
    """Bytes of a worker that trains: weights, optimizer state, and a pass over the longest records. An estimate, and what it lacks.

    On a GPU those of tensors, as `peak_memory_megabytes` has them, else of the process.
    """
    launch, chosen, lacks = settings.launch, settings.training.precision, ""
    on_gpu, sharing = launch.gpus > 0, launch.sharing
    precision = "bf16" if on_gpu and chosen == "auto" else resolve_precision(chosen, torch.device("cpu"))
    width = 2 if precision == "bf16" else 4
    try:
        of_pass = inputs.pass_of(precision).most_bytes
    except Exception as error:  # of a foreign model's own code, which may look at numbers
        of_pass, lacks = 0, f"what a pass takes cannot be told of this language model ({type(error).__name__})"
    held: float = (weights.frozen - weights.quantized) * width + weights.quantized * BYTES + weights.trained * WEIGHT_AND_MOMENTS
    if sharing > 1:
        held = (held + 4 * weights.trained) / sharing + width * weights.gathered
    needed = held + weights.encoders + of_pass
    return needed if on_gpu else PROCESS + KEPT_BY_MALLOC * needed, lacks
