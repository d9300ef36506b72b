"""`raytrain2p VERB` and `python -m raytrain2p VERB`: every command under one name, with its exit codes."""

import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest

import raytrain2p
from raytrain2p.__main__ import COMMANDS, main

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_verbs(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: raytrain2p VERB ..."
    assert [line.split()[0] for line in lines[2 : 2 + len(COMMANDS)]] == list(COMMANDS)


def test_an_unknown_verb_is_bad_input_and_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    output = capsys.readouterr()
    assert "'trian' is not a verb" in output.err
    assert all(verb in output.err for verb in COMMANDS)
    assert output.out == ""


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{raytrain2p.__version__}\n"


@pytest.mark.parametrize("verb", COMMANDS)
def test_each_verb_has_a_help_of_its_own(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(SystemExit):
        assert main([verb, "--help"]) == 0
    assert "usage: python -m raytrain2p." in capsys.readouterr().out


def test_a_verb_passes_its_exit_code_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYTRAIN2P_HOME", str(tmp_path))
    assert main(["train", "--phase", "1", "training.max_stepz=1"]) == 2
    assert "training.max_stepz" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_phase(
    tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYTRAIN2P_HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    words = ["--phase", "1", "--config", str(tiny_config / "phase1.yaml")]
    monkeypatch.setattr(sys, "argv", ["raytrain2p", "train", *words, "--dry-run"])
    assert main(["train", *words, "--dry-run"]) == 0
    assert f"nothing was started\n\nnext:\n  python -m raytrain2p.train {' '.join(words)}\n" in capsys.readouterr().out
    assert not (tmp_path / "checkpoints").exists()


def test_the_module_exits_with_the_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "raytrain2p"]
    assert subprocess.run([*command, "trian"], cwd=tmp_path, capture_output=True, check=False).returncode == 2
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0


def test_the_installed_command_is_the_module() -> None:
    assert tomllib.loads(PROJECT.read_text())["project"]["scripts"] == {"raytrain2p": "raytrain2p.__main__:main"}


def test_predict_takes_an_embedded_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAYTRAIN2P_HOME", str(tmp_path))
    assert main(["predict", "--file", "emoji:val"]) == 2
    assert "--run=latest\n    there is no finished run" in capsys.readouterr().err, "the records were read"
