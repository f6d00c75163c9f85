"""Adapters and quantization from the command line to what a client reads."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaForCausalLM

from cluster.checks import check_memory
from cluster.config.loading import load, on_device
from cluster.config.tree import SlipstreamConfig
from cluster.local import LocalCluster, local_cluster
from cluster.options import ListOptions, config_options
from cluster.resources import share_out
from core.errors import ConfigError
from core.types import Request, SamplingParams
from tests.engine.lora.peft import merge, save_adapter

TIMEOUT_S = 60.0
LAYOUTS: dict[str, dict[str, Any]] = {"disaggregated": {}, "colocated": {"colocated": True}}


@pytest.fixture(scope="module")
def adapters(tiny: tuple[LlamaForCausalLM, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(folder / name, tiny[1], seed=seed) for seed, name in enumerate(("sql", "poems"))}


@pytest.fixture(scope="module")
def merged(
    tiny: tuple[LlamaForCausalLM, Path], adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, LlamaForCausalLM]:
    folder = tmp_path_factory.mktemp("merged")
    folders = {name: merge(adapter, tiny[1], folder / name) for name, adapter in adapters.items()}
    return {"": tiny[0]} | {name: LlamaForCausalLM.from_pretrained(path).eval() for name, path in folders.items()}


def config(adapters: dict[str, Path], **settings: Any) -> SlipstreamConfig:
    modules = [f"{name}={path}" for name, path in adapters.items()]
    return load(None, {"dtype": "float32", "kv_cache_memory": "4MiB", "lora_modules": modules} | settings)


def request(name: str, adapter: str, prompt: list[int]) -> Request:
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    deadline = time.time() + TIMEOUT_S
    return Request(request_id=name, prompt_token_ids=prompt, sampling=sampling, deadline=deadline, adapter=adapter)


async def run(cluster: LocalCluster, job: Request) -> tuple[list[int], int, str | None]:
    """Output, prompt tokens from a cache, and the error that ended it."""
    async with asyncio.timeout(TIMEOUT_S):
        deltas = [delta async for delta in cluster.backend.generate(job)]
    finish = deltas[-1].finish
    assert finish is not None
    return [t for d in deltas for t in d.token_ids], sum(d.num_cached_tokens for d in deltas), finish.error


def expected(model: LlamaForCausalLM, prompt: list[int]) -> list[int]:
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        return model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_every_request_has_the_output_of_its_adapters_merged_weights(
    tiny: tuple[LlamaForCausalLM, Path],
    adapters: dict[str, Path],
    merged: dict[str, LlamaForCausalLM],
    layout: str,
) -> None:
    prompt = [3 + i % 90 for i in range(50)]
    names = ["", "sql", "poems", "sql", ""]
    async with local_cluster(config(adapters, **LAYOUTS[layout]), tiny[1]) as cluster:
        results = await asyncio.gather(*(run(cluster, request(f"r{i}", n, prompt)) for i, n in enumerate(names)))
        again = [await run(cluster, request(f"again-{name}", name, prompt)) for name in ("", "sql", "poems")]
        _, _, error = await run(cluster, request("unknown", "prose", prompt))
    want = {name: expected(model, prompt) for name, model in merged.items()}
    assert len({tuple(tokens) for tokens in want.values()}) == 3
    assert [tokens for tokens, _, _ in results] == [want[name] for name in names]
    assert [(tokens, cached) for tokens, cached, _ in again] == [(want[name], 48) for name in ("", "sql", "poems")]
    assert error == "InvalidRequest"


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["m", "--lora-modules", "a=x", "b=y"],
        ["--lora-modules", "a=x", "b=y", "m"],
        ["--lora-modules", "a=x", "--lora-modules", "b=y", "m"],
        ["--lora-modules", "a=x", "b=y", "--port", "1", "m"],
    ],
)
def test_one_flag_takes_any_number_of_adapters(args: list[str]) -> None:
    assert parsed(*args) == ("a=x", "b=y")


def parsed(*args: str) -> Any:
    """What --lora-modules is given, beside the model m."""
    seen: dict[str, Any] = {}

    @click.command(cls=ListOptions)
    @click.argument("model")
    @config_options
    def serve(**values: Any) -> None:
        seen.update(values)

    outcome = CliRunner().invoke(serve, args)
    assert outcome.exit_code == 0, outcome.output
    assert seen["model"] == "m"
    return seen["lora_modules"]


def test_in_a_file_adapters_are_a_mapping_or_a_list(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    for text in ("{a: /x, b: /y}", "[a=/x, b=/y]"):
        path.write_text(f"engine: {{lora_modules: {text}}}\n")
        assert load(path, {}).engine.adapters == {"a": "/x", "b": "/y"}


def test_paths_mean_the_same_to_workers_as_to_whoever_wrote_them() -> None:
    assert load(None, {"lora_modules": ["a=x/y"]}).engine.adapters == {"a": str(Path.cwd() / "x/y")}


def test_vllms_objects_name_the_model_that_an_adapter_is_listed_under(tmp_path: Path) -> None:
    objects = ['{"name": "a", "path": "/x", "base_model_name": "z"}', '{"name": "b", "path": "/y"}']
    path = tmp_path / "serve.yaml"
    path.write_text(f"engine: {{lora_modules: [{', '.join(objects)}]}}\n")
    for config in (load(None, {"lora_modules": parsed("--lora-modules", *objects, "m")}), load(path, {})):
        config = on_device(config, "cpu")
        assert config.engine.adapters == {"a": "/x", "b": "/y"}
        assert [module.base_model_name for module in config.engine.lora_modules.values()] == ["z", None]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_modules": ["sql"]}, "'sql' is not name=path"),
        ({"lora_modules": ["=x"]}, "'=x' is not name=path"),
        ({"lora_modules": ["a=x", "a=y"]}, "a is there twice"),
        ({"lora_modules": ['{"name": "a"']}, "is not JSON"),
        ({"lora_modules": ['{"name": "a"}']}, "lacks a name or a path"),
        ({"lora_modules": ['{"name": "a", "path": "x", "bass": "m"}']}, "lora_modules.a.bass"),
        ({"lora_modules": ['{"name": "a", "path": 3}']}, "lora_modules.a.path"),
        ({"lora_modules": {"": "x"}}, "'': 'x' has no name"),
        ({"lora_modules": {"a": ""}}, "'a': '' has no path"),
        ({"lora_modules": ["a=~no-such-user/x"]}, "there is no such user"),
        ({"lora_modules": ["demo=x"]}, "demo: that is the base model's name"),
        ({"lora_modules": ["m=x"], "served_model_name": "m"}, "m: that is the base model's name"),
        ({"max_lora_rank": 0}, "max_lora_rank"),
        ({"quantization": "fp8", "device": "cpu"}, "--quantization int8"),
        ({"quantization": "fp8", "device": "cuda", "dtype": "float16"}, "--dtype bfloat16"),
        ({"quantization": "int4"}, "quantization"),
    ],
)
def test_settings_that_can_not_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, settings)
    assert message in caught.value.message


def test_fp8_on_a_cluster_without_gpus_is_refused_before_workers_start() -> None:
    with pytest.raises(ConfigError, match="--quantization fp8 needs a GPU"):
        share_out(load(None, {"quantization": "fp8"}), 2, 0)
    assert share_out(load(None, {"quantization": "fp8"}), 16, 2)[0].gpus == 1


def test_weights_need_the_memory_of_the_type_they_are_computed_in(
    tiny: tuple[LlamaForCausalLM, Path], monkeypatch: Any
) -> None:
    needed = {}
    for dtype in ("auto", "float32", "bfloat16"):
        monkeypatch.setattr("cluster.checks.available_memory", lambda: 2**40)
        monkeypatch.setattr("cluster.checks._gib", lambda count: f"{count}")
        needed[dtype] = int(check_memory(load(None, {"dtype": dtype}), tiny[1]).split()[0])
    weights = sum(p.numel() for p in tiny[0].parameters())
    assert needed["float32"] - needed["bfloat16"] == 2 * 2 * weights  # two workers, two bytes
    assert 0 <= needed["auto"] - needed["float32"] < 2**16  # it is stored so, with a header


def test_quantized_weights_need_less_memory(tiny: tuple[LlamaForCausalLM, Path], monkeypatch: Any) -> None:
    needed = []
    for settings in ({}, {"quantization": "int8"}):
        monkeypatch.setattr("cluster.checks.available_memory", lambda: 2**40)
        monkeypatch.setattr("cluster.checks._gib", lambda count: f"{count}")
        needed.append(int(check_memory(load(None, settings), tiny[1]).split()[0]))
    projections = sum(p.numel() for n, p in tiny[0].named_parameters() if n.endswith("_proj.weight"))
    saved = needed[0] - needed[1]
    assert 2 * 3 * projections < saved < 2 * 3 * projections + 2**16
