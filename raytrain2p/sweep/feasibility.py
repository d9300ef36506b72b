"""Checks before the first trial: whether the settings work with the data, and how many trials run at once."""

import itertools
from contextlib import suppress
from dataclasses import replace

from raytrain2p.config import Findings, InputError, Problem
from raytrain2p.config.console import Console
from raytrain2p.config.settings import LaunchSettings
from raytrain2p.launch.cluster import Capacity, check_before_connecting
from raytrain2p.launch.driver import resolve_artifacts
from raytrain2p.launch.places import place_problems
from raytrain2p.launch.resume import changed_inputs, check_resumable
from raytrain2p.phases.inputs import PhaseInputs, check_global_batch, plan_notes
from raytrain2p.phases.registry import check_init, read_inputs
from raytrain2p.sweep.results import OVER, TrialRecords
from raytrain2p.sweep.schedulers import longest
from raytrain2p.sweep.settings import Sweep
from raytrain2p.sweep.space import Axis, Values
from raytrain2p.sweep.trial import splits_key

MOST_SPLITS = 32  # distinct splits that are prepared before the first trial


def check_sweep(sweep: Sweep, console: Console) -> tuple[Sweep, dict[str, PhaseInputs]]:
    """Every check that needs no cluster.

    Returns:
        The sweep with `model.init` and `model.aligner` resolved, and the inputs by `splits_key`.

    Raises:
        InputError: every problem at once.
    """
    findings = Findings()
    sweep = replace(sweep, base=resolve_artifacts(sweep.base, findings, console))
    with findings:
        findings.extend(check_before_connecting(sweep_launch(sweep)))
    inputs_by_key: dict[str, PhaseInputs] = {}
    with console.status("reading records and decoding new media"):
        for values in split_variants(sweep):
            with findings:
                settings = sweep.settings(values)
                if (key := splits_key(settings)) not in inputs_by_key:
                    inputs_by_key[key] = read_inputs(settings, sweep.options.phase)
    notes = list[str]()
    for varied in [{}, *({axis.setting: value} for axis in sweep.axes for value in axis.probes())] if inputs_by_key else ():
        with suppress(InputError):  # reported already
            settings, records = sweep.settings(varied), next(iter(inputs_by_key.values())).records
            check_global_batch(settings, records, findings)
            with findings:
                check_init(settings)
            notes += plan_notes(settings, records)
    findings.extend(rung_problems(sweep, inputs_by_key))
    jobs = [job for inputs in inputs_by_key.values() for job in inputs.jobs]
    findings.extend(place_problems(sweep.base, is_new=True, jobs=jobs))
    findings.raise_any()
    for note in dict.fromkeys([*next(iter(inputs_by_key.values())).notes, *notes]):  # most trials have the same
        console.say(note)
    return sweep, inputs_by_key


def split_variants(sweep: Sweep) -> list[Values]:
    """Values of the settings on which the splits depend: all combinations, or one at a time if there are too many."""
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


def rung_problems(sweep: Sweep, inputs_by_key: dict[str, PhaseInputs]) -> list[Problem]:
    """A first rung, or a first exchange of weights, that is beyond the end of training."""
    options = sweep.options
    if options.scheduler == "none" or not inputs_by_key:
        return []
    most = longest(sweep, next(iter(inputs_by_key.values())).records)
    if options.scheduler == "pbt":
        what = f"a trial has {most} steps: no weights would ever be copied"
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


def check_trials(
    trial_records: TrialRecords, sweep: Sweep, inputs_by_key: dict[str, PhaseInputs], accept_changed_inputs: bool = False
) -> None:
    """Check that the trials that are not over can be resumed, with the inputs of those that are over: trials are compared.

    Raises:
        InputError: every setting, and every input's content, that has changed.
    """
    findings = Findings()
    for result in trial_records.results():
        if result.run is None:
            continue
        with findings:
            settings = sweep.settings(result.values)
            inputs = inputs_by_key.get(splits_key(settings))
            digests = inputs.digests if inputs is not None else None
            if result.state not in OVER and not result.lineage:
                check_resumable(result.run, settings, digests, accept_changed_inputs)
            elif digests is not None and not accept_changed_inputs:
                findings.extend(changed_inputs(result.run, settings, digests))
    findings.raise_any()


def sweep_launch(sweep: Sweep) -> LaunchSettings:
    """The resources of a trial: one CPU per worker unless set."""
    launch = sweep.base.launch
    return launch if launch.cpus_per_worker is not None else launch.model_copy(update={"cpus_per_worker": 1})


def trials_at_once(sweep: Sweep, capacity: Capacity) -> int:
    """As many as fit the cluster, or `max_concurrent` if that is less. The trials' own drivers take no CPU."""
    launch = sweep_launch(sweep)
    gpus = 1 if launch.use_gpu else 0
    most = 1
    while capacity.fits((most + 1) * launch.max_workers, launch.cpus_per_worker or 1, gpus):
        most += 1
    return min(most, sweep.options.max_concurrent or most)
