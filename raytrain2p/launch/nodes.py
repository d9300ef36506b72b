"""Whether every node that may get a worker sees the same files, and has the same software: asked before anything starts."""

import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.cloudpickle import register_pickle_by_value
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrain2p.config import InputError, Problem
from raytrain2p.config.console import Console
from raytrain2p.config.scratch import is_remote
from raytrain2p.config.secrets import one_line
from raytrain2p.config.settings import ALIGNER, INIT, InstructionModelSettings, LaunchSettings
from raytrain2p.data.media import MediaRef
from raytrain2p.launch import probe
from raytrain2p.models.pretrained import files_of, local_directory
from raytrain2p.models.quantization import PACKAGE
from raytrain2p.phases.inputs import PhaseInputs

register_pickle_by_value(probe)  # a node may lack this package
PACKAGES = (probe.PACKAGE, "torch", "transformers", "pytorch-lightning", "peft", "ray")  # their results and files depend on the version
SECONDS_TO_ANSWER = 120.0  # of a node: it may have to unpack the working directory of a job first
SECONDS_TO_SEE = 5.0  # what another node wrote
MOST_FILES = 1000  # that a node looks at, of each setting
DRIVER = "driver"
SHARE = "mount the same file system on every node at this path"


@dataclass(frozen=True)
class Node:
    """One that may get a worker."""

    id: str
    name: str


HERE = Node(DRIVER, "the driver's node")


@dataclass
class Needed:
    """What all nodes must have.

    Args:
        folders: in which each must see what the others write, by setting, and how to fix it if they do not.
        files: that workers read, and their sizes, by setting.
        packages: of equal versions.
    """

    folders: dict[str, tuple[Path, str]] = field(default_factory=dict)
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    packages: set[str] = field(default_factory=lambda: {*PACKAGES})

    def add_files(self, where: str, paths: Iterable[str | Path]) -> None:
        """Of so many files, some are looked at."""
        found = sorted({str(path) for path in paths})
        sizes = {path: size for path in found[:: len(found) // MOST_FILES + 1] if (size := probe.size_of(path)) >= 0}
        if sizes:
            self.files[where] = sizes

    def add_artifact(self, setting: str, path: str | None) -> None:
        """An aligner.pt or model.pt. Those in an object storage are fetched by each worker."""
        if path is not None and not is_remote(path):
            self.add_files(f"{setting}={path}", [path])


def check_nodes(inputs: Sequence[PhaseInputs], launch: LaunchSettings, console: Console, seconds: float = SECONDS_TO_ANSWER) -> None:
    """Check that the other nodes can do what workers and encoders do there. With one node there is nothing to check.

    Args:
        inputs: of the launch, or of the trials of a sweep.
        launch: resolved.
        seconds: for which to wait for a node's answer.

    Raises:
        InputError: the problems of all nodes.
    """
    if not (nodes := other_nodes(launch)):
        return
    with console.status(f"checking what {len(nodes) + 1} nodes share"):
        problems = node_problems(nodes, needed(inputs), seconds)
    if problems:
        raise InputError(problems)


def other_nodes(launch: LaunchSettings) -> list[Node]:
    """Nodes that may get workers and encoders of a resolved launch, but that of this process."""
    resource = "GPU" if launch.gpus else "CPU"
    here = ray.get_runtime_context().get_node_id()
    others = [one for one in ray.nodes() if one["Alive"] and one["NodeID"] != here and one["Resources"].get(resource)]
    nodes = [Node(one["NodeID"], f"{one['NodeManagerHostname']} ({one['NodeManagerAddress']})") for one in others]
    return sorted(nodes, key=lambda node: node.name)


def needed(inputs: Sequence[PhaseInputs]) -> Needed:
    """By these inputs, and the settings that they were read by."""
    found, models = Needed(), dict[str, str]()
    jobs = [job for one in inputs for job in one.jobs]
    missing = {key: job.items[key] for job in jobs for key in job.store.missing(job.items)}
    media = [item for item in missing.values() if isinstance(item, MediaRef)]
    for one in inputs:
        settings, model = one.settings, one.settings.model
        if not is_remote(settings.output.root):
            found.folders[f"output.root={settings.output.root}"] = (Path(settings.output.root), f"{SHARE}; or output.root=s3://...")
        store = f"data.feature_store={settings.data.feature_store}"
        if missing:
            fix = f"{SHARE}; or set data.feature_store to a directory that all nodes share, or data.features=online"
            found.folders[store] = (Path(str(settings.data.feature_store)), fix)
        else:
            found.add_files(store, {job.store.places()[key][0] for job in jobs for key in job.items})
        if settings.data.features == "online":
            media += one.media_keys
        if isinstance(model, InstructionModelSettings):
            models[f"model.language_model={model.language_model}"] = model.language_model
            found.add_artifact(ALIGNER, model.aligner)
            if model.quantization is not None:
                found.packages.add(PACKAGE)
        found.add_artifact(INIT, model.init)
    for where, name in (models | {job.spec.where: job.spec.name for job in jobs}).items():
        if (directory := local_directory(name)) is not None:
            found.add_files(where, files_of(directory))
    found.add_files("media of the records", {ref.source for ref in media if ref.content is None})
    return found


def node_problems(nodes: Sequence[Node], needed: Needed, seconds: float = SECONDS_TO_ANSWER) -> list[Problem]:
    """What is wrong on which nodes."""
    found = NodeFindings(needed)
    with probe_folders(needed, found) as folders:
        names: dict[str, list[str]] = {folder: [DRIVER] for folder in folders}
        asked = ask(nodes, seconds, found, probe.look, list(folders), needed.files, sorted(needed.packages), SECONDS_TO_SEE)
        for node, (wrong, differing, versions) in asked.items():
            found.add_answer(node, {folders[folder]: what for folder, what in wrong.items()}, differing, versions)
            for folder in folders:
                if folder not in wrong:
                    names[folder].append(node.id)
        named = {node.id: node.name for node in nodes} | {HERE.id: HERE.name}
        writing = [node for node, (wrong, _, _) in asked.items() if not wrong]
        seen = ask(writing, seconds, found, probe.unseen, names, SECONDS_TO_SEE)
        seen[HERE] = probe.unseen(HERE.id, names, SECONDS_TO_SEE)
        for node, unseen in seen.items():
            for folder, of in unseen.items():
                found.add(folders[folder], f"what {', '.join(named[one] for one in of)} writes there is not seen", node)
    return found.problems()


@contextmanager
def probe_folders(needed: Needed, found: "NodeFindings") -> Iterator[dict[str, str]]:
    """Within, a new folder in each that nodes must share, and its setting. The nodes write there alone, so that nothing remains."""
    folders: dict[str, str] = {}
    probed, made = list[Path](), list[Path]()  # innermost first
    try:
        for setting, (path, _) in needed.folders.items():
            probed.append(folder := path / f".probe-{uuid.uuid4().hex}")
            made += [one for one in (path, *path.parents) if not one.exists()]
            if wrong := made_folder(folder):
                found.add(setting, wrong, HERE)
            else:
                folders[str(folder)] = setting
        yield folders
    finally:
        for folder in probed:
            shutil.rmtree(folder, ignore_errors=True)
        for one in made:
            with suppress(OSError):
                one.rmdir()


def made_folder(folder: Path) -> str:
    """What is wrong if it cannot be made and written to."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        return f"cannot be written to: {error.strerror}"
    return probe.write(str(folder), DRIVER, time.monotonic())


def ask(nodes: Sequence[Node], seconds: float, found: "NodeFindings", function: Any, *arguments: Any) -> dict[Node, Any]:
    """What a function of `probe` returns on each node, given the node's ID first; all at once. A node that does not answer is added to
    what was found.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    running = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False), name="look at a node").remote(
            node.id, *arguments
        ): node
        for node in nodes
    }
    answered, silent = ray.wait(list(running), num_returns=len(running), timeout=seconds) if running else ([], [])
    answers = {}
    for reference in answered:
        try:
            answers[running[reference]] = ray.get(reference)
        except ray.exceptions.RayError as error:
            found.add("", f"ended before it answered: {one_line(error, 300)}", running[reference])
    for reference in silent:
        ray.cancel(reference, force=True)
        found.add("", f"does not answer within {seconds:g} seconds", running[reference])
    return answers


