"""A plan for Kubernetes: what KubeRay accepts, and what the Helm chart takes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner, Result
from msgspec.structs import replace

from cluster.cli import cli
from cluster.config.loading import load, overlaid, validated
from cluster.config.replan import ReplanSection
from cluster.deployable import helm_values, in_pods, rayservice
from cluster.groups import groups_of
from core.errors import ConfigError
from placement.packing import Seat
from placement.profile import Setting, write_profile
from tests.placement.profiles import profile

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "slipstream"
SPEC = json.loads((Path(__file__).parent / "kuberay" / "rayservice_spec.json").read_text())
"""Names and types of the fields of KubeRay's RayService (v1) that a plan may write."""
TREE: dict[str, Any] = {
    "model": "demo",
    "engine": {"device": "cuda", "dtype": "bfloat16", "tensor_parallel_size": 2, "pipeline_parallel_size": 1},
    "cluster": {"prefill_replicas": 4, "decode_replicas": 2},
}
SEATS = [Seat("fast", "H100", 2, 6, prefill=2, decode=1)]
GB = 10**9


def planned(tmp_path: Path, name: str, *flags: str) -> dict[str, Any]:
    """What `slipstream plan --out` writes for two nodes of four cores."""
    said(tmp_path, name, *flags)
    found: dict[str, Any] = yaml.safe_load((tmp_path / name).read_text())
    return found


def said(tmp_path: Path, name: str, *flags: str, model: str = "small") -> Result:
    """What it prints."""
    known = profile()
    write_profile(replace(known, model=replace(known.model, name=model)), tmp_path / "profile.json")
    node = "nodes: [{name: here, device: cpu, devices: 4, memory_gb: 8, count: 2}]"
    links = "links: [{within: here, gb_per_s: 10}, {between: [here, here], gb_per_s: 1}]"
    (tmp_path / "cluster.yaml").write_text(f"{node}\n{links}")
    known = ["--profile", str(tmp_path / "profile.json"), "--topology", str(tmp_path / "cluster.yaml")]
    asked = ["--slo", "ttft=400,tpot=60", "--lengths", "prompt=200,output=20,cv=0.3"]
    return CliRunner().invoke(
        cli, ["plan", model, *known, *asked, *flags, "--out", str(tmp_path / name)], catch_exceptions=False
    )


def test_the_name_of_the_file_says_what_is_written(tmp_path: Path) -> None:
    config = planned(tmp_path, "serve.yaml")
    service = planned(tmp_path, "my-rayservice.yaml")
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    jsonschema.validate(service["spec"], SPEC)
    assert yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]["engine"] == config["engine"]
    values = planned(tmp_path, "values.yaml")
    jsonschema.validate(values, json.loads((CHART / "values.schema.json").read_text()))
    assert service == rayservice(values)


def test_what_replanning_goes_by_waits_in_every_file_until_it_is_on(tmp_path: Path) -> None:
    for tp in (1, 2):
        write_profile(profile(setting=Setting(device="cpu", tp=tp)), tmp_path / f"tp{tp}.json")
    further = ("--profile", str(tmp_path / "tp2.json"))
    tree = planned(tmp_path, "serve.yaml", *further)
    path = tmp_path / "serve.yaml"
    assert load(path, {}).replan == ReplanSection()
    on = load(path, {"replan": "on"})
    assert (on.replan.slo, {*on.replan.shapes}) == ("ttft=400,tpot=60", {"1x1", "2x1"})
    assert {on.replan.profile, *on.replan.further_profiles} == {tmp_path / "profile.json", tmp_path / "tp2.json"}
    assert {group.shape for group in groups_of(on)} == set(on.replan.worker_shapes)
    values = planned(tmp_path, "values.yaml", *further)
    jsonschema.validate(values, json.loads((CHART / "values.schema.json").read_text()))
    jsonschema.validate(rayservice(values)["spec"], SPEC)
    kept = values["config"]["replan"]
    assert (kept["mode"], kept["shapes"]) == ("off", tree["replan"]["shapes"])
    assert [kept["profile"], *kept["further_profiles"]] == [
        f"/cache/profiles/{number}-{Path(file).name}"
        for number, file in enumerate([tree["replan"]["profile"], *tree["replan"]["further_profiles"]])
    ]
    assert overlaid(values["config"], {"replan": "on"}).replan.shapes == on.replan.shapes


