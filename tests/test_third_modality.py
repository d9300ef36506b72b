"""A further modality is an encoder, an entry and settings: a copy of the package gets one, in four files, and trains both phases."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.launch.launching import ROOT, run_command
from tests.launch.sockets import files_with, watched

ENCODER = '''
from typing import Any

import numpy as np
import torch

from raytrain2p.models.frozen_encoder import FrozenEncoder


class SignalEncoder(FrozenEncoder):
    """Signals in pieces of 8 values, through a language model's layers."""

    modality = "signal"
    sample = np.zeros(64, np.float32)
    config_part = "signal_config"

    def load_preprocessing(self, directory: Any) -> None:
        pass

    def preprocess(self, items: Any) -> list[torch.Tensor]:
        return [torch.from_numpy(item).unflatten(0, (-1, 8)).repeat(1, 4) for item in items]

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(inputs_embeds=batch).last_hidden_state
'''
CHANGES = {
    "models/encoders.py": (
        ("(ImageEncoder, AudioEncoder, TextEncoder)", "(ImageEncoder, AudioEncoder, SignalEncoder, TextEncoder)"),
        (
            "from raytrain2p.models.text_encoder import",
            "from raytrain2p.models.signal_encoder import SignalEncoder\nfrom raytrain2p.models.text_encoder import",
        ),
    ),
    "config/settings.py": (
        ("class EncodersSettings(", "class SignalEncoderSettings(EncoderSettings):\n    pass\n\n\nclass EncodersSettings("),
        (
            "    text: Annotated[TextEncoderSettings | None, _Named] = None",
            "    signal: Annotated[SignalEncoderSettings | None, _Named] = None\n"
            "    text: Annotated[TextEncoderSettings | None, _Named] = None",
        ),
    ),
    "data/media.py": (
        (
            "MEDIA: dict[str, MediaKind] = {",
            "def decode_signal(encoded: bytes) -> np.ndarray:\n    return np.load(io.BytesIO(encoded), allow_pickle=False)\n\n\n"
            "MEDIA: dict[str, MediaKind] = {\n"
            '    "signal": MediaKind(decode_signal, lambda signal: str(len(signal)), lambda signal: Image.new("RGB", (8, 8))),',
        ),
    ),
}


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A directory with the changed package, which commands run in it import."""
    shutil.copytree(ROOT / "raytrain2p", tmp_path / "raytrain2p", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "raytrain2p" / "models" / "signal_encoder.py").write_text(ENCODER)
    for name, changes in CHANGES.items():
        path = tmp_path / "raytrain2p" / name
        text = path.read_text()
        for before, after in changes:
            assert text.count(before) == 1, f"{name} has no such line any more: {before}"
            text = text.replace(before, after)
        path.write_text(text)
    return tmp_path


def test_a_made_up_modality_trains_both_phases(changed: Path, tiny_bert: Path, tiny_llama: Path) -> None:
    pairs, questions = [], []
    for number in range(32):
        name, period = (("slow", 32), ("fast", 4))[number % 2]
        np.save(changed / f"{number}.npy", np.sin((np.arange(64) + number) * 2 * np.pi / period).astype(np.float32))
        pairs.append({"text": f"a {name} signal", "signal": f"{number}.npy"})
        questions.append({"instruction": "Is <signal> fast or slow?", "response": name, "signal": f"{number}.npy"})
    for file, rows in (("pairs.jsonl", pairs), ("questions.jsonl", questions)):
        (changed / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = ["training.warmup_steps=2", "training.precision=float32", "launch.cpus_per_worker=1", "--json"]
    (changed / "one.yaml").write_text(f"""
data: {{train: pairs.jsonl, test: {{same: pairs.jsonl}}}}
model: {{encoders: {{signal: {tiny_bert}, image: null, text: {tiny_bert}}}, dimension: 16, hidden: 32}}
training: {{max_steps: 20, global_batch_size: 16, learning_rate: 1e-2}}
""")
    (changed / "two.yaml").write_text(f"""
data: {{train: questions.jsonl, test: {{same: questions.jsonl}}}}
model: {{language_model: {tiny_llama}, soft_tokens: 4, tuning: full}}
training: {{max_steps: 20, global_batch_size: 16, learning_rate: 1e-2}}
evaluation: {{samples: 2, max_new_tokens: 4}}
""")
    found = []
    secrets = {"MLFLOW_TRACKING_PASSWORD": "hunt-er2!pass", "A_SERVICE_TOKEN": "hunt-er3!token"}
    with watched() as seen:
        for phase, config in ((1, "one.yaml"), (2, "two.yaml")):
            arguments = ["raytrain2p.train", "--phase", str(phase), "--config", config, *shared]
            found.append(run_command(changed, *arguments, PYTHONPATH=str(changed), RAY_ADDRESS="local", **secrets))
    metrics = found[0].outcome["metrics"]
    assert {"same/signal_to_text_recall_at_1", "same/text_to_signal_recall_at_1"} <= metrics.keys()
    assert found[1].losses[-1] < found[1].losses[0] / 2
    assert (Path(found[1].outcome["directory"]) / "plots").is_dir()
    assert len(seen.listening) > 20, "Ray, and the workers' process group"
    assert [one for one in seen.listening if not one.on_loopback] == []
    hidden = [*secrets.values(), os.environ["RAY_AUTH_TOKEN"]]
    assert len(seen.ray_sessions) >= 2
    assert files_with(hidden, changed, *seen.ray_sessions) == []
    assert [title for title in seen.titles.values() if any(secret in title for secret in hidden)] == []
