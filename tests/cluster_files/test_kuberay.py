"""cluster/kuberay: each resource is one that Kubernetes and KubeRay accept, and does what cluster/README.md promises."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow.cli
import pytest
import ray
import yaml

from tests.cluster_files.commands import check_training
from tests.cluster_files.placeholders import CLUSTER, filled
from tests.cluster_files.schemas import problems

FILES = sorted((CLUSTER / "kuberay").glob("*.yaml"))
Resource = dict[str, Any]


def resources(name: str) -> list[Resource]:
    return list(yaml.safe_load_all(filled((CLUSTER / "kuberay" / name).read_text(), {})))


def only(name: str, kind: str) -> Resource:
    return next(one for one in resources(name) if one["kind"] == kind)


def pods(resource: Resource) -> Iterator[tuple[str, Resource]]:
    """The pod templates in a resource, each with the name of its first container."""
    if isinstance(resource, dict):
        for value in resource.values():
            yield from pods(value)
        if "containers" in resource:
            yield resource["containers"][0]["name"], resource
    elif isinstance(resource, list):
        for one in resource:
            yield from pods(one)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_resource_has_known_fields_of_the_right_types(path: Any) -> None:
    found = resources(path.name)
    assert found
    assert {one["metadata"]["name"]: problems(one) for one in found} == {one["metadata"]["name"]: [] for one in found}


def change(path: str, value: Any) -> Callable[[Resource], None]:
    def apply(resource: Resource) -> None:
        *way, last = path.split("/")
        inner: Any = resource
        for key in way:
            inner = inner[int(key) if isinstance(inner, list) else key]
        inner[last] = value

    return apply


@pytest.mark.parametrize(
    ("name", "kind", "broken"),
    [
        ("raycluster.yaml", "RayCluster", change("spec/headGroupSpecs", {})),
        ("raycluster.yaml", "RayCluster", change("spec/authOptions/mode", "tokens")),
        ("raycluster.yaml", "RayCluster", change("spec/workerGroupSpecs/0/maxReplicas", "4")),
        ("raycluster.yaml", "RayCluster", change("spec/headGroupSpec/rayStartParams/num-cpus", 0)),
        ("raycluster.yaml", "RayCluster", change("spec/workerGroupSpecs/0/template/spec/terminationGracePeriod", 150)),
        ("raycluster.yaml", "RayCluster", change("spec/headGroupSpec/template/spec/containers/0/env/0/valu", "x")),
        ("rayjob.yaml", "RayJob", change("spec/backOffLimit", 3)),
        ("rayjob.yaml", "RayJob", change("spec/rayClusterSpec/enableInTreeAutoscaling", "yes")),
        ("rayjob.yaml", "RayJob", change("spec/submitterPodTemplate/spec/containers/0/image", None)),
        ("mlflow.yaml", "Deployment", change("spec/template/spec/containers/0/envFrom/0/secretRef/nam", "x")),
        ("storage.yaml", "PersistentVolumeClaim", change("spec/accessModes", "ReadWriteMany")),
        ("network.yaml", "NetworkPolicy", change("spec/ingres", [])),
    ],
)
def test_a_misspelled_field_or_a_wrong_type_is_found(name: str, kind: str, broken: Callable[[Resource], None]) -> None:
    resource = only(name, kind)
    broken(resource)
    assert problems(resource)


def test_no_pod_may_do_more_than_the_restricted_standard_allows() -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards: README.md has the namespace enforce it."""
    found = [pod for path in FILES for resource in resources(path.name) for pod in pods(resource)]
    assert {name for name, _ in found} == {"ray-head", "ray-worker", "ray-job-submitter", "mlflow", "postgres"}
    for name, pod in found:
        whole = pod["securityContext"]
        assert whole["runAsNonRoot"], name
        assert whole["runAsUser"] > 0, name
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & {*pod}, name
        assert not [volume for volume in pod.get("volumes", []) if "hostPath" in volume], name
        for container in pod["containers"]:
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}, name
            assert {"cpu", "memory"} <= {*container["resources"]["requests"]}, name
            assert "memory" in container["resources"]["limits"], name


