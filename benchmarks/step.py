"""A step of phase 2: the program through Ray, beside plain loops and the trainers that others use."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.case import TARGET_NAMES, Case, prepare
from benchmarks.options import PACKAGES, Options
from benchmarks.report import NOISES, Bar, Found, Table
from benchmarks.turns import Contestant, Ended, Ratio, Steps, paired, python, recorded_steps, take_turns, written_steps

OURS = "raytrain2p"
NAMES = {
    OURS: "raytrain2p, through Ray",
    "module_loop": "bare torch loop, same module",
    "plain_loop": "fastest plain loop: torch + peft",
    "lightning": "plain Lightning, same module",
    "torch_trainer": "that plain loop in the smallest TorchTrainer program",
    "hf_float32": "HF Trainer + PEFT, float32, encodes in the step",
    "hf_bf16": "HF Trainer + PEFT, bf16 autocast, encodes in the step",
    "trl_bf16": "TRL SFTTrainer + PEFT, bf16, encodes in the step",
}
FLOAT32 = ("hf_float32",)
ROUNDED = ("hf_bf16", "trl_bf16")  # encode within autocast, so that features have the digits of bf16
PEFT = ("plain_loop", "torch_trainer", *ROUNDED)  # in bf16 peft's layers round the base's product before they add to it; ours do not
SECONDS_PER_STEP = 20.0  # that are waited for
MOST_NOISE = 2e-2
TOLERANCE = 2e-3  # of float32 losses: stored features are rounded to float16, those encoded in the step are not


@dataclass(frozen=True)
class Setting:
    """One comparison.

    Args:
        groups: contestants that are alive at once; the program is in each. With batch 64, those of Hugging Face need 8 GB each.
        steps: of a turn; the first one is not counted. An even number, since the program writes two steps at a time.
    """

    targets: str
    batch: int
    workers: int
    groups: tuple[tuple[str, ...], ...]
    turns: int
    steps: int

    def __str__(self) -> str:
        workers = f", {self.workers} workers" if self.workers > 1 else ""
        return f"LoRA on {TARGET_NAMES[self.targets]}, batch {self.batch}{workers}"


ALL = (("module_loop", "plain_loop", "lightning", "torch_trainer"), ("hf_float32", "hf_bf16", "trl_bf16"))
LARGE = (("module_loop", "plain_loop"), ("hf_float32",), ("hf_bf16",))
FEW = (("module_loop", "plain_loop", "hf_float32"),)
SETTINGS = [
    Setting("all", 16, 1, ALL, turns=4, steps=4),
    Setting("attention", 16, 1, ALL, turns=3, steps=4),
    Setting("all", 64, 1, LARGE, turns=2, steps=4),
    Setting("attention", 64, 1, LARGE, turns=2, steps=4),
    Setting("all", 16, 2, FEW, turns=2, steps=4),
]
SHORT = [Setting("all", 4, 1, (("plain_loop", "hf_bf16", "trl_bf16"),), turns=1, steps=4)]


def measure(options: Options) -> Found:
    found = Found()
    for number, setting in enumerate(SHORT if options.short else SETTINGS):
        case = options.case.with_aligner(
            folder=str(options.folder / f"step{number}"),
            targets=setting.targets,
            batch=setting.batch,
            workers=setting.workers,
            steps=(setting.turns + 1) * setting.steps + 2,
        )
        try:
            prepare(case)
            compare(case, setting, options, found)
        except Exception as error:  # the other settings are measured all the same
            found.errors.append(f"{setting}: {type(error).__name__}: {error}")
    return found


def command(name: str, case: Case, out: Path, options: Options, *more: str) -> Contestant:
    """Start a contestant; `more` are arguments of its own."""
    out.mkdir(parents=True, exist_ok=True)
    steps: Steps
    if name == OURS:
        arguments = ["-m", "raytrain2p.train", "--phase", "2", *case.overrides()]
        arguments += [f"output.root={out}", f"tracking.uri=sqlite:///{out}/mlflow.db", "training.log_every=2", *more]
        steps = lambda: recorded_steps(out)  # noqa: E731
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.workers}"] if case.workers > 1 else []
        arguments = [*launcher, "-m", "benchmarks.contestants", name, str(case.path), str(out), "--packages", str(PACKAGES), *more]
        steps = lambda: written_steps(out, case.workers)  # noqa: E731
    return Contestant(name, python(*arguments), out / "log", steps, options.environment())


def compare(case: Case, setting: Setting, options: Options, found: Found) -> None:
    """Let the contestants of a setting take turns, group by group."""
    references = reference_losses(case, setting, options)
    rows, notes = list[list[str]](), list[str]()
    for number, group in enumerate(setting.groups):
        running, failed = raced((OURS, *group), case, setting, case.path / str(number), options)
        durations = {one.name: one.durations() for one in running}
        losses = {one.name: one.losses() for one in running}
        if OURS in failed:
            found.errors.append(f"{setting}: {failed[OURS]}")
            continue
        for name in (OURS, *group) if not rows else group:
            if name in failed:
                rows.append([NAMES[name], "failed", "", "", "", ""])
                notes.append(f"{NAMES[name]}: {' '.join(failed[name].split())[:600]}")
                continue
            ratio = paired(durations[name], durations[OURS])
            right, differs = agreement(name, losses, references)
            rate = Ratio.of([setting.batch / seconds for seconds in durations[name].values()])
            shown = str(ratio) if right else f"void ({ratio.median:.2f})"
            rows.append([NAMES[name], f"{rate.median:.1f}", shown, str(ratio.count), differs, "yes" if right else "**no**"])
            options.say(f"{setting}: {rows[-1]}")
            if right and name != OURS:
                found.bars.append(Bar(NAMES[name], ratio, f"step, {setting}"))
    columns = ["who", "samples/s", "their time / ours, median (quartiles)", "steps", "losses differ by, of at most", "agree"]
    exact = references["float32"]
    lost = {kind: difference(exact, references[kind]) for kind in ("bf16", "peft")}
    notes.append(f"From the losses of float32, those of bf16 differ by {lost['bf16']:.1e}; with peft's LoRA layers by {lost['peft']:.1e}.")
    if rows:
        found.tables.append(Table(str(setting), columns, rows, notes))


def raced(names: tuple[str, ...], case: Case, setting: Setting, folder: Path, options: Options) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants after their turns, ended; and what was wrong with those that failed."""
    say, running, failed = options.saying(str(setting)), list[Contestant](), dict[str, str]()
    try:
        for name in names:
            if name == "trl_bf16" and not PACKAGES.is_dir():
                failed[name] = f"not installed: {PACKAGES} is made by `make bench`"
                continue
            contestant = command(name, case, folder / name, options)
            running.append(contestant)
            try:
                contestant.wait_for_step(setting.steps, 240 + setting.steps * SECONDS_PER_STEP)
                say(f"{name} is warm")
            except Ended as error:
                failed[name] = str(error)
                say(f"{name} failed")
            contestant.each("suspend")
        ready = [one for one in running if one.name not in failed]
        failed |= take_turns(ready, setting.turns, setting.steps, say)
    finally:
        for contestant in running:
            contestant.end()
    return running, failed


