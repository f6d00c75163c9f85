"""What codecs are called, for who may not import torch."""

from __future__ import annotations

from typing import Literal, TypeAlias

CodecName: TypeAlias = Literal["none", "fp8", "int8", "int4", "gear"]

CodecSetting: TypeAlias = Literal["auto", CodecName]

NEARLY_LOSSLESS: tuple[CodecName, ...] = ("fp8", "int8")
"""Those of 8 bits: what `auto` chooses among. With all but `none`, what is generated can change."""
