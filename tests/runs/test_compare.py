"""`runs compare`: what differs between runs, the best of each metric, and their learning curves in one plot."""

import io
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from raytrain2p.config import Settings
from raytrain2p.config.phases import SWEEPS
from raytrain2p.runs import __main__ as runs
from raytrain2p.runs.comparison import read_compared, readable
from raytrain2p.runs.comparison_plot import COLOURS, comparison_png, draw_panel, labels
from raytrain2p.runs.output import human_duration
from raytrain2p.storage.files import write_json
from raytrain2p.tracking.metrics_file import MetricPoint, MetricsFile
from raytrain2p.tracking.mlflow_store import client_of
from raytrain2p.tracking.mlflow_sync import MlflowSync
from raytrain2p.tracking.plots import GREY
from raytrain2p.tracking.run import CHANGED_TAG, SWEEP_TAG, TRIAL_TAG, Run
from raytrain2p.tracking.run_writer import describe_run, resolved_config
from tests.tracking.stores import NOBODY, create, settings_in

Train = Callable[..., Run]


@pytest.fixture
def train(settings: Settings, tmp_path: Path) -> Train:
    """Makes a finished run with settings, training losses, validation losses at the last steps, and metrics of tests."""

    def run(
        *overrides: str,
        losses: Sequence[float] = (3.0, 2.0),
        val: Sequence[float] = (),
        tests: dict[str, float] | None = None,
        digest: str = "a" * 64,
        phase: int = 2,
    ) -> Run:
        made = settings_in(tmp_path, *overrides, phase=phase)
        name = "phase2" if phase == 2 else "alignment"
        one = create(made, f"launch-{len(list((tmp_path / 'checkpoints' / '.launches').glob('*.json')))}", name)
        facts = {"train_records": 4006, "train_digest": digest, "inputs": {"model.language_model=x": {"weights": "b" * 64}}}
        describe_run(one, resolved_config(made, {}), "command", facts)
        points = [MetricPoint("train_loss", loss, step, 1.7e9 + 10 * step) for step, loss in enumerate(losses, 1)]
        points += [MetricPoint("val/loss", loss, len(losses) - len(val) + n, 1.7e9 + 50) for n, loss in enumerate(val, 1)]
        MetricsFile(one.files.metrics).append(points)
        write_json(one.files.test_metrics, tests or {})
        one.checkpoints.mkdir(exist_ok=True)
        (one.checkpoints / f"best-epoch=00-train_loss={min([*losses, 9.0]):.4f}.ckpt").write_bytes(b"")
        one.files.write_status("FINISHED")
        write_json(one.files.status, one.files.read_status() | {"at": 1.7e9 + 100})
        return one

    return run


def compare(capsys: pytest.CaptureFixture[str], *words: str | Run, code: int = 0) -> str:
    """What the command prints."""
    typed = [word.directory if isinstance(word, Run) else word for word in words]
    assert runs.main(["compare", *typed]) == code, capsys.readouterr().err
    return capsys.readouterr().out


def cells(table: str, name: str) -> list[str]:
    """The cells of a row."""
    (row,) = [line for line in table.splitlines() if line.startswith(f" {name}  ")]
    return [cell.strip() for cell in row.removeprefix(f" {name}").split("  ") if cell.strip()]


