"""What a step would take elsewhere: `--dry-run --on` and `--calibrate`."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM, MambaConfig, MixtralConfig

from raytrain2p import train
from raytrain2p.config import InputError, load_settings
from raytrain2p.launch.cost import (
    LATENCY,
    REACHED,
    START,
    Cost,
    Machines,
    Speed,
    Weights,
    check_calibration,
    exchange_seconds,
    parsed_machines,
    speed_on_paper,
    weights_of,
)
from raytrain2p.launch.dry_run import KEPT_BY_MALLOC, memory
from raytrain2p.models.assistant import Assistant, one_record_a_row
from raytrain2p.models.gpus import GPUS
from raytrain2p.models.quantization import BYTES
from raytrain2p.models.tracing import Operation, traced
from raytrain2p.phases.registry import read_inputs
from tests.packages import needs_bitsandbytes

ONE, EIGHT, MANY = (Machines(nodes, gpus, "h100", 3200e9) for nodes, gpus in ((1, 1), (1, 8), (8, 8)))


def operation(flops: int, moved: int) -> Operation:
    return Operation(torch.ops.aten.mm.default, (), None, flops, moved)


def test_a_product_takes_as_long_as_the_slower_of_arithmetic_and_memory() -> None:
    gpu = GPUS["h100"]
    arithmetic, memory = operation(round(gpu.flops), 1), operation(1, round(gpu.bandwidth * 2))
    assert speed_on_paper(Counter({arithmetic: 3, memory: 1}), gpu).of_pass == pytest.approx((3 + 2) / REACHED)
    assert speed_on_paper(Counter({operation(1, 1): 5000}), gpu).of_pass == pytest.approx(5000 * START), "Python starts them one by one"


def test_gradients_go_round_a_ring_and_shards_are_gathered_in_each_pass() -> None:
    weights = Weights(10**9, 6 * 10**6, 0, [10**8] * 9)
    assert exchange_seconds(ONE, 1, weights, 1) == 0
    once = 2 * 7 / 8 * 24e6 / 450e9 + 2 * 3 * LATENCY
    assert exchange_seconds(EIGHT, 1, weights, 4) == pytest.approx(once), "once a step of four passes"
    sharded = 7 / 8 * (4 * (10**9 + 6 * 10**6) + 4 * 6 * 10**6) / 450e9 + 3 * 10 * 3 * LATENCY
    assert exchange_seconds(EIGHT, 8, weights, 2) == pytest.approx(2 * sharded), "in both passes of two"
    between = 2 * 7 / 8 * 24e6 / 8 / (400e9 / 8) + 2 * 3 * LATENCY
    assert exchange_seconds(MANY, 8, weights, 1) == pytest.approx(sharded + between), "shards within a node, gradients between nodes"
    assert exchange_seconds(MANY, 64, weights, 1) == pytest.approx(
        63 / 64 * (4 * (10**9 + 6 * 10**6) + 4 * 6 * 10**6) / 400e9 + 3 * 10 * 6 * LATENCY
    ), "the network of a node is slower than NVLink"
    assert weights.gathered == 2 * 10**8 + 10**8 + 6 * 10**6, "two layers, and what is in none"


@needs_bitsandbytes
def test_weights_in_4_bits_are_counted_and_take_their_bytes(tiny_config: Path, untrained_aligner: Path, tmp_path: Path) -> None:
    given = [f"model.aligner={untrained_aligner}", f"data.feature_store={tmp_path}", "training.precision=float32", "model.tuning=frozen"]
    found = {}
    for form in ("null", "nf4"):
        settings = load_settings(2, str(tiny_config / "phase2.yaml"), [*given, f"model.quantization={form}"])
        inputs = read_inputs(settings, 2)
        found[form] = weights_of(settings, inputs.parts())
    assert found["nf4"] == replace(found["null"], quantized=2 * (4 * 32 * 32 + 3 * 32 * 64) - 2 * 2 * 16 * 32)
    most, least = (memory(settings, inputs, weights)[0] for weights in found.values())
    assert most - least == pytest.approx(KEPT_BY_MALLOC * found["nf4"].quantized * (4 - BYTES))


@pytest.mark.parametrize(("sharded", "least"), [(False, 0.6 + 0.3 + 0.1), (True, 0.6 + 0.1)])
def test_gradients_hide_behind_the_last_pass_and_shards_behind_all(sharded: bool, least: float) -> None:
    cost = Cost(MANY, sharded, 64, Speed(0.2, 1e12, ""), 3, 0.1, 0.5, 64_000, 6e9, 1000)
    assert cost.seconds == pytest.approx((least, 1.2))
    assert cost.mfu == pytest.approx([64_000 * 6e9 / seconds / 64 / 989.4e12 for seconds in (1.2, least)])
    assert f"MFU                0.5% to {cost.mfu[1]:.1%}" in cost.lines(1e9)  # type: ignore[index]


def test_another_gpu_than_that_of_this_machine_is_not_measured() -> None:
    for workers, machines in ((1, EIGHT), (2, None)):
        with pytest.raises(InputError, match="--calibrate with"):
            check_calibration(workers, machines, torch.device("cpu"))
    check_calibration(1, None, torch.device("cpu"))


def test_machines_are_read_and_all_that_is_wrong_is_said_at_once() -> None:
    assert parsed_machines("nodes=8,gpus=4,gpu=H100,network=400") == Machines(8, 4, "h100", 400e9)
    assert parsed_machines("gpu=l4") == Machines(1, 1, "l4", 100e9)
    with pytest.raises(InputError) as refused:
        parsed_machines("nodes=0,gpus=two,gpu=h98,gpu=h99,cards=3,,")
    text = str(refused.value)
    assert "5 problems" in text
    for part in ("nodes=0", "gpus=two", "gpu=h99", "a100, h100", "cards", "--on gpu\n    comes 2 times"):
        assert part in text, part


def test_flops_of_a_token_are_those_of_a_pass(tmp_path: Path) -> None:
    """PaLM's formula against the operations of a pass, all of whose logits are computed."""
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    config, ids = LlamaConfig(vocab_size=128, **size), torch.zeros(3, 40, dtype=torch.int64)
    for trained in (True, False):
        with torch.device("meta"):
            model = LlamaForCausalLM._from_config(config, attn_implementation="eager").requires_grad_(trained)
        model.get_input_embeddings().weight.requires_grad_(True)
        needed = (Assistant(model, {}, 8, {}).flops_per_token(40) or 0) * ids.numel()
        with one_record_a_row():
            counted = traced(model, lambda model=model: model(input_ids=ids, use_cache=False).logits.sum()).operations  # type: ignore[misc]
        assert sum(count * one.flops for one, count in counted.items()) == pytest.approx(needed, rel=0.01)


