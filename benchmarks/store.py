"""An epoch of phase 1 from the feature store, against encoding in each epoch."""

import itertools
import statistics
from pathlib import Path

from benchmarks.options import Options
from benchmarks.report import Bar, Found, Table, median_text, number
from benchmarks.turns import Contestant, Ratio, python, recorded_steps

EPOCHS = {"stored": 20, "online": 3}
SECONDS = 1500.0


def measure(options: Options) -> Found:
    """Three commands: with an empty store, with the full one, and encoding images in each step (texts are always stored)."""
    records, batch = ("emoji:val", 16) if options.short else ("emoji:train", 256)
    starts, epochs = dict[str, float](), dict[str, list[float]]()
    for name, features in {"empty store": "stored", "full store": "stored", "encoding in each epoch": "online"}.items():
        out = options.folder / name.replace(" ", "_")
        out.mkdir()
        count = 3 if options.short else EPOCHS[features]
        settings = [
            f"data.train={records}",
            "data.val=null",
            "data.test={}",
            f"data.features={features}",
            f"data.feature_store={options.folder / 'features'}",
            f"training.max_epochs={count}",
            f"training.global_batch_size={batch}",
            "launch.use_gpu=false",
            f"output.root={out}",
            f"tracking.uri=sqlite:///{out}/mlflow.db",
        ]
        contestant = Contestant(
            name,
            python("-m", "raytrain2p.train", "--phase", "1", *settings),
            out / "log",
            lambda out=out: recorded_steps(out, "alignment"),  # type: ignore[misc]
            options.environment(),
        )
        try:
            contestant.wait_until(lambda out=out: bool(list(Path(out).glob("alignment/*/aligner.pt"))), SECONDS, 0.5)  # type: ignore[misc]
        finally:
            contestant.end()
        steps = recorded_steps(out, "alignment")
        per_epoch = len(steps) // count
        ends = [steps[epoch * per_epoch].end for epoch in range(1, count + 1)]
        epochs[name] = [after - before for before, after in itertools.pairwise(ends)]
        starts[name] = steps[1].end - contestant.started
        options.say(f"{name}: first step after {starts[name]:.1f} s, epochs of {statistics.median(epochs[name]):.2f} s")
    stored, online = epochs["full store"], epochs["encoding in each epoch"]
    build = starts["empty store"] - starts["full store"]
    saved = statistics.median(online) - statistics.median(stored)
    ratio = Ratio.of([one / statistics.median(stored) for one in online])
    rows = [
        ["an epoch from the store, s", median_text(stored)],
        ["an epoch that encodes, s", median_text(online)],
        ["ratio", str(ratio)],
        ["building the store, once, s", number(build)],
        ["epochs after which the store has paid", number(build / saved)],
    ]
    title = f"Phase 1, {records}, batch {batch}: images by EfficientNet-Lite0; texts are stored in both"
    return Found([Table(title, ["what", "median (quartiles)"], rows)], [Bar("encoding in each epoch", ratio, "phase 1, epoch")])
