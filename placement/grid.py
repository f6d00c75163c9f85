"""Which steps are measured: over the whole range in which a worker with default settings runs, more densely where steps
are small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """A step: chunks of prompts as (tokens before it, tokens), and `sequences` that decode, with `context` tokens and
    `rows` rows each."""

    prompts: tuple[tuple[int, int], ...] = ()
    sequences: int = 0
    context: int = 0
    rows: int = 1

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence, once it is computed."""
        return max([past + tokens for past, tokens in self.prompts] + [self.sequences and self.context + self.rows])

    def kv_tokens(self, spare: int) -> int:
        """That the cache holds, if every sequence has room for `spare` more."""
        lengths = [past + tokens for past, tokens in self.prompts]
        return sum(length + spare for length in lengths) + self.sequences * (self.context + self.rows + spare)


@dataclass(frozen=True, slots=True)
class Grid:
    prompts: tuple[int, ...]
    """Tokens of one prompt, and of a chunk behind each of `pasts` tokens."""
    pasts: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    verified: tuple[int, ...]
    """Rows of each sequence in steps that verify drafts."""

    def shapes(self) -> Iterator[Shape]:
        yield from (Shape(((0, tokens),)) for tokens in self.prompts)
        yield from (Shape(((past, tokens),)) for past in self.pasts for tokens in self.prompts[1::2])
        yield from (Shape(((0, tokens),) * 4) for tokens in self.prompts[-4:-2])
        yield from (Shape((), batch, context) for batch in self.batches for context in self.contexts)
        middle = self.contexts[len(self.contexts) // 2]
        yield from (Shape((), batch, middle, rows) for batch in self.batches[::2] for rows in self.verified)
        some = self.batches[1::2], self.prompts[1:-1:2]
        yield from (Shape(((0, tokens),), batch, middle) for batch in some[0] for tokens in some[1])

    def fitting(self, longest: int, kv_tokens: int, spare: int) -> list[Shape]:
        """Those for which a model of `longest` positions and a cache of `kv_tokens` have room."""
        return [
            shape for shape in self.shapes() if shape.longest + spare <= longest and shape.kv_tokens(spare) <= kv_tokens
        ]


FULL = Grid((16, 32, 64, 128, 256, 512, 1024, 2048), (512, 2048), (1, 2, 4, 8, 12, 16, 32, 64), (64, 512, 2048), (3, 6))
QUICK = Grid((16, 64, 128, 256, 512), (256,), (1, 4, 8, 12, 16, 32), (64, 512), (4,))
QUICK_DRAFTING_S = 20.0
"""Of drafts, where measuring is to be quick, unless so few steps as tell anything take longer."""
LARGE = Grid(
    (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192), (512, 8192), (1, 4, 16, 64, 256), (128, 1024, 8192), (3, 6)
)
"""Of devices that are larger than the one at hand."""
