"""The model card of an exported run: README.md with front matter, as model hubs read it. What came from data and settings is escaped."""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from raytrain2p.config import flatten_tree
from raytrain2p.config.escaping import code_block, code_span
from raytrain2p.config.secrets import masked
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_directory import RUN_DIRECTORY, RUN_ID_LENGTH
from raytrain2p.tracking.source import COMMIT_TAG, VERSION_PREFIX

OF_THE_MACHINE = ("output", "tracking", "launch", "data.feature_store", "data.feature_workers", "data.loader_workers")  # settings left out
FOLDERS = re.compile(r"(?<=['\"])[/~][^'\"]*/")  # of a quoted path
WITH_PACKAGE = """import raytrain2p.inference.hf_model  # pip install raytrain2p
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(DIRECTORY)"""
WITH_ADAPTER = """
from peft import PeftModel

model = PeftModel.from_pretrained(model, f"{DIRECTORY}/adapter")"""
PLAIN = """from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained(DIRECTORY)"""
USE = """
processor = AutoProcessor.from_pretrained(DIRECTORY)
content = [{"type": "MODALITY", "path": "FILE"}, {"type": "text", "text": "QUESTION"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))"""


def model_card(run: Run, artifact: Mapping[str, Any], metrics: Mapping[str, float], llava: bool, adapter: bool) -> str:
    """The text of a model card. It has no path of this machine, and no credentials.

    Args:
        artifact: the run's model.pt.
        metrics: on test splits.
    """
    record, media = run.files.read_record() or {}, artifact["shape"]["soft_tokens"]
    name, splits = f"raytrain2p-{run.run_id[:8]}", {split: str(where) for split, where in test_splits(artifact["config"])}
    use = (PLAIN if llava else WITH_PACKAGE + WITH_ADAPTER * adapter) + USE.replace("MODALITY", next(iter(media), "image"))
    parts = [
        f"---\n{front_matter(name, media, splits, metrics)}---",
        f"# {name}",
        f"A language model that reads {' and '.join(media) or 'no'} media through a trained aligner, made by raytrain2p "
        f"{version('raytrain2p')}. It "
        "answers questions of the kind that it was trained on.",
        f"## Use\n\n{code_block(use)}",
        f"## What it can do, and cannot\n\n{abilities(artifact, metrics, splits)}",
        f"## Data\n\n{code_block(data_table(record))}",
        f"## Metrics\n\n{code_block(metrics_table(metrics))}",
        f"## Settings\n\n{code_block(settings_table(artifact['config']))}",
        f"## Lineage\n\n{lineage(run, record, artifact)}",
    ]
    return masked("\n\n".join(parts)) + "\n"


def front_matter(name: str, media: Mapping[str, int], splits: Mapping[str, str], metrics: Mapping[str, float]) -> str:
    pipeline = f"{next(iter(media))}-text-to-text" if len(media) == 1 else "any-to-any"
    results = []
    for split, where in splits.items():
        measured = [
            {"type": "exact_match", "name": f"exact match of {task}", "value": round(value, 4)}
            for task, value in of_tasks(metrics, split, "exact_match").items()
        ]
        if measured:
            results.append({"task": {"type": pipeline}, "dataset": {"type": where, "name": where}, "metrics": measured})
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": pipeline, "tags": ["raytrain2p"]}
    if results:
        head["model-index"] = [{"name": name, "results": results}]
    return yaml.safe_dump(head, sort_keys=False, width=10_000)


