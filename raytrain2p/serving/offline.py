"""Many records, answered on all workers of a cluster with Ray Data."""

import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import ray.data

from raytrain2p.config import InputError, Problem
from raytrain2p.config.settings import LaunchSettings
from raytrain2p.data.records import Record
from raytrain2p.inference.model_file import ModelFile
from raytrain2p.inference.predictor import Batch, Predictor
from raytrain2p.launch.capacity import Capacity
from raytrain2p.launch.cluster import connected
from raytrain2p.launch.quiet import muted_stderr, quiet

MOST_BLOCKS = 1000  # what a worker takes at once is one: small, so that answers come in while others are made


def answer_batches(model: ModelFile, records: Sequence[Record], workers: int, batch_size: int, max_new_tokens: int) -> Generator[Batch]:
    """The batches of `Predictor.batches`, in any order, as they are answered.

    Args:
        workers: processes with a predictor of their own: a CPU each, and a GPU each where the cluster has any.

    Raises:
        InputError: the cluster is too small or cannot be used, or a worker cannot load the model.
    """
    quiet()
    with connected(LaunchSettings(), verbose=False) as capacity, muted_stderr(verbose=False):
        gpus = check_workers(workers, capacity)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        rows = [{"start": start, "records": records[start : start + batch_size]} for start in range(0, len(records), batch_size)]
        answered = ray.data.from_items(rows, override_num_blocks=min(len(rows), MOST_BLOCKS)).map_batches(
            Answerer,
            fn_constructor_args=(model.path, "cuda" if gpus else "cpu", max_new_tokens),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows))),
            num_cpus=1,
            num_gpus=gpus,
        )
        for block in answered.iter_batches(batch_size=None, prefetch_batches=0):
            for start, answers, problem in zip(block["start"], block["answers"], block["problem"], strict=True):
                if problem:
                    raise InputError(Problem(f"a worker of --workers={workers}", problem, "all nodes need the same files"))
                yield int(start), json.loads(answers)


def check_workers(workers: int, capacity: Capacity) -> int:
    """The GPUs that each worker gets.

    Raises:
        InputError: the cluster has too few for so many: Ray would wait for them forever.
    """
    gpus = 1 if capacity.gpus else 0
    if not capacity.fits(workers, 1, gpus):
        has = f"{capacity.gpus:g} GPUs" if gpus else f"{capacity.cpus:g} CPUs"
        what = f"needs as many {'GPUs' if gpus else 'CPUs'}; the cluster has {has}"
        raise InputError(Problem(f"--workers={workers}", what, "lower it, or use a larger cluster (RAY_ADDRESS)"))
    return gpus


class Answerer:
    """A predictor in a process of its own. What it cannot load goes back as text: Ray wraps exceptions in layers of its own."""

    def __init__(self, path: Path, device: str, max_new_tokens: int) -> None:
        self.problem, self.max_new_tokens = "", max_new_tokens
        try:
            self.predictor = Predictor(path, device=device)
        except InputError as error:
            self.problem = "; ".join(f"{problem.where} {problem.what}" for problem in error.problems)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (records,) = batch["records"]
        answers = [] if self.problem else list(self.predictor.answers(records, len(records), self.max_new_tokens))
        return {"start": batch["start"], "answers": [json.dumps(answers)], "problem": [self.problem]}
