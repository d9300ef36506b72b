"""A phase 2 run as a directory of Hugging Face's form: weights in safetensors, tokenizer, template, preprocessing, model card."""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.constants import REPOCARD_NAME
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, GenerationConfig
from transformers.utils import CONFIG_NAME

from raytrain2p.config import InputError, Problem
from raytrain2p.data.chat import ChatFormat
from raytrain2p.inference.chat_template import chat_template, with_placeholders
from raytrain2p.inference.hf_model import AssistantConfig, AssistantForConditionalGeneration, AssistantProcessor
from raytrain2p.inference.predictor import Predictor
from raytrain2p.storage.errors import reporting_disk_errors, storage_error
from raytrain2p.storage.files import directory_aside, read_json, regular_files, write_file, write_json

MARKER = "raytrain2p.json"  # whose export a directory is
ADAPTER = "adapter"  # folder of the LoRA adapter, if it is not merged
BYTES_PER_TOKEN = 200  # of a tokenizer's file, and more
SHARD = "5GB"  # largest file of weights
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Form:
    """What is to be written.

    Args:
        llava: a `LlavaForConditionalGeneration`, which transformers loads without this package.
        adapter: keep LoRA as an adapter beside the frozen language model, instead of merging it into it.
        dtype: of the language model's weights (of all weights in LLaVA's form); None for the precision of training.
    """

    llava: bool = False
    adapter: bool = False
    dtype: Literal["bf16", "float32"] | None = None


def export(predictor: Predictor, form: Form, target: Path, marker: Mapping[str, str], card: str) -> int:
    """Write a directory, or replace an earlier export of the same run. Until it is whole, nothing is at its place.

    Args:
        predictor: the run's; it is used up.
        marker: identifies the run.
        card: the model card.

    Returns:
        Its size in bytes.

    Raises:
        InputError: something else is at `target`, or the run has not the form that is wanted.
        StorageError: the disk is full, read-only or gone.
    """
    check_target(target, marker)
    predictor.device = torch.device("cpu")  # LoRA is merged in float32, for which a GPU that holds the model may lack the memory
    predictor.assistant.to(predictor.device)
    if form.llava:
        from raytrain2p.inference.llava import as_llava

        model, processor = as_llava(predictor)
        adapter = None
    else:
        adapter = detached_adapter(predictor) if form.adapter else None
        model, processor = as_assistant(predictor)
    dtype = DTYPES[form.dtype or ("bf16" if predictor.bf16 else "float32")]
    (model if form.llava else model.assistant.language_model).to(dtype)
    for part in model.config.sub_configs:
        getattr(model.config, part)._name_or_path = ""  # where it was on this machine
    model.generation_config = generation_config(predictor.chat)
    needed = sum(weight.numel() * weight.element_size() for weight in [*model.parameters(), *model.buffers()])
    with writing(target, int(needed * 1.02) + BYTES_PER_TOKEN * len(predictor.chat.tokenizer)), directory_aside(target) as folder:
        model.save_pretrained(folder, max_shard_size=SHARD)
        for weights in folder.glob("*.safetensors"):
            weights.chmod((folder / CONFIG_NAME).stat().st_mode)  # safetensors lets the owner alone read them
        processor.save_pretrained(folder)
        if adapter is not None:
            write_adapter(folder / ADAPTER, *adapter)
        write_json(folder / MARKER, dict(marker))
        write_file(folder / REPOCARD_NAME, card)
    return sum(found.st_size for found in regular_files(target))


def check_target(target: Path, marker: Mapping[str, str]) -> None:
    """An export may replace an earlier one of the same run, and nothing else.

    Raises:
        InputError: it would replace something else.
    """
    fix = "name a new directory"
    if target.is_dir() and not target.is_symlink():
        try:
            found = read_json(target / MARKER)
        except ValueError:
            found = None
        if any(target.iterdir()) and (not isinstance(found, dict) or found.get("run_id") != marker["run_id"]):
            what = f"holds an export of run {found['run_id']}" if isinstance(found, dict) and "run_id" in found else "is not empty"
            raise InputError(Problem(str(target), what, fix))
    elif target.exists() or target.is_symlink():
        raise InputError(Problem(str(target), "is not a directory", fix))


