"""`engine`: what one worker computes with, and how much of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.config.section import Section
from cluster.notation import CountOrAuto, DtypeName, LoraModules, SizeOrAuto, parse_bytes
from core.types import Role
from engine.kv_layout import DEFAULT_KV_CACHE_BYTES
from engine.lora.checkpoint import DEFAULT_MAX_RANK
from engine.quantization.methods import Method, check_method

_DEFAULT_SEQUENCES = 64


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

    @model_validator(mode="after")
    def _adapters_have_a_rank(self) -> EngineSection:
        if "max_lora_rank" in self.model_fields_set and not self.lora_modules:
            raise ValueError("max_lora_rank has no meaning without lora_modules; name some, or leave it out")
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
