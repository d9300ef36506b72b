"""Checks of a warm start of phase 2: whether the weights of a model.pt are of the model that the settings describe."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from raytrain2p.config import Findings, InputError, InstructionSettings, Problem
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION
from raytrain2p.config.settings import ALIGNER, INIT
from raytrain2p.models.artifacts import check_fingerprint, check_weights
from raytrain2p.models.assistant import AssistantShape, build_assistant
from raytrain2p.models.pretrained import model_directory
from raytrain2p.phases.init import WITHOUT, differs, facts_of, init_facts
from raytrain2p.phases.instruction.aligner import branches_of

LORA_SHAPE = ("rank", "alpha", "target_modules")  # what the adapters' weights mean depends on these; dropout is free
FROZEN, LORA = "frozen", "lora"


def check_init(settings: InstructionSettings) -> list[str]:
    """The model.pt of `model.init` must be of these settings' model. Its aligner's encoders are checked as those of an aligner.pt are.

    Returns:
        Lines about what begins untrained.

    Raises:
        InputError: every setting that differs and must not; or weights are missing, or not finite.
    """
    if (artifact := init_facts(settings)) is None:
        return []
    model, path, findings = settings.model, Path(str(settings.model.init)), Findings()
    try:
        trained, needed = AssistantShape(**artifact["shape"]), artifact["language_model"]
        needed = {key: needed[key] for key in ("name", "fingerprint")}
    except (KeyError, TypeError) as error:
        raise InputError(Problem(str(path), f"lacks parts of a {INSTRUCTION.artifact}: {error}", "choose another run")) from None
    with findings:
        directory = model_directory(model.language_model, "model.language_model")
        check_fingerprint(path, needed, model.language_model, directory, "model.language_model", WITHOUT)
    findings.extend(_differences(settings, trained))
    with findings:
        _check_aligner_is_the_same(settings, path, artifact)
    findings.raise_any()
    with torch.device("meta"):
        assistant = build_assistant(replace(trained, language_model=model.language_model), "eager", torch.float32, empty=True)
    assistant.freeze(trained.tuning, train_aligner=False)
    check_weights(path, artifact["state_dict"], assistant.own_weights())
    begins = {LORA: "the adapters begin untrained", "full": "the language model begins as it was pretrained"}.get(model.tuning)
    return [f"{INIT}={path} was trained with model.tuning={FROZEN}: {begins}"] if trained.tuning == FROZEN and begins else []


def _differences(settings: InstructionSettings, trained: AssistantShape) -> Iterator[Problem]:
    """Settings that must be equal to those that the weights were trained with."""
    model = settings.model
    _, tokens, texts = trained.recall or (0, 0, model.recall_texts)
    if model.recall_tokens != tokens:
        yield differs("model.recall_tokens", model.recall_tokens, model.init, tokens)
    if model.recall_texts != texts:
        yield differs("model.recall_texts", model.recall_texts, model.init, texts)
    for modality, count in ((modality, count - tokens * texts) for modality, count in trained.soft_tokens.items()):
        if (here := model.soft_tokens_of(modality)) != count:
            setting = "model.soft_tokens" + f".{modality}" * isinstance(model.soft_tokens, dict)
            yield differs(setting, here, model.init, count)
    if model.projector != trained.projector:
        yield differs("model.projector", model.projector, model.init, trained.projector)
    if model.quantization != trained.quantization:
        yield differs("model.quantization", model.quantization or "null", model.init, trained.quantization or "null")
    if model.tuning != trained.tuning and trained.tuning != FROZEN:
        yield differs("model.tuning", model.tuning, model.init, trained.tuning)
    elif model.tuning == trained.tuning == LORA:
        now = model.lora.model_dump()
        for name in LORA_SHAPE:
            if _unordered(now[name]) != _unordered(trained.lora.get(name)):
                yield differs(f"model.lora.{name}", now[name], model.init, trained.lora.get(name))


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def _check_aligner_is_the_same(settings: InstructionSettings, path: Path, artifact: Mapping[str, Any]) -> None:
    """An aligner that is set as well must be the one in the model.pt.

    Raises:
        InputError: it is another one.
    """
    named = settings.model.aligner
    if named is None or (given := facts_of(Path(named), ALIGNMENT)) is None:
        return
    of_init, of_given = branches_of(artifact), branches_of(given)
    if any(name not in of_given or not torch.equal(value, of_given[name]) for name, value in of_init.items()):
        what = f"is another aligner than the one in {INIT}={path}"
        raise InputError(Problem(f"{ALIGNER}={named}", what, f"leave out {ALIGNER}, or {WITHOUT}"))
