"""Whether a sweep can be resumed: its trials have the inputs that they began with, those that are over too."""

import io
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from raytrain2p.config import InputError
from raytrain2p.config.console import Console
from raytrain2p.sweep.feasibility import check_sweep, check_trials
from raytrain2p.sweep.load import load_sweep
from raytrain2p.sweep.results import Inheritance, add_inheritance
from raytrain2p.tracking.run import Run, recorded_run
from raytrain2p.tracking.run_writer import describe_run, resolved_config
from tests.sweep.test_results import begun, records_in


@pytest.mark.parametrize("status", ["FINISHED", "RUNNING"])
@pytest.mark.parametrize("inherited", [False, True])
def test_a_sweep_is_resumed_with_the_inputs_of_its_trials_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep_config: Path, shapes: Path, tiny_bert: Path, status: str, inherited: bool
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAYTRAIN2P_FEATURES", str(tmp_path / "features"))
    shutil.copytree(tiny_bert, tmp_path / "bert")
    overrides = [f"output.root={tmp_path}", f"model.encoders.text={tmp_path}/bert", "sweep.space={model.hidden: {choice: [16, 32]}}"]
    stream = io.StringIO()
    sweep, inputs = check_sweep(load_sweep(sweep_config, [*overrides, "training.warmup_steps=50"]), Console(stream))
    assert stream.getvalue().splitlines()[1:] == [
        f"data.train: 48 records of {shapes}/phase1.jsonl (pair)",
        "data.val is not set: no validation loss; data.test is not set: nothing is evaluated after training",
        "training.warmup_steps=50 is shortened to 30, since training has 60 steps",
    ], "each once, though there are several trials"
    records = records_in(tmp_path)
    trial = begun(tmp_path, records, 0, status, [(10, 2.0)], values={"model.hidden": 16})
    run = recorded_run(str(tmp_path), trial.launch_id)
    assert isinstance(run, Run)
    (found,) = inputs.values()
    describe_run(run, resolved_config(sweep.settings(trial.values), {}), "tune", asdict(found.digests))
    if inherited:  # population-based training: its settings have changed
        add_inheritance(run.path, Inheritance(5, 1, "b" * 32, 5, {"model.hidden": 32}))
    check_trials(records, sweep, inputs)

    (tmp_path / "bert" / "special_tokens_map.json").write_text("{}")
    _, inputs = check_sweep(sweep, Console())
    with pytest.raises(InputError) as caught:
        check_trials(records_in(tmp_path), sweep, inputs)
    said = str(caught.value)
    assert f"model.encoders.text.name={tmp_path}/bert\n    has other content (special_tokens_map.json) than run 00000000 began with" in said
    check_trials(records_in(tmp_path), sweep, inputs, accept_changed_inputs=True)
