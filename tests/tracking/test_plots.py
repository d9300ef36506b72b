"""Plots of a run are PNG files of a sensible size, for any metrics and answers."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from raytrain2p.tracking.plots import answer_sheet, read_metrics, smoothed, training_curve


def write_metrics(path: Path, steps: int, val: bool = False) -> Path:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        rows.append({"step": step, "name": "train_loss", "value": 3 / step, "time": 0.0})
        rows.append({"step": step, "name": "learning_rate", "value": 1e-3, "time": 0.0})
    if val:
        rows.append({"step": steps, "name": "val/loss", "value": 1.0, "time": 0.0})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(*texts: str) -> list[dict[str, Any]]:
    return [{"question": "What does the picture show?", "answer": text, "expected": "a fox"} for text in texts]


def opened(path: Path) -> Image.Image:
    image = Image.open(path)
    image.load()
    assert image.format == "PNG"
    return image


def no_image(row: dict[str, Any]) -> list[Any]:
    return []


def test_metrics_are_read_by_name_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = read_metrics(write_metrics(tmp_path / "metrics.jsonl", 3, val=True))
    assert set(found) == {"train_loss", "learning_rate", "val/loss"}
    steps, values = found["train_loss"]
    assert steps.tolist() == [1, 2, 3]
    assert values.tolist() == [3.0, 1.5, 1.0]


def test_an_incomplete_last_line_is_left_out(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "metrics.jsonl", 3)
    path.write_text(path.read_text()[:-15])
    assert read_metrics(path)["train_loss"][0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(("steps", "val"), [(1, False), (50, False), (50, True)])
def test_the_training_curve_is_a_png_of_sensible_size(tmp_path: Path, steps: int, val: bool) -> None:
    target = tmp_path / "plots" / "training_curve.png"
    training_curve(write_metrics(tmp_path / "metrics.jsonl", steps, val), target, "phase2 run 0123abcd")
    image = opened(target)
    assert target.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert 600 <= image.width <= 2000
    assert 400 <= image.height <= 1500
    assert 5_000 < target.stat().st_size < 500_000


def test_the_validation_loss_is_seen_in_the_curve(tmp_path: Path) -> None:
    pixels = []
    for val in (False, True):
        target = tmp_path / f"{val}.png"
        training_curve(write_metrics(tmp_path / "metrics.jsonl", 50, val), target, "run")
        pixels.append(np.asarray(opened(target).convert("RGB")).astype(int))
    orange = [int(((p[..., 0] > 200) & (p[..., 1] > 80) & (p[..., 1] < 150) & (p[..., 2] < 80)).sum()) for p in pixels]
    assert orange[0] == 0
    assert orange[1] > 10


def test_a_nan_loss_still_gives_a_plot(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "metrics.jsonl", 5)
    with path.open("a") as stream:
        stream.write('{"step": 6, "name": "train_loss", "value": NaN, "time": 0}\n')
    training_curve(path, tmp_path / "curve.png", "run")
    opened(tmp_path / "curve.png")


def test_drawing_again_replaces_the_image_and_leaves_no_other_file(tmp_path: Path) -> None:
    target = tmp_path / "plots" / "curve.png"
    for steps in (2, 50):
        training_curve(write_metrics(tmp_path / "metrics.jsonl", steps), target, "run")
    assert [path.name for path in target.parent.iterdir()] == ["curve.png"]


def test_no_figure_is_left_open(tmp_path: Path) -> None:
    training_curve(write_metrics(tmp_path / "metrics.jsonl", 3), tmp_path / "curve.png", "run")
    answer_sheet(answers("a fox"), no_image, tmp_path / "sheet.png", "run")
    assert plt.get_fignums() == []


def test_smoothing_keeps_a_constant_and_starts_without_bias() -> None:
    assert smoothed(np.full(5, 2.0)) == pytest.approx(np.full(5, 2.0))
    assert smoothed(np.array([2.0, np.nan, 2.0, 2.0])) == pytest.approx(np.full(4, 2.0)), "a step that is not finite ends no curve"
    rising = smoothed(np.array([0.0, 1.0]))
    assert rising[0] == 0
    assert rising[1] == pytest.approx(0.1 / 0.19)
    assert math.isclose(smoothed(np.concatenate([np.zeros(200), np.ones(200)]))[-1], 1.0, abs_tol=1e-6)


def test_the_answer_sheet_grows_by_rows_of_five(tmp_path: Path) -> None:
    sizes = []
    for count in (1, 5, 6, 20):
        answer_sheet(answers(*["a fox"] * count), lambda row: [Image.new("RGB", (16, 16), "red")], tmp_path / "sheet.png", "run")
        sizes.append(opened(tmp_path / "sheet.png").size)
    assert sizes[0] == sizes[1]
    assert [height for _, height in sizes[1:]] == pytest.approx([sizes[1][1] * lines for lines in (1, 2, 4)], abs=3)
    assert all(1000 <= width <= 2000 for width, _ in sizes)


def test_images_are_visible_in_the_sheet(tmp_path: Path) -> None:
    answer_sheet(answers("a fox"), lambda row: [Image.new("RGB", (16, 16), (255, 0, 0))], tmp_path / "sheet.png", "run")
    pixels = np.asarray(opened(tmp_path / "sheet.png").convert("RGB"))
    assert (pixels == (255, 0, 0)).all(axis=-1).sum() > 1000


def test_several_images_stand_side_by_side(tmp_path: Path) -> None:
    images = [Image.new("RGB", (16, 16), colour) for colour in ("#ff0000", "#0000ff")]
    answer_sheet(answers("a fox"), lambda row: images, tmp_path / "sheet.png", "run")
    pixels = np.asarray(opened(tmp_path / "sheet.png").convert("RGB"))
    red, blue = (np.flatnonzero((pixels == colour).all(axis=-1).any(axis=0)) for colour in ((255, 0, 0), (0, 0, 255)))
    assert 20 < len(red) == pytest.approx(len(blue), abs=2)
    assert red.max() < blue.min()


@pytest.mark.parametrize(
    "answer", ["", "a very long answer " * 10, "line\nbreaks\n", "5 $ or 6 $", r"$\frac{1}$ of $\nothing$", r"100% \alpha_{x}^{y"]
)
def test_answers_are_shown_as_plain_text(tmp_path: Path, answer: str) -> None:
    answer_sheet(answers(answer), no_image, tmp_path / "sheet.png", "run")
    opened(tmp_path / "sheet.png")


@pytest.mark.parametrize("text", ["$\\bad{$", "\x1b[31m\ud800", "$$"])
def test_text_that_is_no_mathematics_can_be_plotted(tmp_path: Path, text: str) -> None:
    training_curve(write_metrics(tmp_path / "metrics.jsonl", 3), tmp_path / "curve.png", text)
    row = {"question": text, "answer": text, "expected": text + "x"}
    answer_sheet([row], no_image, tmp_path / "answers.png", text)
    opened(tmp_path / "curve.png")
    opened(tmp_path / "answers.png")
