"""`slipstream bench exactness`: greedy output against Transformers' own, token for token, in float32.

Every prompt is run disaggregated and colocated, alone and in a batch, chunked and not. A divergence is excused only
where the reference's two best logits lie closer than MARGIN: there, rounding decides.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click

from core.errors import ConfigError

MARGIN = 1e-3


@dataclass(frozen=True, slots=True)
class Reference:
    """What Transformers generates: tokens, and the top-2 logit margin before each."""

    prompt: list[int]
    tokens: list[int]
    margins: list[float]


@dataclass(frozen=True, slots=True)
class Case:
    colocated: bool
    batch: int
    chunk: int

    def __str__(self) -> str:
        layout = "colocated" if self.colocated else "disaggregated"
        return f"{layout}, {'alone' if self.batch == 1 else f'batch of {self.batch}'}, chunks of {self.chunk}"


def read_prompts(path: Path, count: int) -> list[str]:
    """The first turns of a JSONL file of {"turns": [...]}. Raises ConfigError naming the line."""
    prompts: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            prompts.append(str(json.loads(line)["turns"][0]))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ConfigError(f'{path}:{number}: expected {{"turns": ["…"]}}: {error!r}') from error
        if len(prompts) == count:
            break
    return prompts


def reference(folder: Path, prompts: list[str], max_tokens: int) -> list[Reference]:
    """Greedy generation by Transformers in float32, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    references = []
    for text in prompts:
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        out: Any = model.generate(
            ids, max_new_tokens=max_tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        top = torch.stack(out.logits).float().squeeze(1).topk(2).values
        references.append(
            Reference(ids[0].tolist(), out.sequences[0, ids.shape[1] :].tolist(), (top[:, 0] - top[:, 1]).tolist())
        )
    return references


def compare(expected: Reference, got: list[int]) -> str:
    """ "equal", "excused" (diverged where the margin is below MARGIN) or "different"."""
    for index, (want, have) in enumerate(zip(expected.tokens, got, strict=False)):
        if want != have:
            return "excused" if expected.margins[index] < MARGIN else "different"
    return "equal" if len(got) == len(expected.tokens) else "different"


async def run_case(folder: Path, case: Case, references: list[Reference], max_tokens: int) -> dict[str, int]:
    from cluster.config.loading import load
    from cluster.local import local_cluster
    from core.types import Request, SamplingParams
    from engine.model_config import ModelConfig

    stop = tuple(ModelConfig.from_folder(folder).eos_token_ids)
    config = load(
        None,
        {
            "dtype": "float32",
            "colocated": case.colocated,
            "max_num_batched_tokens": case.chunk,
            "max_num_seqs": min(case.batch, case.chunk),
            "prefix_caching": False,
        }
        | ({} if case.colocated else {"handoff_min_tokens": 0}),
    )
    counts = {"equal": 0, "excused": 0, "different": 0}
    room = asyncio.Semaphore(case.batch)
    async with local_cluster(config, folder) as cluster:

        async def one(index: int, expected: Reference) -> None:
            sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=stop)
            request = Request(
                request_id=f"exact-{index}",
                prompt_token_ids=expected.prompt,
                sampling=sampling,
                deadline=time.time() + 600,
            )
            async with room:
                got = [t async for delta in cluster.backend.generate(request) for t in delta.token_ids]
            counts[compare(expected, got)] += 1

        await asyncio.gather(*(one(index, expected) for index, expected in enumerate(references)))
    return counts


@click.command()
@click.option("--model", default="demo", help="As for serve.")
@click.option("--dataset-path", type=click.Path(path_type=Path, exists=True), required=True, help="JSONL with turns.")
@click.option("--num-prompts", default=60, type=click.IntRange(1), help="[default: 60]")
@click.option("--max-tokens", default=64, type=click.IntRange(1), help="[default: 64]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def exactness(model: str, dataset_path: Path, num_prompts: int, max_tokens: int, as_json: bool) -> None:
    """Compare greedy float32 output with Transformers', in every way a request can be served."""
    from engine.checkpoints import Silent, resolve

    folder = resolve(model, progress=Silent())
    references = reference(folder, read_prompts(dataset_path, num_prompts), max_tokens)
    results = {}
    for colocated, batch, chunk in product((False, True), (1, 16), (2048, 32)):
        case = Case(colocated, batch, chunk)
        results[str(case)] = counts = asyncio.run(run_case(folder, case, references, max_tokens))
        if not as_json:
            click.echo(f"{case!s:<45}" + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
    if as_json:
        click.echo(json.dumps(results, indent=2))
    if any(counts["different"] for counts in results.values()):
        sys.exit(1)
