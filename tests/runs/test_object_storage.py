"""The verbs that read runs, on a host that has none of their files."""

import json
import time
from pathlib import Path

import pytest

from raytrain2p.config.phases import ALIGNMENT
from raytrain2p.runs.__main__ import main
from tests.storage.s3_server import BUCKET, S3Server
from tests.tracking.test_run_objects import on_host, points, save, settings_in, writer_of


def test_a_run_is_listed_shown_and_found_while_it_trains_and_after_it(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"s3://{BUCKET}/{tmp_path.name}"
    settings = settings_in(url, f"sqlite:///{tmp_path}/mlflow.db")

    def verb(*words: str) -> str:
        assert main([*words, f"output.root={url}"]) == 0
        found = capsys.readouterr()
        assert "/scratch" not in found.out + found.err
        assert str(tmp_path / "reader") not in found.out + found.err
        return found.out

    with writer_of(settings) as (run, writer):
        writer.write(points(1, 2, time=time.time()))
        save(run, writer, 2)
        with monkeypatch.context() as reader:
            on_host("reader", reader, tmp_path)
            assert verb("list").splitlines()[1].split()[:3] == [run.run_id[:8], "alignment", "RUNNING"]
        run.files.artifact(ALIGNMENT).write_bytes(bytes(5000))
        writer.finish("FINISHED")

    on_host("reader", monkeypatch, tmp_path)
    row = json.loads(verb("list", "--json"))[0]
    assert (row["run_id"], row["status"], row["metrics"]["train_loss"]) == (run.run_id, "FINISHED", 0.5)
    assert row["directory"] == f"{url}/alignment/{run.path.name}"
    assert 5000 < row["bytes"] < 100_000
    assert verb("latest", "--phase", "1").strip() == row["directory"]
    assert verb("latest", "--phase", "1", "--artifact").strip() == f"{row['directory']}/aligner.pt"
    assert json.loads(verb("find", run.run_id[:8], "--json"))[0]["directory"] == row["directory"]
    assert row["directory"] in verb("show", row["directory"])
    assert main(["verify", f"output.root={url}"]) == 1
    verified = capsys.readouterr().out
    assert ".launches" not in verified  # what scratch keeps there is no record
    assert "has another directory" not in verified