class NodeFindings:
    """What was found, and on which nodes."""

    def __init__(self, needed: Needed) -> None:
        self.needed = needed
        self.nodes: dict[tuple[str, str], list[str]] = {}
        self.versions = {package: probe.version(package) for package in needed.packages}

    def add(self, where: str, what: str, node: Node) -> None:
        self.nodes.setdefault((where, what), []).append(node.name)

    def add_answer(
        self, node: Node, folders: Mapping[str, str], files: Mapping[str, tuple[int, int, str]], versions: Mapping[str, str]
    ) -> None:
        """Of `probe.look`."""
        for setting, what in folders.items():
            self.add(setting, what, node)
        for setting, (missing, wrong, example) in files.items():
            every = len(self.needed.files[setting])
            what = f"{wrong:,} of {every:,} files are missing or have another size, such as {example}"
            self.add(setting, "is not there" if missing == every else what, node)
        for package, version in versions.items():
            if version != self.versions[package]:
                what = f"cannot be imported ({version.strip()})" if version.startswith(" ") else f"is {version}"
                self.add(f"{package} {self.versions[package]}", what, node)

    def problems(self) -> list[Problem]:
        return [
            Problem(where or "Ray node", f"{what}, on {', '.join(names)}", self.fix(where), cause=f"{where} {what}")
            for (where, what), names in self.nodes.items()
        ]

    def fix(self, where: str) -> str:
        if where in self.needed.folders:
            return self.needed.folders[where][1]
        if where in self.needed.files:
            return f"{SHARE}, or copy it there"
        if where:
            return "install the same packages on every node, such as from one container image"
        return "see `ray status` and the node's logs; stop the node, or start it again"
