"""The model of phase 2 by transformers and peft alone, as somebody would write it who does not have this program.

It is the yardstick: it uses none of our model code, and stays as it is when that becomes faster. The initial weights are those of the
program, so that both have the same losses.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

MODEL = "language_model."  # a prefix in initial.pt


class SoftTokens(nn.Module):
    """Features (P, T, D) of images to soft tokens (P, T, E): the frozen aligner and the projector that trains."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        width, hidden, dimension = (weights[f"branches.image.map.{name}"].shape[0] for name in ("0.weight", "1.weight", "4.weight"))
        embedding = weights["projector.gain"].shape[0]
        aligner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, dimension))
        self.aligner = aligner.requires_grad_(False)
        self.projector = nn.Sequential(nn.LayerNorm(dimension), nn.Linear(dimension, embedding), nn.GELU(), nn.Linear(embedding, embedding))
        self.gain = nn.Parameter(torch.empty(embedding))
        self.load_state_dict(
            {
                name.replace("branches.image.map.", "aligner."): value
                for name, value in weights.items()
                if name.startswith("branches.image.map.")
            }
            | {name.replace("projector.map.", "projector."): value for name, value in weights.items() if name.startswith("projector.map.")}
            | {"gain": weights["projector.gain"]}
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        y = self.projector(self.aligner(features.float()))
        return F.layer_norm(y.float(), y.shape[-1:]) * self.gain


def with_lora(model: Any, targets: list[str] | str, **options: Any) -> Any:
    """By peft; its adapters are float32."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def load_adapters(model: nn.Module, weights: Mapping[str, torch.Tensor], inner: str = "") -> None:
    """The initial adapters, by their names in peft.

    Args:
        inner: what the names of `model` have after `base_model.model.model.`.
    """
    mine = dict(model.named_parameters())
    wanted = {name for name in mine if "lora_" in name}
    found = {name.removeprefix(MODEL): value for name, value in weights.items() if "lora_" in name}
    found = {name.replace("base_model.model.model.", f"base_model.model.model.{inner}"): value for name, value in found.items()}
    if wanted != found.keys():
        raise ValueError(f"initial.pt has {len(found)} adapters, the model {len(wanted)}; differing: {sorted(wanted ^ found.keys())[:3]}")
    with torch.no_grad():
        for name, value in found.items():
            mine[name].copy_(value)


class PlainAssistant(nn.Module):
    """The fastest plain form that is known on CPUs: base in bf16 and frozen, adapters in float32, eager attention, and logits at
    supervised positions alone.
    """

    def __init__(self, directory: str, targets: list[str], weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
        self.language_model = with_lora(base, targets).train()
        load_adapters(self.language_model, weights)
        self.soft_tokens = SoftTokens(weights)

    def forward(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The summed loss."""
        masks, model = batch["masks"], self.language_model.get_base_model()
        embeddings = model.get_input_embeddings()(batch["tokens"]["input_ids"])
        soft = self.soft_tokens(batch["items"]["image"].values).to(embeddings.dtype)
        embeddings = embeddings.masked_scatter(masks["soft"].unsqueeze(-1), soft)
        hidden = model.model(inputs_embeds=embeddings, attention_mask=masks["attention_mask"], use_cache=False).last_hidden_state
        targets = masks["labels"][:, 1:]
        supervised = targets != -100
        logits = model.get_output_embeddings()(hidden[:, :-1][supervised])
        return F.cross_entropy(logits.float(), targets[supervised], reduction="sum")


class BackboneWithImages(nn.Module):
    """In place of the backbone of a causal language model: encodes images, and puts their soft tokens among the embeddings. So the
    trainers of Hugging Face take the model as any other one, and encode in each step, as their users do.
    """

    def __init__(self, language: Any, encoder: Any, soft_tokens: SoftTokens) -> None:
        super().__init__()
        self.language, self.encoder, self.soft_tokens = language, encoder.model, soft_tokens
        self.encode = encoder.forward  # pixels to (P, T, D)

    def train(self, mode: bool = True) -> "BackboneWithImages":
        """The frozen encoder's batch norms keep their statistics."""
        super().train(mode)
        self.encoder.eval()
        return self

    def get_input_embeddings(self) -> Any:
        return self.language.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, pixels: torch.Tensor, soft: torch.Tensor, **others: Any) -> Any:
        others.pop("inputs_embeds", None)
        embeddings = self.language.get_input_embeddings()(input_ids)
        with torch.no_grad():
            features = self.encode(pixels)
        embeddings = embeddings.masked_scatter(soft.unsqueeze(-1), self.soft_tokens(features).to(embeddings.dtype))
        return self.language(inputs_embeds=embeddings, **others)


def hugging_face_model(directory: str, encoder: Any, targets: list[str], weights: Mapping[str, torch.Tensor]) -> Any:
    """A PeftModel in float32 with transformers' own attention; the projector is trained and saved beside the adapters."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.model = BackboneWithImages(model.model, encoder, SoftTokens(weights))
    wrapped = with_lora(model, rf".*\.language\.layers\.\d+\..*({'|'.join(targets)})", modules_to_save=["soft_tokens"])
    load_adapters(wrapped, weights, "language.")
    for name, parameter in wrapped.named_parameters():
        if ".aligner." in name:
            parameter.requires_grad_(False)
    return wrapped.train()