def test_only_what_differs_is_listed_and_what_one_lacks(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    first = train("training.learning_rate=0.01", "data.test={test: emoji:test_drawing}")
    second = train("model.lora.rank=8", "data.test={}", digest="c" * 64)
    table = compare(capsys, first, second)
    assert table.splitlines()[0].split() == [first.run_id[:8], second.run_id[:8]]
    assert cells(table, "training.learning_rate") == ["0.01", "0.001"]
    assert cells(table, "model.lora.rank") == ["16", "8"]
    assert cells(table, "data.test.test") == ["emoji:test_drawing", "-"]
    assert cells(table, "data.train records") == ["aaaaaaaa (4,006)", "cccccccc (4,006)"]
    assert "warmup" not in table
    assert "language_model" not in table
    found = json.loads(compare(capsys, "--json", first, second))
    assert found["differing_settings"]["model.lora.rank"] == {first.run_id: 16, second.run_id: 8}
    assert found["differing_settings"]["data.test.test"] == {first.run_id: "emoji:test_drawing"}
    assert list(found["differing_inputs"]) == ["data.train records"]
    assert [one["settings"]["training"] if "training" in one["settings"] else one["steps"] for one in found["runs"]] == [2, 2]


def test_runs_of_the_same_settings_are_said_to_be_the_same(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert "settings: all the same" in compare(capsys, train(), train())


def test_the_best_of_each_metric_is_marked_where_it_is_known_which_is_better(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    tests = {
        "test/exact_match/x": 0.5,
        "test/token_f1/x": 0.5,
        "test/exact_match_shuffled/x": 0.25,
        "test/majority/x": 0.1,
        "test/text_to_image_recall_at_1": 0.5,
    }
    better = {
        "test/exact_match/x": 0.75,
        "test/token_f1/x": 0.75,
        "test/exact_match_shuffled/x": 0.5,
        "test/majority/x": 0.1,
        "test/text_to_image_recall_at_1": 0.5,
    }
    first, second = train(losses=(3.0, 1.5, 2.5), val=(1.0, 2.0), tests=tests), train(losses=(3.0, 2.0), tests=better)
    table = compare(capsys, first, second)
    assert cells(table, "best train_loss") == ["1.5 at 2 *", "2 at 2"]
    assert cells(table, "train_loss") == ["2.5", "2 *"]
    assert cells(table, "val/loss") == ["2", "-"]
    assert cells(table, "lowest val/loss") == ["1 at 2", "-"]
    assert cells(table, "test/exact_match/x") == cells(table, "test/token_f1/x") == ["0.5", "0.75 *"]
    assert cells(table, "test/exact_match_shuffled/x") == ["0.25", "0.5"]
    assert cells(table, "test/text_to_image_recall_at_1") == ["0.5", "0.5"]
    assert "majority" not in table
    assert cells(table, "steps") == ["3", "2"]
    assert cells(table, "duration") == ["1 min 30 s", "1 min 30 s"]
    found = json.loads(compare(capsys, "--json", first, second))
    assert found["best"]["test/exact_match/x"] == [second.run_id]
    assert found["runs"][0]["metrics"]["train_loss"]["lowest_step"] == 2
    assert found["runs"][0]["metrics"]["test/majority/x"] == {"last": 0.1}


def test_a_table_of_two_runs_fits_a_terminal(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data.train=[{path: emoji:train, weight: 2}, {path: emoji:val, weight: 1}]", f"model.system_prompt={'long ' * 30}"]
    metrics = {"test_drawing/exact_match_shuffled/group": 0.123456}
    table = compare(capsys, train(*words, tests=metrics), train(tests=metrics))
    assert max(map(len, table.splitlines())) <= 80
    assert cells(table, "data.train")[0].startswith("emoji:train x 2")
    assert table.count("long") == 30


def test_many_runs_have_a_line_each_if_that_is_narrower(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    several = [train(f"training.learning_rate={n}e-3", losses=(3.0, 2 + n / 100)) for n in range(1, 13)]
    heading, *lines, note = compare(capsys, *several).splitlines()
    assert heading.split()[:2] == ["run", "learning_rate"]
    assert [line.split()[0] for line in lines] == [run.run_id[:8] for run in several]
    assert ["*" in line for line in lines] == [True] + [False] * 11
    assert note == "* the best"


def test_a_sweep_stands_for_its_trials(settings: Settings, train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = create(settings, "sweep", SWEEPS)
    trials = [train(f"training.learning_rate={n}e-3") for n in (1, 2)] + [train(losses=())]
    train()  # another run
    for n, trial in enumerate(trials):
        trial.add_tags({SWEEP_TAG: sweep.run_id, TRIAL_TAG: str(n)})
    assert runs.main(["compare", f"output.root={settings.output.root}", sweep.run_id[:8], trials[1].run_id]) == 0
    table, error = capsys.readouterr()
    assert table.splitlines()[0].split() == [trial.run_id[:8] for trial in trials[:2]]
    assert cells(table, "trial") == ["0", "1"]
    assert f"{trials[2].run_id[:8]}, trial 2, has no metrics, and is left out" in error


def test_models_and_losses_of_two_phases_are_not_compared(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    table = compare(capsys, train(losses=(2.0, 1.0), phase=1), train(losses=(3.0, 2.0)), train("model.lora.rank=8", losses=(3.0, 2.5)))
    assert cells(table, "model.lora.rank") == ["-", "16", "8"]
    assert "model.dimension" not in table
    assert cells(table, "train_loss") == ["1", "2 *", "2.5"]
    assert cells(table, "phase") == ["alignment", "phase2", "phase2"]
    assert "* the best of its phase" in table


def test_a_damaged_run_is_a_line_and_the_others_are_compared(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = train(), train(), train()
    second.files.config.write_text("{")
    assert runs.main(["compare", *(run.directory for run in (first, second, third))]) == 1
    table, error = capsys.readouterr()
    assert table.splitlines()[0].split() == [first.run_id[:8], third.run_id[:8]]
    assert error.count(str(second.files.config)) == 1
    assert runs.main(["compare", first.directory, second.directory]) == 1
    assert capsys.readouterr().out == ""


def test_what_cannot_be_compared_is_one_problem(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, empty, folder = train().directory, train().directory, train(losses=()).directory, tmp_path / "folder.png"
    folder.mkdir()
    for words, problem in (
        ([], "RUN\n    at least two runs are required; there is none"),
        ([first], "RUN\n    at least two runs are required; there is 1"),
        ([first, first], "RUN\n    at least two runs are required; there is 1"),
        ([first, "ffff"], "RUN ffff\n    there is no such run"),
        ([first, empty], "has no metrics: it ended before its first step"),
        ([first, second, "--plot", "no/such/a.png"], "--plot no/such/a.png\n    there is no directory"),
        ([first, second, "--plot", "a.pdf"], "--plot a.pdf\n    does not end in .png"),
        ([first, second, "--plot", str(folder)], "is a directory"),
        ([first, second, "--plot", "/proc/a.png"], "--plot /proc/a.png\n    "),
    ):
        assert runs.main(["compare", f"output.root={tmp_path}/checkpoints", *words]) == 2
        out, error = capsys.readouterr()
        assert problem in error
        assert "1 problem;" in error
        assert out == ""


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.format == "PNG"
    return image


def test_the_curves_of_each_phase_have_a_panel(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, aligner = train(losses=(3.0, math.nan, 2.0, 1.0), val=(1.0,)), train("model.lora.rank=8"), train(phase=1)
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    assert f"plot: {one}" in compare(capsys, first, second, "--plot", str(one))
    compare(capsys, first, second, aligner, "--plot", str(two))
    assert opened(two.read_bytes()).height > 1.6 * opened(one.read_bytes()).height


def test_each_curve_is_told_apart_and_beyond_ten_the_best_are_in_colour(train: Train, tmp_path: Path) -> None:
    several = [train(f"training.learning_rate={n}.0000001e-3", losses=(3.0, math.nan, 2 + n / 100)) for n in range(1, 13)]
    compared = [read_compared(run, f"{tmp_path}/checkpoints") for run in reversed(several)]
    assert labels(compared)[0] == f"{several[-1].run_id[:8]}  learning_rate=0.012"
    for shown, grey in ((compared[:10], 0), (compared, 12 - len(COLOURS))):
        _, axes = plt.subplots()
        draw_panel(axes, shown)
        curves = [line for line in axes.get_lines() if str(line.get_label())[:8] in {run.run_id[:8] for run in several}]
        looks: set[Any] = {(to_hex(line.get_color()).lower(), line.get_linestyle()) for line in curves}
        assert len(curves) == len(shown)
        assert all(np.isfinite(np.asarray(line.get_ydata())).all() for line in curves)
        assert sum(to_hex(line.get_color()) == GREY for line in curves) == grey
        assert len(looks) == (10 if not grey else len(COLOURS) + 1)
        plt.close()
    best = {str(line.get_label())[:8] for line in curves if to_hex(line.get_color()) != GREY}
    assert best == {run.run_id[:8] for run in several[: len(COLOURS)]}
    assert opened(comparison_png(compared)).width > 500


def test_the_plot_is_kept_with_each_run_and_sent_to_mlflow(settings: Settings, train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = train(), train("model.lora.rank=8")
    sweep = create(settings, "sweep", SWEEPS)
    sweep.files.write_status("FINISHED")
    third = train("model.lora.rank=4")
    third.add_tags({SWEEP_TAG: sweep.run_id, TRIAL_TAG: "0"})
    compare(capsys, first, second, sweep, "--log")
    ids = "_".join(sorted(run.run_id[:8] for run in (first, second, sweep)))
    for run in (first, second, sweep):
        opened((run.files.plots / f"comparison_{ids}.png").read_bytes())
        listed = client_of(settings.tracking.uri).list_artifacts(run.run_id, "plots")
        assert [one.path for one in listed] == [f"plots/comparison_{ids}.png"]
        assert not any(MlflowSync(run, settings.tracking.uri)._artifacts_left())
    assert not third.files.plots.exists()


def test_runs_whose_directories_are_gone_are_compared_as_mlflow_has_them(
    settings: Settings, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = create(settings, "sweep", SWEEPS)
    runs_of_it = [train(f"model.lora.rank={rank}", losses=(3.0, rank / 8), val=(rank / 8,)) for rank in (8, 16)]
    for n, trial in enumerate(runs_of_it):
        trial.add_tags({SWEEP_TAG: sweep.run_id, TRIAL_TAG: str(n)})
    changed = train("training.weight_decay=0.5")
    changed.add_tags({f"{CHANGED_TAG}training.weight_decay": "0.25"})
    for run in (sweep, *runs_of_it, changed):
        MlflowSync(run, settings.tracking.uri).send()
    where = [f"output.root={settings.output.root}", f"tracking.uri={settings.tracking.uri}"]
    before = compare(capsys, *where, sweep)
    for run in (sweep, changed, runs_of_it[1]):
        shutil.rmtree(run.path)
    both = compare(capsys, *where, runs_of_it[0], runs_of_it[1].run_id[:8], changed.launch_id)
    assert cells(both, "model.lora.rank") == ["8", "16", "16"]
    assert cells(both, "training.weight_decay") == ["0.0", "0.0", "0.25"]
    shutil.rmtree(runs_of_it[0].path)
    after = compare(capsys, *where, sweep.run_id)
    assert after == before
    assert runs.main(["compare", *where, sweep.run_id[:8], "--log"]) == 1
    assert f"{sweep.run_id[:8]} has no directory in" in capsys.readouterr().err
    assert runs.main(["compare", where[0], f"tracking.uri={NOBODY}", sweep.run_id, "abcd"]) == 2
    error = capsys.readouterr().err
    assert error.count("there is no such run in") == 2
    assert error.count(NOBODY) == 1


def test_neither_mlflow_nor_matplotlib_is_imported_unless_needed(train: Train, tmp_path: Path) -> None:
    code = (
        "import sys; from raytrain2p.runs.__main__ import main; code = main(); "
        "print(*sorted({'mlflow', 'matplotlib'} & {*sys.modules}), file=sys.stderr); sys.exit(code)"
    )
    names = [train().directory, train().directory]
    for words, imported in (([], "\n"), (["--plot", f"{tmp_path}/a.png"], "matplotlib\n")):
        done = subprocess.run([sys.executable, "-c", code, "compare", *names, *words], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, imported)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([None, True], ["null", "true"]),
        (["postgresql://me:hunter2@a/x", "postgresql://me:hunter2@b/x"], [".../me:***@a/x", ".../me:***@b/x"]),
        (["", "a\nb"], ['""', '"a\\nb"']),
        ([[{"path": "a:b", "weight": 0.5}, {"path": "c:d", "weight": None}], []], ["a:b x 0.5, c:d", "[]"]),
        (["/data/runs/a/x.pt", "/data/runs/b/x.pt", None], [".../a/x.pt", ".../b/x.pt", "null"]),
        ([f"/data/alignment/{'0' * 32}_20261126_022113/aligner.pt", "a.pt"], ["/data/alignment/00000000/aligner.pt", "a.pt"]),
    ],
)
def test_values_are_shown_as_they_are_typed_and_paths_shortened(values: list[Any], texts: list[str]) -> None:
    assert readable([{"key": value} for value in values], "key") == texts


def test_durations_are_short() -> None:
    assert [human_duration(seconds) for seconds in (0.4, 59.7, 754, 7500, 90_000)] == [
        "0 s",
        "1 min 0 s",
        "12 min 34 s",
        "2 h 5 min",
        "25 h 0 min",
    ]
