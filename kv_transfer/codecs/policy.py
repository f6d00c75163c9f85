"""What the operator says about codecs (--kv-codec), and what follows from it for the transfers of one link."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping

import torch

from engine.kv_layout import KVLayout
from kv_transfer.codecs.bandwidth import LinkBandwidth
from kv_transfer.codecs.choice import CodecSpeed, choose
from kv_transfer.codecs.names import NEARLY_LOSSLESS, CodecName, CodecSetting
from kv_transfer.codecs.speeds import CodecSpeeds


class CodecPolicy:
    """Of one process, for KV of one layout on one device."""

    def __init__(self, setting: CodecSetting, layout: KVLayout, device: torch.device) -> None:
        self.setting = setting
        self._speeds = CodecSpeeds(layout, device)
        self._measuring = threading.Lock()

    @property
    def forces(self) -> bool:
        """Whether every transfer gets the codec that is named."""
        return self.setting not in ("none", "auto")

    async def speeds(self) -> dict[CodecName, CodecSpeed]:
        """Of the codecs that there is a choice among, measured in a thread when first asked."""
        return await asyncio.to_thread(self._measured) if self.setting == "auto" else {}

    def _measured(self) -> dict[CodecName, CodecSpeed]:
        with self._measuring:
            return {name: self._speeds.of(name) for name in NEARLY_LOSSLESS}


class LinkCodec:
    """Of the transfers over one link; fed with what they show of it."""

    def __init__(
        self, setting: CodecSetting, own: Mapping[CodecName, CodecSpeed], encode_rates: Mapping[CodecName, float]
    ) -> None:
        """`own` are the taker's speeds, `encode_rates` the giver's."""
        self.bandwidth = LinkBandwidth()
        self._setting = setting
        self._speeds = {
            name: CodecSpeed(encode_rates[name], speed.decode, speed.ratio)
            for name, speed in own.items()
            if encode_rates.get(name, 0) > 0
        }

    def choose(self, *, in_place: bool) -> CodecName:
        """For the next transfer. `in_place`: its transport would read the giver's pool where it lies, and so needs no
        codec; one that is forced has no such transport."""
        if self._setting != "auto":
            return self._setting
        return "none" if in_place else choose(self.bandwidth.bytes_per_second, self._speeds, NEARLY_LOSSLESS)
