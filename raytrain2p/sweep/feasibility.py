"""What can be known of a sweep before its first trial: whether its settings work, and how many trials run at once."""

import itertools
from contextlib import suppress
from dataclasses import replace
from typing import Any

from raytrain2p.config import Findings, InputError, Problem
from raytrain2p.config.settings import LaunchSettings
from raytrain2p.launch.cluster import Capacity, check_before_connecting
from raytrain2p.launch.driver import resolve_aligner
from raytrain2p.launch.progress import Console
from raytrain2p.launch.resume import check_resumable
from raytrain2p.phases.inputs import check_global_batch
from raytrain2p.phases.registry import read_inputs
from raytrain2p.sweep.results import OVER, TrialRecords
from raytrain2p.sweep.schedulers import longest
from raytrain2p.sweep.settings import Sweep
from raytrain2p.sweep.space import Axis
from raytrain2p.sweep.trial import splits_key

MOST_SPLITS = 32  # combinations of settings with splits of their own that are prepared before the first trial


def check_sweep(sweep: Sweep, console: Console) -> tuple[Sweep, dict[str, Any]]:
    """Everything that can be known before a cluster is asked.

    Returns:
        The sweep with the aligner resolved, and the inputs_by_key by `splits_key`.

    Raises:
        InputError: every problem at once.
    """
    findings = Findings()
    with findings:
        sweep = replace(sweep, base=resolve_aligner(sweep.base, console))
    with findings:
        findings.extend(check_before_connecting(sweep_launch(sweep)))
    console.show("reading records and decoding new images")
    inputs_by_key: dict[str, Any] = {}
    for values in split_variants(sweep):
        with findings:
            settings = sweep.settings(values)
            if (key := splits_key(settings)) not in inputs_by_key:
                inputs_by_key[key] = read_inputs(settings, sweep.options.phase)
    console.clear()
    for axis in sweep.axes:
        for value in axis.probes() if inputs_by_key else ():
            with suppress(InputError):  # told already
                check_global_batch(sweep.settings({axis.setting: value}), next(iter(inputs_by_key.values())).records, findings)
    findings.extend(rung_problems(sweep, inputs_by_key))
    findings.raise_any()
    return sweep, inputs_by_key


def split_variants(sweep: Sweep) -> list[dict[str, Any]]:
    """Values of the settings on which the splits depend, in every combination, if these are few; else one at a time."""
    base = splits_key(sweep.base)
    moving: list[Axis] = []
    for axis in sweep.axes:
        with suppress(InputError):
            if any(splits_key(sweep.settings({axis.setting: value})) != base for value in axis.probes()):
                moving.append(axis)
    choices = [[(axis.setting, value) for value in axis.probes()] for axis in moving]
    combinations = [dict(pairs) for pairs in itertools.islice(itertools.product(*choices), MOST_SPLITS + 1)]
    if len(combinations) > MOST_SPLITS:
        combinations = [dict([pair]) for pairs in choices for pair in pairs]
    return [{}, *combinations] if sweep.options.try_defaults else combinations


def rung_problems(sweep: Sweep, inputs_by_key: dict[str, Any]) -> list[Problem]:
    """Halving, or an exchange of weights, beyond the end of training would never come."""
    options = sweep.options
    if options.scheduler == "none" or not inputs_by_key:
        return []
    most = longest(sweep, next(iter(inputs_by_key.values())).records)
    if options.scheduler == "pbt":
        what = f"a trial has {most} steps: no weights would ever be taken over"
        late = options.pbt.interval >= most
        return [Problem(f"sweep.pbt.interval={options.pbt.interval}", what, "set it lower, or set sweep.scheduler=none")] if late else []
    if options.asha.grace_period < most:
        return []
    return [
        Problem(
            f"sweep.asha.grace_period={options.asha.grace_period}",
            f"a trial has {most} {options.asha.time_attr}s: none would be stopped early",
            "set it lower, or set sweep.scheduler=none",
        )
    ]


def check_trials(trial_records: TrialRecords, sweep: Sweep, inputs_by_key: dict[str, Any]) -> None:
    """Whether the trials that are not over can go on as they began.

    Raises:
        InputError: every setting, and every number of records, that is another one now.
    """
    findings = Findings()
    for row in trial_records.rows():
        if row.run is not None and row.state not in OVER and not row.lineage:
            with findings:
                settings = sweep.settings(row.values)
                inputs = inputs_by_key.get(splits_key(settings))
                check_resumable(row.run, settings, inputs.digests if inputs is not None else None)
    findings.raise_any()


def sweep_launch(sweep: Sweep) -> LaunchSettings:
    """What each trial asks of the cluster: in a sweep, one CPU a worker unless it is set."""
    launch = sweep.base.launch
    return launch if launch.cpus_per_worker is not None else launch.model_copy(update={"cpus_per_worker": 1})


def trials_at_once(sweep: Sweep, capacity: Capacity) -> int:
    """As many as the cluster has room for, or fewer if so set; the trials' own drivers take no CPU."""
    launch = sweep_launch(sweep)
    gpus = 1 if launch.use_gpu else 0
    room = 1
    while capacity.fits((room + 1) * launch.num_workers, launch.cpus_per_worker or 1, gpus):
        room += 1
    return min(room, sweep.options.max_concurrent or room)