def test_credentials_come_from_secrets_alone() -> None:
    for path in FILES:
        for resource in resources(path.name):
            assert resource["kind"] != "Secret", path.name
            for _, pod in pods(resource):
                for variable in pod["containers"][0].get("env", []):
                    secret = any(word in variable["name"] for word in ("PASSWORD", "TOKEN", "SECRET", "KEY"))
                    assert not (secret and "value" in variable), variable["name"]


def test_the_job_s_cluster_has_the_pods_of_the_standing_cluster() -> None:
    standing, job = only("raycluster.yaml", "RayCluster")["spec"], only("rayjob.yaml", "RayJob")["spec"]["rayClusterSpec"]
    del job["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"]  # the autoscaler's pod must reach Kubernetes
    for name in ("enableInTreeAutoscaling", "autoscalerOptions"):
        del standing[name]
    for spec in (standing, job):
        for count in ("replicas", "minReplicas", "maxReplicas"):
            del spec["workerGroupSpecs"][0][count]
    assert standing == job


def test_ray_is_the_version_that_is_tested() -> None:
    assert only("raycluster.yaml", "RayCluster")["spec"]["rayVersion"] == ray.__version__
    assert only("rayjob.yaml", "RayJob")["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__


def test_a_job_that_is_tried_again_has_the_same_launch_id_and_its_settings_are_right() -> None:
    job = only("rayjob.yaml", "RayJob")
    words = shlex.split(job["spec"]["entrypoint"])
    options, settings = check_training(words)
    assert job["spec"]["backoffLimit"] > 0
    assert options.launch_id == job["metadata"]["name"]
    assert settings.launch.num_workers == job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
    (service,) = [one for one in resources("mlflow.yaml") if one["kind"] == "Service" and one["metadata"]["name"] == "mlflow"]
    assert settings.tracking.uri == f"http://mlflow:{service['spec']['ports'][0]['port']}"


def test_a_pod_that_is_deleted_has_time_for_a_checkpoint() -> None:
    for name, pod in pods(only("raycluster.yaml", "RayCluster")):
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert "120" in command[-1], name
        assert pod["terminationGracePeriodSeconds"] > 120
        if command[0] == "python":
            compile(command[-1], name, "exec")


def test_mlflow_s_server_takes_its_arguments() -> None:
    container = dict(pods(only("mlflow.yaml", "Deployment")))["mlflow"]["containers"][0]
    assert container["args"][:2] == ["mlflow", "server"]
    context = mlflow.cli.server.make_context("server", container["args"][2:])
    assert context.params["artifacts_destination"].startswith("s3://")
    assert "mlflow:5000" in context.params["allowed_hosts"].split(",")


SCENE = """
import subprocess, sys, threading, time
from pathlib import Path

folder, code = Path(sys.argv[1]), sys.argv[2]
slow = "import signal, sys, time; from pathlib import Path; end = lambda *_: (time.sleep(0.5), Path(sys.argv[2]).touch(), sys.exit(143)); "
slow += "signal.signal(signal.SIGTERM, end); Path(sys.argv[2] + '.ready').touch(); time.sleep(60)"
started = [subprocess.Popen([sys.executable, "-c", slow, name, str(folder / name)]) for name in ("raytrain2p.train", "other.program")]
while len(list(folder.glob("*.ready"))) < 2:
    time.sleep(0.02)
threading.Thread(target=started[0].wait).start()  # as Ray does
subprocess.run([sys.executable, "-c", code], check=True)
print((folder / "raytrain2p.train").exists(), started[1].poll())
started[1].kill()
"""


def test_the_head_s_pod_ends_only_when_its_drivers_have_stopped(tmp_path: Path) -> None:
    isolated = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]  # it sees no driver but its own
    if shutil.which("unshare") is None or subprocess.run([*isolated, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs `unshare --pid`, and so root, to have processes of its own")
    head = dict(pods(only("raycluster.yaml", "RayCluster")))["ray-head"]
    code = head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    command = [*isolated, sys.executable, "-c", SCENE, str(tmp_path), code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["True", "None"], done.stderr
