"""`slipstream drafts`: heads that draft for a model, made and trained offline.

Exit status: 0; 1 if a head came out no better than it went in, and nothing was written; or 2 with one `error: …` line
on standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from cluster.one_line import one_line
from core.errors import ConfigError
from core.finite import FiniteRange

if TYPE_CHECKING:
    from engine.runner import ModelRunner
    from gateway.tokenizer import ServedModel
    from speculation.heads.new import Shape

KINDS = ("eagle3", "hydra", "medusa")
_BLOCK_SIZE = 16

_model = click.option("--model", default="demo", show_default=True, help="That it drafts for, as for serve.")
_out = click.option("--out", required=True, type=click.Path(path_type=Path), help="A folder that is not there yet.")
_seed = click.option("--seed", default=0, type=click.IntRange(0), show_default=True)
_threads = click.option("--threads", type=click.IntRange(1), help="Cores to compute on; default: what PyTorch takes.")


def _shape_options(command: Callable[..., None]) -> Callable[..., None]:
    options = (
        click.option(
            "--vocab", default=8192, type=click.IntRange(1), show_default=True, help="Tokens that it proposes."
        ),
        click.option("--depth", default=4, type=click.IntRange(1, 16), show_default=True, help="Tokens ahead."),
        click.option("--intermediate-size", type=click.IntRange(1), help="Of eagle3; default: twice the hidden size."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group()
def drafts() -> None:
    """Make, train and look at heads that draft tokens for a model."""


@drafts.command()
@click.argument("kind", type=click.Choice(KINDS))
@_model
@_out
@_seed
@_shape_options
def new(kind: str, model: str, out: Path, seed: int, **shape: Any) -> None:
    """Make an untrained head of KIND, of the tokens with the lowest ids."""
    with one_line(), _fresh(out):
        import torch

        from speculation.heads import checkpoint
        from speculation.heads.new import new_config, new_tensors

        config, vocabulary, dtype = _ends_of(model)
        head, layer = new_config(kind, config, vocabulary.fingerprint, _shape(**shape))  # type: ignore[arg-type]
        token_ids = torch.arange(head.draft_vocab_size)
        tensors = new_tensors(head, vocabulary, token_ids, seed)
        checkpoint.save(out, head, {name: tensor.to(dtype) for name, tensor in tensors.items()}, token_ids, layer)
    click.echo(out)


@drafts.command()
@click.option("--kind", required=True, type=click.Choice(KINDS))
@_model
@click.option(
    "--prompts",
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="JSONL with prompt or turns, of which the first is asked.",
)
@_out
@click.option("--from", "start", type=click.Path(path_type=Path, file_okay=False), help="A head to go on from.")
@click.option("--steps", type=click.IntRange(1), help="Of the training; with it, the same seed gives the same head.")
@click.option("--minutes", type=FiniteRange(0, min_open=True), help="Of the training. [default: 10, without --steps]")
@click.option("--learning-rate", default=5e-3, type=FiniteRange(0, min_open=True), show_default=True)
@click.option("--max-tokens", default=128, type=click.IntRange(4), show_default=True, help="Of an answer, at most.")
@click.option("--temperature", default=0.0, type=FiniteRange(0), show_default=True, help="Of the answers.")
@_seed
@_shape_options
@_threads
@click.pass_context
def train(
    ctx: click.Context,
    /,
    kind: str,
    model: str,
    prompts: Path,
    out: Path,
    start: Path | None,
    steps: int | None,
    minutes: float | None,
    learning_rate: float,
    max_tokens: int,
    temperature: float,
    seed: int,
    threads: int | None,
    **shape: Any,
) -> None:
    """Distil a head offline: MODEL answers the prompts, and the head learns what it said and why.

    A tenth of the prompts is held out, and says how well the head drafts before and after. It is written only if it has
    become better.
    """
    with one_line():
        if start is not None and (given := [name for name in shape if _was_given(ctx, name)]):
            raise ConfigError(f"--{given[0].replace('_', '-')} has no meaning with --from: the head has its shape")
        texts = _read_prompts(prompts)
        with _fresh(out):
            from engine.checkpoints.bars import Bars
            from speculation.heads.distil import Distillation, distil

            served, runner, ids = _open(model, texts, max_tokens, threads)
            seconds = None if minutes is None else 60 * minutes
            wanted = Distillation(
                kind=kind,  # type: ignore[arg-type]
                shape=_shape(**shape),
                start=start,
                max_tokens=max_tokens,
                temperature=temperature,
                learning_rate=learning_rate,
                steps=steps,
                seconds=600.0 if steps is None and seconds is None else seconds,
                seed=seed,
            )
            with Bars() as progress:
                result = distil(runner, ids, served.eos_token_ids, wanted, out, progress)
    click.echo(f"trained {result.num_parameters:,} parameters in {result.steps} steps over {result.rows} tokens")
    click.echo(f"held out, before: {result.before}")
    click.echo(f"held out, after:  {result.after}")
    if result.after.tau <= result.before.tau:
        click.echo("error: the head has not become better, and is not written; train it for longer", err=True)
        ctx.exit(1)
    click.echo(out)


@drafts.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@_model
def inspect(folder: Path, model: str) -> None:
    """Check that the head in FOLDER fits MODEL, and say what it is."""
    with one_line():
        from speculation.heads import checkpoint
        from speculation.heads.new import target_of

        config, vocabulary, _ = _ends_of(model)
        head = checkpoint.load(folder, target_of(config, vocabulary))
    said = "this model's" if head.config.fingerprint else "not said"
    for name, value in (
        ("kind", head.config.kind),
        ("version", head.version),
        ("parameters", f"{head.num_parameters:,}"),
        ("vocabulary", f"{len(head.token_ids)} of {head.config.vocab_size} tokens"),
        ("taps", ", ".join(map(str, head.config.taps))),
        ("depth", head.config.depth),
        ("target", said),
    ):
        click.echo(f"{name:<11} {value}")


@drafts.command()
@_model
@click.option("--count", required=True, type=click.IntRange(1), help="Prompts to write.")
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="A JSONL file to write.")
@click.option("--begin", multiple=True, help="How prompts begin; of several, by turns.")
@click.option("--max-tokens", default=256, type=click.IntRange(1), show_default=True, help="Of a prompt, at most.")
@_seed
@_threads
def prompts(
    model: str, count: int, out: Path, begin: tuple[str, ...], max_tokens: int, seed: int, threads: int | None
) -> None:
    """Have MODEL write what users might ask it, for `train` (Magpie, arXiv:2406.08464)."""
    with one_line():
        if out.exists():
            raise ConfigError(f"--out: {out} is there already; name another file")
        from core.types import SamplingParams
        from engine.checkpoints.bars import Bars
        from speculation.heads.distil import BATCH
        from speculation.heads.passages import write
        from speculation.rounds import Needs

        begins = [begin[index % len(begin)] if begin else "" for index in range(count)]
        served, runner, ids = _open(model, begins, max_tokens, threads, render=_users_turn)
        stops = served.eos_token_ids
        sampling = [
            SamplingParams(max_tokens=max_tokens, seed=seed * count + index, stop_token_ids=stops)
            for index in range(count)
        ]
        texts: dict[int, str] = {}
        with Bars() as progress:
            progress.begin(f"Writing {count} prompts", count)
            for index, passage in write(runner, ids, sampling, Needs(), BATCH):
                texts[index] = begins[index] + served.decode(passage.token_ids[len(ids[index]) :].tolist())
                progress.update(len(texts))
        lines = (msgspec.json.encode({"turns": [texts[index]]}) for index in range(count))
        out.write_bytes(b"".join(line + b"\n" for line in lines))
    click.echo(out)


# --- parts ---------------------------------------------------------------------------------------------------------


class _Row(msgspec.Struct):
    prompt: str | None = None
    turns: list[str] = []


def _read_prompts(path: Path) -> list[str]:
    """Raises ConfigError, naming the line at fault."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line, type=_Row)
        except ValueError as error:
            raise ConfigError(f"--prompts: {path}, line {number}: {error}") from error
        text = row.prompt if row.prompt is not None else next(iter(row.turns), "")
        if not text:
            raise ConfigError(f"--prompts: {path}, line {number}: needs `prompt` or `turns` with some text")
        found.append(text)
    return found


