"""Makes kubernetes_1.34.json of the schemas in a wheel: pip install --target FOLDER --no-deps kubernetes-validate==1.37.0, then
`python reduce.py FOLDER`. It keeps the kinds that cluster/kuberay uses and what they refer to, without descriptions
and nulls.
"""

import json
import sys
from pathlib import Path
from typing import Any

VERSION = "v1.34.0-local-strict"  # the oldest that is supported: what it knows, later ones know too
CORE = "io.k8s.api.core.v1."
ROOTS = [
    "io.k8s.api.apps.v1.Deployment",
    "io.k8s.api.apps.v1.StatefulSet",
    "io.k8s.api.networking.v1.NetworkPolicy",
    *(CORE + kind for kind in ("EnvFromSource", "EnvVar", "PersistentVolumeClaim", "PodTemplateSpec", "ResourceRequirements")),
    *(CORE + kind for kind in ("SecurityContext", "Service", "VolumeMount")),
]


def reduced(schema: Any, found: set[str]) -> Any:
    """Without descriptions and notes; adds the definitions that it refers to."""
    if isinstance(schema, list):
        return [reduced(one, found) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(reference := schema.get("$ref"), str):
        found.add(reference.rpartition("/")[2])
        return {"$ref": f"#/definitions/{reference.rpartition('/')[2]}"}
    kept = {key: value for key, value in schema.items() if not (isinstance(value, str) and key == "description")}
    if isinstance(kept.get("type"), list):  # [..., "null"]: a field that is left empty is a mistake
        kept["type"] = kept["type"][0]
    return {key: reduced(value, found) for key, value in kept.items() if not key.startswith(("x-kubernetes", "$schema"))}


def main(folder: Path) -> None:
    source = folder / "kubernetes_validate/kubernetes-json-schema" / VERSION / "_definitions.json"
    everything = json.loads(source.read_text())["$defs"]
    definitions: dict[str, Any] = {}
    wanted = set(ROOTS)
    while missing := wanted - set(definitions):
        for name in missing:
            definitions[name] = reduced(everything[name], wanted)
    target = Path(__file__).with_name("kubernetes_1.34.json")
    target.write_text(json.dumps({"definitions": definitions}, sort_keys=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
