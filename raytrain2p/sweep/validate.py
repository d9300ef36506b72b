"""Checks of a sweep: the settings that vary, their values, and what contradicts the search or the scheduler."""

import math
from collections.abc import Sequence

from raytrain2p.config.loading import nearest_key
from raytrain2p.config.metadata import LIVE, SHARED, known_keys, metadata_of, settings_where
from raytrain2p.config.problems import Findings, InputError, Problem
from raytrain2p.config.scratch import is_remote
from raytrain2p.config.settings import SETTINGS_OF_PHASE
from raytrain2p.sweep.settings import MOST_TRIALS, Sweep
from raytrain2p.sweep.space import Axis


def fixed_twice(sweep: Sweep, overrides: Sequence[str]) -> list[Problem]:
    """Overrides of settings that vary: they would apply to the defaults only."""
    varying = {axis.setting for axis in sweep.axes}
    return [
        Problem(override, "varies: it is in sweep.space", f"to fix it, sweep.space.{setting}='{{choice: [{value}]}}'")
        for override in overrides
        for setting, _, value in [override.partition("=")]
        if setting in varying
    ]


def space_problems(sweep: Sweep) -> list[Problem]:
    """Problems of the settings that vary, and of their values."""
    options = sweep.options
    findings = Findings()
    if sweep.base.launch.is_elastic:
        what = "trials are compared, and share the cluster by their size: each has a fixed number of workers"
        findings.add(Problem(f"launch.num_workers={sweep.base.launch.num_workers}", what, "set a number"))
    if not sweep.axes:
        findings.add(Problem("sweep.space", "is empty: nothing varies", "name at least one setting, such as training.learning_rate"))
    for axis in sweep.axes:
        findings.extend(axis_problems(sweep, axis))
    grids = [axis.setting for axis in sweep.axes if axis.distribution == "grid"]
    if options.search == "grid" and (rest := [axis.setting for axis in sweep.axes if axis.values is None]):
        findings.add(
            Problem("sweep.search=grid", f"{', '.join(rest)} has no list of values", "give it `grid: [VALUE, ...]`, or search at random")
        )
    if options.search != "grid" and grids:
        findings.add(Problem(f"sweep.search={options.search}", f"{', '.join(grids)} is a grid", "set sweep.search=grid, or write `choice`"))
    grid = math.prod(len(axis.values) for axis in sweep.axes if axis.values)
    if options.search == "grid" and options.num_trials is None and grid > MOST_TRIALS:
        what = f"the grid has {grid:,} combinations, and at most {MOST_TRIALS:,} trials are run: each is a run with a directory of its own"
        findings.add(Problem("sweep.space", what, "leave out values, set sweep.num_trials, or set sweep.search=random"))
    if options.search != "grid" and options.num_trials is None:
        findings.add(Problem("sweep.num_trials", "is missing", "set it: only search=grid ends without it"))
    return findings.problems


def axis_problems(sweep: Sweep, axis: Axis) -> list[Problem]:
    """Problems of one setting that varies: its name, its distribution, or its values."""
    kind, where = SETTINGS_OF_PHASE[sweep.options.phase], f"sweep.space.{axis.setting}"
    known = known_keys(kind)
    if axis.setting not in known:
        nearest = nearest_key(kind, axis.setting)
        return [Problem(where, "no such setting", f"did you mean {nearest}?" if nearest else "")]
    if metadata_of(known[axis.setting]).trial == SHARED:
        return [Problem(where, "is shared by all trials", f"set it beside the `sweep` group, as {axis.setting}")]
    if len(sweep.options.space[axis.setting]) != 1:
        return [Problem(where, "has more than one distribution, or none", "give one")]
    if found := axis.problem():
        return [Problem(f"{where} = {{{axis.distribution}: {list(axis.arguments)}}}", found)]
    problems = []
    for value in axis.probes():
        try:
            sweep.settings({axis.setting: value})
        except InputError as error:
            problems.append(Problem(f"{where}, value {value!r}", "; ".join(problem.what for problem in error.problems)))
    return problems


def schedule_problems(sweep: Sweep) -> list[Problem]:
    """Settings that contradict the metric or the scheduler."""
    options, base = sweep.options, sweep.base
    findings = Findings()
    if options.metric == "val/loss" and base.data.val is None:
        findings.add(
            Problem("sweep.metric=val/loss", "is measured on validation records, but data.val is not set", "set it, or take train_loss")
        )
    every = base.checkpoint.every_steps
    by_step = options.scheduler == "pbt" or (options.scheduler == "asha" and options.asha.time_attr == "step")
    if by_step and (base.checkpoint.best_of != "saves" or every is None):
        findings.add(
            Problem(
                f"sweep.scheduler={options.scheduler}",
                "compares trials by step, but they are measured at epochs' ends only",
                "set checkpoint.best_of=saves and checkpoint.every_steps",
            )
        )
    if options.scheduler == "asha" and options.asha.time_attr == "step" and every is not None and options.asha.grace_period % every:
        findings.add(
            Problem(
                f"sweep.asha.grace_period={options.asha.grace_period}",
                f"must be a multiple of checkpoint.every_steps={every}: trials are measured when they save",
                f"set it to {math.ceil(options.asha.grace_period / every) * every}",
            )
        )
    if options.scheduler == "pbt":
        findings.extend(pbt_problems(sweep))
    return findings.problems


def retry_problems(sweep: Sweep) -> list[Problem]:
    """Workers that are restarted while the sweep stops or pauses their trial would keep CPUs that no scheduler counts."""
    restarts = sweep.base.launch.max_failures  # null: none, in a sweep
    if not restarts:
        return []
    fix = f"set launch.max_failures=0 and sweep.max_failures={restarts}"
    return [Problem(f"launch.max_failures={restarts}", "in a sweep, a failed trial is restarted by the sweep", fix)]


def pbt_problems(sweep: Sweep) -> list[Problem]:
    """Settings that contradict population-based training, which changes settings and keeps weights."""
    options, every = sweep.options, sweep.base.checkpoint.every_steps
    findings = Findings()
    if every is not None and options.pbt.interval % every:
        findings.add(
            Problem(
                f"sweep.pbt.interval={options.pbt.interval}",
                f"must be a multiple of checkpoint.every_steps={every}: weights are copied from a checkpoint",
                f"set it to {math.ceil(options.pbt.interval / every) * every}",
            )
        )
    if is_remote(sweep.base.output.root):
        what = f"copies checkpoints through a directory that all nodes share, and output.root={sweep.base.output.root} is an object storage"
        findings.add(Problem("sweep.scheduler=pbt", what, "take another scheduler, or set output.root to such a directory"))
    live = settings_where(type(sweep.base), lambda metadata: metadata.trial == LIVE)
    for axis in sweep.axes:
        if axis.setting not in live:
            findings.add(
                Problem(
                    f"sweep.space.{axis.setting}",
                    f"cannot change while weights stay; with sweep.scheduler=pbt these can: {', '.join(live)}",
                    "leave it out, or take another scheduler",
                )
            )
    if options.search != "random":
        findings.add(Problem(f"sweep.search={options.search}", "population-based training searches by itself", "set sweep.search=random"))
    if options.try_defaults and (unset := [key for key, value in sweep.default_values().items() if value is None]):
        findings.add(Problem("sweep.try_defaults=true", f"{', '.join(unset)} has no default to vary", "set it, or leave out try_defaults"))
    if (options.num_trials or 2) < 2:
        findings.add(Problem(f"sweep.num_trials={options.num_trials}", "is not a population", "set 2 or more"))
    return findings.problems
