"""The assistant as MLflow loads it from a registered model: a pyfunc that is made from this file ("models from code"), without pickle."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from pandas import DataFrame

from raytrain2p.config import InputError
from raytrain2p.config.paths import is_kind
from raytrain2p.data.media import MEDIA, item_bytes
from raytrain2p.inference.predictor import Predictor
from raytrain2p.inference.questions import as_records
from raytrain2p.models.pretrained import copies_of_models


class RegisteredAssistant(PythonModel):
    """Answers a table of questions. `tracking/model_package.py` writes what it is loaded from."""

    def load_context(self, context: Any) -> None:
        """Load model.pt and its base models, of which those that were local directories in training are in the registered model.

        Raises:
            InputError: the file is damaged, or a base model is not the one in training.
        """
        self.copies = {name: Path(path) for name, path in context.artifacts.items()}
        artifact = self.copies.pop("model")
        with copies_of_models(self.copies):
            self.predictor = Predictor(artifact)
            for modality in self.predictor.trained:
                self.predictor.encoder(modality)

    def predict(self, context: Any, model_input: DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """An answer to each row.

        Args:
            model_input: a question in `instruction`; its media are a file's path, its file:// URL, a data URL, or base64.
            params: `max_new_tokens` of an answer, and `batch_size`, rows in a forward pass.

        Raises:
            MlflowException: every problem of every row; a server answers 400.
        """
        given = params or {}
        most, batch_size = int(given.get("max_new_tokens", 32)), int(given.get("batch_size", 32))
        if most < 1 or batch_size < 1:
            raise MlflowException.invalid_parameter_value("max_new_tokens and batch_size must be at least 1")
        try:
            records = as_records([fields_of(row) for row in model_input.to_dict("records")])
            with copies_of_models(self.copies):
                self.predictor.check(records, most)
                return list(self.predictor.answers(records, batch_size, most))
        except InputError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


def fields_of(row: Mapping[Hashable, Any]) -> dict[str, Any]:
    """A row as the fields of a record: what a table leaves out is not a number there."""
    fields = {str(name): value for name, value in row.items() if value is not None and value == value}
    return {name: media_of(value) if name in MEDIA else value for name, value in fields.items()}


def media_of(value: Any) -> Any:
    """An item as records take it: bytes, if it is base64 and not the name of a file."""
    if isinstance(value, list):
        return [media_of(item) for item in value]
    if not isinstance(value, str) or is_kind(Path(value), Path.is_file):
        return value
    try:
        return item_bytes(value)
    except ValueError:
        return value  # the record's own message says what is wrong


set_model(RegisteredAssistant())
