"""Resuming a run: after a kill, after a request to stop, with other settings, or after its end."""

import json
import shutil
import signal
import time
from pathlib import Path

import mlflow
import pytest
import torch

from tests.chaos.killing import Launch, kill_driver, last, losses, only_long
from tests.launch.launching import Command, ray_job, run_command

pytestmark = only_long  # tests/phases/test_base.py resumes from every step, in seconds
STEPS = 60


def phase2_in(folder: Path, tiny_config: Path, ray_head: str, *more: str, workers: int = 1) -> Launch:
    """60 steps of phase 2 with gradient accumulation and dropout, which a resume must restore."""
    arguments = [
        "--phase=2",
        f"--config={tiny_config}/phase2.yaml",
        f"training.max_steps={STEPS}",
        "training.global_batch_size=8",
        f"training.micro_batch_size={4 // workers}",  # two passes a step
        "training.log_every=3",
        "checkpoint.every_steps=4",
        "checkpoint.monitor=val/loss",
        "model.lora.dropout=0.2",
        "model.soft_token_dropout=0.3",
        f"launch.num_workers={workers}",
        *more,
    ]
    return Launch(folder, arguments, {"RAY_ADDRESS": ray_head})


@pytest.fixture(scope="module")
def undisturbed(workdir: Path, tiny_config: Path, ray_head: str, untrained_aligner: Path) -> Launch:
    launch = phase2_in(workdir / "undisturbed", tiny_config, ray_head, f"model.aligner={untrained_aligner}")
    launch.start()
    assert launch.wait() == 0, launch.log
    return launch


def status(launch: Launch) -> str:
    """The status of the launch's one run in MLflow."""
    (run,) = launch.mlflow_runs()
    return str(run.info.status)