def abilities(artifact: Mapping[str, Any], metrics: Mapping[str, float], splits: Mapping[str, str]) -> str:
    """What the figures say, and what they do not."""
    lines = [
        f"Each {modality} becomes {count} soft tokens, from {code_span(without_path(artifact['encoders'][modality]['name']))}."
        for modality, count in artifact["shape"]["soft_tokens"].items()
    ]
    for split in splits:
        chance, shuffled = (of_tasks(metrics, split, kind) for kind in ("majority", "exact_match_shuffled"))
        for task, value in of_tasks(metrics, split, "exact_match").items():
            line = f"{code_span(task)} on {code_span(split)}: {value:.1%} of the answers are exactly those expected"
            line += f" ({chance[task]:.1%} if the commonest were always given)" if task in chance else ""
            line += f"; with the media of other records, {shuffled[task]:.1%}" if task in shuffled else ""
            learnt = value > 1.1 * max(chance.get(task, 0.0), shuffled.get(task, 0.0)) + 0.01
            lines.append(line + ("." if learnt else ". **It has not learnt this.**"))
    lines.append("Other questions, languages and kinds of media were not measured; nor were bias and safety.")
    lines.append("The licences of the models and of the data that it was made from apply.")
    return "\n".join(f"- {line}" for line in lines)


def data_table(record: Mapping[str, Any]) -> str:
    """Each split: its source, the number of its records, and their digest."""
    digests = {key: parts.get("records", "") for key, parts in record.get("inputs", {}).items()}
    rows = []
    for key, count in record.get("split_records", {}).items():
        setting, _, source = key.partition("=")
        digest = record.get("train_digest", "") if setting == "data.train" else digests.get(key, "")
        rows.append([setting, without_path(source), f"{count:,}", digest])
    return table(["split", "source", "records", "sha256"], rows)


def metrics_table(metrics: Mapping[str, float]) -> str:
    return table(["metric", "value"], [[name, f"{value:.4f}"] for name, value in metrics.items()])


def settings_table(config: Mapping[str, Any]) -> str:
    kept = {
        key: value
        for key, value in flatten_tree(dict(config)).items()
        if not any(key == one or key.startswith(f"{one}.") for one in OF_THE_MACHINE)
    }
    return table(["setting", "value"], [[key, str(without_path(value))] for key, value in kept.items() if value is not None])


def lineage(run: Run, record: Mapping[str, Any], artifact: Mapping[str, Any]) -> str:
    """What it was made from, by content."""
    tags = record.get("tags", {})
    lines = [
        f"MLflow run {code_span(run.run_id)} of {code_span(run.timestamp)}, sha256 of model.pt's content {code_span(artifact['digest'])}"
    ]
    for key, parts in record.get("inputs", {}).items():
        setting, _, value = key.partition("=")
        if setting.startswith("model.") and parts:
            folder = Path(value).parent.name
            run_of = f" of run {code_span(folder[:RUN_ID_LENGTH])}" if RUN_DIRECTORY.fullmatch(folder) else ""
            lines.append(f"{code_span(setting)}: {code_span(without_path(value))}{run_of}, sha256 {code_span(next(iter(parts.values())))}")
    if COMMIT_TAG in tags:
        lines.append(f"commit {code_span(tags[COMMIT_TAG])}")
    versions = ", ".join(f"{key.removeprefix(VERSION_PREFIX)} {value}" for key, value in tags.items() if key.startswith(VERSION_PREFIX))
    if versions:
        lines.append(f"trained with {code_span(versions)}")
    return "\n".join(f"- {line}" for line in lines)


def test_splits(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names of the test splits, and where they are from."""
    return ((name, without_path(where)) for name, where in (config.get("data", {}).get("test") or {}).items())


def of_tasks(metrics: Mapping[str, float], split: str, kind: str) -> dict[str, float]:
    """A metric of a split, by task."""
    start = f"{split}/{kind}/"
    return {name.removeprefix(start): value for name, value in metrics.items() if name.startswith(start)}


def without_path(value: Any) -> Any:
    """A setting's value in which files are named without their folders, also in a list that was written as text."""
    if isinstance(value, Mapping):
        return {key: without_path(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_path(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return Path(value).name if value.startswith(("/", "~")) else FOLDERS.sub("", value) if value.startswith(("[", "{")) else value


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text."""
    lines = [heading, *rows]
    widths = [max(len(str(line[place])) for line in lines) for place in range(len(heading))]
    return "\n".join("  ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