def test_a_plan_and_the_file_that_it_writes_are_replanned_alike(tmp_path: Path, monkeypatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr("cluster.launcher.serve", lambda config, _console: served.append(config) or 0)
    write_profile(profile(setting=Setting(device="cpu", tp=2)), tmp_path / "tp2.json")
    (tmp_path / "plan.json").write_text(
        said(tmp_path, "serve.yaml", "--profile", str(tmp_path / "tp2.json"), "--json").stdout
    )
    for flags in (["--plan", "plan.json"], ["--config", "serve.yaml"]):
        given = ["serve", flags[0], str(tmp_path / flags[1]), "--replan", "on"]
        CliRunner().invoke(cli, given, catch_exceptions=False)
    assert served[0] == served[1]
    assert len(served[0].replan.shapes) == 2


@pytest.mark.parametrize(
    ("replan", "message"),
    [
        ({"shapes": "4x1"}, "the workers begin with 1x1; name it too"),
        ({"shapes": "half"}, "'half' is no TP and PP"),
        ({"slo": "ttft=soon"}, "ttft"),
        ({"chunk": 1}, "unknown setting replan.chunk"),
    ],
)
def test_what_waits_for_replanning_is_checked_when_it_is_read(replan: dict[str, Any], message: str) -> None:
    waiting = {"mode": "off", "slo": "ttft=400,tpot=60", "profile": "p.json", "shapes": "1x1,2x1"}
    assert validated({"model": "demo", "replan": waiting}).replan == ReplanSection()
    with pytest.raises(ConfigError, match=message):
        validated({"model": "demo", "replan": waiting | replan})


def test_a_flag_for_replanning_is_refused_while_what_the_file_knows_of_it_waits(tmp_path: Path) -> None:
    planned(tmp_path, "serve.yaml")
    with pytest.raises(ConfigError, match="interval has no meaning while replan is off; use advise or on"):
        load(tmp_path / "serve.yaml", {"replan_interval": 1.0})


def test_targets_with_percentiles_of_their_own_are_nothing_to_replan_by(tmp_path: Path) -> None:
    assert "replan" not in planned(tmp_path, "serve.yaml", "--slo", "ttft=400@p95,tpot=60")


@pytest.mark.parametrize("name", ["a.values.yaml", "a.rayservice.yaml"])
def test_what_pods_will_not_have_is_said_with_what_to_do(tmp_path: Path, name: str) -> None:
    here = f"the model is {tmp_path} of this machine, which pods don't have: copy it to the volume of modelCache"
    told = " ".join(said(tmp_path, name, model=str(tmp_path)).stdout.split())
    assert here in told
    assert f"copy to the volume of modelCache {tmp_path}/profile.json as /cache/profiles/0-profile.json" in told
    assert "which pods don't have" not in said(tmp_path, name, model="owner/small").stdout
    assert "which pods don't have" not in said(tmp_path, "serve.yaml", model=str(tmp_path)).stdout


def test_weights_of_drafters_are_not_in_pods_either() -> None:
    tree = TREE | {"speculation": {"drafter": "draft_model", "weights": {"draft_model": "/drafts/small"}}}
    _, (missing,) = in_pods(tree)
    assert missing.startswith("weights of draft_model are /drafts/small of this machine, which pods don't have: copy")


def test_pods_have_what_the_workers_on_them_take() -> None:
    values = helm_values(TREE, SEATS, weight_bytes=16 * GB)
    jsonschema.validate(values, json.loads((CHART / "values.schema.json").read_text()))
    (group,) = rayservice(values)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert (group["replicas"], limits["nvidia.com/gpu"], limits["cpu"]) == (2, 6, "24")
    assert 3 * 16 * GB < int(limits["memory"].removesuffix("Gi")) * 2**30 < 3 * 16 * GB * 2
    assert values["config"]["cluster"]["cpus_per_worker"] * 3 == float(limits["cpu"])
    jsonschema.validate(rayservice(values)["spec"], SPEC)


def test_workers_of_two_shapes_take_what_each_of_them_does() -> None:
    tree = TREE | {"cluster": TREE["cluster"] | {"prefill_tensor_parallel_size": 1}}
    values = helm_values(tree, [Seat("fast", "H100", 2, 4, prefill=2, decode=1)], weight_bytes=16 * GB)
    assert values["workerGroups"][0]["cpu"] == "16"
    groups = groups_of(validated(values["config"]))
    assert [(own.config.engine.ranks, own.config.cluster.cpus_per_worker) for own in groups] == [(1, 4.0), (2, 8.0)]


def test_devices_of_another_maker_have_their_own_resource() -> None:
    values = helm_values(TREE, [Seat("a", "MI300X", 1, 2, both=1)], GB)
    assert values["workerGroups"][0]["accelerator"] == {"resource": "amd.com/gpu", "count": 2}


def test_what_serve_is_told_is_a_configuration_of_ours() -> None:
    config = helm_values(TREE, SEATS, GB)["config"]
    assert validated(config).gateway.host == "0.0.0.0"
    assert TREE["cluster"] == {"prefill_replicas": 4, "decode_replicas": 2}, "what was given stays as it was"


def test_models_are_kept_on_a_claim_if_there_is_one() -> None:
    values = helm_values(TREE, SEATS, GB)
    values["modelCache"]["existingClaim"] = "models"
    service = rayservice(values)
    jsonschema.validate(service["spec"], SPEC)
    pods = [service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]]
    pods += [group["template"]["spec"] for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]]
    assert [pod["volumes"][0]["persistentVolumeClaim"]["claimName"] for pod in pods] == ["models", "models"]


