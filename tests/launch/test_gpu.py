"""Both phases on a GPU, through Ray: encoding, training, resuming, prediction. `make test-gpu` runs the tests that need one.

All launches begin together, each in a Ray of its own: they are small, and a GPU is costly to wait for. RAYTRAIN2P_GPU_TESTS=cpu
runs the same on CPUs, to try the tests themselves.
"""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pynvml
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from raytrain2p.config.phases import INSTRUCTION
from raytrain2p.inference.predictor import Predictor
from raytrain2p.models.artifacts import load_artifact
from raytrain2p.models.distributed import GatherWithGradient, NumberOfFirst, WorkerGroup
from tests.chaos.killing import Launch, kill_rank_zero, last, losses
from tests.launch.launching import run_command, start_command
from tests.packages import BITSANDBYTES, needs_bitsandbytes
from tests.serving.serving import Server, image_url, with_image

ON_CPU = os.environ.get("RAYTRAIN2P_GPU_TESTS") == "cpu"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available() and not ON_CPU, reason="needs a CUDA GPU")
gpu_alone = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
USE_GPU = "launch.use_gpu=" + str(not ON_CPU).lower()
AUTO = "launch.use_gpu=auto"
HALF = "launch.gpus_per_worker=0.5"
STEPS = 300


BF16, FLOAT32, CPU = "training.precision=auto", "training.precision=float32", "launch.use_gpu=false"
WITHOUT_DROPOUT = ("model.lora.dropout=0.0", "model.soft_token_dropout=0.0")  # of one seed, a GPU draws other masks than a CPU
LAUNCHES = {  # phase and settings, by name
    "undisturbed": (2, AUTO, BF16, "tracking.system_metrics=true"),
    "killed": (2, USE_GPU, BF16),
    "stopped": (2, USE_GPU, BF16),
    "from_gpu": (2, USE_GPU, FLOAT32, *WITHOUT_DROPOUT),
    "from_cpu": (2, CPU, FLOAT32, *WITHOUT_DROPOUT),
    "online": (2, USE_GPU, BF16, "data.features=online"),
    "quantized": (2, USE_GPU, BF16, "model.quantization=nf4"),
    "phase_1": (1, USE_GPU, FLOAT32, HALF, "data.feature_workers=2"),
    "phase_1_cpu": (1, CPU, FLOAT32),
    "phase_1_online": (1, USE_GPU, FLOAT32, "data.features=online"),
}
PHASE_2 = (  # several passes a step, dropout, several checkpoints: what a resume must restore
    f"training.max_steps={STEPS}",
    "training.global_batch_size=8",
    "training.micro_batch_size=4",
    "training.log_every=3",
    "checkpoint.every_steps=20",
    "model.lora.dropout=0.2",
    "model.soft_token_dropout=0.3",
    "launch.max_failures=3",
    "data.val=null",
)


def terminate(launch: Launch) -> None:
    assert launch.process is not None
    launch.process.send_signal(signal.SIGTERM)


def kill_worker(launch: Launch) -> None:
    assert kill_rank_zero(launch)


INTERRUPTED = {"killed": kill_worker, "stopped": terminate, "from_gpu": terminate, "from_cpu": terminate}  # after 30 steps
RESUMED = {"stopped": (), "from_gpu": (CPU,), "from_cpu": (USE_GPU,)}  # with these settings


class Launches:
    """The launches of this file, each started when it is first asked for. They share their features: the first one encodes."""

    def __init__(self, folder: Path, tiny_config: Path, aligner: Path) -> None:
        self.folder, self.config, self.aligner = folder, tiny_config, aligner
        self.started: dict[str, Launch] = {}
        self.interrupted: set[str] = set()
        self.resumed: dict[str, int] = {}  # and the step from which

    def __getitem__(self, name: str) -> Launch:
        if name not in self.started:
            phase, *settings = LAUNCHES[name]
            arguments = [f"--phase={phase}", f"--config={self.config}/phase{phase}.yaml"]
            arguments += [f"model.aligner={self.aligner}", *PHASE_2] if phase == 2 else []
            arguments += map(str, settings)
            path = {"PYTHONPATH": str(BITSANDBYTES)} if name == "quantized" else {}
            self.started[name] = Launch(self.folder / name, arguments, {"RAY_ADDRESS": "local"} | path)
            self.started[name].start()
        return self.started[name]

    def interrupt(self, *names: str) -> None:
        """Interrupt these launches in the middle, unless they were before."""
        deadline = time.monotonic() + 150
        while waiting := [name for name in names if name not in self.interrupted]:
            for name in waiting:
                assert self[name].running(), self[name].log[-4000:]
                assert time.monotonic() < deadline, self[name].log[-4000:]
                if len(self[name].steps()) >= 30:
                    INTERRUPTED[name](self[name])
                    self.interrupted.add(name)
            time.sleep(0.02)

    def resume(self, *names: str) -> None:
        """Resume these launches, which were stopped, unless they were before."""
        self.interrupt(*names)
        for name in names:
            if name not in self.resumed:
                launch = self[name]
                assert launch.wait() == 128 + signal.SIGTERM, launch.log[-4000:]
                checkpoint = launch.directories()[0] / "lightning_checkpoints" / "last.ckpt"
                self.resumed[name] = int(torch.load(checkpoint, weights_only=True)["global_step"])
                launch.arguments = [*launch.arguments, *RESUMED[name]]  # the same launch ID: it resumes
                launch.start()

    def finished(self, name: str) -> Launch:
        if name in RESUMED:
            self.resume(name)
        elif name in INTERRUPTED:
            self.interrupt(name)
        assert self[name].wait() == 0, self[name].log[-4000:]
        return self[name]


