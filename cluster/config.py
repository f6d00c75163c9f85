"""The configuration: one tree, one YAML file, the same names as flags.

Sections group what belongs together in the file; leaf names are unique over the tree, so that `--kv-cache-memory` and
`engine: {kv_cache_memory: …}` are one setting. Those of `speculation` have the section's name before them as flags:
`--speculation-rule` is `speculation: {rule: …}`, and `--speculation` its drafter, and those of `replan` alike, with
`--replan` for its mode. Everything has a default that works
on a laptop. Unknown keys are refused with the nearest known name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from cluster.notation import (
    AbsolutePath,
    CountOrAuto,
    DrafterNames,
    DrafterWeights,
    DtypeName,
    LoraModules,
    NodeLabels,
    Size,
    SizeOrAuto,
    StepSizes,
    parse_bytes,
)
from core.errors import ConfigError
from core.types import Role
from engine.kv_layout import DEFAULT_KV_CACHE_BYTES
from engine.lora.checkpoint import DEFAULT_MAX_RANK
from engine.quantization.methods import Method, check_method
from kv_transfer.codecs.names import CodecSetting
from kv_transfer.transports.names import READS_IN_PLACE, TransportName
from speculation.controllers.registry import CONTROLLERS, DEFAULT_CONTROLLER
from speculation.drafters.registry import DRAFTERS
from speculation.rules.registry import DEFAULT_RULE, RULES
from speculation.settings import Settings

if TYPE_CHECKING:
    from placement.outcome import Targets

_DEFAULT_SEQUENCES = 64
DEFAULT_DRAFTER = "none"
PREFILL_SHAPE = ("prefill_tensor_parallel_size", "prefill_pipeline_parallel_size", "prefill_cpus_per_worker")
"""Settings of the cluster by which prefill workers may differ from decode workers."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: object, field: ValidationInfo) -> object:
        """Python counts True as 1."""
        annotation = cls.model_fields[str(field.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool:
            if (word := "on" if value else "off") in get_args(annotation):  # as YAML 1.1 reads these words
                return word
            raise ValueError(f"{str(value).lower()} is neither a number nor a name; write one, or leave it out")
        return value

    @classmethod
    def flag(cls, name: str) -> str:
        """What a setting is called outside of its section."""
        return name


class EngineSection(Section):
    dtype: DtypeName = Field(
        "auto", description="Type of weights and KV cache; auto: bfloat16 where the device has it, else float32"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where workers compute; auto: a GPU each if the cluster has them, else the CPU"
    )
    block_size: Literal[8, 16, 32, 64] = Field(16, description="Tokens per KV cache block")
    kv_cache_memory: SizeOrAuto = Field(
        None,
        description="KV cache of one worker, such as 512MiB; default, and auto: 1GiB on the CPU, on a GPU what "
        "gpu_memory_utilization leaves",
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of a GPU's memory that a worker may use: weights, the largest step, and the rest for the KV "
        "cache, unless kv_cache_memory says how much; default: 0.9. Refused on the CPU",
    )
    max_model_len: CountOrAuto = Field(
        None,
        gt=0,
        description="Longest prompt plus output, in tokens, such as 8192 or 8K; default, and auto: what the model and "
        "the KV cache allow",
    )
    max_num_seqs: int | None = Field(
        None,
        gt=0,
        le=4096,
        description=f"Sequences in one step; default: {_DEFAULT_SEQUENCES}, or max_num_batched_tokens if that is lower",
    )
    max_num_batched_tokens: CountOrAuto = Field(
        None,
        gt=0,
        description="Tokens in one step; default: 2048 on prefill workers, 512 on the others, or max_num_seqs if more",
    )
    tensor_parallel_size: int = Field(
        1, ge=1, le=64, description="Devices of a worker over which every layer is split; processes on the CPU"
    )
    pipeline_parallel_size: int = Field(
        1, ge=1, le=64, description="Stages of a worker, each with a part of the layers on tensor_parallel_size devices"
    )
    prefix_caching: bool = Field(True, description="Reuse the KV of common prefixes")
    enforce_eager: bool = Field(
        False,
        description="Compute with PyTorch's own operators only: no compiled or native kernels, no captured graphs",
    )
    quantization: Method | None = Field(
        None, description="Keep the projections in 8 bits: int8 on a CPU or GPU, fp8 on a GPU; default: as dtype says"
    )
    lora_modules: LoraModules = Field(
        {},
        description="LoRA adapters to serve beside the model, name=path of a PEFT folder each, or JSON with name, path "
        "and base_model_name, chosen by model name",
    )
    max_lora_rank: int = Field(DEFAULT_MAX_RANK, gt=0, description="Largest rank of an adapter")

    @model_validator(mode="after")
    def _a_token_per_sequence(self) -> EngineSection:
        tokens, sequences = self.max_num_batched_tokens, self.max_num_seqs
        if tokens is not None and sequences is not None and tokens < sequences:
            raise ValueError(
                f"max_num_batched_tokens {tokens} is below max_num_seqs {sequences}: "
                "a step has room for a token of each sequence; raise the one or lower the other"
            )
        return self

    @model_validator(mode="after")
    def _quantization_runs(self) -> EngineSection:
        if self.device != "auto":  # else known once the cluster is
            check_method(self.quantization, self.device, self.dtype)
        return self

    @model_validator(mode="after")
    def _a_gpu_to_share(self) -> EngineSection:
        if self.device == "cpu" and self.gpu_memory_utilization is not None:
            raise ValueError("gpu_memory_utilization has no meaning with device cpu; use kv_cache_memory")
        return self

    @property
    def kv_cache_bytes(self) -> int | None:
        """Of one worker; None where the worker finds out, on its GPU."""
        if self.kv_cache_memory is not None:
            return parse_bytes(self.kv_cache_memory)
        return DEFAULT_KV_CACHE_BYTES if self.device == "cpu" else None

    @property
    def adapters(self) -> dict[str, str]:
        """Folders by name."""
        return {name: module.path for name, module in self.lora_modules.items()}

    @property
    def ranks(self) -> int:
        """Devices, or processes on the CPU, of one worker."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def sequences(self) -> int:
        """How many sequences a step takes; never more than its tokens."""
        if self.max_num_seqs is not None:
            return self.max_num_seqs
        return min(_DEFAULT_SEQUENCES, self.max_num_batched_tokens or _DEFAULT_SEQUENCES)

    def batched_tokens(self, role: Role, planned: int | None = None) -> int:
        """The token budget of a step for a worker of `role`, or what a plan has made of it."""
        if planned is not None:
            return max(planned, self.sequences)
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(2048 if role is Role.PREFILL else 512, self.sequences)


class ClusterSection(Section):
    prefill_replicas: int = Field(1, ge=0, le=1024, description="Workers that prefill")
    decode_replicas: int = Field(1, ge=0, le=1024, description="Workers that decode")
    colocated: bool = Field(False, description="Prefill and decode in the same worker; --decode-replicas of them")
    cpus_per_worker: float | None = Field(
        None, gt=0, description="Cores of one worker; default: the machine's cores shared out evenly"
    )
    prefill_tensor_parallel_size: int | None = Field(
        None, ge=1, le=64, description="tensor_parallel_size of prefill workers; default: that of decode workers"
    )
    prefill_pipeline_parallel_size: int | None = Field(
        None, ge=1, le=64, description="pipeline_parallel_size of prefill workers; default: that of decode workers"
    )
    prefill_cpus_per_worker: float | None = Field(
        None, gt=0, description="cpus_per_worker of prefill workers; default: that of decode workers"
    )
    ray_address: str | None = Field(None, description="A running Ray cluster to join; default: start one here")
    workers_per_node: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Workers on a node of the cluster, at the most: each reserves its part of the node's cores; "
        "default: as many as have room",
    )
    node_labels: NodeLabels = Field({}, description="Workers run on nodes of the Ray cluster with these labels only")
    handoff_within_node: bool = Field(
        False, description="KV goes to a decode worker on the node of the prefill worker, as long as there is one"
    )
    handoff_min_tokens: CountOrAuto = Field(
        None,
        ge=0,
        description="Prompts of which fewer tokens have to be computed are prefilled where they are decoded; 0 hands "
        "everything over; default, and auto: where that delays others less than the hand-off would this one, as "
        "measured",
    )
    kv_transport: Literal["auto", TransportName] = Field(
        "auto",
        description="How KV is moved between workers; auto: shared memory within a host, NCCL between GPUs, else TCP, "
        "and another where one cannot be used or fails",
    )
    kv_codec: CodecSetting = Field(
        "none",
        description="How KV is made smaller on its way; none: not at all, which alone keeps greedy output the same; "
        "auto: fp8 or int8 where that is sooner on a link as measured; a name: always, and never by shared memory",
    )
    otlp_traces_endpoint: str | None = Field(
        None,
        description="URL at which a collector takes traces by OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces; "
        "default: none are made",
    )
    lease_s: float = Field(10.0, gt=0.5, le=600, description="Life of a hand-off's lease without a heartbeat, seconds")

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _is_a_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError(
                f"{value!r} is no http or https URL; give the whole of it, such as http://HOST:4318/v1/traces"
            )
        return value

    @model_validator(mode="after")
    def _some_worker(self) -> ClusterSection:
        if self.decode_replicas < 1:
            raise ValueError("decode_replicas must be at least 1: nothing could answer")
        if not self.colocated and self.prefill_replicas < 1:
            raise ValueError("prefill_replicas must be at least 1, unless colocated is set")
        if self.colocated and "prefill_replicas" in self.model_fields_set and self.prefill_replicas > 0:
            raise ValueError(
                f"prefill_replicas {self.prefill_replicas} has no meaning with colocated, where "
                "decode_replicas workers do both; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _prefill_workers_differ(self) -> ClusterSection:
        given = [name for name in PREFILL_SHAPE if getattr(self, name) is not None]
        if self.colocated and given:
            raise ValueError(
                f"{given[0]} has no meaning with colocated, where all workers do both and are alike; leave it out"
            )
        if self.prefill_cpus_per_worker is not None and self.cpus_per_worker is None:
            raise ValueError("prefill_cpus_per_worker needs cpus_per_worker: how many cores the other workers have")
        return self

    @model_validator(mode="after")
    def _has_nodes(self) -> ClusterSection:
        if self.handoff_within_node and self.colocated:
            raise ValueError("handoff_within_node has no meaning with colocated, where nothing is handed over")
        if self.handoff_within_node and self.workers_per_node is None:
            raise ValueError("handoff_within_node needs workers_per_node: how many of both roles share a node")
        return self

    @model_validator(mode="after")
    def _codec_is_carried(self) -> ClusterSection:
        if self.kv_codec != "none" and self.kv_transport in READS_IN_PLACE:
            raise ValueError(
                f"kv_codec {self.kv_codec} has no meaning with kv_transport {self.kv_transport}, which moves KV as it "
                "lies; leave one of them out, or use kv_transport tcp or torch_distributed"
            )
        return self

    @property
    def roles(self) -> dict[Role, int]:
        """How many workers of each role."""
        if self.colocated:
            return {Role.BOTH: self.decode_replicas}
        return {Role.PREFILL: self.prefill_replicas, Role.DECODE: self.decode_replicas}

    @property
    def num_workers(self) -> int:
        return sum(self.roles.values())


class GatewaySection(Section):
    host: str = Field("127.0.0.1", description="Address the HTTP API listens on")
    port: int = Field(8000, ge=0, le=65535, description="Port of the HTTP API; 0 takes a free one")
    served_model_name: str | None = Field(None, description="Name in the API; default: the name given to serve")
    max_concurrent_requests: int = Field(256, gt=0, description="More than these at once are answered 429")
    request_timeout_s: float = Field(600.0, gt=0, description="Every request ends within this time, seconds")
    max_body: Size = Field("4MiB", description="Largest request body")
    traffic_log: AbsolutePath | None = Field(
        None,
        description="Append a line of JSON for every request that ends: when it came, lengths, latencies; slipstream "
        "plan and simulate read it as a trace. 64 MiB, and as much before that in FILE.1",
    )
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="Requests that bring no seed get theirs from this one and their prompt, so that a run can be "
        "repeated; default: every run differs",
    )
    drain_timeout_s: float = Field(20.0, ge=0, description="On shutdown, how long running requests may go on, seconds")


class SpeculationSection(Section):
    drafter: DrafterNames = Field(
        DEFAULT_DRAFTER,
        validate_default=True,
        description=f"Who drafts tokens, which the model then verifies several at once: {', '.join(DRAFTERS)}, or some "
        "of them with commas between; none does without",
    )
    rule: str = Field(
        DEFAULT_RULE,
        description=f"How drafts are verified: {', '.join(RULES)}. Naming one that is not lossless (typical) is asking "
        "for it",
    )
    controller: str = Field(
        DEFAULT_CONTROLLER, description=f"Who says how much is drafted in a step: {', '.join(CONTROLLERS)}"
    )
    budget: int = Field(24, gt=0, description="Draft tokens of a request in a step, at most")
    memory: Size = Field("256MiB", description="What the drafters of one worker may hold together")
    weights: DrafterWeights = Field({}, description="Checkpoints of drafters that take one, name=path of a folder each")
    allow_lossy: bool = Field(
        False, description="Let requests ask for rules that are not lossless; the one that `rule` names they may anyway"
    )

    @classmethod
    def flag(cls, name: str) -> str:
        return "speculation" if name == "drafter" else f"speculation_{name}"

    @model_validator(mode="after")
    def _goes_together(self) -> SpeculationSection:
        try:
            idle = self.settings is None
        except ConfigError as error:
            raise ValueError(error.message) from error
        if idle and (others := sorted(self.model_fields_set - {"drafter"})):
            raise ValueError(f"{others[0]} has no meaning without a drafter; name one, or leave it out")
        return self

    @property
    def together(self) -> str | None:
        """Who drafts, as a profile names them; None without a drafter."""
        return ",".join(self.drafter) or None

    @property
    def settings(self) -> Settings | None:
        """None without a drafter. Raises ConfigError for what does not go together."""
        if not self.drafter:
            return None
        return Settings(
            drafters=self.drafter,
            max_budget=self.budget,
            max_memory_bytes=parse_bytes(self.memory),
            rule=self.rule,
            controller=self.controller,
            weights={name: Path(folder) for name, folder in self.weights.items()},
            allow_lossy=self.allow_lossy,
        )


class ReplanSection(Section):
    mode: Literal["off", "advise", "on"] = Field(
        "off",
        description="Change roles, numbers and steps of workers in service, as traffic does; advise: only say how",
    )
    slo: str | None = Field(None, description="Targets in ms for it, as ttft=200,tpot=50")
    share: float = Field(0.9, gt=0, lt=1, description="Of the requests, that are to meet both targets")
    profile: AbsolutePath | None = Field(None, description="What slipstream profile measured of such a worker")
    forecast: Literal["constant", "holt-winters", "kalman"] = Field(
        "constant", description="How the traffic to come is foreseen"
    )
    warm_start: AbsolutePath | None = Field(
        None, description="A trace, such as an earlier traffic log, with which the forecast begins"
    )
    interval: float = Field(
        5.0, ge=0.1, le=3600, description="Between two looks at queues and attainment, seconds; forecasts take 6 such"
    )
    horizon: float = Field(120.0, gt=0, description="Over which a change has to gain more than it costs, seconds")
    floor: int = Field(1, ge=1, le=1024, description="Workers that a role keeps at the least, if it is used at all")
    max_workers: int | None = Field(
        None, ge=1, le=1024, description="Workers that may be started in all; default: their number stays as it is"
    )
    chunk_tokens: StepSizes = Field(
        (), description="Tokens in one step to choose from, as 256,512; default: steps stay as they are"
    )

    @classmethod
    def flag(cls, name: str) -> str:
        return "replan" if name == "mode" else f"replan_{name}"

    @model_validator(mode="after")
    def _goes_together(self) -> ReplanSection:
        if self.mode == "off":
            if others := sorted(self.model_fields_set - {"mode"}):
                raise ValueError(f"{others[0]} has no meaning while replan is off; use advise or on, or leave it out")
            return self
        for name, lacks in (("slo", "such as ttft=200,tpot=50"), ("profile", "a file of slipstream profile")):
            if getattr(self, name) is None:
                raise ValueError(f"replan {self.mode} needs a replan {name}: give one, {lacks}")
        try:
            self.targets  # noqa: B018 - raises
        except ConfigError as error:
            raise ValueError(error.message) from error
        return self

    @property
    def targets(self) -> Targets:
        """Raises ConfigError."""
        from placement.slo import parse_slo  # with numpy, which `--help` does without

        return parse_slo(self.slo or "")


class SlipstreamConfig(Section):
    model: str = Field("demo", description="A Hugging Face id, a folder, a .gguf file, or demo")
    revision: str | None = Field(None, description="Revision of a Hugging Face model")
    engine: EngineSection = EngineSection()
    cluster: ClusterSection = ClusterSection()
    speculation: SpeculationSection = SpeculationSection()
    gateway: GatewaySection = GatewaySection()
    replan: ReplanSection = ReplanSection()

    @property
    def served_name(self) -> str:
        """Of the base model in the API."""
        return self.gateway.served_model_name or self.model

    @model_validator(mode="after")
    def _names_differ(self) -> SlipstreamConfig:
        if self.served_name in self.engine.lora_modules:
            raise ValueError(f"lora_modules {self.served_name}: that is the base model's name; choose another")
        return self

    @property
    def most_workers(self) -> int:
        """That there may come to be."""
        return self.replan.max_workers or self.cluster.num_workers

    def for_role(self, role: Role) -> SlipstreamConfig:
        """As workers of that role have it."""
        if role is not Role.PREFILL:
            return self
        cluster = self.cluster
        split = {
            "tensor_parallel_size": cluster.prefill_tensor_parallel_size or self.engine.tensor_parallel_size,
            "pipeline_parallel_size": cluster.prefill_pipeline_parallel_size or self.engine.pipeline_parallel_size,
        }
        cpus = {"cpus_per_worker": cluster.prefill_cpus_per_worker or cluster.cpus_per_worker}
        return self.model_copy(
            update={"engine": self.engine.model_copy(update=split), "cluster": cluster.model_copy(update=cpus)}
        )

    @property
    def one_shape(self) -> bool:
        """Whether all workers are alike, and any can take the role of another."""
        return self._shape == self.for_role(Role.PREFILL)._shape

    @property
    def _shape(self) -> tuple[object, ...]:
        engine = self.engine
        return engine.tensor_parallel_size, engine.pipeline_parallel_size, self.cluster.cpus_per_worker

    @model_validator(mode="after")
    def _shapes_have_their_place(self) -> SlipstreamConfig:
        if self.one_shape:
            return self
        differs = f"prefill and decode workers differ in shape ({', '.join(PREFILL_SHAPE)})"
        if self.replan.mode != "off":
            raise ValueError(f"replan {self.replan.mode} changes roles, and {differs}; leave out the one or the other")
        if self.cluster.workers_per_node is not None:
            raise ValueError(f"workers_per_node is of workers that are alike, and {differs}; leave out one of them")
        return self

    @model_validator(mode="after")
    def _replanning_has_room(self) -> SlipstreamConfig:
        most, workers = self.replan.max_workers, self.cluster.num_workers
        if most is not None and most < workers:
            raise ValueError(f"replan.max_workers {most} is below the {workers} workers to begin with; raise it")
        return self

    @model_validator(mode="after")
    def _drafts_fit_a_step(self) -> SlipstreamConfig:
        budget, tokens = self.speculation.budget, self.engine.batched_tokens(Role.DECODE)
        if self.speculation.drafter and budget >= tokens:
            raise ValueError(
                f"speculation.budget {budget} is above what a step has room for: {tokens} tokens, the request's own "
                f"among them; lower it to {tokens - 1} at most, or raise max_num_batched_tokens"
            )
        return self


SECTIONS: dict[str, type[Section]] = {
    "engine": EngineSection,
    "cluster": ClusterSection,
    "speculation": SpeculationSection,
    "gateway": GatewaySection,
    "replan": ReplanSection,
}


class Leaf(NamedTuple):
    """A setting."""

    section: str | None
    field: str
    """Its name in the section."""
    name: str
    """Unique over the tree: that of its flag, with underscores."""
    info: FieldInfo


def leaves() -> Iterator[Leaf]:
    yield Leaf(None, "revision", "revision", SlipstreamConfig.model_fields["revision"])
    for section, cls in SECTIONS.items():
        for field, info in cls.model_fields.items():
            yield Leaf(section, field, cls.flag(field), info)


def load(path: Path | None, overrides: Mapping[str, Any]) -> SlipstreamConfig:
    """The file's settings with `overrides` (Leaf.name -> value) on top. Raises ConfigError, one line."""
    return overlaid(read_tree(path) if path is not None else {}, overrides, path)


def overlaid(tree: dict[str, Any], overrides: Mapping[str, Any], path: Path | None = None) -> SlipstreamConfig:
    """As load, with the tree that was read from `path`."""
    where = {leaf.name: (leaf.section, leaf.field) for leaf in leaves()} | {"model": (None, "model")}
    for name, value in overrides.items():
        section, field = where[name]
        (tree if section is None else tree.setdefault(section, {}))[field] = value
    return validated(tree, path)


def validated(tree: Mapping[str, Any], path: Path | None = None) -> SlipstreamConfig:
    """The settings of a tree that was read from `path`, or made. Raises ConfigError, one line."""
    try:
        return SlipstreamConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, path)) from error


