"""Checks of the models that phase 2 puts together: aligner, encoders, language model."""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raytrain2p.config import Findings, InputError, InstructionSettings, Problem
from raytrain2p.config.phases import ALIGNMENT
from raytrain2p.data.chat import ChatFormat, load_chat_format
from raytrain2p.data.media import TEXT
from raytrain2p.data.records import ASSISTANT, USER, Message
from raytrain2p.models.aligner import Aligner
from raytrain2p.models.artifacts import check_fingerprint, check_weights, load_artifact
from raytrain2p.models.encoders import ENCODERS, EncoderSpec
from raytrain2p.models.pretrained import context_length


def encoder_specs(settings: InstructionSettings) -> dict[str, EncoderSpec]:
    """The encoders of the aligner's media, by modality. A name in `model.encoders` says where the same model is now.

    Raises:
        InputError: the aligner is not readable.
    """
    path = Path(settings.model.aligner)
    if not path.is_file():
        return {}  # reported where the setting was resolved to a path
    elsewhere = settings.model.encoders.by_modality()
    return {
        modality: EncoderSpec(modality, elsewhere[modality].name if modality in elsewhere else trained["name"], trained["options"])
        for modality, trained in load_artifact(path, ALIGNMENT)["encoders"].items()
        if modality != TEXT
    }


def check_aligner(settings: InstructionSettings) -> None:
    """The aligner must have all weights of its branches.

    Raises:
        InputError: it has not, or is not readable.
    """
    path = Path(settings.model.aligner)
    if not path.is_file():
        return  # reported where the setting was resolved to a path
    artifact = load_artifact(path, ALIGNMENT)
    try:
        with torch.device("meta"):
            aligner = Aligner(**artifact["shape"])
    except TypeError as error:
        raise InputError(Problem(str(path), f"lacks parts of an {ALIGNMENT.artifact}: {error}", "train it anew")) from None
    check_weights(path, artifact["state_dict"], aligner.state_dict())


def check_encoders(settings: InstructionSettings) -> None:
    """Encoders that are set must be those that the aligner was trained with.

    Raises:
        InputError: they are not; both sides are named.
    """
    path, findings = Path(settings.model.aligner), Findings()
    if not path.is_file():
        return  # reported where the setting was resolved to a path
    trained = load_artifact(path, ALIGNMENT)["encoders"]
    for modality, encoder in settings.model.encoders.by_modality().items():
        setting = f"model.encoders.{modality}"
        if modality not in trained:
            findings.add(Problem(f"{setting}={encoder.name}", f"{path} aligns {', '.join(trained)}", f"train an aligner with {setting}"))
            continue
        spec = EncoderSpec(modality, encoder.name, trained[modality]["options"])
        with findings:
            check_fingerprint(path, trained[modality], encoder.name, spec.directory(), setting)
        for option, value in encoder.options().items():
            if value != trained[modality]["options"].get(option):
                used = trained[modality]["options"].get(option)
                what = f"{path} was trained with {'the default of the encoder' if used is None else used}"
                findings.add(Problem(f"{setting}.{option}={value}", what, f"leave out {setting}.{option}, or train another aligner"))
    findings.raise_any()


def check_soft_tokens(settings: InstructionSettings, modalities: Iterable[str]) -> None:
    """Soft tokens may be set for the aligner's modalities alone.

    Raises:
        InputError: they are set for others.
    """
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
    path = Path(settings.model.aligner)
    trained = load_artifact(path, ALIGNMENT)["encoders"][spec.modality]
    check_fingerprint(path, trained, spec.name, spec.directory(), f"model.encoders.{spec.modality}")
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
        soft_tokens = {modality: model.soft_tokens_of(modality) for modality in modalities}
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
    if not chat.stop_ids:
        raise InputError(Problem(f"model.language_model={model.language_model}", "its tokenizer has no end token", "take another model"))
    return chat


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
