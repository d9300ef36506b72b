"""A trained assistant as an MLflow model: a folder that MLflow loads without pickle, and without this package installed."""

import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow.pyfunc
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from pandas import DataFrame

from raytrain2p.config.paths import PACKAGE
from raytrain2p.tracking.registered_model import FILES
from raytrain2p.tracking.run import DIGEST_TAG

LOADER = PACKAGE / "inference" / "pyfunc.py"
# What `inference` imports; MLflow brings pandas and SQLAlchemy, transformers the rest. gguf: a packaged model comes in that format.
REQUIREMENTS = ("mlflow", "torch", "transformers", "peft", "gguf", "numpy", "pillow", "pyarrow", "pydantic", "pyyaml", "scipy", "soundfile")
NOT_SHIPPED = ("__pycache__", "*.parquet")  # of the package: the embedded sets
KEY_LENGTH = 16


@dataclass(frozen=True)
class ModelContent:
    """What an MLflow model is made from.

    Args:
        run_id: of the run that trained it.
        artifact: model.pt, with its digest.
        base_models: the files of base models that are local directories, by the name that the artifact has for them.
        media: the modalities that it has learnt.
        example: a row of its input.
        parameters: of an answer, with their defaults.
        packages: that it needs and others do not.
    """

    run_id: str
    artifact: Path
    digest: str
    base_models: Mapping[str, Sequence[Path]]
    media: Sequence[str]
    question: str
    example: Mapping[str, str]
    parameters: Mapping[str, int]
    packages: Sequence[str] = ()

    def files(self) -> dict[str, Path]:
        """The large files, by their folder in the model; they are sent from where they are."""
        copies = [(f"{FILES}/base_{number}", paths) for number, paths in enumerate(self.base_models.values())]
        return {f"{folder}/{path.name}": path for folder, paths in [(FILES, [self.artifact]), *copies] for path in paths}

    def places(self) -> dict[str, str]:
        """Where the loader finds them: model.pt, and the folder of each base model by its name."""
        copies = {name: f"{FILES}/base_{number}" for number, name in enumerate(self.base_models)}
        return {"model": f"{FILES}/{self.artifact.name}", **copies}


def write_package(folder: Path, content: ModelContent) -> str:
    """Write all but the large files into an empty folder. Returns its key: equal models, written by the same version of this package and
    of its requirements, have the same.
    """
    with _quiet_mlflow():
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(LOADER),
            code_paths=[str(_shipped(folder.with_name("code") / PACKAGE.name))],
            mlflow_model=Model(run_id=content.run_id, model_uuid=content.digest[:32]),
            signature=_signature(content),
            input_example=DataFrame([content.example]),
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in (*REQUIREMENTS, *content.packages)],
            metadata={DIGEST_TAG: content.digest},
        )
    model = Model.load(folder)
    size = sum(path.stat().st_size for path in [*folder.rglob("*"), *content.files().values()] if path.is_file())
    found = {name: {"path": path, "uri": path} for name, path in content.places().items()}
    model.flavors[mlflow.pyfunc.FLAVOR_NAME] |= {"artifacts": found, "model_code_path": LOADER.name}
    model.model_size_bytes = size
    model.save(folder / MLMODEL_FILE_NAME)
    return _key(folder, content.digest)


def _signature(content: ModelContent) -> ModelSignature:
    columns = [ColSpec(DataType.string, content.question), *(ColSpec(DataType.string, name, required=False) for name in content.media)]
    parameters = [ParamSpec(name, DataType.long, default) for name, default in content.parameters.items()]
    return ModelSignature(Schema(columns), Schema([ColSpec(DataType.string)]), ParamSchema(parameters))


def _shipped(target: Path) -> Path:
    """A copy of this package without what a model does not need."""
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    return target


def _key(folder: Path, artifact: str) -> str:
    digest = hashlib.sha256(artifact.encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MLMODEL_FILE_NAME):  # which has the time
        digest.update(f"{path.relative_to(folder)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:KEY_LENGTH]


@contextmanager
def _quiet_mlflow() -> Any:
    """Without MLflow's notes on the model that is written."""
    logger = logging.getLogger("mlflow")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
