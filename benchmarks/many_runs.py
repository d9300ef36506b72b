"""A store of many runs, as a month of work leaves it: real files of small size, and the same runs in MLflow.

    python -m benchmarks.many_runs FOLDER [--runs 1000] [--server]

Nothing is trained: losses are drawn, weights have a few kB. All else is made by the code that makes real runs. Of them 40 % are
of phase 1, the others of phase 2, eight to a sweep or alone, each with one of the aligners. Most are FINISHED, some FAILED or KILLED;
the last one is RUNNING without a process, as a power failure leaves it. So `runs sync` finds all but that one complete in MLflow,
and `runs reconcile` all. The same seed makes the same runs, but for the run IDs, which MLflow draws.

FOLDER gets `checkpoints/` and `mlflow.db`; with --server, the database and the artifacts of an `mlflow server` that runs meanwhile.
"""

import argparse
import hashlib
import io
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image

from raytrain2p.config import InstructionSettings, Settings, load_settings
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION, PHASES, SWEEPS, Phase
from raytrain2p.models.artifacts import load_artifact, recorded_digest, save_artifact
from raytrain2p.phases.inputs import described, split_sources
from raytrain2p.storage.files import write_file, write_json
from raytrain2p.sweep.load import load_sweep
from raytrain2p.sweep.results import PARENT_TAG, Trial, TrialRecords, sweep_config, sweep_page, write_results
from raytrain2p.sweep.trial import trial_launch_id
from raytrain2p.tracking.checkpoints import CheckpointScore, best_checkpoint, last_checkpoint, write_checkpoint
from raytrain2p.tracking.create_run import get_or_create_run
from raytrain2p.tracking.metrics_file import MetricPoint
from raytrain2p.tracking.mlflow_store import client_of, prepare_store
from raytrain2p.tracking.run import EARLY_TAG, SWEEP_TAG, TRIAL_TAG, Run, launch_lock, launch_record
from raytrain2p.tracking.run_writer import RunWriter, open_run_writer, resolved_config
from raytrain2p.worker.job import OBJECTIVE, Outcome
from tests.chaos.mlflow_server import Server

MONTH = 30 * 86400.0
STEPS_PER_EPOCH, TRIALS, REGISTERED = 25, 8, 3
MODEL_NAME = "assistant"  # registered in MLflow: the best runs of phase 2 are its versions


