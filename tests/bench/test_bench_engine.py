"""`slipstream bench engine` on a tiny random model."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import engine.runner
from bench.cli import bench
from bench.engine_speed import roofline
from bench.engine_speed.measure import Bench, Options
from bench.engine_speed.shares import part_of
from engine.attention import PagedAttention
from engine.model_config import ModelConfig

SMALL = ["--batch", "1,3", "--context", "40", "--prefill", "2x20", "--runs", "3", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def small_and_alone(monkeypatch):
    """Copies of a MiB, and the process's threads as they were."""
    monkeypatch.setattr(roofline, "COPY_BYTES", 2**20)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(model, *args):
    return CliRunner().invoke(bench, ["engine", "--model", str(model), "--device", "cpu", "--threads", "1", *args])


@pytest.fixture(scope="module")
def result(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "COPY_BYTES", 2**20)
        outcome = run(model, *SMALL, "--json")
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout)


@pytest.fixture
def options():
    def options(**changes):
        values = {"batches": (1,), "context": 40, "prompts": 3, "prompt_tokens": 100, "runs": 1, "threads": 1}
        return Options(**values | {"dtype": "float32", "device": "cpu", "temperature": 1.0} | changes)

    return options


@pytest.fixture
def watched(model, options, monkeypatch):
    """Makes a Bench and the list of the batches that its engine is given."""
    made = []

    def watched(**changes):
        made.append(driven := Bench(model, options(**changes)))
        batches, submit = [], driven.runner.submit
        monkeypatch.setattr(driven.runner, "submit", lambda batch: batches.append(batch) or submit(batch))
        return driven, batches

    yield watched
    for driven in made:
        driven.close()


# --- what is reported ------------------------------------------------------------------------------------------------


def test_every_number_comes_with_the_conditions_it_holds_under(result, model):
    assert result["model"] == str(model)
    assert (result["dtype"], result["device"], result["threads"], result["runs"]) == ("float32", "cpu", 1, 3)
    assert (result["context"], result["prefill"], result["temperature"]) == (40, "2x20", 1.0)
    assert result["versions"].keys() == {"slipstream", "torch", "python"}
    assert result["bandwidth_gb_s"] > 0


def test_numbers_of_decoding_come_by_batch_size(result):
    for key in ("decode_ms", "decode_ms_min", "decode_ms_max", "shares", "roofline_fraction", "step_bytes"):
        assert list(result[key]) == ["1", "3"], key


def test_medians_lie_between_the_fastest_and_the_slowest_run(result):
    for batch in ("1", "3"):
        assert 0 < result["decode_ms_min"][batch] <= result["decode_ms"][batch] <= result["decode_ms_max"][batch]
    slow, median, fast = (result[f"prefill_tokens_per_s{name}"] for name in ("_min", "", "_max"))
    assert 0 < slow <= median <= fast


def test_the_shares_of_a_step_add_up_to_one_and_none_is_empty(result):
    for shares in result["shares"].values():
        assert shares.keys() == {"linears", "attention", "sampling", "scheduling", "rest"}
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares.values()) > 0


def test_the_roofline_is_the_time_to_move_the_bytes_over_the_time_of_the_step(result):
    kv_token = 3 * 2 * 2 * 16 * 4  # layers, key and value, KV heads, head size, bytes
    assert result["step_bytes"]["3"] - result["step_bytes"]["1"] == 2 * 40 * kv_token
    moved_ms = result["step_bytes"]["3"] / (result["bandwidth_gb_s"] * 1e9) * 1e3
    assert result["roofline_fraction"]["3"] == pytest.approx(moved_ms / result["decode_ms"]["3"])


def test_without_json_there_is_a_line_for_each_batch_size(model):
    outcome = run(model, *SMALL, "--runs", "1")
    assert outcome.exit_code == 0, outcome.output
    assert [line.split()[0] for line in outcome.stdout.splitlines()[2:]] == ["1", "3", "prefill"]


def test_the_engine_is_left_as_it_was(model):
    before = PagedAttention.__call__, engine.runner.sample
    assert run(model, *SMALL, "--runs", "1").exit_code == 0
    assert (PagedAttention.__call__, engine.runner.sample) == before


# --- what is run -----------------------------------------------------------------------------------------------------


def test_decode_steps_have_one_row_per_sequence_around_the_context_asked_for(watched):
    driven, batches = watched(batches=(4,), context=50)
    driven.decode(4)
    assert all(len(batch.token_ids) == 4 and len(batch.logit_rows) == 4 for batch in batches)
    assert np.mean([batch.context_lens for batch in batches]) == 50


def test_the_prefill_computes_every_prompt_token_once_and_decodes_nothing(watched):
    driven, batches = watched(prompts=30, prompt_tokens=100)  # more than one step holds
    driven.prefill_tokens_per_s()
    assert len(batches) == 2
    assert sum(len(batch.token_ids) for batch in batches) == 30 * 100
    assert sum(len(batch.logit_rows) for batch in batches) == 30


def test_runs_do_not_meet_each_others_prompts_in_the_prefix_cache(watched):
    driven, batches = watched()
    for _ in range(2):
        driven.prefill_tokens_per_s()
    assert all(not batch.context_lens.any() for batch in batches)


def test_a_step_at_the_edge_of_the_context_fits(watched):
    driven, batches = watched(batches=(2,), context=256 - 22)
    driven.decode(2)
    assert len(batches) == 21


# --- the bytes of a step ---------------------------------------------------------------------------------------------


def test_tied_embeddings_are_read_once_and_untied_ones_not_at_all(model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    everything = sum(tensor.numel() for tensor in tensors.values())
    assert roofline.weight_bytes(model, ModelConfig.from_folder(model), 2) == 2 * everything

    fields = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    save_file(tensors | {"lm_head.weight": torch.zeros(128, 64)}, tmp_path / "model.safetensors")
    assert roofline.weight_bytes(tmp_path, ModelConfig.from_folder(tmp_path), 2) == 2 * everything


# --- whose an operator is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("aten::linear", "linears"),
        ("aten::addmm", "linears"),
        ("mkldnn::_linear_pointwise", "linears"),
        ("aten::_weight_int8pack_mm", "linears"),
        ("nvjet_tst_128x64_64x8_1x2_h_bz_TNT", "linears"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "linears"),
        ("aten::scaled_dot_product_attention", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("slipstream::attention", "attention"),
        ("slipstream::sampling", "sampling"),
        ("aten::rms_norm", None),
        ("aten::silu", None),
        ("aten::embedding", None),
    ],
)
def test_operators_and_kernels_are_known_by_name(name, part):
    assert part_of(name) == part


# --- bad flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--batch", "0"),
        ("--batch", "1,,4"),
        ("--batch", "many"),
        ("--prefill", "16"),
        ("--prefill", "0x140"),
        ("--prefill", "2x1000"),
        ("--context", "5"),
        ("--context", "1000"),
    ],
)
def test_a_flag_that_cannot_be_is_refused_in_one_line_that_names_it(model, flag, value):
    outcome = run(model, *SMALL, flag, value)
    assert outcome.exit_code == 2
    (line,) = outcome.stderr.splitlines()
    assert line.startswith(f"Error: {flag}: ")
    assert value.removeprefix("2x") in line


def test_a_model_that_is_not_there_is_refused_in_one_line(tmp_path):
    outcome = run(tmp_path / "none")
    assert outcome.exit_code == 2
    assert len(outcome.stderr.splitlines()) == 1


def test_the_command_line_is_understood_without_loading_torch():
    code = "import sys, bench.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
