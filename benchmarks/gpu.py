"""A step of phase 2 on one GPU: what each change of it would bring, beside a plain torch loop, the HF Trainer with PEFT, and
the whole program through Ray and Lightning. One command: prints tables and writes gpu.json into DIR.

    python -m benchmarks.gpu DIR [--batches 4 16 64] [--length 256] [--repeats 7] [--steps 10] [--parts variants launch]
    python -m benchmarks.gpu DIR --tiny     the same on a CPU with a model of width 64, to try the benchmark itself

The language model has the shape of Qwen2.5-0.5B (https://huggingface.co/Qwen/Qwen2.5-0.5B, config.json) and random weights,
LoRA r=16 on all linear layers, 16 soft tokens from a stored grid of 16 positions. Records have half to all of --length tokens,
a quarter of them supervised. Contestants take turns, so many steps each, --repeats times; the table has medians, and the spread as
half the interquartile range. Batches lie on the GPU already, except for the HF Trainer and the launch.

MFU, as PaLM defines it (arXiv:2204.02311, appendix B): (6 N + 12 L H Q T) FLOPs a token, here of real tokens, padding left out,
over the peak of dense bf16 (H100 SXM: 989.4 TFLOP/s, NVIDIA's datasheet). That counts gradients of all weights, of which LoRA
needs few: the column `LoRA` counts 4 N for frozen ones, 6 N for what trains, and the output layer at supervised positions alone.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations import sdpa_attention
from transformers.utils import logging as transformers_logging

from benchmarks.case import masks
from raytrain2p.models import token_loss
from raytrain2p.worker.callbacks.step_logger import peak_flops

SHAPE = {  # of Qwen2.5-0.5B
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
BATCHES = 4  # different ones, in turn
WARM_UP = 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


# What is trained


def make_inputs(folder: Path, shape: dict[str, Any], length: int, records: int, hollow: bool = False) -> None:
    """Language model, image encoder, aligner, images and records, all random.

    Args:
        hollow: the language model's file has the names and shapes of its weights, and zeros that take no place on a disk.
    """
    from PIL import Image
    from transformers import Qwen2Config, Qwen2ForCausalLM, ViTConfig, ViTImageProcessorPil, ViTModel

    from raytrain2p.config.phases import ALIGNMENT
    from raytrain2p.models.aligner import Aligner
    from raytrain2p.models.artifacts import save_artifact
    from raytrain2p.models.pretrained import fingerprint
    from tests.conftest import byte_tokenizer

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    with torch.device("meta" if hollow else DEVICE):  # drawn there: a CPU takes a minute
        model = Qwen2ForCausalLM(Qwen2Config(**(SHAPE | shape), bos_token_id=1, eos_token_id=2, dtype=torch.bfloat16)).bfloat16()
    if hollow:
        model.config.save_pretrained(folder / "model")
        write_hollow(model, folder / "model" / "model.safetensors")
    else:
        model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    of_vit = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    ViTModel(ViTConfig(image_size=32, patch_size=8, **of_vit), add_pooling_layer=False).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    aligner = Aligner({"image": 64}, hidden=512, dimension=256)
    encoders = {"image": {"name": str(folder / "vit"), "options": {}, "fingerprint": fingerprint(folder / "vit")}}
    save_artifact(folder / "aligner.pt", ALIGNMENT, {}, encoders, shape=aligner.shape, state_dict=aligner.state_dict())
    random = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
    rows = []
    for number in range(records):
        tokens = int(random.integers(length // 2, length - 1)) - 70  # what the template and the soft tokens add, about
        answer = max(8, (tokens + 70) // 4)
        text = ["".join(chr(97 + letter) for letter in random.integers(0, 26, max(1, size))) for size in (tokens - answer, answer)]
        rows.append({"instruction": text[0], "response": text[1], "image": f"{number % 8}.png"})
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_hollow(model: nn.Module, path: Path) -> None:
    """A file of safetensors, of which only the head is written."""
    tensors, end = dict[str, Any](), 0
    for name, weight in model.named_parameters():
        tensors[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [end, end := end + 2 * weight.numel()]}
    head = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + end)


def overrides(folder: Path, batch: int, steps: int) -> list[str]:
    """Settings of the program."""
    return [
        f"data.train={folder}/records.jsonl",
        "data.val=null",
        "data.test={}",
        f"data.feature_store={folder}/features",
        f"model.language_model={folder}/model",
        f"model.aligner={folder}/aligner.pt",
        "model.attention=sdpa",
        "model.soft_tokens=16",
        "model.recall_tokens=0",
        "training.precision=bf16",
        f"training.max_steps={steps}",
        f"training.global_batch_size={batch}",
        "checkpoint.every_steps=null",
    ]


def encode(inputs: Any) -> None:
    """The features, without Ray."""
    from raytrain2p.data.features import write_shard
    from raytrain2p.data.media import decode

    for job in inputs.jobs:
        missing = job.store.missing(job.items)
        if missing:
            job.store.directory.mkdir(parents=True, exist_ok=True)
            grids = job.spec.build()([decode(job.items[key]) for key in missing])
            write_shard(job.store.directory, missing, [grid.numpy() for grid in grids])


@dataclass
class Batch:
    """As the program collates it, on the device, with `masks` beside it; and how many tokens of how many positions are real."""

    batch: dict[str, Any]
    tokens: int
    padded: int

    @property
    def supervised(self) -> int:
        return len(self.batch["tokens"]["targets"])


# Variants of the step


@dataclass(frozen=True)
class Variant:
    """What differs from the program's step."""

    name: str
    mask: bool = False  # of the padding
    module: Literal["plain", "compiled", "quantized"] = "plain"
    changed: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


