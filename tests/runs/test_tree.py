"""`runs tree`: aligner, phase 2 runs, registered versions; sweeps and trials."""

from pathlib import Path
from typing import Any

import pytest

from raytrain2p.config import Settings
from raytrain2p.runs import __main__ as runs
from raytrain2p.tracking.mlflow_store import client_of
from raytrain2p.tracking.run import SWEEP_TAG, Run
from tests.runs.made import printed, sent, trained
from tests.tracking.stores import NOBODY, settings_in


@pytest.fixture
def family(settings: Settings, tmp_path: Path) -> dict[str, Run]:
    """An aligner, a phase 2 run and a sweep from it with a trial; a run from an aligner that is not here, and a trial without its sweep;
    runs that began with the weights of the phase 2 run, with a copy of them, and with weights that are not here."""
    made = {"aligner": trained(settings_in(tmp_path, phase=1), "aligner", [1.0], phase="alignment")}
    own = settings_in(tmp_path, f"model.aligner={made['aligner'].path}/aligner.pt")
    made |= {"direct": trained(own, "direct", [1.0]), "sweep": trained(own, "sweep", [1.0], phase="sweeps")}
    made |= {"trial": trained(own, "trial", [1.0]), "lost": trained(own, "lost", [1.0])}
    made["foreign"] = trained(settings_in(tmp_path, "model.aligner=/old/aligner.pt"), "foreign", [1.0])
    for name, path in (("warm", f"{made['direct'].path}/model.pt"), ("copied", "/copy/model.pt"), ("stray", "/old/model.pt")):
        inputs = {f"model.init={path}": {"content": "old" if name == "stray" else "c0"}}
        made[name] = trained(settings_in(tmp_path, f"model.init={path}"), name, [1.0], facts={"inputs": inputs})
    made["trial"].add_tags({SWEEP_TAG: made["sweep"].run_id})
    made["lost"].add_tags({SWEEP_TAG: "7" * 32})
    return made


def shape(trees: list[dict[str, Any]], names: dict[str, str]) -> dict[str, Any]:
    """Nested dictionaries of the runs' names."""
    return {tree.get("missing") or names[tree["run_id"]]: shape(tree["children"], names) for tree in trees}


def test_each_run_is_under_what_it_came_from(settings: Settings, family: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    root, names = family["aligner"].path.parent.parent, {run.run_id: name for name, run in family.items()}
    whole: dict[str, Any] = {
        "aligner": {"direct": {"warm": {}, "copied": {}}, "sweep": {"trial": {}}},
        f"sweeps {'7' * 32}": {"lost": {}},
        "aligner /old/aligner.pt": {"foreign": {}},
        "init /old/model.pt": {"stray": {}},
    }
    assert shape(printed(root, capsys, "tree", "--no-mlflow"), names) == whole
    assert shape(printed(root, capsys, "tree", "--no-mlflow", "trial"), names) == {"aligner": {"sweep": {"trial": {}}}}
    for run in family.values():
        sent(run)
    client = client_of(settings.tracking.uri)
    client.create_registered_model("assistant")
    client.create_model_version("assistant", f"runs:/{family['direct'].run_id}/model", family["direct"].run_id)
    uri = f"tracking.uri={settings.tracking.uri}"
    tree = printed(root, capsys, "tree", "direct")
    assert [child["registered"] for child in tree[0]["children"]] == [["assistant/1"]]
    assert runs.main(["tree", f"output.root={root}", "direct"]) == 0
    assert [line.partition("  phase2")[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        f"└─ {family['direct'].run_id[:8]}",
        "   ├─ registered: assistant/1",
        f"   ├─ {family['warm'].run_id[:8]}",
        f"   └─ {family['copied'].run_id[:8]}",
    ]
    root.rename(root.with_name("gone"))
    whole["aligner"]["direct"].pop("copied")  # MLflow has paths alone: what has the content of a copy is not known
    whole["init /copy/model.pt"] = {"copied": {}}
    assert shape(printed(root, capsys, "tree", uri), names) == whole


def test_a_store_that_is_away_and_a_damaged_run_are_a_line_each(family: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    family["direct"].files.status.write_text("{")
    assert runs.main(["tree", f"output.root={family['aligner'].path.parent.parent}", f"tracking.uri={NOBODY}"]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 13
    assert [len([line for line in err.splitlines() if words in line]) for words in ("MLflow is away", "status.json")] == [1, 1]
