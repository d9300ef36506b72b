"""Checks Kubernetes resources against the schemas beside it; see NOTICE.md."""

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft7Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

FOLDER = Path(__file__).parent
KUBERAY, KUBERNETES = "kuberay_1.7.json", "kubernetes_1.34.json"
RESOURCES = [(name, Resource.from_contents(json.loads((FOLDER / name).read_text()), DRAFT7)) for name in (KUBERAY, KUBERNETES)]
REGISTRY: Registry[Any] = Registry().with_resources(RESOURCES)
KINDS = {
    ("ray.io/v1", "RayCluster"): f"{KUBERAY}#/RayCluster",
    ("ray.io/v1", "RayJob"): f"{KUBERAY}#/RayJob",
    ("apps/v1", "Deployment"): f"{KUBERNETES}#/definitions/io.k8s.api.apps.v1.Deployment",
    ("apps/v1", "StatefulSet"): f"{KUBERNETES}#/definitions/io.k8s.api.apps.v1.StatefulSet",
    ("networking.k8s.io/v1", "NetworkPolicy"): f"{KUBERNETES}#/definitions/io.k8s.api.networking.v1.NetworkPolicy",
    ("v1", "PersistentVolumeClaim"): f"{KUBERNETES}#/definitions/io.k8s.api.core.v1.PersistentVolumeClaim",
    ("v1", "Service"): f"{KUBERNETES}#/definitions/io.k8s.api.core.v1.Service",
}


def problems(resource: dict[str, Any]) -> list[str]:
    """What is wrong with a resource: unknown fields, wrong types and values, missing fields."""
    kind = (str(resource.get("apiVersion")), str(resource.get("kind")))
    if (schema := KINDS.get(kind)) is None:
        return [f"no schema for {kind}"]
    found = Draft7Validator({"$ref": schema}, registry=REGISTRY).iter_errors(resource)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]
