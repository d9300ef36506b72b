"""`--dry-run`: the settings, the sizes of the model and of the data, and an estimate of a worker's memory."""

import json
from collections import Counter

import torch
import yaml

from raytrain2p.config import Settings
from raytrain2p.config.secrets import masked
from raytrain2p.launch.cost import Machines, cost_of, layers
from raytrain2p.launch.places import bytes_needed, free_space, size
from raytrain2p.models.parameters import count_parameters
from raytrain2p.models.precision import resolve_precision
from raytrain2p.models.tracing import Pass
from raytrain2p.phases.inputs import TRAIN, PhaseInputs, planned_steps

PROCESS = 700e6  # Python with torch, Ray, Lightning and MLflow imported, measured on Linux
KEPT_BY_MALLOC = 1.1  # memory of a process for each byte of its tensors, measured: freed blocks are not all given back
WEIGHT_AND_MOMENTS = 4 + 8  # bytes per trained parameter: in float32, and two moments of Adam


def dry_run(settings: Settings, inputs: PhaseInputs, machines: Machines | None = None, calibrate: bool = False) -> str:
    """The text that is printed.

    Args:
        machines, calibrate: for what a step would take, see `cost.py`.

    Raises:
        InputError: the global batch cannot be divided among these machines, or what a step takes cannot be told.
    """
    resolved = json.loads(settings.model_dump_json())
    resolved["tracking"]["uri"] = masked(resolved["tracking"]["uri"])
    counts = count_parameters(inputs.parts())
    steps = planned_steps(settings.training, inputs.records)
    chosen, on_cpu = settings.training.precision, resolve_precision(settings.training.precision, torch.device("cpu"))
    precision = "bf16" if settings.launch.gpus and chosen == "auto" else on_cpu
    frozen = sum(count.frozen for count in counts.values())
    trained = sum(count.trained for count in counts.values())
    held = held_parameters(settings, inputs)
    needed, lacks = memory(settings, inputs, *held, precision, settings.launch.min_workers)
    lines = [yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True).rstrip(), "", f"{'parameters':16}{'frozen':>14}{'trained':>14}"]
    lines += [f"{name:16}{count.frozen:>14,}{count.trained:>14,}" for name, count in counts.items()]
    lines += [
        f"{'together':16}{frozen:>14,}{trained:>14,}",
        "",
        *data_lines(inputs),
        f"feature store      {size(bytes_needed(inputs.jobs))} more; {size(free_space(str(settings.data.feature_store)))} are free there",
        f"tokens per step    {inputs.tokens_per_step():,}",
        f"steps              {steps:,}",
        f"memory per worker  {'more than' if lacks else 'about'} {needed / 1e6:,.0f} MB{lacks and ': ' + lacks}",
    ]
    if machines or calibrate:
        if machines:
            needed, lacks = memory(settings, inputs, *held, "bf16", machines.workers)
        lines += ["", *cost_of(settings, inputs, machines, calibrate, *held).lines(needed), ""]
    lines.append("nothing was started")
    return "\n".join(lines)


def held_parameters(settings: Settings, inputs: PhaseInputs) -> tuple[int, int]:
    """Frozen and trained ones of a worker, which loads the encoders only if they run within the step."""
    counts = count_parameters(inputs.parts())
    held = [count for name, count in counts.items() if "encoder" not in name or settings.data.features == "online"]
    return sum(count.frozen for count in held), sum(count.trained for count in held)


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


def memory(settings: Settings, inputs: PhaseInputs, frozen: int, trained: int, precision: str, workers: int) -> tuple[float, str]:
    """Bytes of a worker that trains: weights, optimizer state, and a pass over the longest records. An estimate, and what it lacks.

    Args:
        frozen, trained: parameters.
    """
    width, sharing = 2 if precision == "bf16" else 4, workers if settings.launch.strategy == "fsdp" else 1
    try:
        of_pass, lacks = inputs.pass_of(precision, workers), ""
    except Exception as error:  # of a foreign model's own code, which may look at numbers
        of_pass, lacks = Pass(0, 0, Counter()), f"what a pass takes cannot be told of this language model ({type(error).__name__})"
    held = frozen * width + trained * WEIGHT_AND_MOMENTS + of_pass.gradient_bytes
    gathered = 0
    if sharing > 1:  # a layer that works, and the next one
        gathered = 2 * width * max((sum(one.numel() for one in layer.parameters()) for layer in layers(inputs.parts())), default=0)
    return PROCESS + KEPT_BY_MALLOC * (held / sharing + gathered + of_pass.most_bytes - of_pass.gradient_bytes), lacks
