"""A plan as what Kubernetes takes: values of the Helm chart in deploy/helm/slipstream, or what that chart makes of
them, a RayService of KubeRay's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cluster.checks import cache_bytes, process_bytes
from cluster.config.loading import validated
from cluster.config.tree import SlipstreamConfig
from core.errors import ConfigError
from core.files import write_text
from core.types import Role
from placement.candidates import Candidate
from placement.packing import Seat, packed
from placement.slo import of_all_together, parse_slo

if TYPE_CHECKING:
    from cluster.planning import Searched

NAME = "slipstream"
HTTP_PORT = 8080
"""Of the gateway. 8000 is that of Ray Serve's proxies, which KubeRay asks whether a node is well."""
CACHE_PATH = "/cache"
_GPU_RESOURCES = {"MI300X": "amd.com/gpu"}
_CPUS_PER_GPU = 4.0
_HEAD = {"cpu": "2", "memory": "4Gi"}
_STORE_BYTES = 100_000_000
"""For Ray's object store: requests and KV don't pass through it."""
_GRACE_S = 10
"""That a pod which is to go has beyond the drain_timeout_s of who runs in it."""
_ROOM = 1.25
"""How much more memory a pod gets than its workers are reckoned to take: page cache, and what Ray takes itself."""


def write_deployable(found: Searched, layout: Candidate | None, path: Path) -> None:
    """As the name of the file asks: …rayservice.yaml, …values.yaml, or the configuration of serve. What replanning goes
    by waits in it until that is on. `layout` is that of the plan's configuration, which is warned of what pods will not
    have. Raises ConfigError if there is none, or the file can't be written."""
    plan, chosen = found.made.plan, found.made.candidates[0]
    if plan.serve is None or layout is None:
        raise ConfigError(f"--out: {found.why_not(chosen)}; give one --profile", param="out")
    tree = plan.serve | _waiting(plan.replan)
    if path.stem.endswith(("rayservice", "values")):
        weight_bytes = found.shapes[layout.decode.name].profile.model.weight_bytes
        tree, missing = in_pods(tree)
        plan.warnings += [f"--out {path.name}: {text}" for text in missing]
        values = helm_values(tree, packed(layout, found.topology), weight_bytes)
        tree = rayservice(values) if path.stem.endswith("rayservice") else values
    write_text(path, as_yaml(tree), "out")


def _waiting(replan: dict[str, Any] | None) -> dict[str, Any]:
    """Nothing where replanning could not be turned on by a word: for targets that have percentiles of their own."""
    if not replan:
        return {}
    try:
        of_all_together(parse_slo(replan["slo"]))
    except ConfigError:
        return {}
    return {"replan": {"mode": "off"} | replan}


def in_pods(tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The configuration with profiles where pods can have them, on the volume for models; and what has to be done
    before they have all that it names."""
    missing, model = [], tree["model"]
    if model != "demo" and (model.startswith(("/", ".", "~")) or Path(model).exists()):
        missing.append(
            f"the model is {model} of this machine, which pods don't have: copy it to the volume of modelCache and "
            f"write its path there, {CACHE_PATH}/{Path(model).name}, or plan with the id of a Hugging Face model"
        )
    for name, folder in tree.get("speculation", {}).get("weights", {}).items():
        missing.append(
            f"weights of {name} are {folder} of this machine, which pods don't have: copy them to the volume of "
            f"modelCache and write their path there, {CACHE_PATH}/{Path(folder).name}"
        )
    if (replan := tree.get("replan")) is None:
        return tree, missing
    files = [replan["profile"], *replan.get("further_profiles", ())]
    first, *further = there = [f"{CACHE_PATH}/profiles/{number}-{Path(file).name}" for number, file in enumerate(files)]
    copies = ", ".join(f"{file} as {path}" for file, path in zip(files, there, strict=True))
    missing.append(f"before replan.mode is turned on, copy to the volume of modelCache {copies}")
    moved = {"profile": first} | ({"further_profiles": further} if further else {})
    return tree | {"replan": replan | moved}, missing


def helm_values(tree: dict[str, Any], seats: Sequence[Seat], weight_bytes: int) -> dict[str, Any]:
    """Of a configuration as `config_of` makes it. A node of the plan becomes a pod."""
    given, cluster = validated(tree), dict(tree["cluster"])
    if given.cluster.cpus_per_worker is None:
        cluster["cpus_per_worker"] = given.engine.ranks * _CPUS_PER_GPU
        if not given.one_shape:
            cluster["prefill_cpus_per_worker"] = given.for_role(Role.PREFILL).engine.ranks * _CPUS_PER_GPU
    gateway = {"host": "0.0.0.0", "port": HTTP_PORT, "drain_timeout_s": given.gateway.drain_timeout_s}  # noqa: S104
    config = tree | {"cluster": cluster, "gateway": gateway}
    full = validated(config)
    return {
        "image": {"repository": NAME, "tag": version("slipstream"), "pullPolicy": "IfNotPresent"},
        "rayVersion": version("ray"),
        "config": config,
        "head": dict(_HEAD),
        "workerGroups": [_group(number, seat, full, weight_bytes) for number, seat in enumerate(seats)],
        "modelCache": {"existingClaim": "", "mountPath": CACHE_PATH},
        "redis": {"address": "", "existingSecret": "", "passwordKey": "redis-password"},
    }


def _group(number: int, seat: Seat, config: SlipstreamConfig, weight_bytes: int) -> dict[str, Any]:
    workers = [(config.for_role(role), getattr(seat, role.value)) for role in Role]
    cpus = sum(count * (own.cluster.cpus_per_worker or 0.0) for own, count in workers)
    memory = sum(count * _memory(weight_bytes, own) for own, count in workers)
    group: dict[str, Any] = {
        "name": f"workers-{number}",
        "replicas": seat.count,
        "cpu": str(math.ceil(cpus)),
        "memory": f"{math.ceil(memory * _ROOM / 2**30)}Gi",
    }
    if config.engine.device == "cuda":
        group["accelerator"] = {
            "resource": _GPU_RESOURCES.get(seat.device, "nvidia.com/gpu"),
            "count": seat.devices,
        }
    return group


def _memory(weight_bytes: int, config: SlipstreamConfig) -> int:
    """Of a worker; on a GPU, its weights pass through the memory of the host."""
    return weight_bytes + cache_bytes(config) + process_bytes(config.engine.ranks)


def rayservice(values: dict[str, Any]) -> dict[str, Any]:
    """As templates/rayservice.yaml of the chart has it."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": NAME},
        "spec": {
            "serveConfigV2": yaml.safe_dump(_serve_config(values["config"]), sort_keys=False),
            "rayClusterConfig": {
                "rayVersion": values["rayVersion"],
                **_surviving_head(values["redis"]),
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "object-store-memory": str(_STORE_BYTES)},
                    "template": _pod(values, "ray-head", values["head"], _head_ports(values["config"])),
                },
                "workerGroupSpecs": [_worker_group(values, group) for group in values["workerGroups"]],
            },
        },
    }


