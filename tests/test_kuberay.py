"""deploy/kuberay: against KubeRay's own schema, against Ray's pinned version, and its commands against the jobs."""

from __future__ import annotations

import gzip
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from test_docs import parse

from pipelines.extraction.fleet import CPU_FLOW

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "deploy" / "kuberay"
SCHEMAS = ROOT.parent / "shared" / "deploy"
MANIFESTS = [document for path in sorted(FOLDER.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())]
(ACCOUNT,), (CLUSTER,), JOBS = (
    [manifest for manifest in MANIFESTS if manifest["kind"] == kind]
    for kind in ("ServiceAccount", "RayCluster", "RayJob")
)
HEAD = CLUSTER["spec"]["headGroupSpec"]
WORKERS = {group["groupName"]: group for group in CLUSTER["spec"]["workerGroupSpecs"]}
PODS = [group["template"]["spec"] for group in (HEAD, *WORKERS.values())]


@cache
def schema_of(kind: str) -> dict[str, Any]:
    """What KubeRay's definition says of a kind. Unknown names, which a server would drop in silence, are errors."""
    path = SCHEMAS / f"ray.io_{kind.lower()}s.yaml.gz"
    if not path.exists():
        pytest.skip("no schemas of KubeRay beside this checkout")
    versions = yaml.load(gzip.decompress(path.read_bytes()), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = (one for one in versions["spec"]["versions"] if one["name"] == "v1")
    schema = dict(version["schema"]["openAPIV3Schema"])
    close(schema["properties"]["spec"])
    return schema


def close(schema: dict[str, Any]) -> None:
    """Let no object have other properties than those that are named."""
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    for inner in (*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")):
        if isinstance(inner, dict):
            close(inner)


@pytest.mark.parametrize("manifest", [CLUSTER, *JOBS], ids=lambda manifest: str(manifest["metadata"]))
def test_kuberay_accepts_it(manifest: dict[str, Any]) -> None:
    jsonschema.validate(manifest, schema_of(manifest["kind"]))


def test_a_misspelt_name_would_be_found() -> None:
    spec = {**CLUSTER["spec"], "workerGroupSpec": []}
    with pytest.raises(jsonschema.ValidationError, match="workerGroupSpec"):
        jsonschema.validate({**CLUSTER, "spec": spec}, schema_of("RayCluster"))


def test_the_ray_is_the_one_of_the_image() -> None:
    assert f"\nray=={CLUSTER['spec']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    images = [container["image"] for pod in PODS for container in pod["containers"]]
    assert images == ["REGISTRY/two-stream-i3d:cpu"] * 2 + ["REGISTRY/two-stream-i3d:cuda"]


def test_workers_of_each_kind_can_come_and_go() -> None:
    assert CLUSTER["spec"]["enableInTreeAutoscaling"]
    assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in WORKERS.values())
    kinds = {name: group["template"]["spec"]["nodeSelector"] for name, group in WORKERS.items()}
    assert kinds["cpu-worker"]["karpenter.sh/capacity-type"] == "spot"
    assert kinds["gpu-worker"]["karpenter.sh/capacity-type"] == "on-demand"
    assert HEAD["rayStartParams"]["num-cpus"] == "0"


def test_flow_on_cpus_keeps_away_from_the_gpus() -> None:
    assert WORKERS["gpu-worker"]["labels"] == {CPU_FLOW: "no"}
    assert "labels" not in WORKERS["cpu-worker"]


def test_a_pod_s_memory_holds_its_object_store() -> None:
    units = {"Mi": 2**20, "Gi": 2**30}

    def size(text: str) -> int:
        return int(text[:-2]) * units[text[-2:]]

    for group in (HEAD, *WORKERS.values()):
        pod = group["template"]["spec"]
        (shared,) = (volume for volume in pod["volumes"] if volume["name"] == "shared-memory")
        (container,) = pod["containers"]
        limits = container["resources"]["limits"]
        assert container["resources"]["requests"] == limits
        store = int(group["rayStartParams"]["object-store-memory"])
        assert store < size(shared["emptyDir"]["sizeLimit"]) < size(limits["memory"]) / 2


def test_no_key_is_in_it_and_every_node_asks_for_the_token() -> None:
    text = "".join(path.read_text() for path in FOLDER.iterdir())
    assert not re.search(r"AKIA|aws_access_key|aws_secret|kind: Secret", text, re.IGNORECASE)
    options = CLUSTER["spec"]["authOptions"]
    assert options["mode"] == "token"
    assert f"kubectl create secret generic {options['secretName']} --from-literal=auth_token=" in text
    assert {pod["serviceAccountName"] for pod in PODS} == {ACCOUNT["metadata"]["name"]}


def test_no_container_runs_as_root() -> None:
    assert all(pod["securityContext"]["runAsNonRoot"] for pod in PODS)
    rights = [container["securityContext"] for pod in PODS for container in pod["containers"]]
    assert all(not one["allowPrivilegeEscalation"] and one["capabilities"] == {"drop": ["ALL"]} for one in rights)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: str(job["metadata"]["generateName"]))
def test_the_jobs_commands_parse_and_write_to_s3(job: dict[str, Any]) -> None:
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": CLUSTER["metadata"]["name"]}
    python, path, *flags = job["spec"]["entrypoint"].split()
    assert python == "python"
    parse([path.removeprefix("/app/"), *flags])
    assert flags[flags.index("--output") + 1].startswith("s3://")
