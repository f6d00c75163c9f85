"""The tree of the sections, what has to hold between them, and its leaves, of which flags are made.

Sections group what belongs together in the file; leaf names are unique over the tree, so that `--kv-cache-memory` and
`engine: {kv_cache_memory: …}` are one setting. Those of `speculation` have the section's name before them as flags:
`--speculation-rule` is `speculation: {rule: …}`, and `--speculation` its drafter, and those of `replan` alike, with
`--replan` for its mode. Everything has a default that works on a laptop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from cluster.config.cluster import HANDOFF, PREFILL_SHAPE, ClusterSection
from cluster.config.engine import EngineSection
from cluster.config.gateway import GatewaySection
from cluster.config.replan import ReplanSection
from cluster.config.section import Section
from cluster.config.speculation import SpeculationSection
from core.types import Role
from placement.worker_shape import WorkerShape


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

    @model_validator(mode="after")
    def _something_is_handed_over(self) -> SlipstreamConfig:
        """Replanning may come to."""
        if self.cluster.colocated and self.replan.mode == "off":
            for name in HANDOFF:
                if name in self.cluster.model_fields_set:
                    raise ValueError(
                        f"{name} has no meaning with colocated, where nothing is handed over; leave one of them out, "
                        "or let roles change with replan on"
                    )
        return self

    @property
    def most_workers(self) -> int:
        """That there may come to be."""
        if shapes := self.replan.worker_shapes:
            return self.most_devices // min(shape.devices for shape in shapes)
        return self.replan.max_workers or self.cluster.num_workers

    @property
    def most_devices(self) -> int:
        """That all workers may take together, where their shapes may change."""
        devices = sum(self.shape_of(role).devices * count for role, count in self.cluster.roles.items())
        return max(devices, (self.replan.max_workers or 0) * self.shape_of(Role.BOTH).devices)

    def shape_of(self, role: Role) -> WorkerShape:
        """Of workers of that role, as configured."""
        engine = self.for_role(role).engine
        return WorkerShape(engine.tensor_parallel_size, engine.pipeline_parallel_size)

    @property
    def shapes(self) -> dict[Role, WorkerShape]:
        """Of workers by role, as configured, where they may change."""
        return {role: self.shape_of(role) for role in self.cluster.roles} if self.replan.shapes else {}

    def of_shape(self, shape: WorkerShape) -> SlipstreamConfig:
        """As workers of that shape have it, with as many cores for each device."""
        split = {"tensor_parallel_size": shape.tp, "pipeline_parallel_size": shape.pp}
        cpus = self.cluster.cpus_per_worker
        each = None if cpus is None else cpus * shape.devices / self.shape_of(Role.BOTH).devices
        without = dict.fromkeys(PREFILL_SHAPE) | {"cpus_per_worker": each}
        return self.model_copy(
            update={"engine": self.engine.model_copy(update=split), "cluster": self.cluster.model_copy(update=without)}
        )

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
        if self.replan.shapes:
            self._check_replanned_shapes()
            return self
        if self.one_shape:
            return self
        differs = f"prefill and decode workers differ in shape ({', '.join(PREFILL_SHAPE)})"
        if self.replan.mode != "off":
            raise ValueError(
                f"replan {self.replan.mode} changes roles, and {differs}; leave out the one or the other, or let "
                "workers change their shape too with replan.shapes"
            )
        if self.cluster.workers_per_node is not None:
            raise ValueError(f"workers_per_node is of workers that are alike, and {differs}; leave out one of them")
        return self

    def _check_replanned_shapes(self) -> None:
        named = self.replan.worker_shapes
        for role in self.cluster.roles:
            if (shape := self.shape_of(role)) not in named:
                raise ValueError(
                    f"replan.shapes {','.join(self.replan.shapes)}: the workers begin with {shape}; name it too"
                )
        if self.cluster.workers_per_node is not None:
            raise ValueError(
                "workers_per_node is of workers of one shape, and replan.shapes changes these; leave out one"
            )
        prefill, others = self.shape_of(Role.PREFILL), self.shape_of(Role.BOTH)
        each, cpus = self.cluster.cpus_per_worker, self.cluster.prefill_cpus_per_worker
        if cpus is not None and cpus * others.devices != (each or 0.0) * prefill.devices:
            raise ValueError(
                "prefill_cpus_per_worker: devices of prefill workers have other cores than those of the others, and "
                "replan.shapes changes who has which; leave out one"
            )

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
