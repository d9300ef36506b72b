"""An assistant in the form of LLaVA (arXiv:2310.03744), which transformers loads by itself.

LLaVA's projector is an MLP of two layers over the last hidden states of a vision tower. A branch without input norm and a linear projector
are one, in three maps: P (A2 gelu(A1 x + a1) + a2) + p. So its first layer is A1, with units that are always 0 up to the width that LLaVA's
has, and its second is P A2.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from raytrain2p.config import Findings, InputError, Problem
from raytrain2p.inference.chat_template import chat_template, with_placeholders
from raytrain2p.inference.predictor import Predictor
from raytrain2p.models.assistant import Assistant
from raytrain2p.models.frozen_encoder import FrozenEncoder
from raytrain2p.models.image_encoder import ImageEncoder

MODALITY = "image"
TOLERANCE = 1e-4


def as_llava(predictor: Predictor) -> tuple[Any, LlavaProcessor]:
    """The model and its processor. LoRA is merged.

    Raises:
        InputError: the run has another form; all that would have to be set is named.
    """
    from raytrain2p.models.lora import without_adapters  # imports peft

    assistant = predictor.assistant.float()
    check_form(predictor)
    encoder = predictor.encoder(MODALITY)
    leading = leading_positions(encoder, assistant.soft_tokens[MODALITY])
    tokenizer, tokens = with_placeholders(predictor.chat)
    token_id = tokenizer.convert_tokens_to_ids(tokens[MODALITY])
    language_model = without_adapters(assistant.language_model)
    grow(language_model, token_id + 1)
    strategy = "default" if leading else "full"
    config = LlavaConfig(
        vision_config=encoder.model.config,
        text_config=language_model.config,
        image_token_index=token_id,
        image_seq_length=assistant.soft_tokens[MODALITY],
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-1,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    config.dtype = torch.float32
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model = encoder.model, language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    model.model.multi_modal_projector.load_state_dict(projector_of(assistant), assign=True)
    check_same(model.eval(), assistant, language_model, encoder)
    processor = LlavaProcessor(
        encoder.processor,
        tokenizer,
        patch_size=encoder.model.config.patch_size,
        vision_feature_select_strategy=strategy,
        chat_template=chat_template(predictor.chat, tokens),
        image_token=tokens[MODALITY],
        num_additional_image_tokens=leading,
    )
    return model, processor


def check_form(predictor: Predictor) -> None:
    """Only some settings give a model that has LLaVA's form.

    Raises:
        InputError: these were not set; each is named, with what to set.
    """
    findings, shape, where = Findings(), predictor.shape, "--llava"
    aligner, width = shape.aligner, predictor.assistant.language_model.get_input_embeddings().weight.shape[1]
    if set(shape.soft_tokens) != {MODALITY}:
        what = f"the model reads {' and '.join(shape.soft_tokens)}; LLaVA reads images alone"
        findings.add(Problem(where, what, "train an aligner of images and text"))
    if aligner.get("input_norm", True):
        what = "the aligner normalizes what it reads; LLaVA's projector does not"
        findings.add(Problem(where, what, "train both phases anew, phase 1 with model.input_norm=false"))
    if shape.recall is not None:
        what = "the model reads words that phase 1 knows an image by; LLaVA does not"
        findings.add(Problem(where, what, "train phase 2 anew with model.recall_tokens=0"))
    if shape.projector != "linear":
        what = f"model.projector is {shape.projector}: with the aligner before it, it is more than LLaVA's two layers"
        findings.add(Problem(where, what, "train phase 2 anew with model.projector=linear"))
    if aligner["hidden"] > width:
        what = f"model.hidden of phase 1 is {aligner['hidden']}; in LLaVA's form it is at most the width of the language model, {width}"
        findings.add(Problem(where, what, f"train both phases anew, phase 1 with model.hidden={width} or less"))
    if MODALITY in predictor.trained:
        with findings:
            check_encoder(predictor)
    findings.raise_any()


def check_encoder(predictor: Predictor) -> None:
    """The encoder must be one that LLaVA can take, and each of its positions a soft token.

    Raises:
        InputError: it is not.
    """
    encoder, name = predictor.encoder(MODALITY), predictor.trained[MODALITY]["name"]
    where, tokens = f"--llava: model.encoders.{MODALITY}={name}", predictor.assistant.soft_tokens.get(MODALITY)
    config, fix = encoder.model.config, "train both phases anew with a CLIP or a SigLIP"
    if config.model_type not in CONFIG_MAPPING_NAMES or not isinstance(getattr(config, "patch_size", None), int):
        raise InputError(Problem(where, f"is a {config.model_type}, and not a vision transformer of transformers' own", fix))
    assert isinstance(encoder, ImageEncoder)
    if encoder.arguments:
        what = "reads images of another size than its own, for which LLaVA does not interpolate positions"
        raise InputError(Problem(where, what, f"train both phases anew without model.encoders.{MODALITY}.size"))
    if encoder.dtype != torch.float32:
        what = "computes in bfloat16, and LLaVA's in the precision of its language model"
        raise InputError(Problem(where, what, f"train both phases anew without model.encoders.{MODALITY}.precision"))
    positions = len(encoder([encoder.sample])[0])
    if tokens != positions:
        what = f"gives {positions} positions, and model.soft_tokens is {tokens}; LLaVA pools none"
        raise InputError(Problem(where, what, f"train phase 2 anew with model.soft_tokens={positions}"))
    if leading_positions(encoder, positions) not in (0, 1):
        raise InputError(Problem(where, "its last hidden states are not its features and at most a class token before them", fix))


@torch.no_grad()
def leading_positions(encoder: FrozenEncoder, positions: int) -> int:
    """Positions before those of the image in the last hidden states, such as that of a class token; -1 if the hidden states are not
    the features."""
    pixels = encoder.preprocess([encoder.sample])[0][None].to(encoder.device)
    hidden, features = encoder.model(pixel_values=pixels, output_hidden_states=True).hidden_states[-1], encoder.forward(pixels)
    leading = hidden.shape[1] - positions
    return leading if leading >= 0 and torch.equal(hidden[:, leading:], features) else -1


@torch.no_grad()
def projector_of(assistant: Assistant) -> dict[str, torch.Tensor]:
    """The branch and the projector as the weights of LLaVA's projector."""
    first, second, last = assistant.branch(MODALITY).map[1], assistant.branch(MODALITY).map[4], assistant.projector
    assert isinstance(first, torch.nn.Linear)
    assert isinstance(second, torch.nn.Linear)
    assert isinstance(last, torch.nn.Linear)
    added = last.out_features - first.out_features  # units whose activation is gelu(0) = 0
    composed = (last.weight.double() @ second.weight.double()).float()
    bias = (last.weight.double() @ second.bias.double() + last.bias.double()).float()
    return {
        "linear_1.weight": F.pad(first.weight, (0, 0, 0, added)),
        "linear_1.bias": F.pad(first.bias, (0, added)),
        "linear_2.weight": F.pad(composed, (0, added)),
        "linear_2.bias": bias,
    }


