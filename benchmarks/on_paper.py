"""What a step of phase 2 would take on GPUs that are not here, as `--dry-run --on` tells it; nothing is measured."""

from benchmarks.gpu import SHAPE, make_inputs, overrides
from benchmarks.options import Options
from benchmarks.report import Found, Table

SHAPES = {  # of Qwen2.5; records in a pass
    "0.5B": ({**SHAPE}, 16),
    "7B": (
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
        4,
    ),
}
MACHINES = ["nodes=1,gpus=8,gpu=h100", "nodes=8,gpus=8,gpu=h100", "nodes=64,gpus=8,gpu=h100", "nodes=64,gpus=8,gpu=h100,network=400"]
FULL = ["model.tuning=full", "launch.strategy=fsdp", "training.gradient_checkpointing=true"]
KINDS = {"LoRA, copies": [], "full, sharded": FULL, "full, sharded within nodes": [*FULL, "launch.shard_workers=8"]}
LENGTH = 1024  # tokens of the longest records; the shortest have half
COLUMNS = ["model, what trains", "GPUs", "GB a GPU", "seconds a step", "of these, passes", "exchange", "tokens/s", "MFU"]


def measure(options: Options) -> Found:
    from raytrain2p.config import InstructionSettings, load_settings
    from raytrain2p.launch.cost import cost_of, parsed_machines, settings_on, weights_of
    from raytrain2p.launch.dry_run import memory
    from raytrain2p.phases.instruction.data import read_inputs

    rows = []
    for name, (shape, records) in SHAPES.items():
        folder = options.folder / f"paper{name}"
        folder.mkdir()
        make_inputs(folder, shape, LENGTH, 128 if options.short else 8192, hollow=True)
        for kind, more in KINDS.items():
            for text in MACHINES[:1] if options.short else MACHINES:
                machines = parsed_machines(text)
                if machines.nodes == 1 and "within" in kind:
                    continue
                batch = records * machines.workers
                settings = load_settings(2, None, [*overrides(folder, batch, 1000), f"launch.num_workers={machines.workers}", *more])
                assert isinstance(settings, InstructionSettings)
                there = settings_on(settings, machines)
                inputs = read_inputs(settings).with_settings(there)
                weights = weights_of(there, inputs.parts())
                needed, _ = memory(there, inputs, weights)
                cost = cost_of(there, inputs, weights, machines, False)
                (least, most), mfu = cost.seconds, cost.mfu or (0.0, 0.0)
                rows.append(
                    [
                        f"{name}, {kind}",
                        f"{machines}" + (", 400 Gbit/s a node" if "network" in text else ""),
                        f"{needed / 1e9:.1f}",
                        f"{least:.2f} to {most:.2f}",
                        f"{cost.passes * cost.speed.of_pass:.2f}",
                        f"{cost.exchange:.3f}",
                        f"{cost.tokens / most:,.0f}",
                        f"{mfu[0]:.0%} to {mfu[1]:.0%}",
                    ]
                )
                options.say(f"{rows[-1]}: {cost.speed.because}")
    notes = [f"Records of {LENGTH // 2} to {LENGTH} tokens, one image each; 16 a GPU and step for 0.5B, 4 for 7B. Shapes of Qwen2.5."]
    return Found(tables=[Table("On paper: nothing of this is measured", COLUMNS, rows, notes)])
