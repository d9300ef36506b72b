"""docs/tutorial_model.md, typed as it stands into a shell, where the quickstart has trained."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from raytrain2p.data.embedded import images
from tests.inference.hub import running
from tests.launch.launching import ROOT

PAGE = ROOT / "docs" / "tutorial_model.md"


@pytest.mark.timeout(1800)
def test_every_command_of_the_tutorial_runs(quickstart_model: Path) -> None:
    """In the directory of the quickstart itself, since its runs have their MLflow store on record. It gets a run, a registered version,
    and `exported/`."""
    home = quickstart_model.parents[3]
    (home / "image.png").write_bytes(images("test_concept")[0].ref.read())
    script = "set -euxo pipefail\n" + "\n".join(re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    del environment["HF_HUB_OFFLINE"]  # there is a hub, on loopback
    with running("a-token-of-the-hub") as hub:
        environment |= {"RAY_ADDRESS": "local", "HF_ENDPOINT": hub.address, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(["bash", "-c", script], cwd=home, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout[-5000:], done.stderr[-5000:])
    assert done.returncode == 0
    assert {"config.json", "README.md", "model.safetensors"} <= hub.files.keys()
    assert hub.token not in done.stdout + done.stderr.replace(f"HF_TOKEN={hub.token}", "")
