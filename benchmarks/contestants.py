"""The contestants that are not the program itself, each a command:

    python -m benchmarks.contestants NAME CASE OUT [--steps N] [--profile] [--save-every N] [--precision float32]

CASE is the folder of a case (see case.py). A line for each step is written into OUT. Several workers are started by torchrun.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.case import CLIP, LEARNING_RATE, TARGETS, TOTAL_STEPS, Case, rate_factor, read_batches, read_media
from benchmarks.clock import Clock

SAVED = "saved.pt"


def workers() -> tuple[int, int]:
    """Rank and number, as torchrun sets them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def model_directory(case: Case) -> str:
    from raytrain2p.models.pretrained import model_directory

    return str(model_directory(case.language_model))


def initial_weights(case: Case) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(case.path / "initial.pt", weights_only=True)
    return found


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimizer_of(model: nn.Module) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor)


def torch_loop(model: nn.Module, case: Case, clock: Clock, rank: int, world: int, save_every: int = 0, out: Path | None = None) -> None:
    """A loop as short as it can be.

    Args:
        model: gives the summed loss of a batch.
        save_every: steps between two checkpoints of what trains, from which a later process continues; 0 for none.
    """
    trained = trained_parameters(model)
    optimizer, schedule = optimizer_of(model)
    called = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    batches, first = read_batches(case, rank), 0
    saved = (out or case.path) / SAVED
    if save_every and saved.exists():
        state = torch.load(saved, weights_only=True)
        first = state["step"]
        with torch.no_grad():
            for parameter, value in zip(trained, state["weights"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    for number in range(first, TOTAL_STEPS):
        batch = batches[number % len(batches)]
        with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16"):
            loss = called(batch) / batch["step_tokens"]
        (loss * world).backward()  # the gradients' mean over workers is that of the whole batch
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        clock.step(loss.detach())
        if save_every and (number + 1) % save_every == 0 and rank == 0:
            state = {"step": number + 1, "weights": [parameter.detach() for parameter in trained]}
            torch.save(state | {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, saved.with_suffix(".part"))
            saved.with_suffix(".part").replace(saved)
        if clock.ended:
            return


@contextlib.contextmanager
def process_group(world: int) -> Iterator[None]:
    if world > 1:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if world > 1:
            dist.destroy_process_group()


def module_loop(case: Case, clock: Clock, options: argparse.Namespace) -> None:
    """A bare torch loop with the program's module: the difference to the program is what Ray and Lightning cost."""
    from peft.tuners import lora

    from raytrain2p.models.lora import AdaptedLinear

    rank, world = workers()
    module = our_module(case)
    clock.watch("output layer", module.assistant.language_model.get_output_embeddings())
    if options.peft:
        for layer in module.modules():
            if isinstance(layer, AdaptedLinear):
                layer.__class__ = lora.Linear
    if options.rounded:
        module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    with process_group(world):
        torch_loop(Halves(module) if options.halves else module, case, clock, rank, world)


def rounded(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with features that have no more digits than bfloat16 has."""
    images = batch["items"]["image"]
    return batch | {"items": {"image": images._replace(values=images.values.bfloat16().to(images.values.dtype))}}


class Halves(nn.Module):
    """The same loss, summed in another order: one half of the records with the padding of all, and then the other."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        tokens, images = batch["tokens"], batch["items"]["image"]
        records, length = tokens["input_ids"].shape
        soft, supervised, halves = tokens["soft"]["image"], tokens["supervised"], []
        for first, last in ((0, records // 2), (records // 2, records)):
            placed, learnt = ((first * length <= places) & (places < last * length) for places in (soft, supervised))
            cut = {"input_ids": tokens["input_ids"][first:last], "soft": {"image": soft[placed] - first * length}}
            cut |= {"supervised": supervised[learnt] - first * length, "targets": tokens["targets"][learnt]}
            of_half = placed.view(len(images.values), -1)[:, 0]
            values = images._replace(values=images.values[of_half])
            halves.append(self.module({"tokens": cut, "items": {"image": values}, "step_tokens": batch["step_tokens"]}))
        return torch.stack(halves).sum()


def our_module(case: Case) -> Any:
    import pytorch_lightning as pl

    from raytrain2p.phases.instruction import module as instruction

    settings = case.settings()
    pl.seed_everything(settings.seed, verbose=False)
    return instruction.build(settings, TOTAL_STEPS, case.precision)


def plain_loop(case: Case, clock: Clock, options: argparse.Namespace) -> None:
    """The fastest plain loop known; see plain_model.py."""
    from benchmarks.plain_model import PlainAssistant

    rank, world = workers()
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    model = PlainAssistant(model_directory(case), TARGETS[case.targets], initial_weights(case), dtype)
    clock.watch("output layer", model.language_model.get_output_embeddings())
    with process_group(world):
        torch_loop(model, case, clock, rank, world, options.save_every, options.out)


def lightning(case: Case, clock: Clock, options: argparse.Namespace) -> None:
    """Lightning's Trainer with the program's module, without Ray and without our callbacks."""
    import pytorch_lightning as pl

    rank, world = workers()
    module = our_module(case)

    class Report(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            clock.step(pl_module.pass_loss / world)  # the mean over workers is the step's loss
            trainer.should_stop = clock.ended

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        precision="bf16-mixed" if case.precision == "bf16" else "32-true",
        max_steps=TOTAL_STEPS,
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Report()],
    )
    loader = torch.utils.data.DataLoader(cast(Any, read_batches(case, rank)), batch_size=None)
    trainer.fit(module, loader)


class ItemsOfImages:
    """A collate function for the trainers of Hugging Face: an item is the number of a whole batch, whose images are decoded here."""

    def __init__(self, case: Case, encoder: Any, world: int) -> None:
        self.batches = [list(zip(read_batches(case, rank), read_media(case, rank), strict=True)) for rank in range(world)]
        self.encoder = encoder

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        from raytrain2p.data.media import decode

        (row,) = rows
        rank = row["number"] % len(self.batches)
        mine = self.batches[rank]
        batch, media = mine[row["number"] // len(self.batches) % len(mine)]
        pixels = torch.stack(self.encoder.preprocess([decode(ref) for ref in media]))
        return {"input_ids": batch["tokens"]["input_ids"], **batch["masks"], "pixels": pixels}


def hugging_face(bf16: bool, trl: bool) -> Callable[[Case, Clock, argparse.Namespace], None]:
    """The Trainer of transformers, or TRL's SFTTrainer, on the whole model with PEFT."""

    def run(case: Case, clock: Clock, options: argparse.Namespace) -> None:
        trainer, model = hugging_face_trainer(case, clock, options.out, bf16, trl)
        clock.watch("output layer", model.get_output_embeddings())
        clock.watch("encoder", model.get_base_model().model.encoder)
        trainer.train()

    return run


def hugging_face_trainer(case: Case, clock: Clock, out: Path, bf16: bool, trl: bool, **arguments: Any) -> tuple[Any, Any]:
    """The trainer and its model.

    Args:
        arguments: of the trainer's own settings, in place of those here.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from benchmarks.plain_model import hugging_face_model
    from raytrain2p.models.encoders import EncoderSpec

    _, world = workers()
    encoder = EncoderSpec("image", case.encoder, {}).build()
    model = hugging_face_model(model_directory(case), encoder, TARGETS[case.targets], initial_weights(case))

    class Report(TrainerCallback):
        loss: Any = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.step(self.loss / world)
            control.should_training_stop = clock.ended

    report = Report()

    def reporting(of: type) -> Any:
        class Reporting(of):
            def compute_loss(self, model: Any, inputs: Any, *positional: Any, **named: Any) -> Any:
                loss = super().compute_loss(model, inputs, *positional, **named)
                report.loss = loss.detach()
                return loss

        return Reporting

    rows = [{"number": number} for number in range(TOTAL_STEPS * world)]
    shared: dict[str, Any] = {
        "output_dir": str(out / "trainer"),
        "max_steps": TOTAL_STEPS,
        "per_device_train_batch_size": 1,  # an item is a whole batch
        "train_sampling_strategy": "sequential",
        "bf16": bf16,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": True,
        "max_grad_norm": CLIP,
        **arguments,
    }
    taken: dict[str, Any] = {
        "model": model,
        "data_collator": ItemsOfImages(case, encoder, world),
        "optimizers": optimizer_of(model),
        "callbacks": [report],
    }
    if trl:
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        configuration = SFTConfig(**shared, gradient_checkpointing=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        tokenizer = AutoTokenizer.from_pretrained(model_directory(case))
        trainer = reporting(SFTTrainer)(args=configuration, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **taken)
    else:
        trainer = reporting(Trainer)(args=TrainingArguments(**shared), train_dataset=cast(Any, rows), **taken)
    trainer.pop_callback(PrinterCallback)
    return trainer, model


def torch_trainer(case: Case, clock: Clock, options: argparse.Namespace) -> None:
    """The smallest program with Ray's TorchTrainer: the plain loop as its training function."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    folder, out, steps, save_every = case.folder, str(options.out), options.steps, options.save_every

    def train() -> None:
        of = argparse.Namespace(out=Path(out), save_every=save_every)
        torch.set_num_threads(os.cpu_count() or 1)
        plain_loop(Case.read(Path(folder)), Clock(Path(out), 0, steps), of)

    ray.init(include_dashboard=False, log_to_driver=False)
    scaling = ScalingConfig(num_workers=1, resources_per_worker={"CPU": os.cpu_count() or 1})
    configuration = RunConfig(name="smallest", storage_path=str(options.out / "ray"), failure_config=FailureConfig(max_failures=1))
    TorchTrainer(train, scaling_config=scaling, run_config=configuration).fit()


CONTESTANTS: dict[str, Callable[[Case, Clock, argparse.Namespace], None]] = {
    "module_loop": module_loop,
    "plain_loop": plain_loop,
    "lightning": lightning,
    "hf_float32": hugging_face(bf16=False, trl=False),
    "hf_bf16": hugging_face(bf16=True, trl=False),
    "trl_bf16": hugging_face(bf16=True, trl=True),
    "torch_trainer": torch_trainer,
}


def run(name: str, case: Case, options: argparse.Namespace) -> Clock:
    rank, _ = workers()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.precision:
        case = replace(case, precision=options.precision)
    clock = Clock(options.out, rank, options.steps, options.profile)
    CONTESTANTS[name](case, clock, options)
    return clock


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("case", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=0, help="after which it ends; 0 for never")
    parser.add_argument("--profile", action="store_true", help="write what one step did into OUT/counts")
    parser.add_argument("--save-every", type=int, default=0)
    parser.add_argument("--precision", choices=["bf16", "float32"], help="in place of the case's")
    parser.add_argument("--halves", action="store_true", help="half of each batch at a time: sums in another order")
    parser.add_argument("--peft", action="store_true", help="peft's own LoRA layers, which round what they compute twice")
    parser.add_argument("--rounded", action="store_true", help="features in bfloat16, as an encoder within the step gives them")
    parser.add_argument("--packages", type=Path, help="folder of packages that are not installed, for TRL")
    return parser.parse_args(arguments)


def main() -> None:
    options = parsed(sys.argv[1:])
    if options.packages is not None:
        sys.path.append(str(options.packages))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers()[1]))
    run(options.name, Case.read(options.case), options)


if __name__ == "__main__":
    main()