VARIANTS = [
    Variant("as today (plain loop)"),
    Variant("with a padding mask", mask=True),
    # Keys and values are shared by query heads, where the kernel can.
    Variant("keys repeated", changed=partial(patch.object, sdpa_attention, "use_gqa_in_sdpa", lambda *_: False)),
    Variant("all logits in float32", changed=partial(patch.object, token_loss, "CHUNK", sys.maxsize)),
    Variant("compiled layers", module="compiled"),
    Variant("frozen weights in 4 bits", module="quantized"),
]


class Contestant:
    """A module and its optimizer; `step` takes a batch."""

    def __init__(self, module: Any, variant: Variant) -> None:
        self.module, self.variant = module, variant
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0, fused=True)

    def loss(self, batch: Batch) -> torch.Tensor:
        variant, assistant = self.variant, self.module.assistant
        assembled = self.module.assemble(batch.batch)
        if variant.mask:
            assembled = dataclasses.replace(assembled, attention=batch.batch["masks"]["attention_mask"])
        loss: torch.Tensor = assistant.loss_sum(assembled)
        return loss

    def mean_loss(self, batch: Batch) -> torch.Tensor:
        """As it is trained."""
        with self.variant.changed(), torch.autocast(DEVICE.type, torch.bfloat16):
            return self.loss(batch) / batch.batch["step_tokens"]

    def loss_of(self, batch: Batch) -> float:
        return float(self.mean_loss(batch).detach())

    def step(self, batch: Batch) -> torch.Tensor:
        loss = self.mean_loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def run(self, batches: list[Batch], steps: int) -> float:
        """Seconds per step."""
        synchronize()
        begin = time.perf_counter()
        for number in range(steps):
            self.step(batches[number % len(batches)])
        synchronize()
        return (time.perf_counter() - begin) / steps


class HuggingFace(nn.Module):
    """What many would write: the same adapters and soft tokens, embedded by masks, with transformers' own loss at every position."""

    def __init__(self, module: Any, folder: Path) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16, attn_implementation="sdpa")
        self.language_model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
        self.assistant = [module.assistant]  # its aligner and projector; not a submodule
        self.projector = module.assistant.projector

    def forward(self, ids: torch.Tensor, masks: Any, values: torch.Tensor) -> dict[str, torch.Tensor]:
        assistant = self.assistant[0]
        embeddings = self.language_model.get_input_embeddings()(ids)
        soft = assistant.soft("image", values, None).to(embeddings.dtype)
        embeddings = embeddings.masked_scatter(masks["soft"].unsqueeze(-1), soft)
        options = {name: masks[name] for name in ("attention_mask", "labels")}
        out = self.language_model(inputs_embeds=embeddings, use_cache=False, **options)
        return {"loss": out.loss}


