"""`import raytrain2p` is the Python API, and costs nothing until it is used: from a notebook, and from a plain script."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from ray import cloudpickle

import raytrain2p
from raytrain2p.launch.api import TrainModule
from tests.chaos.killing import only_long
from tests.launch.launching import encode_here

ROOT = Path(__file__).parents[1]
NOTEBOOK, PAGE = ROOT / "examples" / "quickstart.ipynb", ROOT / "docs" / "python.md"
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


HANDLERS = "handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]"
# Cells of the test, before and after those of the notebook that train
BEFORE = f"""
import logging, os, signal, ray
{HANDLERS}
level = logging.getLogger("ray.train").level
assert not ray.is_initialized()
"""
BETWEEN = f"""
assert not ray.is_initialized(), "a Ray that the call has connected to is left again"
before = handlers
{HANDLERS}
assert handlers == before
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
{HANDLERS}  # Ray has one of its own for SIGTERM
"""
AFTER = f"""
assert ray.is_initialized(), "the program's own Ray stays"
before, level_before = handlers, level
{HANDLERS}
assert handlers == before
assert logging.getLogger("ray.train").level == level_before
ray.shutdown()
"""


@pytest.fixture
def workdir(tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a reader, whose settings are those of tiny models."""
    for name in ("phase1.yaml", "phase2.yaml"):
        (tmp_path / name).write_text((tiny_config / name).read_text())
    monkeypatch.delenv("RAYTRAIN2P_HOME", raising=False)
    monkeypatch.setenv("RAYTRAIN2P_FEATURES", str(tmp_path / "features"))
    encode_here(1, tiny_config / "phase1.yaml", tmp_path / "features")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def script(page: Path, leave_out: str = "nothing") -> str:
    """The Python of a page, without the blocks that have a word."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    return "\n".join(block for block in blocks if leave_out not in block)


def printed(cell: Any, stream: str) -> str:
    return "".join(output["text"] for output in cell.outputs if output.output_type == "stream" and output.name == stream)


def shown(cell: Any) -> Any:
    """The value of a cell's last expression."""
    (value,) = [output["data"]["text/plain"] for output in cell.outputs if output.output_type == "execute_result"]
    return eval(value)


def test_the_notebook_trains_both_phases_and_asks_and_a_script_gets_the_same_runs(
    workdir: Path, ray_head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script, which is that of the page, launches nothing: its launches have runs already. In `make chaos` it does."""
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(workdir / "jupyter"))
    monkeypatch.setenv("RAY_ADDRESS", ray_head)
    notebook = nbformat.read(NOTEBOOK, 4)
    (given,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    given.source = 'phase1, phase2, question = "phase1.yaml", "phase2.yaml", "Which colour?"'
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    first, second = (next(cell for cell in code if f"phase={phase}, launch_id" in cell.source) for phase in (1, 2))
    around = {id(first): ([BEFORE], []), id(second): ([BETWEEN], [AFTER])}
    new = nbformat.v4.new_code_cell
    notebook.cells = [
        one
        for cell in notebook.cells
        for before, after in [around.get(id(cell), ([], []))]
        for one in (*map(new, before), cell, *map(new, after))
    ]
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(workdir)}}).execute()

    assert [printed(cell, "stdout") for cell in (first, second)] == ["", ""]
    assert "starting 1 worker" in printed(first, "stderr")
    assert "loss" in printed(first, "stderr")
    assert shown(first)["train_loss"] > 0
    assert {key: shown(second)[key] for key in ("steps", "model")} == {"steps": 6, "model": "model.pt"}
    *_, asked, found, wrong = code
    assert [type(answer) for answer in shown(asked)] == [str] * 4
    assert shown(found) is True
    assert printed(wrong, "stdout").startswith("2 problems; nothing was started\n")

    (workdir / "page.py").write_text(script(PAGE, leave_out="raytrain2p.sweep("))
    done = subprocess.run([sys.executable, "page.py"], cwd=workdir, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == [shown(second)["run"], "6"]
    assert "starting 1 worker" not in done.stderr
    assert "did you mean training.max_steps?" in done.stdout


@only_long
def test_the_script_of_the_page_starts_a_ray_of_its_own_for_each_call(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    (workdir / "page.py").write_text(f"{script(PAGE)}\nimport ray\nassert not ray.is_initialized()\n")
    done = subprocess.run([sys.executable, "page.py"], cwd=workdir, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "training.learning_rate" in done.stdout
    assert {path.name for path in (workdir / "checkpoints").iterdir() if path.name[0] != "."} == {"alignment", "phase2", "sweeps"}


OWN_RAY = "import ray; ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level='ERROR')"
INTERRUPTED = """
import os, signal, sys, threading, time
from pathlib import Path
import raytrain2p

def press(ready, seconds):
    def wait():
        while not ready():
            time.sleep(0.1)
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=wait, daemon=True).start()

before = signal.getsignal(signal.SIGINT)
press(lambda: any(Path("checkpoints").glob("alignment/*/lightning_checkpoints/last.ckpt")), 0)
try:
    raytrain2p.train("phase1.yaml", phase=1, launch_id="one", training={"max_steps": 100_000}, checkpoint={"every_steps": 2})
except KeyboardInterrupt as stopped:
    print("stopped", *stopped.__notes__)
assert signal.getsignal(signal.SIGINT) is before
assert raytrain2p.find("one").read_status()["status"] == "KILLED"
assert raytrain2p.find("one").last_checkpoint.is_file()

press(Path("checkpoints/.launches/two.lock").is_file, 2)  # while the workers start: they end at once
try:
    raytrain2p.train("phase1.yaml", phase=1, launch_id="two", training={"max_steps": 100_000})
except KeyboardInterrupt:
    print("stopped again")
assert signal.getsignal(signal.SIGINT) is before
assert {"ray" in sys.modules and sys.modules["ray"].is_initialized()} == {OWN}

outcome = raytrain2p.train("phase1.yaml", phase=1, launch_id="three")
print("then", outcome.steps)
"""


@only_long
@pytest.mark.parametrize("own", [False, True], ids=["Ray of the call", "Ray of the program"])
def test_ctrl_c_ends_the_workers_and_not_the_program(own: bool, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    lines = (OWN_RAY if own else "") + INTERRUPTED.replace("{OWN}", f"{{{own}}}")
    done = subprocess.run([sys.executable, "-c", lines], cwd=workdir, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *rest = done.stdout.splitlines()
    assert re.fullmatch(r"stopped run (\w{32}) can be resumed with resume='.*/\1_\d{8}_\d{6}'", first)
    assert rest == ["stopped again", "then 6"]
    assert (workdir / "mlflow.db").is_file()
