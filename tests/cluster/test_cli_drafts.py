"""`slipstream drafts` makes, trains and looks at heads; what can't be is one line with status 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cluster.cli_drafts import drafts
from tests.tiny import configure, save_byte_tokenizer, save_tiny_llama

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(drafts, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder)
    save_byte_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": f"say{n}"} if n % 2 else {"turns": [f"tell{n}", "more"]} for n in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("kind", ["eagle3", "hydra", "medusa"])
def test_a_new_head_fits_its_model(model: Path, tmp_path: Path, kind: str) -> None:
    made = run("new", kind, "--model", model, "--out", tmp_path / "head", "--vocab", 100, "--depth", 2)
    assert (made.exit_code, made.stdout) == (0, f"{tmp_path / 'head'}\n"), made.output
    found = run("inspect", tmp_path / "head", "--model", model)
    assert found.exit_code == 0, found.output
    lines = dict(line.split(maxsplit=1) for line in found.stdout.splitlines())
    assert lines["kind"] == kind
    assert lines["vocabulary"] == "100 of 128 tokens"


def test_training_writes_a_head_that_is_better_and_goes_on_from_it(model: Path, asked: Path, tmp_path: Path) -> None:
    common = ("--kind", "eagle3", "--model", model, "--prompts", asked, "--max-tokens", 16, "--threads", 1)
    head = tmp_path / "head"
    result = run("train", *common, "--out", head, "--steps", 40, "--learning-rate", 0.03, "--vocab", 128, "--depth", 2)
    assert result.exit_code == 0, result.output
    said = result.stdout.splitlines()
    assert said[0].startswith("trained ")
    assert said[1].startswith("held out, before: alpha 0.")
    assert said[2].startswith("held out, after:  alpha 0.")
    assert said[3] == str(head)
    assert run("inspect", head, "--model", model).exit_code == 0
    again = run("train", *common, "--out", tmp_path / "again", "--steps", 1, "--from", head)
    assert again.exit_code in (0, 1), again.output
    assert (tmp_path / "again").exists() == (again.exit_code == 0)
    assert again.stdout.splitlines()[1] == said[2].replace("after: ", "before:")


def test_a_model_writes_its_own_prompts(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "prompts.jsonl"
    result = run("prompts", "--model", model, "--count", 5, "--out", out, "--begin", "Why", "--max-tokens", 6)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 5
    assert all(row["turns"][0].startswith("Why") for row in rows)
    assert len({row["turns"][0] for row in rows}) > 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a b"}', "has no embedding of"),
        ("{", "line 2: "),
        ('{"turns": []}', "line 2: needs `prompt` or `turns` with some text"),
        ('{"prompt": 3}', "line 2: "),
    ],
)
def test_a_bad_line_of_prompts_is_named(model: Path, tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "say"}\n' + line)
    refused(run("train", "--kind", "hydra", "--model", model, "--prompts", path, "--out", tmp_path / "head"), reason)


def test_what_can_not_be_is_refused_before_anything_is_trained(model: Path, asked: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "say"}\n{"prompt": "say"}')
    train = ("train", "--kind", "hydra", "--model", model, "--out", tmp_path / "head")
    refused(run(*train, "--prompts", one, "--steps", 1), "two different ones")
    refused(run(*train, "--prompts", asked, "--from", tmp_path, "--depth", 2), "--depth has no meaning with --from")
    refused(run(*train, "--prompts", asked, "--from", tmp_path, "--steps", 1), "config.json")
    refused(run(*train, "--prompts", asked, "--max-tokens", 400), "fits the model's context")
    refused(
        run("train", "--kind", "hydra", "--model", model, "--prompts", asked, "--out", tmp_path), "is there already"
    )
    refused(run("new", "medusa", "--model", tmp_path / "none", "--out", tmp_path / "head"), "no such file")
    assert not (tmp_path / "head").exists()


def test_a_head_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    run("new", "medusa", "--model", model, "--out", tmp_path / "head", "--vocab", 64)
    other = tmp_path / "other"
    save_tiny_llama(other)
    save_byte_tokenizer(other)
    configure(other, rms_norm_eps=1e-3)
    refused(run("inspect", tmp_path / "head", "--model", other), "of another model than this one")


def refused(result: Result, reason: str) -> None:
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") or "\nerror: " in result.stderr
    assert reason in result.stderr


def test_a_model_without_a_chat_template_writes_no_prompts(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "bare")
    save_byte_tokenizer(tmp_path / "bare")
    result = run("prompts", "--model", tmp_path / "bare", "--count", 1, "--out", tmp_path / "prompts.jsonl")
    refused(result, "has no chat template")