def test_a_pod_has_longer_to_end_than_who_drains_in_it() -> None:
    tree = TREE | {"gateway": {"drain_timeout_s": 90.5}}
    ray_cluster = rayservice(helm_values(tree, SEATS, GB))["spec"]["rayClusterConfig"]
    pods = [group["template"]["spec"] for group in (ray_cluster["headGroupSpec"], *ray_cluster["workerGroupSpecs"])]
    assert [pod["terminationGracePeriodSeconds"] for pod in pods] == [101, 101]


@pytest.mark.parametrize("secret", ["", "redis"])
def test_what_ray_knows_is_kept_in_redis_if_there_is_one(secret: str) -> None:
    values = helm_values(TREE, SEATS, GB)
    assert "gcsFaultToleranceOptions" not in rayservice(values)["spec"]["rayClusterConfig"]
    values["redis"] |= {"address": "redis:6379", "existingSecret": secret}
    jsonschema.validate(values, json.loads((CHART / "values.schema.json").read_text()))
    spec = rayservice(values)["spec"]
    jsonschema.validate(spec, SPEC)
    found = spec["rayClusterConfig"]["gcsFaultToleranceOptions"]
    password = {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "redis-password"}}}
    assert found == {"redisAddress": "redis:6379"} | ({"redisPassword": password} if secret else {})


Place = tuple[str | int, ...]
"""In the values: names and places, from the top."""


def changed(given: dict[Place, object]) -> dict[str, Any]:
    """What a plan writes, with other values in some places."""
    values: Any = helm_values(TREE, SEATS, GB)
    for (*there, last), value in given.items():
        at = values
        for step in there:
            at = at[step]
        at[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("workerGroups",), []),
        (("workerGroups", 0, "replicas"), 0),
        (("config", "gateway", "port"), 8000),
        (("config", "cluster", "ray_address"), "auto"),
        (("image", "pullPolicy"), "Sometimes"),
        (("head", "memory"), "much"),
        (("modelCache", "mountPath"), "cache"),
    ],
)
def test_the_chart_refuses_values_that_mean_nothing(path: Place, value: object) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed({path: value}), json.loads((CHART / "values.schema.json").read_text()))


def test_the_values_that_the_chart_comes_with_fit_it() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    jsonschema.validate(values, json.loads((CHART / "values.schema.json").read_text()))
    validated(values["config"])
    jsonschema.validate(rayservice(values)["spec"], SPEC)


def test_the_templates_ask_for_values_that_there_are() -> None:
    values: dict[str, Any] = helm_values(TREE, SEATS, GB)
    text = "".join(file.read_text() for file in (CHART / "templates").iterdir())
    asked = set(re.findall(r"(?:\.Values|\$values)((?:\.\w+)+)", text))
    assert len(asked) > 5
    for path in asked:
        at: Any = values
        for name in path.strip(".").split("."):
            assert name in at, f"templates ask for {path}"
            at = at[name]
    assert text.count("{{") == text.count("}}")


def templated(folder: Path, values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """What Helm makes of the chart."""
    (folder / "values.yaml").write_text(yaml.safe_dump(values))
    command = ["helm", "template", "slipstream", str(CHART), "--values", str(folder / "values.yaml")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


SELECTOR = {"pool": "fast"}
TOLERATIONS = [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]
NEEDS_HELM = pytest.mark.skipif(shutil.which("helm") is None, reason="needs helm")


@NEEDS_HELM
@pytest.mark.parametrize(
    "given",
    [
        {},
        {("modelCache", "existingClaim"): "models", ("modelCache", "mountPath"): "/models"},
        {("redis", "address"): "redis:6379"},
        {("redis", "address"): "redis:6379", ("redis", "existingSecret"): "redis"},
        {("head", "nodeSelector"): SELECTOR, ("head", "tolerations"): TOLERATIONS},
        {("workerGroups", 0, "nodeSelector"): SELECTOR, ("workerGroups", 0, "tolerations"): TOLERATIONS},
        {("config", "gateway", "drain_timeout_s"): 90.5, ("config", "gateway", "port"): 9000},
    ],
)
def test_helm_makes_of_the_values_what_the_plan_writes(tmp_path: Path, given: dict[Place, object]) -> None:
    values = changed(given)
    told = templated(tmp_path, values)
    assert not told.returncode, told.stderr
    made, ours = yaml.safe_load(told.stdout), rayservice(values)
    jsonschema.validate(made["spec"], SPEC)
    for service in (made, ours):
        service["spec"]["serveConfigV2"] = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert made["spec"] == ours["spec"]


@NEEDS_HELM
def test_helm_refuses_values_that_mean_nothing(tmp_path: Path) -> None:
    told = templated(tmp_path, changed({("config", "gateway", "port"): 8000}))
    assert told.returncode
    assert "port" in told.stderr


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no-such-folder/values\.yaml can't be written: there is no folder"):
        planned(tmp_path, "no-such-folder/values.yaml")
