from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripted import write_model

from core.errors import ConfigError, InvalidRequest, ModelError
from gateway.tokenizer import INLINE_CHARS, ServedModel, inline_or_thread

USER = [{"role": "user", "content": "hi"}]


def edit(path: Path, **changes: Any) -> None:
    """None removes a key."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_a_model_without_a_chat_template_says_so(tmp_path: Path) -> None:
    model = ServedModel.load(write_model(tmp_path, chat_template=None), ["bare"])
    with pytest.raises(InvalidRequest, match="'bare' has no chat template; use /v1/completions"):
        model.render_chat(USER, template_kwargs={})


def test_what_the_template_refuses_is_the_clients_fault(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must\nalternate') }}"
    model = ServedModel.load(write_model(tmp_path, chat_template=template), ["strict"])
    with pytest.raises(InvalidRequest, match="refused the messages: roles must alternate") as caught:
        model.render_chat(USER, template_kwargs={})
    assert caught.value.param == "messages"


def test_template_variables_reach_the_template(tmp_path: Path) -> None:
    model = ServedModel.load(write_model(tmp_path, chat_template="{{ mood }} {{ messages[0].content }}"), ["m"])
    assert model.render_chat(USER, template_kwargs={"mood": "gay"}) == "gay hi"


def test_end_of_sequence_ids_come_from_all_who_name_one(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    edit(folder / "generation_config.json", eos_token_id=[1, 2])
    model = ServedModel.load(folder, ["m"])
    assert set(model.eos_token_ids) == {1, 2, model.tokenizer.eos_token_id}


def test_an_end_of_sequence_that_the_model_cannot_draw_is_none(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    edit(folder / "generation_config.json", eos_token_id=[-1, 1, 100_000])
    model = ServedModel.load(folder, ["m"])
    assert set(model.eos_token_ids) == {1, model.tokenizer.eos_token_id}


def test_text_with_a_token_that_the_model_lacks_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    edit(folder / "config.json", vocab_size=size - 1)  # the last is <|im_end|>
    model = ServedModel.load(folder, ["m"])
    with pytest.raises(InvalidRequest, match=r"prompt: .*<\|im_end\|>.* none of the model's") as caught:
        model.encode_prompt("hi<|im_end|>", "prompt")
    assert caught.value.param == "prompt"
    assert model.encode_prompt("hi", "prompt")


def test_the_context_can_be_shortened_but_not_stretched(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    assert ServedModel.load(folder, ["m"], max_model_len=100).max_model_len == 100
    with pytest.raises(ConfigError, match="300 is above the model's 256") as caught:
        ServedModel.load(folder, ["m"], max_model_len=300)
    assert caught.value.param == "max_model_len"


def test_a_context_nobody_states_is_asked_for(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    edit(folder / "config.json", max_position_embeddings=None)
    with pytest.raises(ModelError, match="set max_model_len"):
        ServedModel.load(folder, ["m"])
    assert ServedModel.load(folder, ["m"], max_model_len=10).max_model_len == 10


@pytest.mark.parametrize(("name", "content"), [("config.json", "{"), ("config.json", "[]"), ("tokenizer.json", "{}")])
def test_broken_files_are_one_line_with_the_path(tmp_path: Path, name: str, content: str) -> None:
    (write_model(tmp_path) / name).write_text(content)
    with pytest.raises(ModelError) as caught:
        ServedModel.load(tmp_path, ["m"])
    assert str(tmp_path) in caught.value.message
    assert "\n" not in caught.value.message


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        ServedModel.load(tmp_path / "nowhere", ["m"])


def test_truncation_in_the_file_does_not_shorten_prompts(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    edit(folder / "tokenizer.json", truncation=truncation)
    assert len(ServedModel.load(folder, ["m"]).encode("hello " * 20)) > 4


def test_the_bytes_of_any_text_are_those_of_its_tokens(model: ServedModel) -> None:
    text = "naïve 🦊 <|im_end|>\n"
    assert b"".join(bytes(model.token_bytes(i)) for i in model.encode(text)) == text.encode()


async def test_long_text_is_tokenized_off_the_loop(model: ServedModel) -> None:
    import threading

    def where() -> str:
        return threading.current_thread().name

    assert await inline_or_thread(INLINE_CHARS, where) == threading.current_thread().name
    assert await inline_or_thread(INLINE_CHARS + 1, where) != threading.current_thread().name


def test_the_gateway_needs_no_torch(tmp_path: Path) -> None:
    write_model(tmp_path)
    code = (
        "import sys; import gateway.app, gateway.server; from gateway.tokenizer import ServedModel;"
        f"m = ServedModel.load({str(tmp_path)!r}, ['m']); m.render_chat([{{'role': 'user', 'content': 'x'}}], "
        "template_kwargs={}); sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
