"""Both phases through Ray and Lightning, with small random models, on the CPU over Gloo."""

import getpass
import json
import shlex
import signal
from pathlib import Path

import mlflow
import pytest
import torch

from raytrain2p.config import InputError
from raytrain2p.inference.predictor import Predictor
from tests.chaos.killing import MOMENTS_DIRECTORY, Launch, only_long, processes
from tests.data.files import write_lines
from tests.launch.launching import Command, Run, Terminal
from tests.packages import BITSANDBYTES, needs_bitsandbytes, without_bitsandbytes


def train(run: Run, config: Path, phase: int, *overrides: str, **environment: str) -> Command:
    file = config / f"phase{phase}.yaml"
    return run("raytrain2p.train", "--phase", str(phase), "--config", str(file), "--json", *overrides, **environment)


@pytest.fixture(scope="module")
def aligned(run: Run, tiny_config: Path) -> Command:
    """A finished phase 1 run."""
    return train(run, tiny_config, 1)


@pytest.fixture(scope="module")
def tuned(run: Run, tiny_config: Path, aligned: Command) -> Command:
    """A finished phase 2 run on the aligner of `aligned`."""
    assert aligned.code == 0, aligned.err
    return train(run, tiny_config, 2)


def test_phase_2_uses_the_aligner_of_phase_1_and_answers_in_a_new_process(
    run: Run, shapes: Path, aligned: Command, tuned: Command, workdir: Path
) -> None:
    first, outcome = aligned.outcome, tuned.outcome
    directory = Path(outcome["directory"])

    assert first["artifact"] in tuned.err, "it prints the aligner that `latest` stands for"
    assert "0 computed" in tuned.err, "the encoder ran in phase 1 and does not run again"
    assert f"\nnext:\n  python -m raytrain2p.train --phase 2 --aligner {first['run_id'][:8]}" in aligned.err
    ask = f"python -m raytrain2p.predict --run {outcome['run_id'][:8]} --image {shapes}/0.png 'Which colour?'"
    assert f"\nnext:\n  {ask}\n" in tuned.err, "a question of its own records, about an item of theirs"
    assert directory.parent == workdir / "checkpoints" / "phase2"
    assert directory.name.startswith(outcome["run_id"] + "_")
    assert {path.name for path in directory.iterdir()} >= {
        "lightning_checkpoints",
        "model.pt",
        "config.json",
        "MLFLOW_RUN_ID.txt",
        "README.md",
        "metrics.jsonl",
        "answers.jsonl",
        "plots",
    }
    assert [path.name.split("=")[0] for path in sorted(directory.glob("lightning_checkpoints/*.ckpt"))] == ["best-epoch", "last.ckpt"]
    assert 0 <= outcome["metrics"]["same/exact_match/colour"] <= 1
    assert outcome["metrics"]["same/majority/colour"] == pytest.approx(8 / 47, abs=0.01)
    assert {"same/exact_match_shuffled/colour", "same/loss/all", "val/loss"} <= set(outcome["metrics"])

    answers = run("raytrain2p.predict", "--file", str(shapes / "phase2.jsonl"), "--json", RAY_ADDRESS="nowhere")
    assert answers.code == 0, answers.err
    assert answers.err.startswith(f"raytrain2p: --run=latest is {outcome['artifact']}\n")
    assert "Loading weights" not in answers.err, "a progress bar of transformers"
    assert len([json.loads(line)["answer"] for line in answers.out.splitlines()]) == 48

    bad = write_lines(workdir / "bad.jsonl", {"instruction": "Which <|im_end|>?"}, {"instruction": "long " * 300})
    refused = run("raytrain2p.predict", "--file", str(bad), RAY_ADDRESS="nowhere")
    assert refused.code == 2
    assert f"{bad}:1\n    a message of the user has `<|im_end|>`" in refused.err
    assert "the language model's context has 256" in refused.err


def test_the_mlflow_run_and_the_directory_belong_together(aligned: Command, workdir: Path) -> None:
    outcome = aligned.outcome
    client = mlflow.MlflowClient(f"sqlite:///{workdir}/mlflow.db")
    recorded = client.get_run(outcome["run_id"])

    assert recorded.info.status == "FINISHED"
    assert recorded.data.tags["raytrain2p.directory"] == outcome["directory"]
    assert recorded.data.params["training.global_batch_size"] == "16"
    assert [point.step for point in client.get_metric_history(outcome["run_id"], "train_loss")] == [1, 2, 3, 4, 5, 6]
    assert {item.path for item in client.list_artifacts(outcome["run_id"])} == {"aligner", "config", "plots"}


