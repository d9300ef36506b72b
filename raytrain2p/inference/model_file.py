"""model.pt, read and checked: what a trained assistant can be asked. Its weights are in `predictor.py`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from raytrain2p.config import Findings, InputError, Problem
from raytrain2p.config.phases import INSTRUCTION
from raytrain2p.data.chat import load_chat_format
from raytrain2p.data.checks import check_media
from raytrain2p.data.media import MediaRef
from raytrain2p.data.records import Record
from raytrain2p.models.artifacts import check_fingerprint, load_artifact
from raytrain2p.models.assistant import AssistantShape
from raytrain2p.models.encoders import EncoderSpec
from raytrain2p.models.pretrained import context_length, model_directory
from raytrain2p.models.quantization import package_problem
from raytrain2p.tracking.find import find_artifact
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_directory import RunDirectory
from raytrain2p.tracking.run_objects import root_of

LANGUAGE_MODEL = "model.language_model"

WhichModel = str | Path | Run | RunDirectory


def find_model(run: WhichModel, root: str | Path, setting: str = "run") -> Path:
    """The path of a model.pt.

    Args:
        run: its path, that of a run directory, a run ID or its start, a launch ID, `latest`, or a run.
        root: `output.root` of training.
        setting: where `run` came from, for messages.

    Raises:
        InputError: there is none, or several fit.
    """
    wanted = run.path if isinstance(run, Run | RunDirectory) else run
    return find_artifact(root_of(str(root)), INSTRUCTION, str(wanted), setting)


class ModelFile:
    """A model.pt, with the templates and limits of its models.

    Raises:
        InputError: the file is not readable, damaged or incomplete, or the language model differs from the one in training.
    """

    def __init__(self, path: Path) -> None:
        artifact = load_artifact(path, INSTRUCTION)
        try:
            needed, self.shape = artifact["language_model"], AssistantShape(**artifact["shape"])
            self.precision = artifact["config"]["training"]["precision"]
            needed = {key: needed[key] for key in ("name", "fingerprint")}
        except (KeyError, TypeError) as error:
            raise InputError(Problem(str(path), f"lacks parts of a {INSTRUCTION.artifact}: {error}", "train it anew")) from None
        if self.shape.quantization is not None and (problem := package_problem(f"{path}: model.quantization={self.shape.quantization}")):
            raise InputError(problem)
        directory = model_directory(needed["name"], LANGUAGE_MODEL)
        check_fingerprint(path, needed, needed["name"], directory, LANGUAGE_MODEL)
        self.path, self.trained = path, artifact["encoders"]
        self.digest: str = artifact["digest"]
        self.weights = artifact["state_dict"]
        self.most_media: Mapping[str, int] = artifact.get("most_media", {})  # of a record in training; earlier versions did not keep it
        self.context = context_length(directory)
        self.chat = load_chat_format(directory, self.shape.soft_tokens, artifact["system_prompt"])

    def check(self, records: Sequence[Record], max_new_tokens: int = 32) -> Mapping[MediaRef, bytes]:
        """Look at all records and media before the first answer. Returns the sha256 of each item.

        Raises:
            InputError: media do not decode, or the model or their encoder does not take them; the language model's template or context
                does not take a record; and as of `spec`.
        """
        findings = Findings()
        specs = dict[str, EncoderSpec]()
        for modality in dict.fromkeys(ref.modality for record in records for ref in record.media()):
            with findings:
                specs[modality] = self.spec(modality)
        findings.raise_any()
        for record in records:
            for modality, count in Counter(ref.modality for ref in record.media()).items():
                if count > (most := self.most_media.get(modality, count)):
                    what = f"has {count} items of {modality}; the model has learnt questions with at most {most}"
                    findings.add(Problem(record.where, what, "ask about fewer, or train on such records"))
            try:
                length = len(self.chat.prompt(record.messages)) + max_new_tokens
            except ValueError as error:
                findings.add(Problem(record.where, str(error), "change the record"))
                continue
            if length > self.context:
                what = f"is {length} tokens long with an answer of {max_new_tokens}, the language model's context has {self.context}"
                findings.add(Problem(record.where, what, "shorten it", cause="is longer than the language model's context"))
        media = check_media(records, {modality: spec.item_check() for modality, spec in specs.items()})
        findings.extend(media.problems)
        findings.raise_any()
        return media.keys

    def spec(self, modality: str) -> EncoderSpec:
        """The encoder of a modality.

        Raises:
            InputError: the model has not learnt it, or the encoder differs from the one in training.
        """
        if modality not in self.trained:
            raise InputError(Problem(str(self.path), f"was trained with {', '.join(self.trained)}, not with {modality}"))
        needed, setting = self.trained[modality], f"model.encoders.{modality}"
        spec = EncoderSpec(modality, needed["name"], needed["options"])
        check_fingerprint(self.path, needed, spec.name, spec.directory(), setting)
        return spec