@pytest.fixture(scope="module")
def launches(workdir: Path, tiny_config: Path, untrained_aligner: Path) -> Iterator[Launches]:
    made = Launches(workdir, tiny_config, untrained_aligner)
    if not ON_CPU:
        for name in LAUNCHES:
            made[name]
        made.interrupt(*INTERRUPTED)
        made.resume(*RESUMED)
    yield made
    for launch in made.started.values():
        if launch.process is not None and launch.running():
            launch.process.kill()
            launch.process.wait()


@pytest.fixture(autouse=True)
def end_background_commands() -> None:
    """Instead of the fixture that ends them after each test: these belong to the module."""


def processes_on_gpu() -> set[int]:
    """Those with a CUDA context."""
    pynvml.nvmlInit()
    try:
        return {one.pid for one in pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))}
    finally:
        pynvml.nvmlShutdown()


def distance(launch: Launch, other: Launch) -> float:
    """The largest difference of the losses at a step."""
    mine, theirs = losses(launch), losses(other)
    assert sorted(mine) == sorted(theirs) == list(range(1, STEPS + 1))
    return max(abs(mine[step] - theirs[step]) for step in mine)


def test_a_killed_worker_is_replaced_and_the_run_is_the_undisturbed_one(launches: Launches) -> None:
    killed, undisturbed = launches.finished("killed"), launches.finished("undisturbed")
    assert "resuming phase2 run" in killed.log
    assert distance(killed, undisturbed) == 0
    assert all(torch.equal(value, last(undisturbed)[name]) for name, value in last(killed).items())


def test_a_stopped_run_resumes_as_the_undisturbed_one(launches: Launches) -> None:
    stopped = launches.finished("stopped")
    assert 30 <= launches.resumed["stopped"] < STEPS
    assert f"at step {launches.resumed['stopped']}" in stopped.log
    assert distance(stopped, launches.finished("undisturbed")) == 0


def test_it_trains_in_bf16_on_the_gpu_and_its_checkpoint_and_artifact_load_without_one(launches: Launches) -> None:
    launch = launches.finished("undisturbed")
    (directory,) = launch.directories()
    config = json.loads((directory / "config.json").read_text())
    assert config["training"]["precision"] == "bf16" or ON_CPU
    values = list(losses(launch).values())
    assert sum(values[-20:]) < sum(values[:20])
    tensors = [*last(launch).values(), *load_artifact(directory / "model.pt", INSTRUCTION)["state_dict"].values()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    names = {point["name"] for point in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())}
    measured = {name.rpartition("/gpu_")[2].partition("_")[2] for name in names if "/gpu_" in name}  # gpu_0_..., gpu_GPU-4a5b..._...
    assert ON_CPU or {"memory_percent", "utilization_percent"} <= measured


def test_auto_takes_the_gpu_and_half_of_it_is_enough(launches: Launches) -> None:
    assert ON_CPU or " CPU and a GPU each (launch.use_gpu=auto: the cluster has 1 GPU)" in launches.finished("undisturbed").log
    assert ON_CPU or " CPU and 0.5 of a GPU each" in launches.finished("phase_1").log


def test_a_trained_assistant_answers_on_the_gpu_by_each_command(launches: Launches, shapes: Path, tmp_path: Path) -> None:
    """The GPU may round to another answer than the CPU where two tokens are as likely; asked alike, it gives the same ones."""
    (directory,) = launches.finished("undisturbed").directories()
    records = str(shapes / "phase2.jsonl")

    def predict(*more: str, **variables: str) -> list[str]:
        command = ["raytrain2p.predict", "--run", str(directory), "--file", records, "--json", *more]
        answers = run_command(tmp_path, *command, **variables)
        assert answers.code == 0, answers.err
        return [json.loads(line)["answer"] for line in answers.out.splitlines()]

    with ThreadPoolExecutor() as pool:
        here = pool.submit(predict, RAY_ADDRESS="nowhere")
        without = pool.submit(predict, RAY_ADDRESS="nowhere", CUDA_VISIBLE_DEVICES="")
        on_worker = pool.submit(predict, "--workers", "1", RAY_ADDRESS="local")
        alone, on_cpu = here.result(), without.result()
        assert on_worker.result() == alone
    assert len(alone) == 48
    assert sum(mine != theirs for mine, theirs in zip(alone, on_cpu, strict=True)) <= 5

    log, rows = tmp_path / "serve.log", map(json.loads, Path(records).read_text().splitlines())
    questions = [(row, answer) for row, answer in zip(rows, alone, strict=True) if "image" in row][:6]
    serving = start_command(tmp_path, log, "raytrain2p.serve", str(directory), "--port", "0", "--max-tokens", "32", RAY_ADDRESS="local")
    try:
        while (address := re.search(r"at http://127\.0\.0\.1:(\d+)", log.read_text())) is None:
            assert serving.poll() is None, log.read_text()
            time.sleep(0.1)
        server = Server(int(address[1]))
        for row, answer in questions:
            image_first = with_image(row["instruction"], image_url((shapes / row["image"]).read_bytes()))[::-1]
            assert server.ask(image_first).text == answer
        assert ON_CPU or processes_on_gpu() & {child.pid for child in psutil.Process(serving.pid).children(recursive=True)}
    finally:
        serving.send_signal(signal.SIGTERM)
    assert serving.wait(60) == 0, log.read_text()


