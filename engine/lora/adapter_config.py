"""adapter_config.json as PEFT writes it: what is read, what says nothing about the arithmetic, and the rest refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from core.errors import ModelError

_T = TypeVar("_T")

_Rank = Annotated[int, Meta(ge=1)]

_WITHOUT_MEANING = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "alpha_pattern",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
"""Fields that are read below, or that concern training only; which modules are adapted is seen from the tensors."""


class _Fields(msgspec.Struct, frozen=True):
    peft_type: Literal["LORA"]
    r: _Rank
    lora_alpha: float
    use_rslora: bool = False
    bias: Literal["none"] = "none"
    fan_in_fan_out: Literal[False] | None = False
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str | None = True


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    rank: int
    alpha: float
    rank_stabilized: bool
    """arXiv:2312.03732: alpha / sqrt(rank) in place of alpha / rank."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Exceptions, by patterns of module names."""

    @classmethod
    def from_folder(cls, folder: Path) -> AdapterConfig:
        """Raises ModelError that names the file and the field at fault."""
        path = folder / "adapter_config.json"
        try:
            config = json.loads(path.read_bytes())
        except OSError as error:
            raise ModelError(f"{path} can't be read ({error.strerror}): give the folder of a PEFT adapter") from error
        except ValueError as error:
            raise ModelError(f"{path} is not JSON ({error}): save the adapter again") from error
        try:
            fields = msgspec.convert(config, _Fields)
        except msgspec.ValidationError as error:
            raise ModelError(f"{path}: {error}; only plain LoRA without biases can be served") from error
        if not all(map(math.isfinite, (fields.lora_alpha, *(fields.alpha_pattern or {}).values()))):
            raise ModelError(f"{path}: lora_alpha and alpha_pattern must be finite numbers: save the adapter again")
        _refuse_variants(config, path)
        _check_patterns(fields, path)
        return cls(
            rank=fields.r,
            alpha=fields.lora_alpha,
            rank_stabilized=fields.use_rslora,
            rank_pattern=fields.rank_pattern or {},
            alpha_pattern=fields.alpha_pattern or {},
        )

    @property
    def largest_rank(self) -> int:
        return max(self.rank, *self.rank_pattern.values(), 0)

    def rank_of(self, module: str) -> int:
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by."""
        rank, alpha = self.rank_of(module), _matching(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def _matching(pattern: Mapping[str, _T], module: str, default: _T) -> _T:
    """As PEFT has it: the first pattern that matches the end of the module's name."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _refuse_variants(config: Mapping[str, Any], path: Path) -> None:
    """Whatever changes the arithmetic or the base weights in a way that is not computed here."""
    init = config.get("init_lora_weights")
    if isinstance(init, str) and re.match(r"pissa|olora|corda|loftq|lora_ga", init.lower()):
        raise ModelError(
            f"{path}: init_lora_weights {init} goes with changed base weights; convert the adapter to plain LoRA with "
            "PEFT's path_initial_model_for_weight_conversion"
        )
    for name, value in config.items():
        if name not in _WITHOUT_MEANING and value not in (None, False, 0, [], {}, ""):
            raise ModelError(f"{path}: {name} {value!r} is not supported; only plain LoRA without biases can be served")


def _check_patterns(fields: _Fields, path: Path) -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(fields, name) or {}:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ModelError(f"{path}: {name} {pattern!r} is no regular expression ({error})") from error