class TrainerContestant:
    """The HF Trainer with PEFT; each run trains anew for a few steps."""

    def __init__(self, module: Any, folder: Path) -> None:
        self.model, self.folder = HuggingFace(module, folder).to(DEVICE), folder

    def run(self, batches: list[Batch], steps: int) -> float:
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

        class Clock(TrainerCallback):
            times: list[float] = []  # noqa: RUF012

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step in (WARM_UP, WARM_UP + steps):
                    synchronize()
                    self.times.append(time.perf_counter())

        items = [
            {"ids": one.batch["tokens"]["input_ids"], "masks": one.batch["masks"], "values": one.batch["items"]["image"].values}
            for one in batches
        ]
        on_cpu = [torch.utils._pytree.tree_map(lambda value: value.cpu(), item) for item in items]
        clock = Clock()
        clock.times = []
        arguments = TrainingArguments(
            output_dir=str(self.folder / "trainer"),
            max_steps=WARM_UP + steps,
            per_device_train_batch_size=1,  # an item is a whole batch
            bf16=True,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=DEVICE.type == "cpu",
        )
        trainer = Trainer(
            model=self.model,
            args=arguments,
            train_dataset=cast(Any, on_cpu * (WARM_UP + steps)),
            data_collator=lambda rows: rows[0],
            callbacks=[clock],
        )
        trainer.pop_callback(PrinterCallback)
        trainer.train()
        return (clock.times[1] - clock.times[0]) / steps


# Measuring


