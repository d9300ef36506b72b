"""A warm start: the weights of an aligner.pt or a model.pt are those of the new module, bit for bit; what they do not fit is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain2p.config import InputError, Settings
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION
from raytrain2p.config.settings import SETTINGS_OF_PHASE
from raytrain2p.data.features import Features
from raytrain2p.models.aligner import Aligner
from raytrain2p.models.artifacts import load_artifact, save_artifact
from raytrain2p.models.pretrained import fingerprint
from raytrain2p.phases.init import init_content, load_init
from raytrain2p.phases.registry import check_init, phase_functions
from tests.inference.trained import known

WIDTH, RECORDS = 32, 6
RECALL = {"recall_tokens": 1, "soft_tokens": 2}
Module = Any


@pytest.fixture
def folder(tmp_path: Path, tiny_vit: Path) -> Path:
    """With an aligner.pt for tiny_vit."""
    aligner = Aligner({"image": WIDTH, "text": 8}, hidden=16, dimension=12)
    encoders = {"image": {"name": str(tiny_vit), "options": {}, "fingerprint": fingerprint(tiny_vit)}}
    save_artifact(tmp_path / "aligner.pt", ALIGNMENT, {}, encoders, shape=aligner.shape, state_dict=aligner.state_dict(), known=known(12))
    return tmp_path


@pytest.fixture
def models(folder: Path, tiny_vit: Path, tiny_bert: Path, tiny_llama: Path) -> dict[int, dict[str, Any]]:
    """The `model` settings of each phase."""
    encoders = {"image": str(tiny_vit), "text": str(tiny_bert)}
    return {
        1: {"encoders": encoders, "hidden": 16, "dimension": 12},
        2: {"language_model": str(tiny_llama), "aligner": str(folder / "aligner.pt"), "soft_tokens": 4, "lora": {"rank": 4}},
    }


def settings_of(phase: int, model: Mapping[str, Any], **training: Any) -> Settings:
    content = {"data": {"train": "x.jsonl"}, "training": {"max_steps": 1, "precision": "float32"} | training, "model": model}
    return SETTINGS_OF_PHASE[phase].model_validate(content)


def build(settings: Settings) -> Module:
    return phase_functions(settings.phase.number).build(settings, 1, "float32").eval()


def trained(settings: Settings, path: Path) -> Module:
    """A module with other weights than it is built with, exported to a file."""
    module = build(settings)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    phase_functions(settings.phase.number).export(module, path, settings.model_dump(mode="json"), None)
    return module


def warm(settings: Settings) -> Module:
    """A module as a worker makes it, at the beginning of a run."""
    module = build(settings)
    artifact = load_init(settings, init_content(settings))
    assert artifact is not None
    phase_functions(settings.phase.number).warm_start(module, artifact)
    return module


def loss(module: Module, settings: Settings) -> float:
    """On records that are always the same."""
    random = torch.Generator().manual_seed(5)
    images = Features(torch.randn(RECORDS, 16, WIDTH, generator=random))
    with torch.inference_mode():
        if settings.phase == ALIGNMENT:
            every = torch.ones(RECORDS, dtype=torch.bool)
            items = {"image": images, "text": Features(torch.randn(RECORDS, 1, WIDTH, generator=random))}
            return float(module({"items": items, "present": dict.fromkeys(items, every), "keys": torch.arange(RECORDS)}, alone=True))
        ids = torch.randint(3, 200, (RECORDS, 12), generator=random)
        places = torch.arange(ids.numel()).view_as(ids)
        learnt = places[:, 5:].flatten()
        soft = {"image": places[:, 1:5].flatten()}
        tokens = {"input_ids": ids, "soft": soft, "supervised": learnt - 1, "targets": ids.view(-1)[learnt]}
        return float(module({"items": {"image": images}, "tokens": tokens}))


@pytest.mark.parametrize(
    ("phase", "more"), [(1, {}), (1, {"loss": "sigmoid"}), *((2, {"tuning": one}) for one in ("lora", "full", "frozen")), (2, RECALL)]
)
def test_a_run_begins_with_the_weights_and_the_loss_of_the_trained_one(
    models: dict[int, dict[str, Any]], folder: Path, phase: int, more: dict[str, Any]
) -> None:
    path, model = folder / "trained.pt", models[phase] | more | ({"train_aligner": True} if phase == 2 else {})
    before = settings_of(phase, model)
    first = trained(before, path)
    (folder / "aligner.pt").unlink()  # phase 2 needs none
    own = settings_of(phase, {**model, **({"aligner": None} if phase == 2 else {}), "init": str(path)}, learning_rate=1e-5)
    assert check_init(own) == []
    torch.manual_seed(77)
    module = warm(own)
    assert module.state_dict().keys() == first.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    assert loss(module, own) == loss(first, before)
    torch.manual_seed(77)
    assert loss(build(own), own) != loss(first, before), "what is built alone is untrained"


def test_what_does_not_train_comes_from_the_file_on_a_resume_too(models: dict[int, dict[str, Any]], folder: Path) -> None:
    first = trained(settings_of(2, models[2] | RECALL | {"train_aligner": True}), folder / "trained.pt")
    (folder / "aligner.pt").unlink()
    module = build(
        settings_of(2, models[2] | RECALL | {"aligner": None, "init": str(folder / "trained.pt")})
    )  # the checkpoint has the rest
    kept = [name for name in first.state_dict() if name.startswith(("assistant.branches.", "assistant.recall."))]
    assert "assistant.recall.keys" in kept
    for name in kept:
        assert torch.equal(module.state_dict()[name], first.state_dict()[name]), name
    again = folder / "again.pt"
    phase_functions(2).export(module, again, {}, None)
    artifacts = [load_artifact(path, INSTRUCTION) for path in (folder / "trained.pt", again)]
    assert artifacts[0]["encoders"] == artifacts[1]["encoders"]
    assert artifacts[0]["shape"] == artifacts[1]["shape"]


def test_a_modality_that_only_the_new_run_has_begins_untrained(models: dict[int, dict[str, Any]], folder: Path, tiny_vit: Path) -> None:
    path = folder / "trained.pt"
    first = trained(settings_of(1, models[1]), path)
    model = models[1] | {"init": str(path), "encoders": {"image": str(tiny_vit), "audio": str(tiny_vit), "text": None}, "loss": "sigmoid"}
    own = settings_of(1, model)
    lacks = "the branch of audio, the scale of the sigmoid loss"
    assert check_init(own) == [f"model.init={path} lacks {lacks}, which begins untrained"]
    torch.manual_seed(77)
    module = warm(own)
    torch.manual_seed(77)
    untrained = build(own)
    state, parts = module.state_dict(), {"image": first, "audio": untrained, "loss": untrained}
    for name, value in state.items():
        source = next(part for key, part in parts.items() if key in name.split("."))
        assert torch.equal(value, source.state_dict()[name]), name
    assert {name.split(".")[2] for name in state if "branches" in name} == {"image", "audio"}


def test_an_aligner_of_an_earlier_version_is_taken_without_the_scale_of_its_loss(models: dict[int, dict[str, Any]], folder: Path) -> None:
    path = folder / "trained.pt"
    trained(settings_of(1, models[1]), path)
    older = {
        key: value for key, value in load_artifact(path, ALIGNMENT).items() if key not in ("loss", "digest", "format_version", "phase")
    }
    save_artifact(path, ALIGNMENT, **older)
    own = settings_of(1, models[1] | {"init": str(path)})
    assert check_init(own) == [f"model.init={path} lacks the scale of the softmax loss, which begins untrained"]
    assert torch.equal(warm(own).loss.log_scale, build(own).loss.log_scale)


def problems(settings: Settings) -> list[tuple[str, str, str]]:
    with pytest.raises(InputError) as caught:
        check_init(settings)
    return [(problem.where, problem.what, problem.fix) for problem in caught.value.problems]


def test_an_aligner_of_other_encoders_and_widths_is_refused_with_both_sides_named(
    models: dict[int, dict[str, Any]], folder: Path, tiny_vit: Path, tiny_bert: Path
) -> None:
    path = folder / "trained.pt"
    trained(settings_of(1, models[1]), path)
    encoders = {"image": {"name": str(tiny_vit), "size": 16}, "text": str(tiny_vit)}
    found = problems(settings_of(1, {"encoders": encoders, "hidden": 8, "dimension": 4, "init": str(path)}))
    assert [where for where, _, _ in found] == [
        "model.encoders.image.size=16",
        f"model.encoders.text={tiny_vit}",
        "model.hidden=8",
        "model.dimension=4",
    ]
    assert f"was trained with {tiny_bert}" in found[1][1]
    assert found[1][2] == f"set model.encoders.text={tiny_bert}, or leave out model.init"
    assert found[2][1:] == (f"model.init={path} was trained with model.hidden=16", "set model.hidden=16, or leave out model.init")
    alone = {"encoders": {"image": None, "text": None, "audio": str(tiny_vit)}, "init": str(path)}
    ((where, what, _),) = problems(settings_of(1, models[1] | alone))
    assert (where, what) == (f"model.init={path}", "has the branches of image, text, and model.encoders has audio")


def test_a_model_of_other_settings_is_refused_with_both_sides_named(
    models: dict[int, dict[str, Any]], folder: Path, tiny_bert: Path
) -> None:
    path = folder / "trained.pt"
    trained(settings_of(2, models[2]), path)
    lora = {"rank": 8, "alpha": 8, "target_modules": ["q_proj"], "dropout": 0.5}
    other = models[2] | {"init": str(path), "language_model": str(tiny_bert), "soft_tokens": {"image": 5}, "lora": lora}
    found = problems(settings_of(2, other))
    assert [where for where, _, _ in found] == [
        f"model.language_model={tiny_bert}",
        "model.soft_tokens.image=5",
        "model.lora.rank=8",
        "model.lora.alpha=8",
        "model.lora.target_modules=['q_proj']",
    ]
    assert found[1][1:] == (f"model.init={path} was trained with model.soft_tokens.image=4", found[1][2])
    assert all(fix.endswith("or leave out model.init") for _, _, fix in found)
    ((where, what, _),) = problems(settings_of(2, models[2] | {"init": str(path), "recall_tokens": 3}))
    assert (where, what) == ("model.recall_tokens=3", f"model.init={path} was trained with model.recall_tokens=0")
    recalling = folder / "recalling.pt"
    trained(settings_of(2, models[2] | RECALL), recalling)
    ((where, what, _),) = problems(settings_of(2, models[2] | RECALL | {"init": str(recalling), "recall_texts": 1}))
    assert (where, what) == ("model.recall_texts=1", f"model.init={recalling} was trained with model.recall_texts=2")
    ((where, what, fix),) = problems(settings_of(2, models[2] | {"init": str(path), "quantization": "nf4"}))
    assert (where, what) == ("model.quantization=nf4", f"model.init={path} was trained with model.quantization=null")
    assert fix.startswith("set model.quantization=null, or")
    ((where, what, _),) = problems(settings_of(2, models[2] | {"init": str(path), "tuning": "full"}))
    assert (where, what) == ("model.tuning=full", f"model.init={path} was trained with model.tuning=lora")


@pytest.mark.parametrize(("tuning", "begins"), [("lora", "the adapters begin untrained"), ("full", "the language model begins as it was")])
def test_a_language_model_that_was_frozen_may_be_tuned_now(
    models: dict[int, dict[str, Any]], folder: Path, tuning: str, begins: str
) -> None:
    path = folder / "trained.pt"
    first = trained(settings_of(2, models[2] | {"tuning": "frozen"}), path)
    own = settings_of(2, models[2] | {"tuning": tuning, "init": str(path)})
    (line,) = check_init(own)
    assert line.startswith(f"model.init={path} was trained with model.tuning=frozen: {begins}")
    assert loss(warm(own), own) == pytest.approx(loss(first, own), abs=1e-6), "adapters begin without an effect"


def test_an_aligner_beside_a_model_must_be_the_one_in_it(models: dict[int, dict[str, Any]], folder: Path) -> None:
    path, aligner = folder / "trained.pt", folder / "aligner.pt"
    trained(settings_of(2, models[2]), path)
    assert check_init(settings_of(2, models[2] | {"init": str(path)})) == []
    trained(settings_of(2, models[2] | {"train_aligner": True}), path)
    ((where, what, fix),) = problems(settings_of(2, models[2] | {"init": str(path)}))
    assert where == f"model.aligner={aligner}"
    assert f"is another aligner than the one in model.init={path}" in what
    assert fix == "leave out model.aligner, or leave out model.init"


@pytest.mark.parametrize("phase", [1, 2])
def test_weights_that_are_missing_or_not_finite_are_refused_by_name(models: dict[int, dict[str, Any]], folder: Path, phase: int) -> None:
    path = folder / "trained.pt"
    trained(settings_of(phase, models[phase]), path)
    own = settings_of(phase, models[phase] | {"init": str(path)})
    kind = ALIGNMENT if phase == 1 else INSTRUCTION
    content = {key: value for key, value in load_artifact(path, kind).items() if key not in ("digest", "phase", "format_version")}
    name = "branches.image.query.weight" if phase == 1 else next(name for name in content["state_dict"] if "lora_B" in name)
    weights = content["state_dict"] | {name: content["state_dict"][name].clone().index_fill_(0, torch.tensor([0]), torch.nan)}
    save_artifact(path, kind, **content | {"state_dict": weights})
    assert [problem[:2] for problem in problems(own)] == [(str(path), f"has weights that are not finite: {name}")]
    del weights[name]
    save_artifact(path, kind, **content | {"state_dict": weights})
    assert problems(own)[0][1] == f"lacks weights: {name}"


def test_a_file_that_was_replaced_since_the_launch_was_checked_is_refused(models: dict[int, dict[str, Any]], folder: Path) -> None:
    path = folder / "trained.pt"
    trained(settings_of(1, models[1]), path)
    own = settings_of(1, models[1] | {"init": str(path)})
    recorded = init_content(own)
    trained(settings_of(1, models[1]), path)
    with pytest.raises(InputError, match=r"model.init=.*\n.*was replaced since this launch was checked"):
        load_init(own, recorded)
