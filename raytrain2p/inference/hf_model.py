"""A trained assistant as a model and a processor of transformers: what `runs export` writes, and `from_pretrained` loads.

    import raytrain2p.inference.hf_model  # registers the classes with transformers; no code of a model directory is run

    model = AutoModelForImageTextToText.from_pretrained(directory)
    processor = AutoProcessor.from_pretrained(directory)

The classes only connect: encoders, aligner, projector and language model are the code of training.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import cached_file

from raytrain2p.data.features import padded
from raytrain2p.data.media import decode
from raytrain2p.inference.questions import as_records
from raytrain2p.models.aligner import branches_of
from raytrain2p.models.assistant import Assistant, AssistantBatch
from raytrain2p.models.encoders import ENCODERS
from raytrain2p.models.recall import Recall

PREPROCESSING = "preprocessor_config.json"  # in the folder of each modality
HUB_OPTIONS = ("cache_dir", "force_download", "token", "revision", "local_files_only")


class AssistantConfig(PreTrainedConfig):
    """What an assistant is built from.

    Args:
        text_config: of the language model.
        aligner: its shape, see `Aligner`; the kind of `projector`; and of `recall`, the numbers of `Recall`.
        media: by modality: `encoder`, the configuration of its model; its `options`; `soft_tokens` of an item; `token`, which stands for an
            item in a text, and `token_id`, which is in place of each soft token; `input`, the argument of the model that has the items.
    """

    model_type = "raytrain2p"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    aligner: dict[str, Any] | None = None
    projector: str = "mlp"
    recall: tuple[int, int, int] | None = None
    media: dict[str, Any] | None = None


class AssistantForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Frozen encoders, and an assistant over their features.

    Its inputs are token IDs in which each item has as many IDs `token_id` as it has soft tokens, and, by the names that the configuration
    says, the preprocessed items in their order: a tensor, or a list of tensors if shapes differ. `AssistantProcessor` makes both.
    """

    config_class = AssistantConfig
    main_input_name = "input_ids"
    _supports_sdpa = _supports_flash_attn = True
    # as in training, whatever the language model's precision
    _keep_in_fp32_modules_strict = ("encoders", "branches", "projector", "recall.keys")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        aligner, media = config.aligner, config.media
        self.encoders = nn.ModuleDict(
            {
                modality: ENCODERS[modality].encoder_of(
                    AutoModel.from_config(AutoConfig.for_model(**kind["encoder"]), dtype=torch.float32, trust_remote_code=False)
                )
                for modality, kind in media.items()
            }
        ).requires_grad_(False)
        language_model = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
        counts = {modality: kind["soft_tokens"] for modality, kind in media.items()}
        dimension = aligner["dimension"]
        recall = Recall(dimension, *config.recall) if config.recall else None
        self.assistant = Assistant(language_model, branches_of(aligner, media), dimension, counts, config.projector, recall)
        self.post_init()
        # transformers gathers both from direct children, which the language model is not
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        self._no_split_modules = language_model._no_split_modules

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model; it is what `save_pretrained` records."""
        return self.assistant.language_model.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.assistant.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.assistant.language_model.get_output_embeddings()

    def forward(self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None, **options: Any) -> Any:
        """What the language model gives, (B, L, V) logits among it; `options` are its own: attention_mask, labels, …"""
        media = self._take_media(options)
        if inputs_embeds is None:
            inputs_embeds = self._embedded(input_ids, media)[1]
        return self.assistant.language_model(inputs_embeds=inputs_embeds, **options)

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, generation_config: Any = None, **options: Any) -> Any:
        """As everywhere in transformers: the prompts and their answers, token IDs (B, ..). Prompts must be padded on the left."""
        media = self._take_media(options)
        tokens, embedded = self._embedded(options.pop("input_ids", inputs), media)
        language_model = self.assistant.language_model
        language_model.generation_config = generation_config or self.generation_config
        return language_model.generate(tokens, inputs_embeds=embedded, **options)

    def _take_media(self, options: dict[str, Any]) -> dict[str, Any]:
        return {modality: options.pop(kind["input"], None) for modality, kind in self.config.media.items()}

    def _embedded(self, input_ids: Any, media: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token IDs that the language model knows, (B, L), and the embeddings of tokens and media, (B, L, E).

        Raises:
            ValueError: the items are not as many as the tokens say.
        """
        soft, features, tokens = {}, {}, input_ids
        for modality, kind in self.config.media.items():
            is_soft = input_ids == kind["token_id"]
            soft[modality], tokens = is_soft.flatten().nonzero()[:, 0], tokens.masked_fill(is_soft, 0)
            items = [] if media[modality] is None else list(media[modality])
            if (found := len(soft[modality])) != len(items) * kind["soft_tokens"]:
                what = f"{found} tokens {kind['token']}; required are {kind['soft_tokens']} for each"
                raise ValueError(f"{len(items)} items of {modality} in `{kind['input']}`, and {what}")
            if items:
                encoder = ENCODERS[modality].part(kind["options"], self.encoders[modality])
                with torch.autocast(input_ids.device.type, enabled=False):  # on a CPU it takes no float16
                    # cloned, because training takes no tensors of inference mode
                    features[modality] = padded([grid.clone() for grid in encoder.encode(items)])
        return tokens, self.assistant.embed(AssistantBatch(tokens, soft, features))


