"""No code from a model, a record or a store is run: the calls that could do it are absent, or have the argument that forbids it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "raytrain2p"
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "compile", "os.system", "torch.hub.load", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle", "np.fromfile"}
# Calls, and the arguments that they must have
REQUIRED = {
    "torch.load": {"weights_only": True},
    "from_pretrained": {"trust_remote_code": False},
    "from_config": {},  # of a configuration that from_pretrained has read
}
WITHOUT_CODE = {"GenerationConfig", "nn.Embedding"}  # their from_pretrained runs none


def violations(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", "") or ""}
            yield from (f"{node.lineno}: imports {name}" for name in names & MODULES)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in CALLS or given.get("shell") == "True" or given.get("allow_pickle") == "True" or given.get("weights_only") == "False":
            yield f"{node.lineno}: {name}"
        if name == "yaml.load" and given.get("Loader") != "SettingsLoader":
            yield f"{node.lineno}: {name} without SettingsLoader"
        owner, _, method = name.rpartition(".")
        required = REQUIRED.get(name, REQUIRED.get(method, {}) if owner not in WITHOUT_CODE else {})
        if None in given:  # **arguments: the module says them elsewhere
            continue
        yield from (f"{node.lineno}: {name} without {key}={value}" for key, value in required.items() if given.get(key) != str(value))


def test_no_module_runs_code_from_data() -> None:
    found = {path.name: list(violations(path.read_text())) for path in PACKAGE.rglob("*.py")}
    assert len(found) > 50
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(directory)",
        "AutoModel.from_pretrained(directory, trust_remote_code=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run(text, shell=True)",
        "eval(text)",
    ],
)
def test_each_kind_of_violation_is_found(code: str) -> None:
    assert list(violations(code))