@pytest.mark.parametrize(
    ("config", "known"),
    [
        (GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2), True),
        (MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2), False),
        (MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1), False),
    ],
)
def test_flops_of_models_of_another_form_are_not_told(config: Any, known: bool) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert (Assistant(model, {}, 8, {}).flops_per_token(40) is not None) == known


def dry_run(tiny_config: Path, aligner: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    code = train.main(["--phase", "2", "--config", str(tiny_config / "phase2.yaml"), f"model.aligner={aligner}", *more])
    said = capsys.readouterr()
    return code, said.err + said.out


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYTRAIN2P_HOME", str(tmp_path))
    return tmp_path


def test_a_step_elsewhere_is_told_and_nothing_is_started(
    home: Path, tiny_config: Path, untrained_aligner: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--dry-run", "--on", "nodes=2,gpus=2,gpu=h100"]
    monkeypatch.setattr("sys.argv", ["raytrain2p", "train", "--phase", "2", *asked])
    code, said = dry_run(tiny_config, untrained_aligner, capsys, *asked, "training.precision=auto")
    assert code == 0, said
    for part in (
        "on                 2 x 2 h100: 4 workers",
        "GB a GPU",
        "NVIDIA's figures",
        "MFU",
        "400 GB/s around",
        "nothing was started",
    ):
        assert part in said, part
    assert said.rstrip().endswith("python -m raytrain2p.train --phase 2 launch.num_workers=4"), "the command that trains there"
    assert not list(home.glob("checkpoints*"))


def test_this_machine_is_measured(
    home: Path, tiny_config: Path, untrained_aligner: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("raytrain2p.launch.cost.CALIBRATION", 600.0)
    monkeypatch.setattr("raytrain2p.models.timing.LEAST", 0.0)
    monkeypatch.setattr("raytrain2p.models.timing.REPEATS", 1)
    code, said = dry_run(tiny_config, untrained_aligner, capsys, "--dry-run", "--calibrate")
    assert code == 0, said
    found = re.search(r"(\d+) of (\d+) operations were measured here, (\d+)% of a pass's bytes", said)
    assert found is not None, said
    assert int(found[3]) > 90
    assert "MFU" not in said, "the peak of this machine is not known"


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--on", "gpu=h100"], "goes with --dry-run alone"),
        (["--calibrate"], "goes with --dry-run alone"),
        (["--dry-run", "--on", "nodes=3,gpus=5,gpu=h100"], "cannot be divided evenly among 15 workers"),
        (["--dry-run", "--on", "nodes=10000,gpus=10000,gpu=h100"], "cannot be divided evenly among 100000000 workers"),
        (["--dry-run", "--on", "gpu=tpu"], "is not in the table"),
        (["--dry-run", "--on", ""], "is not in the table"),
        (["--on", ""], "goes with --dry-run alone"),
        (["--dry-run", "--on", "gpu=h100", "training.precision=float32"], "has rates in bfloat16 alone"),
        (["--dry-run", "--on", "gpu=h100", "--calibrate", "training.precision=auto"], "would measure a CPU"),
    ],
)
def test_what_cannot_be_told_is_refused(
    home: Path, tiny_config: Path, untrained_aligner: Path, capsys: pytest.CaptureFixture[str], more: list[str], why: str
) -> None:
    code, said = dry_run(tiny_config, untrained_aligner, capsys, *more)
    assert (code, why in said) == (2, True), said


def test_phase_1_is_refused(home: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments: list[Any] = ["--phase", "1", "--config", str(tiny_config / "phase1.yaml"), "--dry-run", "--on", "gpu=h100"]
    assert train.main(arguments) == 2
    assert "phase 2" in capsys.readouterr().err
