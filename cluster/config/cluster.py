"""`cluster`: which workers there are, where they run, and how KV goes between them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from cluster.config.section import Section
from cluster.notation import CountOrAuto, NodeLabels
from core.types import Role
from kv_transfer.codecs.names import CodecSetting
from kv_transfer.transports.names import READS_IN_PLACE, TransportName

PREFILL_SHAPE = ("prefill_tensor_parallel_size", "prefill_pipeline_parallel_size", "prefill_cpus_per_worker")
"""Settings of the cluster by which prefill workers may differ from decode workers."""
HANDOFF = ("handoff_min_tokens", "kv_transport", "kv_codec", "lease_s")
"""Settings of the cluster by which KV is handed over."""


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