def test_mlflow_shows_who_trained_what_on_which_data(aligned: Command, workdir: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{workdir}/mlflow.db")
    recorded = client.get_run(aligned.outcome["run_id"])
    tags, inputs = recorded.data.tags, recorded.inputs.dataset_inputs

    assert client.get_experiment(recorded.info.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"
    assert (tags["mlflow.user"], tags["mlflow.source.name"]) == (getpass.getuser(), "raytrain2p.train")
    assert "python -m raytrain2p.train --phase 1" in tags["mlflow.note.content"]
    assert tags["version.torch"] == torch.__version__
    assert [one.tags[0].value for one in sorted(inputs, key=lambda one: one.dataset.name)] == ["test", "train", "val"]
    assert {json.loads(one.dataset.profile)["num_rows"] for one in inputs} == {48}, "each split has the same file"
    (output,) = recorded.outputs.model_outputs
    assert client.get_logged_model(output.model_id).status == "READY"


def test_a_checkpoint_holds_what_trains_and_loads_without_pickle(tuned: Command) -> None:
    state = torch.load(tuned.outcome["last"], weights_only=True)["state_dict"]
    assert state
    assert all("lora_" in name or "projector" in name for name in state)


@pytest.mark.parametrize(
    ("phase", "strategy"), [(1, "ddp"), (2, "fsdp"), pytest.param(1, "fsdp", marks=only_long), pytest.param(2, "ddp", marks=only_long)]
)
def test_two_workers_with_the_same_settings_have_the_losses_of_one(
    run: Run, tiny_config: Path, aligned: Command, tuned: Command, phase: int, strategy: str
) -> None:
    alone = {1: aligned, 2: tuned}[phase]
    together = train(run, tiny_config, phase, "launch.num_workers=2", f"launch.strategy={strategy}")
    assert together.losses == pytest.approx(alone.losses, abs=1e-4)
    assert alone.losses[-1] < alone.losses[0]
    for name, value in alone.outcome["metrics"].items():
        if "exact" not in name and "recall" not in name:  # these jump where two scores are nearly equal
            assert together.outcome["metrics"][name] == pytest.approx(value, abs=1e-3), name


@needs_bitsandbytes
def test_two_workers_train_a_language_model_in_4_bits_and_it_answers(
    run: Run, tiny_config: Path, tuned: Command, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"PYTHONPATH": str(BITSANDBYTES), "RAY_ADDRESS": "local"}
    small = train(run, tiny_config, 2, "launch.num_workers=2", "model.quantization=nf4", **there)
    assert "gemm_4bit" not in small.err, "bitsandbytes warns of what it lacks"
    assert small.losses != tuned.losses
    assert small.losses == pytest.approx(tuned.losses, rel=0.05)
    state = torch.load(small.outcome["last"], weights_only=True)["state_dict"]
    assert state.keys() == torch.load(tuned.outcome["last"], weights_only=True)["state_dict"].keys()
    artifact = small.outcome["artifact"]
    assert Predictor(artifact)(f"{shapes}/0.png", "Which colour?")
    without_bitsandbytes(monkeypatch)
    with pytest.raises(InputError, match=rf"{artifact}: model.quantization=nf4\n    needs the package bitsandbytes"):
        Predictor(artifact)


@only_long
def test_encoding_in_the_step_gives_the_losses_of_stored_features(run: Run, tiny_config: Path, aligned: Command) -> None:
    online = train(run, tiny_config, 1, "data.features=online")
    assert online.losses == pytest.approx(aligned.losses, abs=1e-4)


@only_long
def test_accumulating_gradients_gives_the_losses_of_one_large_pass(run: Run, tiny_config: Path, tuned: Command) -> None:
    parts = train(run, tiny_config, 2, "training.micro_batch_size=2")
    assert parts.losses == pytest.approx(tuned.losses, abs=1e-4)


@only_long
def test_a_run_on_its_own_cluster_is_not_ended_by_another_cluster_on_the_machine(run: Run, tiny_config: Path, ray_head: str) -> None:
    """Ray Train would look for its controller in the cluster that was started last on this machine."""
    config = str(tiny_config / "phase1.yaml")
    alone = run("raytrain2p.train", "--phase", "1", "--config", config, "training.max_steps=400", RAY_ADDRESS="local")
    assert alone.code == 0, alone.err


@only_long
def test_ctrl_c_and_a_closed_terminal_end_the_run_as_killed_with_the_command_that_resumes_it(
    tiny_config: Path, workdir: Path, ray_head: str
) -> None:
    arguments = ["--phase=1", f"--config={tiny_config}/phase1.yaml", "training.max_steps=100000"]
    launch = Launch(workdir / "stopped", arguments, {"RAY_ADDRESS": ray_head})
    launch.start()
    launch.wait_for_steps(1)
    assert launch.process is not None
    launch.process.send_signal(signal.SIGINT)
    assert launch.wait() == 128 + signal.SIGINT, launch.log
    (run,) = launch.mlflow_runs()
    assert run.info.status == "KILLED"
    (directory,) = launch.directories()
    *_, line = launch.log.splitlines()
    assert "stopping after this step, with a checkpoint (again: at once)" in launch.log
    what, _, command = line.partition("; resume it with: python -m ")
    assert what == f"raytrain2p: stopped by SIGINT; run {run.info.run_id} is in {directory}"
    stopped_at = checkpoint_step(directory)

    terminal = Terminal(launch.folder / "terminal")
    launch.process = terminal.start(launch.folder, *shlex.split(command), **launch.variables | {"RAY_ADDRESS": "local"})
    launch.wait_for_steps(stopped_at + 1)
    terminal.close()
    assert launch.wait() == 128 + signal.SIGHUP, (launch.folder / "terminal").read_text()
    (run,) = launch.mlflow_runs()
    assert run.info.status == "KILLED"
    assert checkpoint_step(directory) == len(launch.steps()) > stopped_at
    assert not processes("ray::RayTrainWorker")


def checkpoint_step(directory: Path) -> int:
    return int(torch.load(directory / "lightning_checkpoints" / "last.ckpt", weights_only=True)["global_step"])


def test_a_loss_that_is_not_finite_ends_the_run_as_failed_with_one_line_and_without_restarts(
    tiny_config: Path, workdir: Path, ray_head: str, shapes: Path
) -> None:
    arguments = ["--phase=1", f"--config={tiny_config}/phase1.yaml", "training.max_steps=100000", "training.learning_rate=1e30"]
    launch = Launch(workdir / "diverges", [*arguments, "launch.num_workers=2", "launch.max_failures=3"], {"RAY_ADDRESS": ray_head})
    launch.start()
    assert launch.wait() == 1, launch.log
    *_, what, why, where = launch.log.splitlines()
    assert what == "raytrain2p: training failed"
    assert where.endswith(f"see it with: python -m raytrain2p.runs show {launch.mlflow_runs()[0].info.run_id[:8]}")
    assert f"since step 2: loss nan, gradient norm nan, records {shapes}/phase1.jsonl:" in why
    assert launch.log.count("parameters that train") == 1, "it was started again"
    (run,) = launch.mlflow_runs()
    assert run.info.status == "FAILED"
    (directory,) = launch.directories()
    assert json.loads((directory / "status.json").read_text())["reason"] == why
    assert not list(directory.glob("*.pt")) + list(directory.glob("*/*.ckpt")), "written before the weights were checked"


@only_long
def test_a_failing_worker_ends_the_run_as_failed_with_exit_code_1(run: Run, tiny_config: Path, aligned: Command, workdir: Path) -> None:
    fails = {"RAYTRAIN2P_CHAOS_FAILS": "raytrain2p.tracking.checkpoints:write_checkpoint", "PYTHONPATH": str(MOMENTS_DIRECTORY)}
    overrides = ["launch.max_failures=0", "--launch-id", "fails"]
    failed = train(run, tiny_config, 2, *overrides, RAY_ADDRESS="local", **fails)
    assert failed.code == 1, failed.err
    assert "training failed" in failed.err
    assert "broken for a test" in failed.err, "the worker's own error"
    assert "once the cause is gone, resume it with: python -m raytrain2p.train --phase 2 --resume " in failed.err.splitlines()[-1]
    client = mlflow.MlflowClient(f"sqlite:///{workdir}/mlflow.db")
    experiment = client.get_experiment_by_name("phase2_training_with_pretrained_aligner")
    (recorded,) = client.search_runs([experiment.experiment_id], "tags.`raytrain2p.launch_id` = 'fails'")
    assert recorded.info.status == "FAILED"


@only_long  # in process: tests/phases/test_init.py
def test_a_warm_start_begins_where_the_trained_run_ended(run: Run, tiny_config: Path, tuned: Command) -> None:
    """With a learning rate that changes nothing, its first validation loss is the last one of the run whose weights it took."""
    still = (f"model.init={tuned.outcome['run_id'][:8]}", "training.max_steps=1", "training.learning_rate=1e-30", "data.test={}")
    warm = train(run, tiny_config, 2, *still)
    assert warm.code == 0, warm.err
    assert f"model.init: {tuned.outcome['artifact']}" in warm.err
    assert warm.outcome["metrics"]["val/loss"] == pytest.approx(tuned.outcome["metrics"]["val/loss"], rel=1e-6)
    config = json.loads(Path(warm.outcome["directory"], "config.json").read_text())
    assert (config["launch"]["use_gpu"], config["launch"]["max_failures"]) == (False, 3), "what auto and null stood for on this cluster"
    assert (config["model"]["init"], config["model"]["aligner"]) == (tuned.outcome["artifact"], None)
