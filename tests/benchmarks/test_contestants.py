"""The contestants of the benchmarks train the same: a small random model, in this process."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.case import TOTAL_STEPS, WARM_UP, Case, prepare, rate_factor, write_aligner
from benchmarks.clock import PROFILED
from benchmarks.contestants import parsed, run
from benchmarks.plain_model import load_adapters
from benchmarks.step import MOST_NOISE, TOLERANCE, agreement, difference, noise
from benchmarks.turns import written_steps

STEPS = 4


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_vit: Path) -> Iterator[Case]:
    """Twelve records with an image each, in float32."""
    folder = tmp_path_factory.mktemp("case")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("RAYTRAIN2P_FEATURES", str(folder / "features"))
    random = np.random.default_rng(0)
    rows = []
    for number in range(12):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
        rows.append({"instruction": "what?" * (1 + number % 2), "response": f"number {number}", "image": f"{number}.png"})
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = Case(
        str(folder / "shared"), str(tiny_llama), str(tiny_vit), str(folder / "records.jsonl"), batch=4, steps=STEPS, precision="float32"
    )
    write_aligner(shared)
    prepare(shared)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is small, and another test process has the other core
    yield shared
    torch.set_num_threads(threads)
    monkeypatch.undo()


def losses(name: str, case: Case, out: Path, *more: str) -> dict[int, float]:
    options = parsed([name, case.folder, str(out / name), "--steps", str(STEPS), *more])
    run(name, case, options)
    return {number: step.loss for number, step in written_steps(options.out, 1).items()}


@pytest.fixture(scope="module")
def made(case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[int, float]]]:
    """The folder and the losses of each contestant that needs nothing else."""
    out = tmp_path_factory.mktemp("made")
    return out, {name: losses(name, case, out, "--profile") for name in ("module_loop", "plain_loop", "lightning", "hf_float32")}


def test_the_contestants_have_our_losses_in_every_step(made: tuple[Path, dict[str, dict[int, float]]], case: Case, tmp_path: Path) -> None:
    _, found = made
    ours = found["module_loop"]
    assert len(ours) == STEPS
    assert ours[1] != ours[2]
    for name, theirs in found.items():
        assert theirs.keys() == ours.keys(), name
        assert difference(ours, theirs) < (TOLERANCE if name == "hf_float32" else 1e-5), name
    for more in ("--halves", "--peft"):
        assert difference(ours, losses("module_loop", case, tmp_path / more, more)) < 1e-5, more
    bf16 = ["--precision", "bf16"]
    rounded, twice = (losses("module_loop", case, tmp_path / str(len(more)), *bf16, *more) for more in ([], ["--peft"]))
    assert rounded != twice, "with peft's layers"


def test_so_they_have_with_adapters_in_attention_alone(case: Case, tmp_path: Path) -> None:
    case = case.with_aligner(folder=str(tmp_path / "case"), targets="attention")
    prepare(case)
    assert difference(losses("module_loop", case, tmp_path), losses("plain_loop", case, tmp_path)) < 1e-5


def test_what_a_step_does_is_counted_and_our_module_computes_fewer_logits(
    made: tuple[Path, dict[str, dict[int, float]]], case: Case
) -> None:
    counts = {name: json.loads((made[0] / name / "counts").read_text()) for name in ("module_loop", "hf_float32")}
    for name, of in counts.items():
        assert 0 < of["matrix products"] < of["operations"], name
        assert of["copies"] < of["operations"], name
    batch = torch.load(case.path / "batches0.pt", weights_only=False)[PROFILED - 1]
    assert counts["module_loop"]["output layer rows"] == batch["step_tokens"]
    assert counts["hf_float32"]["output layer rows"] == batch["tokens"]["input_ids"].numel()
    assert counts["hf_float32"]["encoder calls"] == 1
    assert "encoder calls" not in counts["module_loop"]


def test_a_contestant_with_other_losses_is_void_and_so_is_the_program() -> None:
    right = {1: 3.0, 2: 2.9}
    summed = {1: 3.003, 2: 2.897}
    references = {"float32": right, "bf16": right, "bf16, summed": right, "peft": right, "peft, summed": summed, "peft, rounded": right}
    same = {"raytrain2p": right, "plain_loop": {1: 3.002, 2: 2.9, 3: 1.0}, "hf_float32": {1: 3.0001, 2: 2.9001}}
    assert all(agreement(name, same, references)[0] for name in same), "steps after those of the reference are not compared"
    other = {"raytrain2p": {1: 6.0, 2: 6.0}, "plain_loop": {1: 3.1, 2: 2.9}, "hf_float32": {1: 3.0, 2: 2.8}}
    assert not any(agreement(name, other, references)[0] for name in other)
    assert not agreement("plain_loop", {"plain_loop": {}}, references)[0]
    assert agreement("plain_loop", same, references | {"peft, summed": right})[0], "no noise at all leaves that of rounding"
    assert noise("plain_loop", references | {"peft, summed": {1: 9.0, 2: 9.0}}) == MOST_NOISE
    far = references | {"peft, rounded": {1: 3.006, 2: 2.897}}
    assert noise("hf_bf16", far) > noise("plain_loop", far) == noise("hf_bf16", references), "for those that encode in bf16 alone"
    lower = references | {"peft": {1: 3.3, 2: 3.2}, "peft, summed": {1: 3.3, 2: 3.2}}
    assert agreement("raytrain2p", same, lower)[0]
    assert not agreement("plain_loop", same, lower)[0], "peft's layers are compared with peft's layers"


def test_initial_weights_of_another_model_are_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=r"has 0 adapters, the model 0|differing"):
        load_adapters(torch.nn.ModuleDict({"lora_A": torch.nn.Linear(1, 1)}), {})


def test_the_schedule_is_the_programs(case: Case) -> None:
    from raytrain2p.phases.instruction import module as instruction

    module = instruction.build(case.settings(), TOTAL_STEPS, "float32")
    (schedule,) = (module.configure_optimizers()["lr_scheduler"]["scheduler"],)
    for step in (0, 1, WARM_UP - 1, WARM_UP, WARM_UP + 1, TOTAL_STEPS // 2, TOTAL_STEPS):
        assert schedule.lr_lambdas[0](step) == pytest.approx(rate_factor(step))


def test_a_killed_loop_continues_from_its_checkpoint(case: Case, tmp_path: Path) -> None:
    whole = losses("plain_loop", case, tmp_path / "whole")
    for steps in (2, 2):
        options = parsed(["plain_loop", case.folder, str(tmp_path / "two"), "--steps", str(steps), "--save-every", "2"])
        run("plain_loop", case, options)
    assert difference(whole, {number: step.loss for number, step in written_steps(tmp_path / "two", 1).items()}) < 1e-6