def test_two_trials_of_a_sweep_share_the_gpu(sweep_config: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(sweep_config), "--json", AUTO, HALF, "sweep.num_trials=2"]
    arguments += ["training.max_steps=2000", "checkpoint.every_steps=200"]  # longer than one may begin after the other
    swept = run_command(tmp_path, "raytrain2p.tune", *arguments, RAY_ADDRESS="local")
    assert swept.code == 0, swept.err
    assert "2 trials at once" in swept.err
    runs = tmp_path.glob("checkpoints/alignment/*/metrics.jsonl")
    first, second = ([json.loads(line)["time"] for line in path.read_text().splitlines()] for path in runs)
    assert max(min(first), min(second)) < min(max(first), max(second)), "side by side"


def test_a_run_moves_from_the_gpu_to_the_cpu_and_back(launches: Launches) -> None:
    from_gpu, from_cpu = launches.finished("from_gpu"), launches.finished("from_cpu")
    assert all(30 <= launches.resumed[name] < STEPS for name in ("from_gpu", "from_cpu"))
    assert distance(from_gpu, from_cpu) < 0.05


def test_encoding_in_the_step_trains_as_on_stored_features(launches: Launches) -> None:
    """A GPU rounds features of a batch of another size differently; in bf16 the losses part after some steps."""
    stored, online = (list(losses(launches.finished(name)).values())[:10] for name in ("undisturbed", "online"))
    assert online == pytest.approx(stored, abs=5e-3)
    stored, online = (list(losses(launches.finished(name)).values()) for name in ("phase_1", "phase_1_online"))
    assert online == pytest.approx(stored, abs=1e-3)


@needs_bitsandbytes
def test_a_language_model_in_4_bits_trains_and_answers_on_the_gpu(launches: Launches, shapes: Path) -> None:
    quantized, undisturbed = (list(losses(launches.finished(name)).values()) for name in ("quantized", "undisturbed"))
    assert quantized != undisturbed
    assert quantized[:20] == pytest.approx(undisturbed[:20], rel=0.1)
    assert sum(quantized[-20:]) < sum(quantized[:20])
    (directory,) = launches["quantized"].directories()
    found = {device: Predictor(directory / "model.pt", device=device) for device in ("cpu", "cpu" if ON_CPU else "cuda")}
    answers = [predictor([f"{shapes}/{number}.png" for number in range(12)], "Which colour?") for predictor in found.values()]
    assert sum(left != right for left, right in zip(answers[0], answers[-1], strict=True)) <= 2


def test_the_gpu_and_the_cpu_train_the_same_aligner(launches: Launches) -> None:
    gpu, cpu = (list(losses(launches.finished(name)).values()) for name in ("phase_1", "phase_1_cpu"))
    assert gpu == pytest.approx(cpu, abs=1e-4)


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[torch.device]:
    """A process group of this process alone, over NCCL."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    torch.cuda.set_device(0)
    yield torch.device("cuda", 0)
    dist.destroy_process_group()


@gpu_alone
def test_collectives_work_over_nccl(nccl: torch.device) -> None:
    """With the size of a larger group, so that none takes the short way of a single worker."""
    group = WorkerGroup(0, 2)
    assert group.from_first(lambda: {"run": "a"}) == {"run": "a"}
    number = NumberOfFirst(group)
    assert [number.exchange(2), number.exchange(0)] == [0, 2]
    assert group.mean(torch.full((3,), 4.0, device=nccl)).tolist() == [2.0] * 3
    rows = torch.ones(2, 3, device=nccl, requires_grad=True)
    GatherWithGradient.apply(rows).sum().backward()
    assert rows.grad is not None
    assert rows.grad.tolist() == [[1.0] * 3] * 2


@gpu_alone
@pytest.mark.parametrize("shard", [False, True])
def test_ddp_and_fsdp_step_over_nccl(nccl: torch.device, shard: bool) -> None:
    module: nn.Module = nn.Linear(4, 4).to(nccl)
    if shard:
        fully_shard(module, mesh=init_device_mesh("cuda", (1,)))
    else:
        module = nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    before = module(torch.ones(2, 4, device=nccl)).square().sum()
    before.backward()
    optimizer.step()
    assert float(module(torch.ones(2, 4, device=nccl)).square().sum().detach()) < float(before.detach())
