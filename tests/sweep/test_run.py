"""Sweeps as a user runs them: real trials through Ray Tune, on small models."""

import csv
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import yaml

from tests.chaos.killing import Launch, kill, only_long, processes
from tests.launch.launching import SWEEP_SPACE, SWEEP_STEPS, Command, run_command, submit


@dataclass
class SweepLaunch(Launch):
    """`python -m raytrain2p.tune` in the background."""

    module: str = "raytrain2p.tune"

    def command(self) -> list[str]:
        return [self.module, *self.arguments, "--json"]


def tune(folder: Path, ray_head: str, *arguments: str) -> Command:
    folder.mkdir(parents=True, exist_ok=True)
    features = str(folder.parent / "features")
    return run_command(folder, "raytrain2p.tune", *arguments, "--json", RAY_ADDRESS=ray_head, RAYTRAIN2P_FEATURES=features)


def children(folder: Path) -> tuple[Any, list[Any]]:
    """The one parent run and its children, as MLflow has them."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = [run for experiment in client.search_experiments() for run in client.search_runs([experiment.experiment_id])]
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert {run.data.tags["mlflow.parentRunId"] for run in runs if run is not parent} <= {parent.info.run_id}
    assert {run.data.tags["mlflow.source.name"] for run in runs} == {"raytrain2p.tune"}
    return parent, sorted((run for run in runs if run is not parent), key=lambda run: int(run.data.tags["raytrain2p.trial"]))


def table(folder: Path) -> list[dict[str, str]]:
    (path,) = (folder / "checkpoints" / "sweeps").glob("*/trials.csv")
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def assert_the_table_agrees_with_mlflow(folder: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    _, runs = children(folder)
    lines = table(folder)
    assert [line["run_id"] for line in lines] == [run.info.run_id for run in runs]
    for line, run in zip(lines, runs, strict=True):
        history = client.get_metric_history(run.info.run_id, "objective")
        best = min(history, key=lambda point: point.value)
        assert (float(line["objective"]), int(line["at_step"])) == (best.value, best.step)
        assert int(line["steps"]) == max(point.step for point in client.get_metric_history(run.info.run_id, "train_loss"))
        assert line["stopped_early"] == run.data.tags.get("raytrain2p.stopped_early", "")
        assert run.info.status == "FINISHED"
        assert Path(line["directory"]) == Path(run.data.tags["raytrain2p.directory"])
        for setting in SWEEP_SPACE:
            assert line[setting] == run.data.params[setting]
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "train_loss")]
        assert sorted(steps) == list(range(1, int(line["steps"]) + 1)), "a step is missing, or there twice"
        if line["stopped_early"]:
            assert line["stopped_early"].endswith(f" at step {line['steps']}"), "it was trained on"
        else:
            assert int(line["steps"]) == SWEEP_STEPS


@only_long
def test_a_sweep_whose_driver_is_killed_half_way_ends_as_if_nothing_had_been(tmp_path: Path, ray_head: str, sweep_config: Path) -> None:
    folder = tmp_path / "sweep"
    asha = ["sweep.scheduler=asha", "sweep.asha.grace_period=20", "sweep.asha.reduction_factor=2"]
    launch = SweepLaunch(folder, [f"--config={sweep_config}", *asha], {"RAY_ADDRESS": ray_head})
    launch.start()
    launch.wait_until(lambda: any(folder.glob("checkpoints/alignment/*/result.json")) or stopped_early(folder), 200)
    assert launch.process is not None
    assert kill(launch.process.pid)
    launch.wait()
    begun = {path.name for path in folder.glob("checkpoints/alignment/*")}
    assert 1 <= len(begun) <= 4

    done = tune(folder, ray_head, "--resume", "latest")
    assert done.code == 0, done.err
    assert "resuming: " in done.err
    assert "Ray Tune ended" not in done.err
    outcome = done.outcome
    assert (outcome["trials"], outcome["failed"]) == (4, 0), done.err
    assert outcome["finished"] + outcome["stopped_early"] == 4, done.err
    assert outcome["finished"] >= 1
    assert outcome["stopped_early"] >= 1, "ASHA stopped nobody: that is no test"
    parent, runs = children(folder)
    assert parent.info.status == "FINISHED"
    assert len(runs) == 4
    directories = {path.name for path in folder.glob("checkpoints/alignment/*")}
    assert len(directories) == 4
    assert begun <= directories, "what was begun was resumed"
    assert_the_table_agrees_with_mlflow(folder)
    assert {line["state"] for line in table(folder)} == {"finished", "stopped early"}

    directory = Path(outcome["directory"])
    assert directory.name.startswith(parent.info.run_id + "_")
    assert {path.name for path in directory.iterdir()} >= {"trials.csv", "best.json", "config.json", "README.md", "plots", "trials"}
    launch = json.loads((directory / "config.json").read_text())["launch"]
    assert (launch["use_gpu"], launch["max_failures"]) == (False, 0), "resolved once, for all trials"
    best = json.loads((directory / "best.json").read_text())
    assert best["objective"] == min(float(line["objective"]) for line in table(folder))
    assert f"python -m raytrain2p.train --phase 2 --aligner {best['run_id'][:8]}" in done.err, "the summary says how to use it"
    again = run_command(folder, *best["command"].split()[2:], "--dry-run", RAY_ADDRESS=ray_head)
    assert again.code == 0, again.err


def stopped_early(folder: Path) -> bool:
    return any("stopped_early" in path.read_text() for path in folder.glob("checkpoints/alignment/*/run.json"))


def test_bad_input_leaves_nothing(tmp_path: Path, ray_head: str, sweep_config: Path) -> None:
    done = tune(tmp_path / "bad", ray_head, f"--config={sweep_config}", "sweep.search=grid", "launch.num_workers=9", "sweep.pbt.quantile=2")
    assert done.code == 2
    assert "sweep.pbt.quantile" in done.err
    done = tune(tmp_path / "bad", ray_head, f"--config={sweep_config}", "launch.num_workers=9", "training.global_batch_size=18")
    assert done.code == 2
    assert "needs 9 x 1 CPUs" in done.err
    done = tune(tmp_path / "bad", ray_head, "--resume", "ffff")
    assert done.code == 2
    assert "there is no such run" in done.err
    done = tune(tmp_path / "bad", ray_head, f"--config={sweep_config}", "--resume", "ffff")
    assert done.code == 2
    assert "--resume with --config" in done.err
    assert not (tmp_path / "bad" / "checkpoints" / "alignment").exists()
    assert not list((tmp_path / "bad").glob("checkpoints/sweeps/*"))


PBT = [
    "sweep.scheduler=pbt",
    "sweep.pbt.interval=20",
    "sweep.pbt.quantile=0.5",
    "sweep.num_trials=2",
    "sweep.seed=1",
    "sweep.space={training.learning_rate: {loguniform: [1e-5, 3e-2]}}",
]


def train_losses(folder: Path, run: Any) -> dict[int, float]:
    """By step; each step is there once."""
    history = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").get_metric_history(run.info.run_id, "train_loss")
    assert len(history) == len({point.step for point in history})
    return {point.step: point.value for point in history}


@only_long
def test_population_based_training_continues_from_anothers_weights(tmp_path: Path, ray_head: str, sweep_config: Path) -> None:
    folder = tmp_path / "pbt"
    done = tune(folder, ray_head, f"--config={sweep_config}", *PBT)
    assert done.code == 0, done.err
    assert done.outcome["finished"] == 2
    _, runs = children(folder)
    heirs = [run for run in runs if "raytrain2p.lineage" in run.data.tags]
    assert heirs, "nobody took over anything"
    directory = Path(heirs[0].data.tags["raytrain2p.directory"])
    first = json.loads((directory / "lineage.jsonl").read_text().splitlines()[0])
    donor = next(run for run in runs if run.info.run_id == first["from_run"])
    assert donor.info.run_id != heirs[0].info.run_id
    assert first["at_step"] == first["from_step"], "all at one step"
    mine, theirs, step = train_losses(folder, heirs[0]), train_losses(folder, donor), first["at_step"]
    assert sorted(mine) == list(range(1, SWEEP_STEPS + 1)), "one sequence of steps, whosever weights"
    assert mine[step + 1] == theirs[step + 1], "the step after is made with the donor's weights, on the same batch"
    assert mine[step] != theirs[step]
    last = torch.load(directory / "lightning_checkpoints" / "last.ckpt", weights_only=True)
    rate = last["lr_schedulers"][0]["base_lrs"][0]
    final = json.loads((directory / "lineage.jsonl").read_text().splitlines()[-1])
    assert rate == pytest.approx(final["settings"]["training.learning_rate"]), "it continues with its own rate"


@only_long
def test_a_population_is_resumed_after_its_driver_is_killed(tmp_path: Path, ray_head: str, sweep_config: Path) -> None:
    folder = tmp_path / "pbt"
    launch = SweepLaunch(folder, [f"--config={sweep_config}", *PBT], {"RAY_ADDRESS": ray_head})
    launch.start()
    launch.wait_until(lambda: any(folder.glob("checkpoints/alignment/*/lineage.jsonl")), 300)  # the first exchange
    assert launch.process is not None
    assert kill(launch.process.pid)
    launch.wait()

    done = tune(folder, ray_head, "--resume", "latest")
    assert done.code == 0, done.err
    assert "Ray Tune ended" not in done.err
    assert (done.outcome["trials"], done.outcome["finished"]) == (2, 2), done.err
    _, runs = children(folder)
    assert len(runs) == 2
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    assert len(list(folder.glob("checkpoints/alignment/*"))) == 2
    for run in runs:
        assert sorted(train_losses(folder, run)) == list(range(1, SWEEP_STEPS + 1)), "a step is missing"
    assert any("raytrain2p.lineage" in run.data.tags for run in runs)


@only_long
def test_a_sweep_runs_as_a_submitted_job(tmp_path: Path, ray_head: str, sweep_config: Path) -> None:
    where = f"output.root={tmp_path}/checkpoints tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    outcome = submit(f"python -m raytrain2p.tune --config {sweep_config} sweep.num_trials=2 {where} --json")
    assert (outcome["trials"], outcome["finished"]) == (2, 2)
    parent, runs = children(tmp_path)
    assert parent.info.run_id == outcome["run_id"]
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    assert_the_table_agrees_with_mlflow(tmp_path)


@only_long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_or_a_closed_terminal_leaves_the_table_and_can_be_resumed(
    number: signal.Signals, tmp_path: Path, ray_head: str, sweep_config: Path
) -> None:
    folder = tmp_path / "stopped"
    launch = SweepLaunch(folder, [f"--config={sweep_config}", "training.max_steps=100000", "sweep.num_trials=3"], {"RAY_ADDRESS": ray_head})
    launch.start()
    launch.wait_for_steps(30)
    assert launch.process is not None
    launch.process.send_signal(number)
    assert launch.wait() == 128 + number, launch.log
    parent, runs = children(folder)
    assert parent.info.status == "KILLED"
    directory = parent.data.tags["raytrain2p.directory"]
    *_, line = launch.log.splitlines()
    assert line.startswith(f"raytrain2p: stopped by {number.name}; run {parent.info.run_id} is in {directory}; ")
    assert line.endswith(f"python -m raytrain2p.tune --resume {directory}")
    assert {run.info.status for run in runs} == {"KILLED"}
    assert {line["state"] for line in table(folder)} <= {"killed", "waiting"}


@only_long
def test_a_model_that_is_not_there_is_found_before_anything_starts(tmp_path: Path, ray_head: str, sweep_config: Path) -> None:
    space = "sweep.space={model.encoders.text.name: {choice: [nowhere/at-all, all-minilm-l6-v2]}}"
    done = tune(tmp_path / "missing", ray_head, f"--config={sweep_config}", space)
    assert done.code == 2, done.err
    assert "nowhere/at-all" in done.err


@only_long
def test_a_trial_that_fails_is_tried_again_and_ends_nothing_else(
    tmp_path: Path, ray_head: str, tiny_config: Path, untrained_aligner: Path
) -> None:
    config = tmp_path / "sweep.yaml"
    tree = {
        "sweep": {
            **{"phase": 2, "base": str(tiny_config / "phase2.yaml"), "search": "grid", "metric": "train_loss"},
            "space": {"model.attention": {"grid": ["flash_attention_2", "eager"]}},  # the first needs a GPU, as only the worker finds out
        },
        "model": {"aligner": str(untrained_aligner)},
        "data": {"val": None, "test": {}},
    }
    config.write_text(yaml.safe_dump(tree))
    folder = tmp_path / "fails"
    done = tune(folder, ray_head, f"--config={config}")
    assert done.code == 0, done.err
    assert (done.outcome["finished"], done.outcome["failed"]) == (1, 1)
    _, runs = children(folder)
    assert [run.info.status for run in runs] == ["FAILED", "FINISHED"], "tried again in the same run"
    assert [line["state"] for line in table(folder)] == ["failed", "finished"]
    assert done.err.lower().count("trial 0: failed: ") == 2, "once, and once again"
    assert "flash" in done.err.lower()


@only_long
def test_a_time_budget_ends_trials_as_stopped_early(tmp_path: Path, ray_head: str, sweep_config: Path) -> None:
    folder = tmp_path / "budget"
    done = tune(folder, ray_head, f"--config={sweep_config}", "training.max_steps=100000", "sweep.time_budget_s=45", "sweep.num_trials=2")
    assert done.code == 0, done.err
    assert done.outcome["stopped_early"] == 2
    assert all(line["stopped_early"].startswith("time budget at step") for line in table(folder))


@only_long
def test_a_trial_whose_process_is_killed_is_failed_everywhere(tmp_path: Path, ray_head: str, sweep_config: Path) -> None:
    folder = tmp_path / "killed"
    arguments = [f"--config={sweep_config}", "training.max_steps=100000", "sweep.num_trials=1", "sweep.max_failures=0"]
    launch = SweepLaunch(folder, arguments, {"RAY_ADDRESS": ray_head})
    launch.start()
    launch.wait_for_steps(10)
    (trial,) = processes("ray::ImplicitFunc")
    assert kill(trial)
    assert launch.wait() == 1, "no trial has a result"
    assert "trial 0: failed: " in launch.log
    parent, (run,) = children(folder)
    assert (parent.info.status, run.info.status) == ("FAILED", "FAILED")
    assert [line["state"] for line in table(folder)] == ["failed"]