def reference_losses(case: Case, setting: Setting, options: Options) -> dict[str, dict[int, float]]:
    """Of our own module in a bare loop, in float32 and in bf16. The latter with our LoRA layers and with peft's; each also with half of a
    batch at a time, which sums in another order. And with features in bf16."""
    losses = {}
    of = case.path / "references"
    # rounding grows from step to step: by the eighth, that of stored features has moved a loss by 3 %
    steps = 6 if setting.batch == 16 and not options.short else 4
    peft = {"peft": ["--peft"], "peft, summed": ["--peft", "--halves"], "peft, rounded": ["--peft", "--rounded"]}
    for name, more in {"float32": ["--precision", "float32"], "bf16": [], "bf16, summed": ["--halves"], **peft}.items():
        out = of / name
        contestant = command("module_loop", case, out, options, "--steps", str(steps), *more)
        try:
            contestant.wait_for_step(steps, 240 + steps * SECONDS_PER_STEP)
            losses[name] = contestant.losses()
        finally:
            contestant.end()
    return losses


def agreement(name: str, losses: Mapping[str, Mapping[int, float]], references: Mapping[str, Mapping[int, float]]) -> tuple[bool, str]:
    """Whether a contestant's losses, the program's among them, are those of the reference, and by how much they differ on average."""
    kind = "float32" if name in FLOAT32 else "peft" if name in PEFT else "bf16"
    limit = TOLERANCE if name in FLOAT32 else noise(name, references)
    by = difference(references[kind], losses[name])
    return by <= limit, f"{by:.1e} of {limit:.1e} ({kind})"


def noise(name: str, references: Mapping[str, Mapping[int, float]]) -> float:
    """By how much a contestant's losses in bf16 may differ; never more than MOST_NOISE, which a mistake in the reference would be."""
    kind = "peft" if name in PEFT else "bf16"
    sources = [f"{kind}, summed", *(["peft, rounded"] if name in ROUNDED else [])]
    return min(MOST_NOISE, max(TOLERANCE, NOISES * max(difference(references[kind], references[source]) for source in sources)))


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """The mean, relative to the loss, over steps that both made."""
    both = sorted(one.keys() & other.keys())
    return sum(abs(one[number] - other[number]) / abs(one[number]) for number in both) / len(both) if both else float("nan")