class AssistantProcessor(ProcessorMixin):
    """Conversations, or texts and media, to the model's inputs.

    Args:
        tokenizer: knows a token for an item of each modality.
        media: as in `AssistantConfig`.
        chat_template: takes messages whose content is a text, or a list of texts and media.
        encoders: what preprocesses each modality.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        media: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        encoders: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.media = {modality: dict(kind) for modality, kind in (media or {}).items()}
        self.preprocessing = dict(encoders or {})

    @classmethod
    def from_pretrained(cls, name: Any, **options: Any) -> Self:
        processor = super().from_pretrained(name, **options)
        where = {key: options[key] for key in HUB_OPTIONS if key in options}
        for modality, kind in processor.media.items():
            file = Path(cached_file(name, f"{modality}/{PREPROCESSING}", **where))
            processor.preprocessing[modality] = ENCODERS[modality].part(kind["options"], directory=file.parent)
        return processor

    def save_pretrained(self, folder: Any, **options: Any) -> Any:
        for modality, encoder in self.preprocessing.items():
            encoder.processor.save_pretrained(Path(folder) / modality)
        return super().save_pretrained(folder, **options)

    def __call__(self, *, text: str | Sequence[str], **given: Any) -> BatchFeature:
        """The model's inputs, padded on the left.

        Args:
            text: one or several; the token of a modality in it stands for an item.
            given: items by modality, such as `image=[...]` or `images=[...]`, in the order in which they are in the texts: PIL images,
                bytes, data URLs, or files' names. All else goes to the tokenizer.

        Raises:
            ValueError: items and tokens are not equally many; InputError: an item cannot be read.
        """
        texts = [text] if isinstance(text, str) else list(text)
        given.pop("return_tensors", None)
        values: dict[str, Any] = {}
        for modality, kind in self.media.items():
            items = flat(given.pop(modality, None)) + flat(given.pop(f"{modality}s", None))
            if (found := sum(one.count(kind["token"]) for one in texts)) != len(items):
                raise ValueError(f"the texts have {found} {kind['token']}, and {len(items)} items of {modality} are given")
            texts = [one.replace(kind["token"], kind["token"] * kind["soft_tokens"]) for one in texts]
            if items:
                tensors = self.preprocessing[modality].preprocess([decoded(modality, item) for item in items])
                values[kind["input"]] = torch.stack(tensors) if len({tensor.shape for tensor in tensors}) == 1 else tensors
        options = {"padding": True, "padding_side": "left", "add_special_tokens": False} | given
        return BatchFeature({**self.tokenizer(texts, return_tensors="pt", **options), **values})

    def apply_chat_template(
        self, conversation: Sequence[Any], tokenize: bool = False, return_dict: bool = False, return_tensors: Any = None, **options: Any
    ) -> Any:
        """A conversation, or several, as text; or, with `tokenize` and `return_dict`, as the model's inputs.

        A message's content is a text or a list of parts: `{"type": "text", "text": ...}`, or an item such as
        `{"type": "image", "image": ...}`, also under `path`, or as a data URL under `url`.
        """
        conversations = [conversation] if isinstance(conversation[0], Mapping) else conversation
        options |= {"chat_template": options.get("chat_template") or self.chat_template, "tokenize": False}
        options |= options.pop("processor_kwargs", None) or {}
        texts = [self.tokenizer.apply_chat_template(one, **options) for one in conversations]
        if not tokenize:
            return texts[0] if isinstance(conversation[0], Mapping) else texts
        media: dict[str, list[Any]] = {}
        for part in (part for one in conversations for message in one for part in parts_of(message)):
            media.setdefault(part["type"], []).append(next(part[key] for key in (part["type"], "path", "url") if key in part))
        inputs = self(text=texts, **media)
        return inputs if return_dict else inputs["input_ids"]


def parts_of(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The media in a message."""
    content = message["content"]
    return [] if isinstance(content, str) else [part for part in content if part["type"] != "text"]


def flat(items: Any) -> list[Any]:
    """Items as a list, which may have been one, or a list of lists."""
    if items is None:
        return []
    return [one for item in items for one in flat(item)] if isinstance(items, list | tuple) else [items]


def decoded(modality: str, item: Any) -> Any:
    """An item as its encoder takes it, read as `Predictor` reads it."""
    return decode(next(as_records([{modality: item}], "?")[0].media()))


AutoConfig.register(AssistantConfig.model_type, AssistantConfig, exist_ok=True)
for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
    auto.register(AssistantConfig, AssistantForConditionalGeneration, exist_ok=True)
AutoProcessor.register(AssistantConfig, AssistantProcessor, exist_ok=True)