@contextmanager
def writing(target: Path, needed: int) -> Iterator[None]:
    """Within, `target` is written: `needed` bytes.

    Raises:
        StorageError: the disk is full, read-only or gone. safetensors and tokenizers report that in ways of their own.
    """
    with reporting_disk_errors(target, needed):
        target.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(target.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            yield
        except SafetensorError as error:
            raise storage_error(target, error, needed) from None


def as_assistant(predictor: Predictor) -> tuple[Any, AssistantProcessor]:
    """The assistant as the model that `hf_model` defines, and its processor. LoRA is merged, if it is there."""
    from raytrain2p.models.lora import without_adapters  # imports peft

    assistant = predictor.assistant
    assistant.language_model = language_model = without_adapters(assistant.language_model)
    encoders = {modality: predictor.encoder(modality) for modality in predictor.trained if modality in assistant.soft_tokens}
    tokenizer, tokens = with_placeholders(predictor.chat)
    media = {
        modality: {
            "encoder": json.loads(
                AutoConfig.from_pretrained(predictor.spec(modality).directory(), trust_remote_code=False).to_json_string()
            ),
            "options": encoder.options,
            "soft_tokens": assistant.soft_tokens[modality],
            "token": tokens[modality],
            "token_id": tokenizer.convert_tokens_to_ids(tokens[modality]),
            "input": encoder.model.main_input_name,
        }
        for modality, encoder in encoders.items()
    }
    shape = predictor.shape
    config = AssistantConfig(
        text_config=language_model.config,
        aligner=shape.aligner,
        projector=shape.projector,
        recall=shape.recall,
        media=media,
    )
    with torch.device("meta"):
        model = AssistantForConditionalGeneration(config)
    model.assistant, model.encoders = assistant, nn.ModuleDict({modality: encoder.model for modality, encoder in encoders.items()})
    template = chat_template(predictor.chat, tokens)
    return model, AssistantProcessor(tokenizer, media, template, encoders)


def detached_adapter(predictor: Predictor) -> tuple[Any, dict[str, torch.Tensor]]:
    """LoRA's configuration and weights, as peft takes them for the exported model. The language model is without it afterwards.

    Raises:
        InputError: the run has none.
    """
    from peft import get_peft_model_state_dict

    model = predictor.assistant.language_model
    if not hasattr(model, "peft_config"):
        what = f"was trained with model.tuning={predictor.shape.tuning}: it has no adapter"
        raise InputError(Problem("--adapter", what, "leave --adapter out, or train with model.tuning=lora"))
    place = "assistant.language_model."
    weights = {
        name.replace("base_model.model.", f"base_model.model.{place}", 1): value.contiguous()
        for name, value in get_peft_model_state_dict(model).items()
    }
    config = model.peft_config["default"]
    config.target_modules = {
        f"{place}{name.removeprefix('base_model.model.')}" for name, part in model.named_modules() if hasattr(part, "lora_A")
    }
    config.base_model_name_or_path = None
    predictor.assistant.language_model = model.unload()
    return config, weights


def write_adapter(folder: Path, config: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """As peft loads it onto the exported model."""
    folder.mkdir()
    save_file(dict(sorted(weights.items())), folder / "adapter_model.safetensors", {"format": "pt"})
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    write_file(folder / "adapter_config.json", json.dumps(fields | {"inference_mode": True}, indent=2, sort_keys=True, default=str) + "\n")


def generation_config(chat: ChatFormat) -> GenerationConfig:
    """Greedy answers up to a stop token, as `Predictor` gives them."""
    return GenerationConfig(eos_token_id=list(chat.stop_ids), pad_token_id=chat.stop_ids[0], do_sample=False)


def push(folder: Path, repository: str, endpoint: str | None, token: str | None) -> str:
    """Upload a directory to a model hub; a repository that is not there yet is made, for its owner alone. Returns its address.

    Raises:
        InputError: the hub refuses it, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    api = HfApi(endpoint=endpoint, token=token)
    where = f"--push {repository}"
    try:
        made = api.create_repo(repository, exist_ok=True, private=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=f"raytrain2p: {folder.name}", delete_patterns="*")
    except HFValidationError as error:
        raise InputError(Problem(where, str(error), "name it as in OWNER/NAME")) from None
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"the hub answers {status}" if status else " ".join(str(error).split())[:200] or type(error).__name__
        fix = "set HF_TOKEN to a token that may write there" if status in (401, 403) else "push again: the export itself is complete"
        raise InputError(Problem(where, f"cannot be uploaded: {reason}", fix)) from None
    return str(made)
