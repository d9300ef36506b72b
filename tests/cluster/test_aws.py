"""cluster/launcher/aws.yaml as `ray up` uses it, on an EC2 that moto plays in this process: all but SSH to the instances."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster_files.placeholders import CLUSTER, filled

pytestmark = pytest.mark.skipif("RAYTRAIN2P_CLUSTER_TESTS" not in os.environ, reason="Ray waits 30 s for AWS: make test-cluster")
REGION = "us-east-1"


def test_the_launcher_makes_what_it_needs_and_starts_a_head_and_a_spot_instance_with_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto")
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    for name, value in {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": REGION}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key pair to ~/.ssh
    with moto.mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        ec2 = boto3.client("ec2", region_name=REGION)
        values = {"region": REGION, "machine-image": ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]}
        config = prepare_config(yaml.safe_load(filled((CLUSTER / "launcher" / "aws.yaml").read_text(), values)))
        config = bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(config))
        types = config["available_node_types"]
        assert types["head"]["resources"] == {"CPU": 0}
        assert types["gpu"]["resources"]["GPU"] == 1
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for kind in ("head", "gpu"):
            tags = {"ray-node-type": "head" if kind == "head" else "worker", "ray-user-node-type": kind}
            provider.create_node(types[kind]["node_config"], tags, 1)
        started = [one for group in ec2.describe_instances()["Reservations"] for one in group["Instances"]]
        assert {(one["InstanceType"], one.get("InstanceLifecycle")) for one in started} == {("m7i.2xlarge", None), ("g6.4xlarge", "spot")}
        (group,) = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["raytrain2p"]}])["SecurityGroups"]
        rules: list[dict[str, Any]] = group["IpPermissions"]
        open_to_all = [rule.get("ToPort") for rule in rules if rule["IpRanges"]]
        assert open_to_all == [22]
        assert [pair["GroupId"] for rule in rules for pair in rule["UserIdGroupPairs"]] == [group["GroupId"]]
