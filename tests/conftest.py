"""Shared fixtures: small models with random weights, saved to disk."""

import os
import secrets
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test uses a model hub; read when transformers is imported
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # of the tests' clusters: none is made in the home directory

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

pytest_plugins = [
    "tests.inference.models",
    "tests.launch.launching",
    "tests.tracking.store_fixtures",
    "tests.disks",
    "tests.storage.s3_server",
]

# Files with many launches. One test process begins with the longest, the other with quick tests; the others come last.
FIRST, LAST = "test_docs.py", ("launch/test_job.py", "launch/test_training.py", "chaos/test_kills.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two test processes are busy to the end."""

    def place(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return -1 if path.endswith(f"tests/{FIRST}") else next((n for n, name in enumerate(LAST, 1) if path.endswith(f"tests/{name}")), 0)

    items.sort(key=place)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same random numbers in any order of tests and in any process."""
    torch.manual_seed(0)


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes with the chat markers as special tokens; needs no vocabulary file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>")
    wrapped.chat_template = chat_template
    return wrapped


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with two layers of width 32 and a context of 256 tokens."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of width 32 on 32 px images in patches of 8: a grid of 16 vectors."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny_vit")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ViTModel(ViTConfig(image_size=32, patch_size=8, **shape), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of width 32 that reads up to 64 bytes."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("tiny_bert")
    tokenizer = byte_tokenizer(None)
    tokenizer.model_max_length = 64
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