class Store:
    """Makes runs, one after the other, each at its own time of the month.

    Args:
        folder: new or empty.
        uri: of MLflow.
        count: how many runs there will be.
    """

    def __init__(self, folder: Path, uri: str, count: int, seed: int = 0) -> None:
        self.folder, self.uri, self.count, self.random = folder, uri, count, random.Random(seed)  # noqa: S311
        self.root, self.sets = f"{folder}/checkpoints", [f"output.root={folder}/checkpoints", f"tracking.uri={uri}"]
        self.now = self.end = time.time()
        self.seconds: Counter[str] = Counter()  # spent, by part of the work
        self.runs: list[Run] = []
        self.aligners: list[Path] = []
        self.finished: list[tuple[float, Run]] = []  # of phase 2, with their validation losses
        image = io.BytesIO()
        Image.linear_gradient("L").resize((64, 40)).save(image, "PNG")
        self.plot = image.getvalue()

    def make(self, progress: Callable[[int], None]) -> None:
        """Make all runs."""
        launch_record(self.root, "any").parent.mkdir(parents=True)
        for phase in PHASES.values():
            prepare_store(load_settings(phase.number, None, self.sets), phase.experiment)
        sweep_starts = {self.count * part // 5 for part in range(1, max(1, self.count // 200) + 1)}
        with mock.patch("time.time", self.clock):  # the runs begin and end at their own times, in MLflow too
            while len(self.runs) < self.count:
                number = len(self.runs)
                self.now = self.end - MONTH * (1 - number / self.count) + self.random.uniform(0, 600)
                if sweep_starts and number >= min(sweep_starts) and self.aligners:
                    sweep_starts.remove(min(sweep_starts))
                    self.sweep(f"sweep-{number:04d}", min(TRIALS, self.count // 3, self.count - number - 2))
                else:
                    self.single(number)
                progress(len(self.runs))
            self.register()

    def clock(self) -> float:
        return self.now

    def single(self, number: int) -> None:
        """A run alone: of phase 1, or of phase 2 with an aligner. The first one makes an aligner."""
        is_last, draw = number == self.count - 1, self.random
        phase = ALIGNMENT if not self.aligners or (not is_last and draw.random() < 0.42) else INSTRUCTION
        status = "RUNNING" if is_last else "FINISHED" if number < 2 else draw.choices(["FINISHED", "FAILED", "KILLED"], [80, 12, 8])[0]
        command = f"python -m raytrain2p.train --phase {phase.number}"
        words = [f"seed={draw.randrange(5)}", f"training.learning_rate={draw.choice([3e-4, 1e-3, 3e-3])}"]
        if phase is INSTRUCTION:
            words += [f"model.aligner={draw.choice(self.aligners[-20:])}", f"model.lora.rank={draw.choice([8, 16, 32])}"]
        if draw.random() < 0.25:
            words.append(f"data.train={self.folder}/captions.jsonl")
        self.launch(phase, load_settings(phase.number, None, self.sets + words), f"launch-{number:04d}", status, {}, command)

    def sweep(self, launch_id: str, trials: int) -> None:
        """A sweep and its trials, some of which were stopped early."""
        sweep = load_sweep(None, [*self.sets, f"model.aligner={self.aligners[-1]}", f"sweep.num_trials={trials}"])
        command = "python -m raytrain2p.tune"
        describe = {"config": sweep_config(sweep), "command": command, "facts": {}, "page": sweep_page}
        with self.run(SWEEPS, INSTRUCTION.experiment, sweep.base, launch_id, {}, describe) as writer:
            run = writer.run
            records = TrialRecords(run.path, self.root)
            for number in range(trials):
                values = {"training.learning_rate": round(10 ** self.random.uniform(-3.5, -2), 6), "model.lora.rank": 2 ** (3 + number % 3)}
                trial = Trial(number, values, trial_launch_id(launch_id, number))
                records.begin(trial)
                tags = {PARENT_TAG: run.run_id, SWEEP_TAG: run.run_id, TRIAL_TAG: str(number)}
                self.launch(INSTRUCTION, sweep.settings(values), trial.launch_id, "FINISHED", tags, f"{command}  # trial {number}")
            write_results(run.path, records.results(), ["training.learning_rate", "model.lora.rank"], "min", INSTRUCTION.number)
            write_file(run.files.plots / "objective.png", self.plot)
            self.close(writer, "FINISHED")

    def launch(self, phase: Phase, settings: Settings, launch_id: str, status: str, tags: dict[str, str], command: str) -> None:
        """A run of a phase, to its end; every fourth trial was stopped early."""
        config = resolved_config(settings, {"training.precision": "bf16", "launch.cpus_per_worker": 2})
        describe = {"config": config, "command": command, "facts": facts(settings)}
        with self.run(phase.name, phase.experiment, settings, launch_id, tags, describe) as writer:
            steps = self.random.randint(30, 120)
            losses = self.train(writer, settings.training.learning_rate, steps, OBJECTIVE if tags else None)
            if status == "FINISHED":
                self.finish(phase, writer, config, losses, steps)
            if tags and int(tags[TRIAL_TAG]) % 4 == 3:
                writer.run.add_tags({EARLY_TAG: f"asha at step {steps}"})
            if status != "RUNNING":
                self.close(writer, status)

    @contextmanager
    def run(
        self, folder: str, experiment: str, settings: Settings, launch_id: str, tags: dict[str, str], describe: dict[str, Any]
    ) -> Iterator[RunWriter]:
        """Within, a new run is under way."""
        stamp = datetime.fromtimestamp(self.now).strftime("%Y%m%d_%H%M%S")
        write_json(launch_record(self.root, launch_id), {"launch_id": launch_id, "timestamp": stamp, "since": self.now})
        with launch_lock(self.root, launch_id).held():
            with self.timed("creating"):
                run = get_or_create_run(settings, folder, experiment, launch_id, tags)
            self.runs.append(run)
            with open_run_writer(run, self.uri, describe, print) as writer:
                yield writer

    def close(self, writer: RunWriter, status: str) -> None:
        with self.timed("sending"):
            complete = writer.finish(status, "loss is not finite at 3 steps in a row" if status == "FAILED" else "")
        assert complete, f"MLflow has not taken all of {writer.run.directory}"

    def train(self, writer: RunWriter, rate: float, steps: int, objective: str | None) -> dict[str, float]:
        """Metric points and checkpoints of so many steps, a few seconds each. Returns the last losses."""
        floor, points, best = 1 + abs(math.log10(rate / 1e-3)) / 3 + self.random.uniform(0, 0.4), list[MetricPoint](), math.inf
        scores: list[CheckpointScore] = []
        for step in range(1, steps + 1):
            self.now += 4
            loss = floor + 4 * math.exp(-step / 20) + self.random.gauss(0, 0.05)
            now = {"train_loss": loss, "learning_rate": rate * min(1, step / 20), "epoch": float((step - 1) // STEPS_PER_EPOCH)}
            if step % STEPS_PER_EPOCH == 0 or step == steps:
                now["val/loss"] = loss + 0.3 + self.random.uniform(0, 0.2)
                now |= {objective: now["val/loss"]} if objective else {}
                scores.append(CheckpointScore((step - 1) // STEPS_PER_EPOCH, step, "train_loss", loss))
            points += [MetricPoint(name, value, step, self.now) for name, value in now.items()]
        writer.write(points)
        for score in scores:
            best, is_best = min(best, score.value), score.value < best
            checkpoint = {"state_dict": self.weights(), "global_step": score.step, "epoch": score.epoch}
            write_checkpoint(checkpoint, writer.run.files.last_checkpoint, score.file_name() if is_best else None)
        return {name: now[name] for name in ("val/loss", "train_loss")}

    def finish(self, phase: Phase, writer: RunWriter, config: dict[str, Any], losses: dict[str, float], steps: int) -> None:
        """The artifact and the results."""
        run, encoders = writer.run, {"image": named("efficientnet-lite0", options={})}
        artifact = run.files.artifact(phase)
        content: dict[str, Any] = {"shape": {"dimension": 16}, "state_dict": self.weights()}
        if phase is INSTRUCTION:
            content |= {"language_model": named("smollm2-135m-instruct"), "system_prompt": ""}
            self.finished.append((losses["val/loss"], run))
        else:
            self.aligners.append(artifact)
        save_artifact(artifact, phase, config, encoders, **content)
        tests = {f"{name}/loss": losses["val/loss"] + self.random.uniform(0, 0.5) for name in ("test_drawing", "test_concept")}
        writer.write_metrics(tests, steps)
        write_file(run.files.training_curve, self.plot)
        write_json(run.files.test_metrics, tests)
        best, last = best_checkpoint(run.checkpoints), last_checkpoint(run.checkpoints)
        write_json(
            run.files.result,
            asdict(
                Outcome(run.run_id, run.directory, str(best), str(last), str(artifact), tests | losses, steps, recorded_digest(artifact))
            ),
        )

    def weights(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.random.randrange(2**31))
        return {f"branches.image.{part}": torch.randn(16, 32, generator=generator) for part in ("inner", "outer")}

    def register(self) -> None:
        """Register the best runs of phase 2."""
        client = client_of(self.uri)
        client.create_registered_model(MODEL_NAME)
        for _, run in sorted(self.finished, key=lambda pair: pair[0])[:REGISTERED]:
            client.create_model_version(MODEL_NAME, f"runs:/{run.run_id}/model", run.run_id)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - begin  # type: ignore[assignment]


def named(model: str, **more: Any) -> dict[str, Any]:
    """A frozen model as artifacts name it."""
    return {"name": model, "fingerprint": hashlib.sha256(model.encode()).hexdigest()} | more


def facts(settings: Settings) -> dict[str, Any]:
    """Digests of the inputs, by setting, as the driver computes them."""
    splits = {f"{setting}={described(sources)}": described(sources) for setting, sources in split_sources(settings).values()}
    (_, train), *others = splits.items()
    inputs = {key: {"records": named(value)["fingerprint"]} for key, value in others}
    if isinstance(settings, InstructionSettings) and settings.model.aligner is not None:
        content = load_artifact(Path(settings.model.aligner), ALIGNMENT)["digest"]
        model = settings.model.language_model
        inputs |= {f"model.language_model={model}": {"package": named(model)["fingerprint"]}}
        inputs |= {f"model.aligner={settings.model.aligner}": {"content": content}}
    return {"train_records": 2003, "train_digest": named(train)["fingerprint"], "inputs": inputs}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new or empty")
    parser.add_argument("--runs", type=int, default=1000, help="how many")
    parser.add_argument("--server", action="store_true", help="keep them in an `mlflow server`, which is started and stopped here")
    options = parser.parse_args(arguments)
    folder, begin = options.folder.absolute(), time.monotonic()
    if (folder / "checkpoints").exists():
        parser.error(f"{folder} has runs already: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        uri = f"sqlite:///{folder}/mlflow.db"
        if options.server:
            server = Server(folder)
            server.start()
            stack.callback(server.stop)
            uri = server.uri
        store = Store(folder, uri, options.runs)
        store.make(lambda done: print(f"{done} of {options.runs} runs, {time.monotonic() - begin:.0f} s", end="\r", flush=True))
    parts = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in store.seconds.items())
    print(f"{options.runs} runs in {store.root} and {uri}: {time.monotonic() - begin:.0f} s, of these {parts}")


if __name__ == "__main__":
    main()