def _users_turn(served: ServedModel, begin: str) -> list[int]:
    """What a user's first message begins with, by the chat template."""
    if served.tokenizer.chat_template is None:
        raise ConfigError("--model: it has no chat template, so it can't tell what a user would ask")
    mark = "\u2042"
    rendered = served.render_chat([{"role": "user", "content": mark}], template_kwargs={})
    return served.encode(rendered.split(mark)[0] + begin, add_special_tokens=False)


def _open(
    model: str,
    texts: list[str],
    max_tokens: int,
    threads: int | None,
    render: Callable[[ServedModel, str], list[int]] | None = None,
) -> tuple[ServedModel, ModelRunner, list[list[int]]]:
    """The model, and as tokens those of the texts that leave room for what is to follow."""
    from engine.checkpoints import Silent, resolve
    from engine.runner import ModelRunner
    from gateway.tokenizer import ServedModel
    from speculation.heads.distil import BATCH
    from speculation.heads.passages import room_for

    folder = resolve(model, progress=Silent())
    served = ServedModel.load(folder, ["model"])
    ids = [render(served, text) if render is not None else served.question_ids(text) for text in texts]
    if strange := next(
        (text for text, own in zip(texts, ids, strict=True) if max(own, default=0) >= served.vocab_size), None
    ):
        raise ConfigError(f"--prompts: {strange[:60]!r} has a token that the model has no embedding of; leave it out")
    fit = [prompt for prompt in ids if prompt and len(prompt) + max_tokens <= served.max_model_len]
    if len(fit) < len(ids):
        click.echo(f"{len(ids) - len(fit)} of {len(ids)} prompts are too long for the model, and left out", err=True)
    if not fit:
        raise ConfigError(
            f"--prompts: there is none that fits the model's context of {served.max_model_len} tokens with "
            f"--max-tokens {max_tokens} after it; lower that"
        )
    num_blocks = room_for(fit, max_tokens, BATCH, _BLOCK_SIZE)
    return served, ModelRunner.load(folder, threads=threads, block_size=_BLOCK_SIZE, num_blocks=num_blocks), fit


def _ends_of(model: str) -> tuple[Any, Any, Any]:
    """Configuration, vocabulary and dtype of a model that isn't run."""
    from engine.checkpoints import Silent, resolve
    from engine.device import resolve_device, resolve_dtype
    from engine.kv_cache import DTYPES
    from engine.model_config import ModelConfig
    from engine.vocabulary import read_vocabulary

    folder = resolve(model, progress=Silent())
    config = ModelConfig.from_folder(folder)
    device = resolve_device("cpu")
    dtype = DTYPES[resolve_dtype("auto", device)]
    return config, read_vocabulary(folder, config, device, dtype), dtype


def _shape(vocab: int, depth: int, intermediate_size: int | None) -> Shape:
    from speculation.heads.new import Shape

    return Shape(vocab, depth, intermediate_size)


def _was_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


@contextmanager
def _fresh(out: Path) -> Iterator[None]:
    """A folder that is made, and goes again if nothing comes into it."""
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(f"--out: {out} is there already; name a folder that is not") from None
    except OSError as error:
        raise ConfigError(f"--out: {out} can't be made ({error.strerror}); name another folder") from error
    try:
        yield
    finally:
        if not any(out.iterdir()):
            out.rmdir()