def assert_equal(launch: Launch, other: Launch) -> None:
    assert sorted(launch.steps()) == list(range(1, STEPS + 1))
    assert losses(launch) == losses(other)
    mine, theirs = last(launch), last(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def resume(launch: Launch, *arguments: str) -> Command:
    """`--resume latest` in the launch's directory."""
    command = ["raytrain2p.train", "--phase=2", "--resume", "latest", "--json", *arguments]
    return run_command(launch.folder, *command, **launch.variables)


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_a_request_to_stop_keeps_a_checkpoint_and_a_resume_equals_the_undisturbed_run(
    strategy: str, workdir: Path, tiny_config: Path, ray_head: str, untrained_aligner: Path, undisturbed: Launch
) -> None:
    more = (f"model.aligner={untrained_aligner}", f"launch.strategy={'fsdp' if strategy == 'fsdp' else 'ddp'}")
    launch = phase2_in(workdir / f"stopped_{strategy}", tiny_config, ray_head, *more, workers=1 if strategy == "single" else 2)
    if strategy != "single":  # dropout differs between workers: two of them have other losses
        undisturbed = phase2_in(workdir / f"undisturbed_{strategy}", tiny_config, ray_head, *more, workers=2)
        undisturbed.start()
        assert undisturbed.wait() == 0, undisturbed.log
    launch.start()
    launch.wait_for_steps(8)
    assert launch.process is not None
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() == 128 + signal.SIGTERM, launch.log
    assert "stopping after this step" in launch.log
    assert status(launch) == "KILLED"
    (directory,) = launch.directories()
    stopped_at = torch.load(directory / "lightning_checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert stopped_at == max(launch.steps()), "the steps since the last checkpoint were lost"
    assert 8 <= stopped_at < STEPS

    done = resume(launch)
    assert done.code == 0, done.err
    assert f"at step {stopped_at}" in done.err
    assert status(launch) == "FINISHED"
    assert_equal(launch, undisturbed)
    assert len(launch.directories()) == 1


def test_workers_stop_on_request_where_every_step_ends_an_epoch(
    workdir: Path, tiny_config: Path, ray_head: str, untrained_aligner: Path
) -> None:
    more = (
        f"model.aligner={untrained_aligner}",
        "training.global_batch_size=48",
        "training.micro_batch_size=12",
        "training.max_steps=5000",
    )
    launch = phase2_in(workdir / "short_epochs", tiny_config, ray_head, *more, workers=2)
    launch.start()
    launch.wait_for_steps(8)
    assert launch.process is not None
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() == 128 + signal.SIGTERM, launch.log
    assert status(launch) == "KILLED"
    (directory,) = launch.directories()
    stopped_at = torch.load(directory / "lightning_checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert stopped_at == max(launch.steps()), "the steps since the last checkpoint were lost"


def test_a_job_that_is_stopped_keeps_a_checkpoint_and_its_run_is_killed(
    workdir: Path, tiny_config: Path, ray_head: str, untrained_aligner: Path
) -> None:
    folder = workdir / "stopped_job"
    launch = phase2_in(folder, tiny_config, ray_head, f"model.aligner={untrained_aligner}", "training.max_steps=5000")
    where = f"output.root={folder}/checkpoints tracking.uri=sqlite:///{folder}/mlflow.db"
    command = f"python -m raytrain2p.train {' '.join(launch.arguments)} {where}"
    assert ray_job(f"submit --no-wait --submission-id to-be-stopped --working-dir . -- {command}").returncode == 0
    deadline = time.monotonic() + 120
    while len(launch.steps()) < 8:
        assert time.monotonic() < deadline, ray_job("logs to-be-stopped").stdout[-3000:]
        time.sleep(0.1)
    assert ray_job("stop to-be-stopped").returncode == 0
    while "stopped" not in ray_job("status to-be-stopped").stdout.lower():
        assert time.monotonic() < deadline + 90
        time.sleep(0.5)
    assert status(launch) == "KILLED"
    (directory,) = launch.directories()
    stopped_at = torch.load(directory / "lightning_checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert stopped_at == max(launch.steps()), "the steps since the last checkpoint were lost"


def test_a_launch_that_is_under_way_is_not_started_twice(workdir: Path, tiny_config: Path, ray_head: str, untrained_aligner: Path) -> None:
    launch = phase2_in(workdir / "twice", tiny_config, ray_head, f"model.aligner={untrained_aligner}", "training.max_steps=2000")
    launch.start()
    launch.wait_for_steps(4)
    second = Launch(launch.folder, launch.arguments, launch.environment, starts=1)
    second.start()
    assert second.wait() == 2, second.log
    assert "--launch-id chaos" in second.log
    assert "is under way: pid" in second.log
    kill_driver(launch)
    launch.wait()


def test_a_finished_run_is_not_trained_again_unless_it_is_given_more_steps(undisturbed: Launch) -> None:
    before = undisturbed.steps()
    done = resume(undisturbed)
    assert done.code == 0, done.err
    assert "is finished already" in done.err
    assert json.loads(done.out.splitlines()[-1])["directory"] == str(undisturbed.directories()[0])
    assert undisturbed.steps() == before
    assert len(undisturbed.directories()) == 1


def test_settings_that_cannot_change_are_refused_together_with_both_values(undisturbed: Launch) -> None:
    changes = ("model.soft_tokens=2", "training.global_batch_size=16", "training.learning_rate=1e-4", "seed=7", "launch.strategy=fsdp")
    done = resume(undisturbed, *changes)
    assert done.code == 2
    for line in (
        "model.soft_tokens=2",
        "began with 4",
        "training.global_batch_size=16",
        "began with 8",
        "training.learning_rate=0.0001",
        "seed=7",
        "launch.strategy=fsdp",
    ):
        assert line in done.err, done.err


def test_settings_that_may_change_are_printed_and_recorded(undisturbed: Launch, workdir: Path) -> None:
    done = resume(undisturbed, f"training.max_steps={STEPS + 4}", "training.log_every=2")
    assert done.code == 0, done.err
    assert f"changed since the run began: training.max_steps: {STEPS} -> {STEPS + 4}" in done.err
    (directory,) = undisturbed.directories()
    assert json.loads((directory / "changes.jsonl").read_text())["changes"]["training.max_steps"] == [STEPS, STEPS + 4]
    assert sorted(undisturbed.steps()) == list(range(1, STEPS + 5))
    client = mlflow.MlflowClient(f"sqlite:///{undisturbed.folder}/mlflow.db")
    tags = client.get_run(directory.name[:32]).data.tags
    assert tags["raytrain2p.changed.training.max_steps"] == str(STEPS + 4)
    assert f"training.max_steps={STEPS}" in tags["raytrain2p.command"], "the first command"
    assert "--resume latest" in tags["raytrain2p.resumed"]
    page = (directory / "README.md").read_text()
    assert (
        page.index(tags["raytrain2p.command"])
        < page.index("--resume latest")
        < page.index(f"`training.max_steps`: `{STEPS}` -> `{STEPS + 4}`")
    )
    earlier = directory / "earlier" / f"step_{STEPS}"
    assert {path.name for path in earlier.iterdir()} == {"answers.jsonl", "answers.png", "test_metrics.json", "result.json"}
    assert {json.loads(line)["step"] for line in (directory / "answers.jsonl").read_text().splitlines()} == {STEPS + 4}
    assert {json.loads(line)["step"] for line in (earlier / "answers.jsonl").read_text().splitlines()} == {STEPS}


def test_changed_inputs_are_refused_unless_they_are_accepted_and_then_recorded(
    workdir: Path, shapes: Path, tiny_config: Path, ray_head: str, untrained_aligner: Path
) -> None:
    records = workdir / "records"
    shutil.copytree(shapes, records)
    more = (f"model.aligner={untrained_aligner}", f"data.train={records}/phase2.jsonl", "data.test={}", "training.max_steps=6")
    launch = phase2_in(workdir / "changed", tiny_config, ray_head, *more)
    launch.start()
    assert launch.wait() == 0, launch.log
    lines = (records / "phase2.jsonl").read_text().splitlines()
    (records / "phase2.jsonl").write_text("\n".join([*lines, lines[0], lines[1]]) + "\n")
    longer = "training.max_steps=12"
    refused = resume(launch, longer)
    assert refused.code == 2
    assert "has 50 records; run" in refused.err
    assert len(launch.steps()) == 6
    accepted = resume(launch, longer, "--accept-changed-inputs")
    assert accepted.code == 0, accepted.err
    assert "data.train: other content (records), accepted" in accepted.err
    assert sorted(launch.steps()) == list(range(1, 13))
    (run,) = launch.mlflow_runs()
    assert "data.train (records)" in run.data.tags["raytrain2p.accepted_inputs"]
    (directory,) = launch.directories()
    assert "other content accepted: `data.train`" in (directory / "README.md").read_text()

    artifact = directory / "model.pt"
    content = bytearray(artifact.read_bytes())
    content[len(content) // 2] ^= 1
    artifact.write_bytes(content)
    asked = run_command(launch.folder, "raytrain2p.predict", "Say yes.")
    assert asked.code == 2
    assert f"{artifact}\n    is damaged" in asked.err


def test_a_run_that_does_not_exist_is_bad_input(undisturbed: Launch) -> None:
    done = run_command(undisturbed.folder, "raytrain2p.train", "--phase=2", "--resume", "ffff", **undisturbed.environment)
    assert done.code == 2
    assert "--resume ffff" in done.err
    assert "there is no such run" in done.err


def test_reconcile_marks_a_run_whose_driver_was_killed_as_failed(
    workdir: Path, tiny_config: Path, ray_head: str, untrained_aligner: Path
) -> None:
    launch = phase2_in(workdir / "dead", tiny_config, ray_head, f"model.aligner={untrained_aligner}", "training.max_steps=4000")
    launch.start()
    launch.wait_for_steps(4)
    reconciled = run_command(launch.folder, "raytrain2p.runs", "reconcile")
    assert "under way" in reconciled.out
    kill_driver(launch)
    launch.wait()
    time.sleep(5)  # until Ray has ended the dead driver's workers
    assert status(launch) == "RUNNING"
    reconciled = run_command(launch.folder, "raytrain2p.runs", "reconcile")
    assert reconciled.code == 0, reconciled.err
    assert "orphaned, no process works on it: FAILED" in reconciled.out
    assert status(launch) == "FAILED"
    assert len(launch.directories()) == 1
