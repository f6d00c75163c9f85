"""The arithmetic of a split: which heads, columns, rows and layers are whose. Free of torch.

Tensor parallel (TP), as in arXiv:1909.08053: projections into heads and into the inner size are split by their outputs,
those back to the hidden size by their inputs, and the ranks of a stage sum what comes out. Pipeline parallel (PP): a
stage has consecutive layers and hands its hidden states to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from core.errors import ConfigError

if TYPE_CHECKING:
    from engine.model_config import ModelConfig

KEY_VALUE = frozenset({"k_proj", "v_proj"})
"""Projections into KV heads, which ranks share where there are fewer heads than ranks."""


@dataclass(frozen=True, slots=True)
class Split:
    """Where one rank stands in its group: rank `tp_rank` of stage `pp_rank`."""

    tp_size: int = 1
    pp_size: int = 1
    tp_rank: int = 0
    pp_rank: int = 0

    @property
    def ranks(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def rank(self) -> int:
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def first(self) -> bool:
        """Whether the rank is of the first stage, which embeds."""
        return self.pp_rank == 0

    @property
    def last(self) -> bool:
        """Whether the rank is of the last stage, which computes logits."""
        return self.pp_rank == self.pp_size - 1

    def all(self) -> Iterator[Split]:
        """Every rank of the group, in the order of `rank`."""
        for stage in range(self.pp_size):
            for rank in range(self.tp_size):
                yield replace(self, tp_rank=rank, pp_rank=stage)

    def layers(self, count: int) -> range:
        """Of `count` layers, those of this stage. Earlier stages have one more where they don't divide: the last has
        the head to compute."""
        each, more = divmod(count, self.pp_size)
        start = self.pp_rank * each + min(self.pp_rank, more)
        return range(start, start + each + (self.pp_rank < more))

    def share(self, count: int) -> range:
        """Of `count` things that TP divides, those of this rank."""
        each = count // self.tp_size
        return range(self.tp_rank * each, (self.tp_rank + 1) * each)

    def kv_heads(self, count: int) -> range:
        """Of `count` KV heads, those of this rank: its share, or one that it holds in common with others."""
        if count >= self.tp_size:
            return self.share(count)
        head = self.tp_rank * count // self.tp_size
        return range(head, head + 1)

    def vocabulary(self, count: int) -> range:
        """Of `count` rows of embedding or head, those of this rank. All have `vocabulary_rows` but the last ones."""
        each = self.vocabulary_rows(count)
        return range(min(count, self.tp_rank * each), min(count, (self.tp_rank + 1) * each))

    def vocabulary_rows(self, count: int) -> int:
        return -(-count // self.tp_size)

    def view(self, config: ModelConfig) -> ModelConfig:
        """The model as this rank computes it: its heads and its part of the inner size. Layers and vocabulary are the
        whole model's."""
        from engine.model_config import DecoderConfig

        if not isinstance(config, DecoderConfig):
            return config  # see check_split
        experts = config.experts
        if experts is not None:
            experts = replace(experts, inner_size=len(self.share(experts.inner_size)))
        return replace(
            config,
            experts=experts,
            num_heads=len(self.share(config.num_heads)),
            num_kv_heads=len(self.kv_heads(config.num_kv_heads)),
            intermediate_size=len(self.share(config.intermediate_size)),
        )


WHOLE = Split()
"""One device."""


def check_split(config: ModelConfig, tp_size: int, pp_size: int, flags: str = "--") -> None:
    """Raise ConfigError, naming the field at fault, for a model that can't be split so. The flags that ask for it
    begin with `flags`."""
    from engine.model_config import DecoderConfig

    if tp_size * pp_size == 1:
        return
    if not isinstance(config, DecoderConfig):
        flag = "tensor-parallel-size" if tp_size > 1 else "pipeline-parallel-size"
        raise ConfigError(
            f"{flags}{flag}: {config.architecture} is run by its class in Transformers, which can't be split; use one "
            "device"
        )
    _check_divides("num_attention_heads", config.num_heads, tp_size, flags)
    _check_divides("intermediate_size", config.intermediate_size, tp_size, flags)
    if config.experts is not None:
        _check_divides("moe_intermediate_size", config.experts.inner_size, tp_size, flags)
    if config.vocab_size <= (tp_size - 1) * Split(tp_size).vocabulary_rows(config.vocab_size):
        raise ConfigError(
            f"{flags}tensor-parallel-size {tp_size}: the model's vocab_size {config.vocab_size} leaves a rank without "
            "rows; use fewer ranks"
        )
    kv_heads = config.num_kv_heads
    if kv_heads % tp_size and tp_size % kv_heads:
        raise ConfigError(
            f"{flags}tensor-parallel-size {tp_size}: the model's num_key_value_heads {kv_heads} can be neither shared "
            f"out evenly over {tp_size} ranks nor repeated evenly; use {_divisors(kv_heads)}"
        )
    if pp_size > config.num_layers:
        raise ConfigError(
            f"{flags}pipeline-parallel-size {pp_size}: the model's num_hidden_layers is {config.num_layers}, "
            "and every stage needs a layer; use fewer stages"
        )


def _check_divides(field: str, value: int, tp_size: int, flags: str) -> None:
    if value % tp_size:
        raise ConfigError(
            f"{flags}tensor-parallel-size {tp_size} does not divide the model's {field} {value}; use {_divisors(value)}"
        )


def _divisors(value: int) -> str:
    found = [str(size) for size in (1, 2, 3, 4, 6, 8, 16) if value % size == 0]
    return " or ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)
