"""The assistant: a causal language model that reads media as soft tokens through the aligner.

Shape letters: B records, L tokens of the longest record, P items of one modality in the batch, T grid positions, D width of
its encoder, S width of the shared space, K soft tokens per item, E embedding width of the language model, M supervised
positions in the batch, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, masking_utils

from raytrain2p.models.aligner import Branch, Grids, branches_of
from raytrain2p.models.encoders import ENCODERS
from raytrain2p.models.norms import replace_norms
from raytrain2p.models.parameters import ParameterCount, count_of, count_parameters
from raytrain2p.models.pretrained import model_directory
from raytrain2p.models.quantization import quantize
from raytrain2p.models.recall import Recall
from raytrain2p.models.token_loss import token_loss

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # of a mixture, as configurations name their number


@dataclass
class AssistantBatch:
    """Token records of equal padded length. Places in them are counted row by row: row * L + column.

    input_ids (B, L) has any valid ID at soft-token places; soft (P * K,) by modality are the places of the items, in the order of the
    modality's features (P, T, D). attention (B, L) is 0 at padding; None if that is on the right, where no token looks. To learn from,
    there are the places before supervised tokens, supervised (M,), and these tokens, targets (M,).
    """

    input_ids: torch.Tensor
    soft: Mapping[str, torch.Tensor]
    features: Mapping[str, Grids]
    attention: torch.Tensor | None = None
    supervised: torch.Tensor | None = None
    targets: torch.Tensor | None = None


class Projector(nn.Module):
    """Shared space (.., S) to the language model's embedding space (.., E).

    The output is normalized and then scaled to the spread of the model's own embeddings, which makes training start well.
    """

    def __init__(self, dimension: int, width: int, spread: float) -> None:
        super().__init__()
        self.map = nn.Sequential(nn.LayerNorm(dimension), nn.Linear(dimension, width), nn.GELU(), nn.Linear(width, width))
        self.gain = nn.Parameter(torch.full((width,), spread))

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        y = self.map(grid)
        return F.layer_norm(y.float(), y.shape[-1:]) * self.gain


GRID_SIZE = 0.15  # root mean square of what branches give after phase 1, measured: the projector that normalizes it need not know


class LinearProjector(nn.Linear):
    """The same by one linear map. After a branch without input norm, both are one MLP of two layers, as in LLaVA (arXiv:2310.03744)."""

    def __init__(self, dimension: int, width: int, spread: float) -> None:
        super().__init__(dimension, width)
        nn.init.normal_(self.weight, std=spread / (GRID_SIZE * dimension**0.5))
        nn.init.zeros_(self.bias)


PROJECTORS: dict[str, type[Projector] | type[LinearProjector]] = {"mlp": Projector, "linear": LinearProjector}


def pool_grid(grid: torch.Tensor, tokens: int, positions: torch.Tensor | None = None, square: bool = False) -> torch.Tensor:
    """(P, T, S) to (P, K, S) by averaging neighbours: over a square where both counts are squares, else along the row.

    Args:
        positions: of each item (P,), where they differ.
        square: items are squares, and not sequences; a shorter sequence repeats positions.
    """
    if positions is not None:
        pooled = grid.new_empty(len(grid), tokens, grid.shape[2])
        for count in positions.unique().tolist():
            rows = positions == count
            pooled = pooled.masked_scatter(rows[:, None, None], pool_grid(grid[rows, :count], tokens, None, square))
        return pooled
    longest = grid.shape[1]
    if longest == tokens:
        return grid
    if square and longest < tokens:
        raise ValueError(f"a grid of {longest} positions cannot give {tokens} soft tokens: set model.soft_tokens to {longest} or less")
    columns = grid.transpose(1, 2)
    side, target = round(longest**0.5), round(tokens**0.5)
    if square and side**2 == longest and target**2 == tokens:
        return F.adaptive_avg_pool2d(columns.unflatten(2, (side, side)), target).flatten(2).transpose(1, 2)
    return F.adaptive_avg_pool1d(columns, tokens).transpose(1, 2)


class Assistant(nn.Module):
    """Language model, the aligner's branches and projector.

    Args:
        language_model: any causal language model of transformers, bare or wrapped by peft.
        branches: the aligner's, by modality.
        dimension: S.
        soft_tokens: K, by modality. With `recall`, the first of them are its words, the others are the grid's.
        projector: a key of PROJECTORS.
        recall: the texts of phase 1, if the language model reads what they say.
        quantized: whether `convert` quantizes the language model's linear layers.
    """

    def __init__(
        self,
        language_model: Any,
        branches: Mapping[str, Branch],
        dimension: int,
        soft_tokens: Mapping[str, int],
        projector: str = "mlp",
        recall: Recall | None = None,
        quantized: bool = False,
    ) -> None:
        super().__init__()
        self.soft_token_dropout = 0.0  # share of soft tokens that are blank in each training pass
        self.language_model, self.quantized = language_model, quantized
        self.branches = nn.ModuleDict(branches)
        embedding = language_model.get_input_embeddings().weight
        spread = 0.02 if embedding.is_meta else float(embedding.detach().float().std())
        self.projector = PROJECTORS[projector](dimension, embedding.shape[1], spread)
        self.soft_tokens, self.recall = dict(soft_tokens), recall

    def branch(self, modality: str) -> Branch:
        return cast(Branch, self.branches[modality])

    def layers(self) -> nn.ModuleList:
        """The language model's, all of one shape."""
        return max((module for module in self.language_model.modules() if isinstance(module, nn.ModuleList)), key=len)

    def checkpoint_layers(self) -> None:
        """The layers' activations are computed again in the backward pass, and not kept until then. In training mode alone."""
        self.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def compile_layers(self, backend: str = "inductor") -> None:
        """Each layer is one graph from its first pass on, and all of them, at any length, share what is compiled."""
        for layer in self.layers():
            layer.compile(backend=backend, dynamic=True)

    def parts(self) -> dict[str, nn.Module]:
        parts = {"language model": self.language_model, "aligner": self.branches, "projector": self.projector}
        return parts | ({"recall": self.recall} if self.recall is not None else {})

    def freeze(self, tuning: str, train_aligner: bool) -> dict[str, ParameterCount]:
        """Set which weights train, and count them by part.

        Args:
            tuning: of the language model: its adapters (`lora`), all of it (`full`), or nothing (`frozen`).
            train_aligner: whether the branches' maps train. Their pooling queries never do.
        """
        self.requires_grad_(False)
        for name, parameter in self.language_model.named_parameters():
            parameter.requires_grad_(tuning == "full" or (tuning == "lora" and "lora_" in name))
        for modality in self.branches:
            self.branch(modality).map.requires_grad_(train_aligner)
        self.projector.requires_grad_(True)
        return count_parameters(self.parts())

    def flops_per_token(self, positions: float) -> float | None:
        """Of a forward and a backward pass over records of so many tokens: 6 N + 12 L H Q T, PaLM's formula (arXiv:2204.02311,
        appendix B), but 4 for each weight that does not train and so needs no gradient. None for models of another form: those without
        attention heads, and mixtures of experts, of which a token meets a few.
        """
        model, config = self.language_model, self.language_model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None)
        if not heads or any(getattr(config, name, None) for name in EXPERTS):
            return None
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        weights = {id(one): one for one in model.parameters() if one is not embedding} | {id(head): head}
        products = sum((6 if one.requires_grad else 4) * count_of(one) for one in weights.values())
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        return products + 12 * len(self.layers()) * width * positions

    def convert(self, dtype: torch.dtype, device: torch.device) -> None:
        """The language model's weights to float32 where they train, else to `dtype`, or to 4 bits, which are made on `device`.

        Which weights train, `freeze` must have set.
        """
        if self.quantized:
            quantize(self.language_model, device, dtype)

        def converted(value: torch.Tensor) -> torch.Tensor:
            if not isinstance(value, nn.Parameter) or not value.is_floating_point():
                return value
            if value.requires_grad:
                return value.float()
            return value.to(dtype, copy=self.quantized)  # the last weights that have their file in memory, with all that is quantized

        self.language_model._apply(converted)

    def own_weights(self) -> dict[str, torch.Tensor]:
        """What model.pt holds, once `freeze` was called: all but the language model's frozen weights and buffers, which come with it."""
        trained = {name for name, parameter in self.named_parameters(remove_duplicate=False) if parameter.requires_grad}
        return {name: value for name, value in self.state_dict().items() if not name.startswith("language_model.") or name in trained}

    def embed(self, batch: AssistantBatch) -> torch.Tensor:
        """Token embeddings with the soft tokens of the media inserted, (B, L, E)."""
        embeddings = self.language_model.get_input_embeddings()(batch.input_ids)
        for modality in self.branches:
            values, positions = batch.features.get(modality, (embeddings.new_empty(0), None))
            if len(values):
                soft = self.soft(modality, values, positions).to(embeddings.dtype)
                embeddings = embeddings.flatten(0, 1).index_copy(0, batch.soft[modality], soft.flatten(0, 1)).view_as(embeddings)
            else:  # DDP waits for gradients of every trained part, FSDP's workers for each other, in validation too
                branch = self.branch(modality)
                idle = self.projector(branch.grid(values.new_zeros(1, 1, branch.width, dtype=branch.dtype))).sum()
                embeddings = embeddings + 0 * idle.to(embeddings.dtype)
        return embeddings

    def soft(self, modality: str, values: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """Soft tokens (P, K, E) of a modality's features (P, T, D)."""
        branch, recalled = self.branch(modality), self.recall.tokens if self.recall is not None else 0
        grid = branch.grid(values.to(branch.dtype))
        soft = self.projector(pool_grid(grid, self.soft_tokens[modality] - recalled, positions, ENCODERS[modality].square))
        if self.training and self.soft_token_dropout:
            soft = soft * (torch.rand(*soft.shape[:2], 1, device=soft.device) >= self.soft_token_dropout)
        if self.recall is None:
            return soft
        words = self.recall(branch.pooled(grid, positions), self.language_model.get_input_embeddings())
        return torch.cat([words.to(soft.dtype), soft], dim=1)

    def supervised_logits(self, batch: AssistantBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (M, V) where the next token is supervised, and those tokens (M,).

        The vocabulary is by far the widest layer: computed at every position, it needs more memory than the rest of the model.
        """
        assert batch.supervised is not None
        assert batch.targets is not None
        with at_places(self.language_model.get_output_embeddings(), batch.supervised), one_record_a_row():
            out = self.language_model(inputs_embeds=self.embed(batch), attention_mask=batch.attention, use_cache=False)
        return out.logits, batch.targets

    def loss_sum(self, batch: AssistantBatch) -> torch.Tensor:
        """Cross entropy summed over the supervised positions; the caller divides by their number in the whole step."""
        logits, targets = self.supervised_logits(batch)
        return token_loss(logits, targets)

    def forward(self, batch: AssistantBatch) -> torch.Tensor:
        return self.loss_sum(batch)

    @torch.inference_mode()
    def generate(
        self, batch: AssistantBatch, max_new_tokens: int, stop_ids: list[int], pad_id: int, streamer: Any = None, together: bool = False
    ) -> torch.Tensor:
        """Greedy answers, token IDs (B, at most max_new_tokens). The records must be padded on the left.

        Args:
            streamer: of transformers; gets each token of a single record.
            together: go on until all workers have their answers: each has a part of the weights.
        """
        return self.language_model.generate(
            inputs_embeds=self.embed(batch),
            attention_mask=batch.attention,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=stop_ids,
            pad_token_id=pad_id,
            streamer=streamer,
            synced_gpus=together,
        )


@contextmanager
def at_places(head: nn.Module, places: torch.Tensor) -> Iterator[None]:
    """Within, the output layer sees only these places (M,), as (M, E).

    A hook, because the model's own forward may also scale or cap the logits.
    """

    def select(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (inputs[0].flatten(0, 1).index_select(0, places),)

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def one_record_a_row() -> Iterator[None]:
    """Within, transformers does not look whether a row without a mask holds several records: Python would wait for the GPU's answer."""
    kept = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = kept


@dataclass(frozen=True)
class AssistantShape:
    """What an assistant is built from, in plain types. `soft_tokens` of an item are by modality; `aligner` is the shape in aligner.pt."""

    language_model: str
    soft_tokens: dict[str, int]
    tuning: str
    lora: dict[str, Any]
    aligner: dict[str, Any]
    projector: str = "mlp"
    recall: tuple[int, int, int] | None = None  # texts that are known, tokens of each, texts that are read: these are among the soft tokens
    quantization: str | None = None  # of the language model's linear layers: nf4

    def __post_init__(self) -> None:
        if self.recall is not None and len(self.recall) != 3:
            raise TypeError("what it recalls, it recalls as an earlier version did")
        if self.quantization not in (None, "nf4"):
            raise TypeError(f"its language model is quantized to {self.quantization}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def build_assistant(shape: AssistantShape, attention: str, dtype: torch.dtype, empty: bool = False, as_stored: bool = False) -> Assistant:
    """The pretrained language model, with adapters if `shape.tuning` is `lora`; the aligner's branches and projector untrained.

    Which weights train is for `Assistant.freeze` to set; then those in 4 bits are for `Assistant.convert` to make.

    Args:
        attention: kernel, as transformers names it.
        dtype: of the frozen weights; those that train are float32.
        empty: build from the configuration alone, without reading weights (for counting, on the meta device).
        as_stored: the language model's weights are as its files have them, and mapped into memory, which all processes of a machine share;
            `Assistant.convert` is for later.
    """
    directory = model_directory(shape.language_model, "model.language_model")
    stored = "auto" if as_stored or shape.tuning == "full" else dtype
    if empty:
        base = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(directory, trust_remote_code=False), dtype=dtype, attn_implementation=attention
        )
    else:
        base = AutoModelForCausalLM.from_pretrained(directory, dtype=stored, attn_implementation=attention, trust_remote_code=False)
    base.generation_config = GenerationConfig()
    if shape.tuning == "full":
        base = base if as_stored else base.float()
    elif not empty:
        replace_norms(base)
    if shape.tuning == "lora":
        from raytrain2p.models.lora import with_adapters  # peft's import takes a second

        base = with_adapters(base, shape.lora)
    dimension = shape.aligner["dimension"]
    recall = Recall(dimension, *shape.recall) if shape.recall is not None else None
    return Assistant(
        base,
        branches_of(shape.aligner, shape.soft_tokens),
        dimension,
        shape.soft_tokens,
        shape.projector,
        recall,
        shape.quantization is not None,
    )