@torch.no_grad()
def grow(language_model: Any, size: int) -> None:
    """Rows for the image token, which is never read and never the most likely answer: its logit is the mean of all others."""
    before = language_model.get_input_embeddings().weight.shape[0]
    if size > before:
        language_model.resize_token_embeddings(size, mean_resizing=False)
        for part in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
            part.weight[before:] = part.weight[:before].mean(0)


@torch.no_grad()
def check_same(model: Any, assistant: Assistant, language_model: Any, encoder: FrozenEncoder) -> None:
    """LLaVA's form must give what the assistant gives: a language model may do more than its layers and its output layer do.

    Raises:
        InputError: it does not.
    """
    pixels = encoder.preprocess([encoder.sample])[0][None].to(encoder.device)
    soft = assistant.soft(MODALITY, encoder.forward(pixels), None)[0]
    found = model.get_image_features(pixel_values=pixels).pooler_output[0]
    tokens = torch.arange(1, 9, device=encoder.device)[None]
    expected, logits = language_model(input_ids=tokens).logits, model(input_ids=tokens).logits
    if not (
        torch.allclose(found, soft, rtol=TOLERANCE, atol=TOLERANCE) and torch.allclose(logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
    ):
        what = f"a {language_model.config.model_type} gives other logits in LLaVA's form"
        raise InputError(Problem("--llava", what, "export without --llava, or take another language model"))
