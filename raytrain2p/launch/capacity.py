"""CPUs and GPUs of a cluster, how many workers they hold, and the launch settings that follow from them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from raytrain2p.config import Problem
from raytrain2p.config.settings import LaunchSettings

RESTARTS_ON_A_CLUSTER = 3  # a lost node or worker is part of life there; a Ray that was started here is lost with its machine
TYPE = "accelerator_type:"  # prefix of the resource by which Ray names a node's GPUs
MOST_NODES = 10_000  # of a type, where the autoscaler has no limit


class Node(NamedTuple):
    """CPUs, GPUs and accelerator types of a node; `is_head` of the cluster's first one."""

    cpus: float
    gpus: float
    accelerators: frozenset[str] = frozenset()
    is_head: bool = False

    def workers(self, cpus: float, gpus: float, accelerator: str | None = None) -> int:
        """How many workers it holds. A fraction of a GPU is a fraction of one GPU."""
        if accelerator is not None and accelerator not in self.accelerators:
            return 0
        by_cpu = self.cpus // cpus
        if not gpus:
            return int(by_cpu)
        return int(min(by_cpu, int(self.gpus) * int(1 / gpus + 1e-9) if gpus < 1 else self.gpus // gpus))


@dataclass(frozen=True)
class Limits:
    """What an autoscaler may add.

    Args:
        types: a node of each type, and how many of it there may be.
        most: how many nodes there may be of all types together, without the head.
    """

    types: tuple[tuple[Node, int], ...]
    most: int


@dataclass(frozen=True)
class Capacity:
    """The nodes of a cluster, and how many machines they are on.

    Args:
        started_here: this launch started the cluster, and stops it.
        of_caller: the program that called us had initialised Ray, which stays as it is.
        autoscales: an autoscaler may add nodes.
        limits: of the autoscaler; None if there is none, or if they cannot be read.
    """

    nodes: tuple[Node, ...]
    machines: int = 1
    started_here: bool = False
    of_caller: bool = False
    autoscales: bool = False
    limits: Limits | None = None

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    @property
    def most_cpus(self) -> float:
        """Of one node."""
        return max(node.cpus for node in self.nodes)

    @property
    def possible(self) -> tuple[Node, ...]:
        """The nodes, and one of each type that may be added."""
        return (*self.nodes, *(node for node, most in (self.limits.types if self.limits else ()) if most))

    def fits(self, workers: int, cpus: float, gpus: float, accelerator: str | None = None, strategy: str = "PACK") -> bool:
        """Whether that many workers fit, each on one node."""
        return self.groups(workers, cpus, gpus, accelerator, strategy) > 0

    def groups(self, workers: int, cpus: float, gpus: float, accelerator: str | None = None, strategy: str = "PACK") -> int:
        """How many groups of that many workers fit at the same time.

        Args:
            strategy: STRICT_PACK: the workers of a group on one node; STRICT_SPREAD: each on a node of its own.
        """
        places = [node.workers(cpus, gpus, accelerator) for node in self.nodes]
        if strategy == "STRICT_PACK":
            return sum(place // workers for place in places)
        if strategy == "STRICT_SPREAD":
            groups = 0
            while sum(min(place, groups + 1) for place in places) >= (groups + 1) * workers:
                groups += 1
            return groups
        return sum(places) // workers

    def holds(self, launch: LaunchSettings, workers: int | None = None) -> int:
        """How many groups of workers of a resolved launch fit at the same time; `workers` is the size of a group, by default its least."""
        need = (launch.cpus_per_worker or 1, launch.gpus, launch.accelerator_type, launch.placement_strategy)
        return self.groups(workers or launch.min_workers, *need)

    def at_most(self, launch: LaunchSettings) -> "Capacity":
        """With all nodes that the autoscaler may add, first those that hold the most workers."""
        if self.limits is None:
            return self
        need, added = (launch.cpus_per_worker or 1, launch.gpus, launch.accelerator_type), list[Node]()
        for node, most in sorted(self.limits.types, key=lambda kind: -kind[0].workers(*need)):
            added += [node] * min(most, self.limits.most - len(added))
        grown = replace(self, nodes=(*(node for node in self.nodes if node.is_head), *added))
        return max((grown, self), key=lambda one: one.holds(launch))


def resolved(launch: LaunchSettings, capacity: Capacity, trial: bool = False) -> LaunchSettings:
    """With the values that `auto` and null stand for on this cluster.

    Args:
        trial: of a sweep, which restarts trials itself, and shares the cluster out among them.
    """
    use_gpu = launch.use_gpu
    if use_gpu == "auto":  # a type of accelerator was asked for: `check_capacity` reports one that is not there
        use_gpu = launch.accelerator_type is not None or any(node.gpus for node in capacity.possible)
    launch = launch.model_copy(update={"use_gpu": use_gpu})
    restarts = launch.max_failures
    if restarts is None:
        restarts = 0 if trial or capacity.started_here else RESTARTS_ON_A_CLUSTER
    return launch.model_copy(update={"max_failures": restarts, "cpus_per_worker": cpus_per_worker(launch, capacity, trial)})


def cpus_per_worker(launch: LaunchSettings, capacity: Capacity, trial: bool = False) -> int:
    """As set; else with GPUs the share of a node's CPUs that belongs to them, and without as many as leave room for every worker."""
    if launch.cpus_per_worker is not None:
        return launch.cpus_per_worker
    if launch.gpus:
        suitable = [node for node in capacity.possible if node.workers(1, launch.gpus, launch.accelerator_type)]
        return max(1, min((int(node.cpus / node.gpus * launch.gpus + 1e-9) for node in suitable), default=1))
    cpus = 1
    while not trial and capacity.fits(launch.max_workers, cpus + 1, 0, strategy=launch.placement_strategy):
        cpus += 1
    return cpus


def check_capacity(launch: LaunchSettings, capacity: Capacity) -> list[Problem]:
    """Resources that a resolved launch asks for, and that the cluster does not have and cannot add: Ray would wait for them forever."""
    wanted = launch.accelerator_type
    types = sorted({name for node in capacity.possible for name in node.accelerators})
    if wanted is not None and wanted not in types:
        where, what = f"launch.accelerator_type={wanted}", "no node has such a GPU, and none can be added"
        known = f"take {' or '.join(types)}" if types else "Ray knows the type of no GPU here: name it with `ray start --resources`"
        return [Problem(where, what, f"{known}; or set launch.accelerator_type=null")]
    most = capacity.at_most(launch)
    if most.holds(launch):
        return []
    where, fix = f"launch.num_workers={launch.num_workers}", "lower launch.num_workers or launch.cpus_per_worker"
    if launch.use_gpu:
        where, fix = f"{where} with launch.use_gpu=true", f"{fix}, set launch.use_gpu=false"
    if launch.placement_strategy.startswith("STRICT"):
        where, fix = f"{where} with launch.placement_strategy={launch.placement_strategy}", f"{fix}, take PACK or SPREAD"
    how = {"STRICT_PACK": "all on one node", "STRICT_SPREAD": "each on a node of its own"}.get(
        launch.placement_strategy, "each worker on one node"
    )
    grown = " with all that its autoscaler may add" if capacity.limits is not None else ""
    what = f"needs {needed(launch)}, {how}; the cluster has {has_nodes(most.nodes, wanted, launch.gpus > 0)}{grown}"
    return [Problem(where, what, f"{fix}, or use a larger cluster (RAY_ADDRESS)")]


def worker_resources(launch: LaunchSettings) -> dict[str, float]:
    """What Ray reserves for a worker of a resolved launch."""
    resources = {"CPU": float(launch.cpus_per_worker or 1)}
    if launch.gpus:
        resources["GPU"] = launch.gpus
    return resources | ({f"{TYPE}{launch.accelerator_type}": 0.001} if launch.accelerator_type else {})


def needed(launch: LaunchSettings) -> str:
    """What all workers of a resolved launch take."""
    return f"{launch.min_workers} x ({demand(launch)})" if launch.gpus else f"{launch.min_workers} x {launch.cpus_per_worker or 1} CPUs"


def demand(launch: LaunchSettings) -> str:
    """What each worker of a resolved launch takes."""
    cpus = launch.cpus_per_worker or 1
    share = "" if not launch.gpus else " and a GPU" if launch.gpus == 1 else f" and {launch.gpus:g} of a GPU"
    kind = f" ({launch.accelerator_type})" if launch.accelerator_type else ""
    return f"{cpus} CPU{'s' if cpus > 1 else ''}{share}{kind}"


def has_nodes(nodes: Iterable[Node], accelerator: str | None, gpus: bool) -> str:
    """The CPUs, and GPUs if they matter, of the nodes that count."""
    counted = [node for node in nodes if accelerator is None or accelerator in node.accelerators]
    cpus, found = sum(node.cpus for node in counted), sum(node.gpus for node in counted)
    return f"{cpus:g} CPUs and {found:g} GPUs on {len(counted)} node(s)" if gpus else f"{cpus:g} on {len(counted)} node(s)"