def _surviving_head(redis: dict[str, Any]) -> dict[str, Any]:
    """What Ray knows is kept in Redis, if there is one, so that the workers outlive the head."""
    if not redis["address"]:
        return {}
    secret = {"name": redis["existingSecret"], "key": redis["passwordKey"]}
    password = {"redisPassword": {"valueFrom": {"secretKeyRef": secret}}} if redis["existingSecret"] else {}
    return {"gcsFaultToleranceOptions": {"redisAddress": redis["address"], **password}}


def _head_ports(config: dict[str, Any]) -> list[dict[str, Any]]:
    ports = {"gcs": 6379, "dashboard": 8265, "client": 10001, "serve": 8000, "http": config["gateway"]["port"]}
    return [{"name": name, "containerPort": port} for name, port in ports.items()]


def _serve_config(config: dict[str, Any]) -> dict[str, Any]:
    """With Serve's proxies, though no request goes through them: KubeRay takes for ready whom they answer for.
    Replanning is a scaler outside of Serve."""
    application = {"name": NAME, "import_path": "cluster.serve_app:application", "args": config}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},  # noqa: S104
        "applications": [application | {"external_scaler_enabled": True}],
    }


def _worker_group(values: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    count = group["replicas"]
    return {
        "groupName": group["name"],
        "replicas": count,
        "minReplicas": count,
        "maxReplicas": count,
        "rayStartParams": {"object-store-memory": str(_STORE_BYTES)},
        "template": _pod(values, "ray-worker", group, []),
    }


def _pod(values: dict[str, Any], name: str, size: dict[str, Any], ports: list[dict[str, Any]]) -> dict[str, Any]:
    image, cache = values["image"], values["modelCache"]
    resources = {"cpu": size["cpu"], "memory": size["memory"]}
    if (accelerator := size.get("accelerator")) is not None:
        resources[accelerator["resource"]] = accelerator["count"]
    claim = cache["existingClaim"]
    volume = {"persistentVolumeClaim": {"claimName": claim}} if claim else {"emptyDir": {}}
    container = {
        "name": name,
        "image": f"{image['repository']}:{image['tag']}",
        "imagePullPolicy": image["pullPolicy"],
        **({"ports": ports} if ports else {}),
        "env": [{"name": "SLIPSTREAM_CACHE", "value": cache["mountPath"]}],
        "resources": {"requests": resources, "limits": resources},
        "volumeMounts": [{"name": "cache", "mountPath": cache["mountPath"]}],
    }
    grace_s = math.ceil(values["config"]["gateway"]["drain_timeout_s"]) + _GRACE_S
    volumes = [{"name": "cache", **volume}]
    where = {name: size[name] for name in ("nodeSelector", "tolerations") if size.get(name)}
    return {"spec": {"terminationGracePeriodSeconds": grace_s, "containers": [container], "volumes": volumes, **where}}


class _Plain(yaml.SafeDumper):
    """Texts of several lines as they are, and nothing by reference."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Plain.add_representer(str, _text)


def as_yaml(tree: dict[str, Any]) -> str:
    return yaml.dump(tree, Dumper=_Plain, sort_keys=False)
