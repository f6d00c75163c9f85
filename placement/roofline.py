"""Step times of a device that is not at hand, reckoned from what it can compute and read at the most.

A step takes what its matrices take by arithmetic or by reading the weights, whichever is more, and the same for
attention and KV; the sums over tensor parallel ranks; and a fixed time for each layer. Real kernels reach a part of
what devices are sold for (COMPUTES, READS). The same fit is made of these points as of measured ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from placement.devices import Device, device
from placement.fit import Point
from placement.grid import LARGE, Grid, Shape
from placement.profile import ModelFacts, Profile, Setting

COMPUTES = 0.6
READS = 0.8
LAYER_MS = 0.01
"""Of launching what a layer is made of, and of norms and the like."""
HOP_MS = 0.01
"""Of a sum over ranks, besides its bytes; there are two in a layer."""
_ITEM_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """`active` parameters of all layers take part in computing a token, out of `layer_parameters`: they are fewer where
    a token has only some of the experts. The output layer has vocab_size * hidden_size more, and input embeddings
    again as many unless they are the same."""

    layer_parameters: int
    active: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    tied: bool
    max_tokens: int

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def kv_token_bytes(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * _ITEM_BYTES

    def facts(self, name: str) -> ModelFacts:
        embeddings = self.head_parameters * (1 if self.tied else 2)
        return ModelFacts(
            name=name,
            fingerprint="",
            dtype="bfloat16",
            quantization=None,
            weight_bytes=(self.layer_parameters + embeddings) * _ITEM_BYTES,
            kv_token_bytes=self.kv_token_bytes,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            max_tokens=self.max_tokens,
        )


def roofline(
    name: str, size: ModelSize, kind: str, tp: int = 1, link_gb_s: float | None = None, grid: Grid = LARGE
) -> Profile:
    """Of the model `name` over `tp` devices of a `kind` in the table, with links of `link_gb_s` between them (default:
    the table's). Raises ConfigError for a kind that is not in the table."""
    found = device(kind)
    link = found.link_gb_s if link_gb_s is None else link_gb_s
    shapes = [shape for shape in grid.shapes() if shape.longest <= size.max_tokens]
    points = tuple(
        Point.of(shape.prompts, shape.sequences, shape.context, shape.rows, step_ms(shape, size, found, tp, link))
        for shape in shapes
    )
    return Profile(source="roofline", model=size.facts(name), setting=Setting(device=kind, tp=tp), points=points)


def step_ms(shape: Shape, size: ModelSize, device: Device, tp: int, link_gb_s: float) -> float:
    """flops / flop rate or bytes / bandwidth, whichever is more: of the layers, the output layer and attention."""
    drawn = len(shape.prompts) + shape.sequences * shape.rows
    tokens = sum(chunk for _, chunk in shape.prompts) + shape.sequences * shape.rows
    layers = _slower(device, 2 * size.active * tokens, _read(size, tokens) * _ITEM_BYTES)
    head = _slower(device, 2 * size.head_parameters * drawn, size.head_parameters * _ITEM_BYTES)
    pairs = sum(chunk * past + chunk * (chunk + 1) / 2 for past, chunk in shape.prompts)
    pairs += shape.sequences * shape.rows * shape.context
    held = sum(past + chunk for past, chunk in shape.prompts) + shape.sequences * shape.context
    score_and_mix = 4 * size.num_heads * size.head_size * size.num_layers * pairs
    attention = _slower(device, score_and_mix, held * size.kv_token_bytes)
    return (layers + head + attention) / tp + size.num_layers * (LAYER_MS + _sums_ms(size, tokens, tp, link_gb_s))


def _read(size: ModelSize, tokens: int) -> float:
    """Parameters of the layers that `tokens` tokens need: more tokens need more of the experts, up to all."""
    return min(size.layer_parameters, size.active * tokens)


def _slower(device: Device, flops: float, nbytes: float) -> float:
    """Milliseconds."""
    return max(flops / (device.tflops * 1e9 * COMPUTES), nbytes / (device.read_gb_s * 1e6 * READS))


def _sums_ms(size: ModelSize, tokens: int, tp: int, link_gb_s: float) -> float:
    """Of the two sums over the ranks that a layer has: by rings each rank sends 2 (tp - 1) / tp of what is summed."""
    if tp == 1:
        return 0.0
    sent = 2 * (tp - 1) / tp * tokens * size.hidden_size * _ITEM_BYTES
    return 2 * (HOP_MS + sent / (link_gb_s * 1e6))
