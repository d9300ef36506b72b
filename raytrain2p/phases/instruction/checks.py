"""Checks of the models that phase 2 puts together: aligner, encoders, language model."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raytrain2p.config import Findings, InputError, InstructionSettings, Problem
from raytrain2p.config.phases import ALIGNMENT
from raytrain2p.config.settings import LoraSettings
from raytrain2p.data.chat import ChatFormat, load_chat_format
from raytrain2p.data.media import TEXT
from raytrain2p.data.records import ASSISTANT, USER, Message
from raytrain2p.models.aligner import Aligner
from raytrain2p.models.artifacts import check_fingerprint, check_weights
from raytrain2p.models.assistant import one_record_a_row
from raytrain2p.models.encoders import ENCODERS, EncoderSpec
from raytrain2p.models.pretrained import context_length, first_line, load_pretrained
from raytrain2p.models.quantization import package_problem, quantizable, quantize
from raytrain2p.models.tracing import without_numbers
from raytrain2p.phases.init import facts_of
from raytrain2p.phases.instruction.aligner import found_aligner, required_aligner


def encoder_specs(settings: InstructionSettings) -> dict[str, EncoderSpec]:
    """The encoders of the aligner's media, by modality. A name in `model.encoders` says where the same model is now.

    Raises:
        InputError: the aligner is not readable.
    """
    if (aligner := found_aligner(settings)) is None:
        return {}
    elsewhere = settings.model.encoders.by_modality()
    return {
        modality: EncoderSpec(modality, elsewhere[modality].name if modality in elsewhere else trained["name"], trained["options"])
        for modality, trained in aligner.encoders.items()
        if modality != TEXT
    }


def check_aligner(settings: InstructionSettings) -> None:
    """The aligner.pt must have all weights of its branches; `check_init` looks at a model.pt.

    Raises:
        InputError: it has not, or is not readable.
    """
    named = settings.model.aligner
    if named is None or (artifact := facts_of(Path(named), ALIGNMENT)) is None:
        return
    try:
        with torch.device("meta"):
            aligner = Aligner(**artifact["shape"])
    except TypeError as error:
        raise InputError(Problem(named, f"lacks parts of an {ALIGNMENT.artifact}: {error}", "train it anew")) from None
    check_weights(Path(named), artifact["state_dict"], aligner.state_dict())


def check_soft_tokens(settings: InstructionSettings, modalities: Iterable[str]) -> None:
    """Soft tokens may be set for the aligner's modalities alone, and recalled ones if it keeps more texts than are recalled.

    Raises:
        InputError: they are set for others; it keeps too few.
    """
    aligner, model = found_aligner(settings), settings.model
    if aligner is not None and model.recall_tokens and aligner.texts <= model.recall_texts:
        what = f"{aligner.path} keeps {aligner.texts or 'no'} texts, required are {model.recall_texts + 1} or more"
        fix = f"set model.recall_tokens=0, or {aligner.otherwise or 'train another aligner'}"
        raise InputError(Problem(f"model.recall_tokens={model.recall_tokens}", what, fix))
    known, numbers = tuple(modalities), settings.model.soft_tokens
    for modality in numbers if isinstance(numbers, dict) else ():
        if modality not in known:
            what = f"the aligner has no such modality of media, it has {', '.join(known) or 'none'}"
            raise InputError(Problem(f"model.soft_tokens.{modality}", what, "leave it out, or train another aligner"))


def check_encoder(settings: InstructionSettings, spec: EncoderSpec) -> None:
    """An encoder that is used must be the one that the aligner was trained with, and have enough positions for the soft tokens.

    Raises:
        InputError: it does not.
    """
    aligner = required_aligner(settings)
    setting, trained = f"model.encoders.{spec.modality}", aligner.encoders[spec.modality]
    check_fingerprint(aligner.path, trained, spec.name, spec.directory(), setting, aligner.otherwise)
    tokens, positions = settings.model.soft_tokens_of(spec.modality), spec.probe()
    if ENCODERS[spec.modality].square and tokens > positions:
        what = f"{spec.name} gives a grid of {positions} positions"
        raise InputError(Problem(f"model.soft_tokens={tokens}", what, f"set model.soft_tokens to {positions} or less"))


def checked_language_model(settings: InstructionSettings, directory: Path, modalities: Iterable[str]) -> ChatFormat:
    """The chat format of a directory that holds a causal language model with a usable tokenizer and template.

    Raises:
        InputError: it does not.
    """
    model = settings.model
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        soft_tokens = {modality: model.tokens_of(modality) for modality in modalities}
        chat = load_chat_format(directory, soft_tokens, model.system_prompt, settings.data.loss_on)
        chat.encode([Message(USER, ("Is this a question?",)), Message(ASSISTANT, ("This is an answer.",))])
    except Exception as error:  # a foreign model's own code and template: it may raise anything
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            Problem(
                f"model.language_model={model.language_model}",
                f"is not a usable causal language model: {type(error).__name__}: {reason}",
                "take another model; if its template refuses system messages, set model.system_prompt=null",
            )
        ) from None
    return chat


def check_base_model(settings: InstructionSettings, directory: Path) -> None:
    """The language model must have all its weights, and take its adapters and its attention kernel.

    Only the heads of the weights' files are read.

    Raises:
        InputError: it does not.
    """
    model, findings = settings.model, Findings()
    if model.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        what = "the package flash-attn is not installed"
        findings.add(Problem("model.attention=flash_attention_2", what, "install it, or set model.attention=auto"))
    if (problem := attention_problem(settings)) is not None:
        findings.add(problem)
    with findings:
        where = f"model.language_model={model.language_model}"
        empty, missing = load_pretrained(AutoModelForCausalLM, directory, where, device_map="meta")
        if missing:
            what = f"lacks {len(missing):,} of its weights, such as {missing[0]}"
            raise InputError(Problem(where, what, "download it again, or take another model"))
        if model.tuning == "lora":
            with findings:
                check_adapters(model.lora, empty)
        if model.quantization is not None:
            check_quantization(f"model.quantization={model.quantization}", empty)
    findings.raise_any()


def attention_problem(settings: InstructionSettings) -> Problem | None:
    """An attention kernel that needs GPUs, where none is used; `launch.use_gpu=auto` may still become true."""
    if settings.model.attention != "flash_attention_2" or settings.launch.use_gpu is not False:
        return None
    return Problem("model.attention=flash_attention_2", "needs GPUs, and launch.use_gpu is false", "set model.attention=auto")


def check_quantization(where: str, empty: Any) -> None:
    """The package must be there, and most weights of the layers in linear modules, with which the language model makes products and nothing
    else. A mixture's experts are in none, and nor is what GPT-2 has in their place; Mamba reads weights itself.

    Args:
        empty: the language model, without memory for its weights. It is used up.

    Raises:
        InputError: they are not.
    """
    fix = "take another language model, or set model.quantization=null"
    if (problem := package_problem(where)) is not None:
        raise InputError(problem)
    if getattr(empty.config, "quantization_config", None) is not None:
        raise InputError(Problem(where, "the language model is quantized already", fix))
    layers = max((module for module in empty.modules() if isinstance(module, torch.nn.ModuleList)), key=len, default=torch.nn.ModuleList())
    every = sum(weight.numel() for name, weight in layers.named_parameters() if "lora_" not in name)
    for name, weight in empty.named_parameters():
        weight.requires_grad_("lora_" in name)
    linear = sum(layer.weight.numel() for _, _, layer in quantizable(empty))
    if 2 * linear < every:
        what = f"takes linear modules, which have {linear:,} of the {every:,} weights in the layers of this language model"
        raise InputError(Problem(where, what, fix))
    quantize(empty, torch.device("meta"), empty.dtype)
    try:
        with without_numbers(empty), torch.no_grad(), one_record_a_row():
            empty(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    except Exception as error:  # of a foreign model's own code
        what = f"the language model does more with its linear modules than call them: {first_line(error)}"
        raise InputError(Problem(where, what, fix)) from None


def check_adapters(lora: LoraSettings, empty: Any) -> None:
    """Adapters must have modules that peft takes for this language model, which is without memory for its weights.

    Raises:
        InputError: a target is not there, or peft refuses it.
    """
    targets = lora.target_modules
    where, names = f"model.lora.target_modules={targets}", [name for name, _ in empty.named_modules()]
    linear = {name.rpartition(".")[2] for name, module in empty.named_modules() if isinstance(module, torch.nn.Linear)}
    fix = f"linear modules of this language model: {', '.join(sorted(linear)) or 'none'}"
    absent = [one for one in targets if not any(f".{name}".endswith(f".{one}") for name in names)] if isinstance(targets, list) else []
    if absent or not targets:
        what = f"no module is named {', '.join(absent)}" if absent else "names no module"
        raise InputError(Problem(where, what, fix))
    from raytrain2p.models.lora import with_adapters  # imports peft

    try:
        with torch.device("meta"):
            with_adapters(empty, lora.model_dump())
    except Exception as error:  # peft raises many kinds
        raise InputError(Problem(where, f"peft refuses it: {first_line(error)}", fix)) from None


def longest_record(directory: Path, wanted: int | None) -> int:
    """Longest record in tokens: the language model's context, or less if so set.

    Raises:
        InputError: more was set than the model has.
    """
    context = context_length(directory)
    if wanted is not None and wanted > context:
        raise InputError(
            Problem(f"model.max_length={wanted}", f"the language model's context has {context} tokens", f"set {context} or less")
        )
    return wanted or context