def on_device(config: SlipstreamConfig, device: Literal["cpu", "cuda"]) -> SlipstreamConfig:
    """With device auto settled. Raises ConfigError for a setting that has no meaning there."""
    if config.engine.device != "auto":
        return config
    given = config.engine.model_dump(exclude_unset=True)
    try:
        engine = EngineSection.model_validate(given | {"device": device})
    except ValidationError as error:
        raise ConfigError(_explain(error, None)) from error
    return config.model_copy(update={"engine": engine})


def read_tree(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error
    except ValueError as error:  # a date or a number that YAML has the form of and Python has not
        raise ConfigError(f"{path} holds a value that cannot be read: {error}") from error
    if tree is None:
        return {}
    if isinstance(tree, dict):
        tree = {name: {} if value is None and name in SECTIONS else value for name, value in tree.items()}
    if not isinstance(tree, dict) or not all(isinstance(tree.get(s, {}), dict) for s in SECTIONS):
        raise ConfigError(
            f"{path}: the file and its sections {', '.join(SECTIONS)} must be mappings of names to values"
        )
    return tree


def _explain(error: ValidationError, path: Path | None) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    origin = f"{path}: " if path is not None else ""
    if first["type"] == "extra_forbidden":
        outside = len(first["loc"]) == 1
        known = [*SlipstreamConfig.model_fields, *(leaf.name if outside else leaf.field for leaf in leaves())]
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        return f"{origin}unknown setting {name}" + (f"; did you mean {near[0]}?" if near else "")
    message = first["msg"].removeprefix("Value error, ")
    return f"{origin}{name}: {message}" if name else f"{origin}{message}"
