"""`slipstream bench serve` from the command line to its table, file and exit status."""

import json
import os
import signal
import socket

import pytest
from click.testing import CliRunner
from sse_server import DONE, text, three_words

from bench.cli import bench

# Keys that scripts written for `vllm bench serve` read.
VLLM_KEYS = {
    "date",
    "endpoint_type",
    "backend",
    "label",
    "model_id",
    "tokenizer_id",
    "num_prompts",
    "request_rate",
    "burstiness",
    "max_concurrency",
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    "max_output_tokens_per_s",
    "max_concurrent_requests",
    *(f"{s}_{m}_ms" for s in ("mean", "median", "std", "p50", "p90", "p99") for m in ("ttft", "tpot", "itl", "e2el")),
}
VLLM_DETAILED_KEYS = {"input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors"}


@pytest.fixture
def run(server, tmp_path, monkeypatch):
    """The command against the scripted server, with short random prompts unless told otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(*args, small=True):
        sizes = ["--num-prompts", "4", "--random-input-len", "5"] if small else []
        return CliRunner().invoke(bench, ["serve", "--base-url", server.url, *sizes, *args])

    return run


def refusal(result, status=2):
    """The one line a user sees."""
    assert result.exit_code == status, result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("Error: ")


# --- results -------------------------------------------------------------------------------------------------------


def test_the_table_tells_what_happened(run, server):
    result = run("--goodput", "ttft:60000", "tpot:60000", "--max-concurrency", "2", "--request-rate", "1000")
    assert result.exit_code == 0, result.output
    rows = dict(line.rsplit(":", 1) for line in result.stdout.splitlines() if ":" in line)
    assert rows["Successful requests"].strip() == "4"
    assert rows["Total input tokens"].strip() == "28"
    assert rows["Total generated tokens (by usage)"].strip() == "12"
    assert rows["SLO attainment (%)"].strip() == "100.00"
    assert {"Mean TTFT (ms)", "P99 ITL (ms)", "P90 E2EL (ms)", "Mean Client Queue Time (ms)"} <= rows.keys()
    assert [exchange.body["model"] for exchange in server.exchanges] == ["tiny"] * 4
    assert all(len(exchange.body["prompt"]) == 5 for exchange in server.exchanges)


def test_the_saved_result_has_the_keys_of_vllm(run, tmp_path):
    run("--save-result", "--result-dir", "out/deep", "--result-filename", "r.json", "--metadata", "gpu=none", "n=1")
    result = json.loads((tmp_path / "out/deep/r.json").read_text())
    assert result.keys() >= VLLM_KEYS
    assert not (result.keys() & VLLM_DETAILED_KEYS)
    assert (result["request_rate"], result["max_concurrency"], result["request_goodput"]) == ("inf", None, None)
    assert (result["completed"], result["total_output_tokens"], result["model_id"]) == (4, 12, "tiny")
    assert (result["gpu"], result["n"]) == ("none", "1")


def test_details_are_saved_when_asked(run, tmp_path):
    run("--save-result", "--save-detailed", "--result-filename", "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    assert result.keys() >= VLLM_KEYS | VLLM_DETAILED_KEYS
    assert result["generated_texts"] == ["a b c"] * 4
    assert result["output_lens"] == [3] * 4
    assert [len(gaps) for gaps in result["itls"]] == [2] * 4


def test_the_default_file_name_tells_the_setting(run, tmp_path):
    run("--save-result", "--request-rate", "1000", "--max-concurrency", "3", "--label", "mine")
    (path,) = tmp_path.glob("*.json")
    assert path.name.startswith("mine-1000.0qps-concurrency3-tiny-")
    result = json.loads(path.read_text())
    assert result["max_dispatch_lag_ms"] >= result["median_dispatch_lag_ms"] >= 0
    assert "mean_e2el_including_client_queue_ms" in result


def test_results_can_be_appended(run, tmp_path):
    for _ in range(2):
        run("--append-result", "--result-filename", "r.jsonl")
    assert [json.loads(line)["completed"] for line in (tmp_path / "r.jsonl").read_text().splitlines()] == [4, 4]


def test_categories_of_spec_bench_are_reported(run, tmp_path):
    rows = [{"question_id": i, "category": c, "turns": ["hello"]} for i, c in enumerate(["math", "qa", "math"])]
    (tmp_path / "spec.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("--dataset-name", "spec-bench", "--dataset-path", "spec.jsonl", "--backend", "openai-chat")
    result = run(
        *flags, "--no-oversample", "--save-result", "--save-detailed", "--result-filename", "r.json", small=False
    )
    assert result.exit_code == 0, result.output
    categories = json.loads((tmp_path / "r.json").read_text())["categories"]
    assert {name: of["completed"] for name, of in categories.items()} == {"math": 2, "qa": 1}
    assert any(line.split()[:2] == ["math", "2"] for line in result.stdout.splitlines())


def test_chat_prompts_are_sized_through_the_servers_tokenizer(run, server):
    assert run("--backend", "openai-chat").exit_code == 0
    contents = [exchange.body["messages"][0]["content"] for exchange in server.exchanges]
    assert [len(content) for content in contents] == [5] * 4


def test_warmups_and_the_ready_check_are_not_measured(run, server):
    result = run("--num-warmups", "3", "--ready-check-timeout-sec", "60")
    assert len(server.exchanges) == 1 + 3 + 4
    assert "Successful requests:                          4" in result.stdout


def test_an_api_key_is_sent_unless_a_header_says_otherwise(run, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    run()
    run("--header", "authorization=Basic x", "x-slo-ttft-ms=200")
    first, last = server.exchanges[0].headers, server.exchanges[-1].headers
    assert first["authorization"] == "Bearer k"
    assert (last["authorization"], last["x-slo-ttft-ms"]) == ("Basic x", "200")


def test_the_same_seed_sends_the_same_prompts(run, server):
    def prompts(seed):
        before = len(server.exchanges)
        run("--seed", seed)
        return sorted(exchange.body["prompt"] for exchange in server.exchanges[before:])

    assert prompts("1") == prompts("1") != prompts("2")


# --- failures ------------------------------------------------------------------------------------------------------


def test_some_failures_are_counted_and_shown(run, server):
    async def every_other(exchange):
        if exchange.number % 2:
            exchange.reply(500, {"error": {"message": "out of memory"}})
        else:
            await three_words(exchange)

    server.script = every_other
    result = run()
    assert result.exit_code == 0
    assert "Failed requests:                              2" in result.stdout
    assert "Warning: 2 failed: HTTP 500: out of memory" in result.stderr


def test_nothing_but_failures_fails_the_command(run, server):
    async def fail(exchange):
        exchange.reply(503, {"error": {"message": "no worker"}})

    server.script = fail
    result = run()
    assert result.exit_code == 1
    assert "Warning: 4 failed: HTTP 503: no worker" in result.stderr


def test_missing_usage_is_said(run, server):
    async def silent(exchange):
        exchange.stream(text("a"), text("b", "stop"), DONE)

    server.script = silent
    result = run()
    assert "Total generated tokens (by chunks):           8" in result.stdout
    assert "without usage" in result.stderr


def test_an_unreachable_server_is_one_line():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # so that nobody else gets it
        port = silent.getsockname()[1]
        result = CliRunner().invoke(bench, ["serve", "--port", str(port)])
    assert refusal(result, 1).startswith(f"--base-url: can't reach a server at http://127.0.0.1:{port}: ")


def test_a_failing_warmup_is_one_line(run, server):
    async def fail(exchange):
        exchange.reply(400, {"error": {"message": "context too long"}})

    server.script = fail
    message = "--num-warmups: 2 of 2 warm-ups failed: HTTP 400: context too long"
    assert refusal(run("--num-warmups", "2"), 1) == message


def test_ctrl_c_prints_what_was_measured(run, server, tmp_path):
    async def interrupt_at_the_third(exchange):
        if exchange.number < 2:
            await three_words(exchange)
        else:
            os.kill(os.getpid(), signal.SIGINT)
            await exchange.gone()

    server.script = interrupt_at_the_third
    result = run("--max-concurrency", "1", "--save-result", "--save-detailed", "--result-filename", "r.json")
    assert result.exit_code == 130, result.output
    assert "Successful requests:                          2" in result.stdout
    assert "Cut short by the interruption:                1" in result.stdout
    assert "Not sent:                                     1" in result.stdout
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["interrupted"]
    assert saved["errors"] == ["", "", "cut short"]


# --- bad flags -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--goodput", "itl:3"], "--goodput: 'itl:3' names no metric; use ttft, tpot, e2el, as in ttft:200"),
        (["--goodput", "ttft:1", "tpot"], "--goodput: 'tpot' holds no number"),
        (["--goodput", "ttft:-1"], "--goodput: 'ttft:-1' needs a number of milliseconds, 0 or more"),
        (["--request-rate", "-2"], "--request-rate: must be above 0"),
        (["--request-rate", "nan"], "--request-rate: must be above 0"),
        (["--burstiness", "0"], "--burstiness: must be above 0"),
        (["--random-range-ratio", "1"], "--random-range-ratio: must be at least 0 and below 1"),
        (["--request-timeout", "0"], "--request-timeout: must be above 0"),
        (["--percentile-metrics", "ttft,tbt"], "--percentile-metrics: 'tbt' is none of ttft, tpot, itl, e2el"),
        (["--metric-percentiles", "50,101"], "--metric-percentiles: 101 is not between 0 and 100"),
        (["--metric-percentiles", "p99"], "--metric-percentiles: 'p99' holds no number"),
        (["--header", "nothing"], "--header: 'nothing' is not KEY=VALUE"),
        (["--header", "a=b\r\nc: d"], "--header: 'a=b\\r\\nc: d' holds a line break"),
        (["--metadata", "a=1", "completed=9"], "--metadata: 'completed' is a key of the result"),
        (["--extra-body", "{"], "--extra-body: not JSON"),
        (["--extra-body", "[]"], "--extra-body: must be a JSON object"),
        (["--dataset-name", "custom", "--dataset-path", "no"], "--dataset-path: there is no file no"),
        (["--dataset-name", "custom"], "--dataset-path: needed with --dataset-name custom"),
        (["--dataset-path", "x"], "--dataset-path: not used with --dataset-name random"),
        (["--sharegpt-output-len", "3"], "--sharegpt-output-len: not used with --dataset-name random"),
        (["--no-oversample"], "--no-oversample: not used with --dataset-name random"),
        (["--result-dir", "x"], "--result-dir: needs --save-result"),
        (["--save-result", "--result-dir", "/dev/null/x"], "--result-dir: /dev/null/x can't be made"),
        (["--tokenizer", "nowhere"], "--tokenizer: nowhere has no tokenizer.json"),
        (["--host", "h"], "--base-url: takes the place of --host and --port"),
        (["--base-url", "ftp://x"], "--base-url: 'ftp://x/v1/completions' is not an http:// or https:// URL"),
    ],
)
def test_bad_flags_are_refused_by_name(run, server, flags, message):
    assert refusal(run(*flags, small="--dataset-name" not in flags)).startswith(message)
    assert not server.exchanges


def test_a_temperature_that_is_no_number_is_refused(run, server):
    result = run("--temperature", "nan")
    assert result.exit_code == 2
    assert "'--temperature': nan is no finite number" in result.stderr


def test_a_server_without_tokenize_asks_for_a_tokenizer(run, server):
    server.tokenizes = False
    message = refusal(run())
    assert message.startswith("--tokenizer: the server's /tokenize can't be used (")
    assert message.endswith("give a folder with tokenizer.json")
