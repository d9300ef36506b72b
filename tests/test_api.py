"""`import raytrain2p` is the Python API, and costs nothing until it is used."""

import subprocess
import sys
from pathlib import Path

import pytest
from ray import cloudpickle

import raytrain2p
from raytrain2p.launch.api import TrainModule

REFUSED = """
def refused(call, **settings):
    try:
        call(phase=1, training={"max_stepz": 5}, **settings)
    except ValueError as error:
        assert "did you mean training.max_steps?" in str(error), error
        return True
"""


def run(script: str, folder: Path, *options: str) -> str:
    done = subprocess.run([sys.executable, *options, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_loads_no_library_and_one_more_module_of_the_package(tmp_path: Path) -> None:
    script = "import sys; before = {*sys.modules}; import raytrain2p; print(*{*sys.modules} - before)"
    loaded = run(script, tmp_path).split()
    assert {name for name in loaded if name.startswith("raytrain2p")} == {"raytrain2p", "raytrain2p.interrupts"}
    assert {name.partition(".")[0] for name in loaded} - {"raytrain2p"} <= {*sys.stdlib_module_names}


@pytest.mark.parametrize(
    "imports",
    [
        "import raytrain2p",
        "import raytrain2p.train; import raytrain2p.tune",
        "from raytrain2p.train import main; import raytrain2p",
        "import raytrain2p; raytrain2p.train; from raytrain2p.sweep.load import load_sweep; import raytrain2p.train",
        "import raytrain2p.__main__, importlib, raytrain2p; importlib.import_module('raytrain2p.train').main",
        "from raytrain2p import sweep, train; import raytrain2p",
    ],
)
def test_train_and_sweep_can_be_called_and_are_modules_whatever_was_imported_first(imports: str, tmp_path: Path) -> None:
    script = f"""{imports}
{REFUSED}
assert refused(raytrain2p.train)
try:
    raytrain2p.sweep(sweep={{"num_trialz": 5}})
except raytrain2p.InputError as error:
    assert "did you mean sweep.num_trials?" in str(error), error
from raytrain2p import train
from raytrain2p.train import main
from raytrain2p.sweep.load import load_sweep
assert main is raytrain2p.train.main is train.main
assert load_sweep is raytrain2p.sweep.load.load_sweep
"""
    run(script, tmp_path)


def test_the_command_warns_of_nothing(tmp_path: Path) -> None:
    """As Python does if the package has imported the module that `-m` runs."""
    command = [sys.executable, "-W", "error", "-m", "raytrain2p.train", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_name_is_there_and_is_listed() -> None:
    assert {*raytrain2p.__all__} <= {*dir(raytrain2p)}
    assert all(callable(getattr(raytrain2p, name)) for name in raytrain2p.__all__)
    assert isinstance(raytrain2p.train, TrainModule)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        raytrain2p.trian  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_a_function_of_a_notebook_that_uses_them_can_be_sent_to_a_worker(name: str) -> None:
    assert cloudpickle.loads(cloudpickle.dumps(getattr(raytrain2p, name))) is getattr(raytrain2p, name)