def state_bytes(contestant: Any) -> int:
    """Weights of its model and the state of its optimizer."""
    model = contestant.module if isinstance(contestant, Contestant) else contestant.model
    found = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    if isinstance(contestant, Contestant):
        for state in contestant.optimizer.state.values():
            found |= {id(value): value for value in state.values() if isinstance(value, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def peak_over_state(contestant: Any, batches: list[Batch]) -> int:
    """Bytes that a step needs beside what stays."""
    if DEVICE.type != "cuda":
        return 0
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contestant.run(batches, 2)
    return torch.cuda.max_memory_allocated() - before


SYNCHRONIZING = ("aten::nonzero", "aten::item", "aten::masked_select", "aten::masked_scatter", "cudaStreamSynchronize", "cudaMemcpyAsync")


def profile(contestant: Contestant, batches: list[Batch]) -> dict[str, Any]:
    """Of one step: kernels, their time, calls that synchronize or often do, and kernels of attention by name."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])]
    contestant.run(batches, 1)
    with profiler(activities=activities) as made:
        contestant.run(batches, 1)
    assert made.profiler is not None
    assert made.profiler.kineto_results is not None
    events = made.profiler.kineto_results.events()  # as recorded: torch takes minutes to make a tree of them
    on_device = [event for event in events if event.device_type() == torch.autograd.DeviceType.CUDA]
    # spans of an annotation, as the optimizer's, are listed beside the kernels in them
    kernels = [event for event in on_device if not event.name().startswith(("Memcpy", "Memset", "Optimizer.", "ProfilerStep"))]
    names = Counter(event.name() for event in events)
    words = ("flash", "fmha", "attention", "softmax")
    attention = Counter(event.name()[:80] for event in kernels if any(word in event.name().lower() for word in words))
    longest: Counter[str] = Counter()
    for event in kernels:
        longest[event.name()[:80]] += event.duration_ns()
    return {
        "kernels": len(kernels) or sum(count for name, count in names.items() if name.startswith("aten::")),
        "kernel_ms": sum(event.duration_ns() for event in kernels) / 1e6,
        "copies": sum(event.name().startswith("Memcpy") for event in on_device),
        "calls": {name: names[name] for name in (*SYNCHRONIZING, "aten::copy_", "cudaLaunchKernel", "cuLaunchKernelEx") if names[name]},
        "attention": dict(attention.most_common(6)),
        "longest_ms": {name: round(nanoseconds / 1e6, 3) for name, nanoseconds in longest.most_common(12)},
    }


def flops(module: Any, batches: list[Batch]) -> tuple[float, float]:
    """FLOPs of the mean batch: as PaLM counts them, and those that LoRA needs."""
    model = module.assistant.language_model.get_base_model()
    config = model.config
    head = model.lm_head.weight.numel()
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    apart = ("lora_", "embed_tokens", "lm_head")
    body = sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in apart))
    tokens = statistics.mean(batch.tokens for batch in batches)
    supervised = statistics.mean(batch.supervised for batch in batches)
    positions = statistics.mean(batch.padded / len(batch.batch["tokens"]["input_ids"]) for batch in batches)
    attention = 12 * config.num_hidden_layers * config.hidden_size * positions
    palm = (6 * (body + head) + attention) * tokens
    return palm, (4 * body + 6 * adapters + attention) * tokens + 4 * head * supervised


def build_module(folder: Path, batch: int, *more: str) -> Any:
    """The program's module, as it trains it."""
    from raytrain2p.config import load_settings
    from raytrain2p.phases.instruction import module as instruction

    torch.manual_seed(0)
    settings: Any = load_settings(2, None, [*overrides(folder, batch, 1000), *more])
    module = instruction.build(settings, 1000, "bf16")
    module.assistant.convert(torch.bfloat16, DEVICE)
    return module.to(DEVICE).train()


def read_batches(folder: Path, size: int, length: int) -> list[Batch]:
    """Different ones of equal padded length, on the device."""
    from pytorch_lightning.utilities import move_data_to_device

    from raytrain2p.config import load_settings
    from raytrain2p.data.batches import MicroBatch
    from raytrain2p.phases.instruction import data as instruction_data

    settings: Any = load_settings(2, None, overrides(folder, size, 1000))
    inputs = instruction_data.read_inputs(settings)
    encode(inputs)
    split = inputs.prepare()["train"]
    longest = np.argsort(-split.lengths, kind="stable")
    made = []
    for number in range(BATCHES):
        rest = np.random.default_rng(number).permutation(longest[BATCHES:])[: size - 1]
        records = np.concatenate([longest[number : number + 1], rest])
        batch: Any = split[MicroBatch(records, int(split.supervised[records].sum()))]
        tokens = batch["tokens"]
        width = tokens["input_ids"].shape[1]
        tokens["input_ids"] = F.pad(tokens["input_ids"], (0, length - width))
        for places in (tokens["soft"]["image"], tokens["supervised"]):
            places += places // width * (length - width)
        batch["masks"] = masks(split.tokens, records, tokens)
        made.append(Batch(move_data_to_device(batch, DEVICE), int(split.lengths[records].sum()), length * len(records)))
    return made


def table_line(row: dict[str, Any]) -> str:
    traced = row.get("profile", {"kernels": 0, "kernel_ms": 0.0})
    return (
        f"{row['name']:32}{row['median_ms']:9.2f}{row['spread_ms']:7.2f}{row['speed_ratio']:7.2f}{row['tokens_per_second']:10.0f}"
        f"{100 * (row['mfu_palm'] or 0):6.1f}%{100 * (row['mfu_lora'] or 0):6.1f}%{(row['peak'] + row['state']) / 1e9:6.1f}"
        f"{traced['kernels']:9}{traced['kernel_ms']:9.2f}"
    )


def measure_variants(folder: Path, options: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> None:
    """Every variant at every batch size."""
    variants = [variant for variant in VARIANTS if not options.only or variant.name in options.only]
    settings = {"plain": [], "compiled": [], "quantized": ["model.quantization=nf4"]}
    modules = {kind: build_module(folder, options.batches[0], *settings[kind]) for kind in {"plain", *(one.module for one in variants)}}
    if "compiled" in modules:
        modules["compiled"].assistant.compile_layers("inductor" if DEVICE.type == "cuda" else "aot_eager")
    module = modules["plain"]
    for size in options.batches:
        batches = read_batches(folder, size, options.length)
        palm, needed = flops(module, batches)
        contestants: dict[str, Any] = {
            variant.name: Contestant(modules[variant.module], variant)
            for variant in variants
            if variant.module != "compiled" or size in options.compile
        }
        contestants["HF Trainer and PEFT"] = TrainerContestant(module, folder)
        first_loss: dict[str, float] = {}
        for name, contestant in contestants.items():
            if isinstance(contestant, Contestant):
                first_loss[name] = contestant.loss_of(batches[0])
        print(f"\nbatch {size}, losses before training: { ({name: round(value, 5) for name, value in first_loss.items()}) }")
        memory: dict[str, dict[str, int]] = {}
        for name, contestant in list(contestants.items()):
            try:
                contestant.run(batches, WARM_UP)
                memory[name] = {"peak": peak_over_state(contestant, batches), "state": state_bytes(contestant)}
            except Exception as error:
                del contestants[name]
                print(f"batch {size}, {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                write({"batch": size, "name": name, "error": f"{type(error).__name__}: {str(error)[:300]}"})
                error.__traceback__ = None
                if DEVICE.type == "cuda":
                    torch.cuda.empty_cache()
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(options.repeats):
            for name, contestant in contestants.items():
                seconds[name].append(contestant.run(batches, options.steps))
        peak = peak_flops(DEVICE)
        tokens = statistics.mean(batch.tokens for batch in batches)
        baseline = statistics.median(seconds[VARIANTS[0].name])
        supervised = statistics.mean(batch.supervised for batch in batches)
        print(f"\nbatch {size} x {options.length} positions, {tokens:.0f} tokens of them real, {supervised:.0f} supervised")
        print(f"{'':32}{'ms/step':>9}{'+-':>7}{'ratio':>7}{'tokens/s':>10}{'MFU':>7}{'LoRA':>7}{'GB':>6}{'kernels':>9}{'busy ms':>9}")
        for name, contestant in contestants.items():
            middle = statistics.median(seconds[name])
            quartiles = statistics.quantiles(seconds[name], n=4) if len(seconds[name]) > 1 else [middle] * 3
            row: dict[str, Any] = {
                "batch": size,
                "length": options.length,
                "name": name,
                "seconds": seconds[name],
                "median_ms": 1e3 * middle,
                "spread_ms": 1e3 * (quartiles[2] - quartiles[0]) / 2,
                "speed_ratio": baseline / middle,
                "tokens_per_second": tokens / middle,
                "mfu_palm": palm / middle / peak if peak else None,
                "mfu_lora": needed / middle / peak if peak else None,
                **memory[name],
                "first_loss": first_loss.get(name),
            }
            if isinstance(contestant, Contestant) and size in options.profile:
                row["profile"] = profile(contestant, batches)
            write(row)
            print(table_line(row), flush=True)
        del contestants, contestant
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


# Through Ray and Lightning


def loop_with_loader(folder: Path, batch: int, steps: int) -> list[float]:
    """The plain loop over the program's own batches, in its order, loaded as it loads them: the end of every tenth step."""
    from pytorch_lightning.utilities import move_data_to_device

    from raytrain2p.config import load_settings
    from raytrain2p.models.distributed import WorkerGroup
    from raytrain2p.phases.instruction import data as instruction_data
    from raytrain2p.worker.loaders import train_sampler

    torch.set_num_threads(1)  # as a worker with one CPU
    settings: Any = load_settings(2, None, overrides(folder, batch, steps))
    inputs = instruction_data.read_inputs(settings)
    encode(inputs)
    data = inputs.prepare()["train"]
    contestant = Contestant(build_module(folder, batch), VARIANTS[0])
    sampler = train_sampler(settings, data, WorkerGroup())
    loader: Any = torch.utils.data.DataLoader(cast(Any, data), batch_size=None, sampler=sampler, pin_memory=DEVICE.type == "cuda")
    ends: list[float] = []
    losses: list[torch.Tensor] = []
    done = 0
    while done < steps:
        sampler.set_epoch(done // sampler.steps)
        for loaded in loader:
            moved: Any = move_data_to_device(loaded, DEVICE)
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = contestant.module(moved) / moved["step_tokens"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(contestant.trained, 1.0)
            contestant.optimizer.step()
            contestant.optimizer.zero_grad()
            losses.append(loss.detach())
            done += 1
            if done % 10 == 0:
                torch.stack(losses).tolist()
                losses = []
                ends.append(time.time())
            if done == steps:
                break
    return ends


def launched(folder: Path, batch: int, steps: int) -> list[float]:
    """The same through the program: the end of every tenth step."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        command = [sys.executable, "-m", "raytrain2p.train", "--phase", "2", *overrides(folder, batch, steps)]
        command += [
            f"output.root={root}",
            f"tracking.uri=sqlite:///{root}/mlflow.db",
            f"launch.use_gpu={str(DEVICE.type == 'cuda').lower()}",
            "launch.cpus_per_worker=1",
        ]
        environment = os.environ | {"RAY_ADDRESS": "local", "RAYTRAIN2P_HOME": root}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        lines = next(Path(root).glob("phase2/*/metrics.jsonl")).read_text().splitlines()
        points = [point for point in map(json.loads, lines) if point["name"] == "train_loss" and point["step"] % 10 == 0]
        return [point["time"] for point in points]


def measure_launch(folder: Path, options: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> None:
    """Before and after a launch the plain loop makes the same steps."""
    for size in options.launch_batches:
        loops, launch = [], []
        for _ in range(options.launches):
            loops.append(loop_with_loader(folder, size, options.launch_steps))
            launch.append(launched(folder, size, options.launch_steps))
        loops.append(loop_with_loader(folder, size, options.launch_steps))
        skipped = 2  # tens of steps at the beginning
        per_step = [
            [[(after - before) / 10 for before, after in zip(ends[skipped:], ends[skipped + 1 :], strict=False)] for ends in runs]
            for runs in (loops, launch)
        ]
        medians = [[1e3 * statistics.median(run) for run in runs] for runs in per_step]
        plain, ours = (statistics.median(seconds for run in runs for seconds in run) for runs in per_step)
        row = {"batch": size, "loop_ms": medians[0], "launch_ms": medians[1], "speed_ratio": plain / ours, "per_step": per_step}
        write({"part": "launch", **row})
        texts = [", ".join(f"{value:.1f}" for value in values) for values in medians]
        print(f"\nbatch {size}, ms a step with loading: plain loop {texts[0]}; through Ray and Lightning {texts[1]}", flush=True)
        print(f"speed ratio {plain / ours:.3f}", flush=True)


def ceilings() -> dict[str, Any]:
    """What this machine is, and the rate of a large matrix product."""
    found: dict[str, Any] = {name: version(name) for name in ("torch", "transformers", "peft", "pytorch-lightning")}
    found |= {"device": DEVICE.type, "cpus": os.cpu_count()}
    if DEVICE.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        left, right = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        for _ in range(3):
            left @ right
        synchronize()
        begin = time.perf_counter()
        for _ in range(20):
            left @ right
        synchronize()
        found["matmul_tflops"] = 20 * 2 * 8192**3 / (time.perf_counter() - begin) / 1e12
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="gets gpu.json")
    parser.add_argument("--tiny", action="store_true", help="a model of width 64, few steps")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--length", type=int, default=256, help="padded length of a record, in tokens")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--profile", type=int, nargs="*", default=[16], help="batch sizes whose steps are profiled")
    parser.add_argument("--compile", type=int, nargs="*", default=[16], help="batch sizes at which compiled layers take part")
    parser.add_argument("--only", nargs="*", default=[], help="variants by name")
    parser.add_argument("--parts", nargs="+", default=["variants", "launch"], choices=["variants", "launch"])
    parser.add_argument("--launch-batches", type=int, nargs="+", default=[16])
    parser.add_argument("--launch-steps", type=int, default=200)
    parser.add_argument("--launches", type=int, default=2)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if options.tiny:
        options.batches, options.length, options.repeats, options.steps = [4], 128, 2, 2
        options.profile, options.compile = [4], [4]
        options.launch_batches, options.launch_steps, options.launches = [4], 50, 1
    options.directory.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    result = {"machine": ceilings(), "options": {key: str(value) for key, value in vars(options).items()}, "rows": rows}
    print(json.dumps(result["machine"]), flush=True)

    def write(row: dict[str, Any]) -> None:
        """After each row, so that an interrupted benchmark has some."""
        rows.append(row)
        (options.directory / "gpu.json").write_text(json.dumps(result, indent=1))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, TINY if options.tiny else {}, options.length, 512 if options.tiny else 2048)
        if "variants" in options.parts:
            measure_variants(folder, options, write)
        if "launch" in options.parts:
            measure_launch(folder, options, write)


if __name__ == "__main__":
    main()
