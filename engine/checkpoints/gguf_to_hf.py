"""Writes a GGUF file out as a Hugging Face folder in bfloat16. Runs as a process of its own:

    python -m engine.checkpoints.gguf_to_hf '{"gguf": path, "out": new folder, "label": text, "prompt": text or null}'

A process, because its memory then goes back to the system, a kill leaves the caller whole, and what the libraries print
stays out of the user's terminal. Standard output carries one JSON object a line: {"begin": label}, {"done": n, "total":
n}, {"architecture", "config", "parameters"} once, before the weights are touched, and {"refused": reason} at the end if
the file can't be converted. It exits when its standard input closes, that is when its parent is gone.

Transformers reads the weights. What it passes over in silence is set right or refused here: pre-tokenizers that split
digits, scaled rope (Llama 3.1 and later), ends of turn, and tensors that no parameter of the model takes.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

Emit = Callable[[dict[str, Any]], None]

_ROPE_FACTORS = "rope_freqs.weight"
_DIGITS_THEN_GPT2 = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""`tokenizer.ggml.pre` of vocabularies learned with every digit on its own, then GPT-2's split: ggml-org/llama.cpp,
llama-vocab.cpp. Transformers would leave the digits together, which changes how the space before them is cut."""
_GPT2 = {"gpt-2", "gpt2", "phi-2", "olmo", "jais", "mpt", "trillion", "granite-docling"}
"""Those that use GPT-2's split alone, which is what Transformers falls back to for a name it has no split for."""


class Refused(Exception):
    """The file can't be converted; the text says why and what to do."""


def convert(gguf: Path, out: Path, label: str, prompt: str | None, emit: Emit) -> None:
    """Write `gguf` to the new folder `out`. `prompt` is what its chat template must make of one user message "Hi"."""
    emit({"begin": f"{label}: reading"})
    reader = _open(gguf)
    config = _config(gguf, reader)
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name != _ROPE_FACTORS)
    architecture = _field(reader, "general.architecture")
    emit({"architecture": architecture, "config": config.to_dict(), "parameters": parameters})

    emit({"begin": f"{label}: reading the vocabulary"})
    tokenizer = _tokenizer(gguf, reader, config)
    _write_weights(gguf, out, config, parameters, _ends(reader))
    tokenizer.save_pretrained(out)
    emit({"begin": f"{label}: checking the result"})
    _verify(out, prompt)


def _open(gguf: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
    except (ValueError, IndexError, KeyError) as error:
        raise Refused(f"not a whole GGUF file ({error}): fetch it again") from error
    for key in ("general.architecture", "tokenizer.ggml.model"):
        if key not in reader.fields:
            raise Refused(f"its metadata has no {key}: name the file with the language model and its tokenizer")
    return reader


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def _config(gguf: Path, reader: GGUFReader) -> PreTrainedConfig:
    """The Transformers configuration that the metadata describes, with the class that will hold the weights."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    architecture = _field(reader, "general.architecture")
    try:
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except (ValueError, KeyError) as error:
        raise Refused(
            f"its architecture {architecture!r} can't be converted: use the model in safetensors form, by its Hugging "
            "Face id"
        ) from error
    config.architectures = [model_class.__name__]
    scaling = _field(reader, f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none"):
        raise Refused(f"its rope scaling {scaling!r} is not read from GGUF: use the model by its Hugging Face id")
    _restore_llama3_rope(config, reader)
    return config


def _restore_llama3_rope(config: PreTrainedConfig, reader: GGUFReader) -> None:
    """Recover the parameters of Llama 3's scaled rope from the factors by which the file divides each frequency.

    The factors run from 1 to `factor`; the other parameters are the same in every model published with them, and the
    frequencies that follow from all four are compared with the file's.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    tensor = next((tensor for tensor in reader.tensors if tensor.name == _ROPE_FACTORS), None)
    if tensor is None:
        return
    factors = torch.tensor(tensor.data.copy())  # [head_size / 2]
    theta = config.rope_parameters["rope_theta"]
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** -(torch.arange(len(factors)) / len(factors))
    if scaled.shape != factors.shape or not torch.allclose(scaled * factors, plain, rtol=1e-4):
        raise Refused("its rope factors are not Llama 3's: use the model in safetensors form, by its Hugging Face id")


def _tokenizer(gguf: Path, reader: GGUFReader, config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    split = _field(reader, "tokenizer.ggml.pre")
    byte_level = _field(reader, "tokenizer.ggml.model") == "gpt2"
    if byte_level and split not in _DIGITS_THEN_GPT2 | _GPT2 | GGUF_PRE_TOKENIZER_SPLITS.keys():
        raise Refused(f"its pre-tokenizer {split!r} is not known: use the model by its Hugging Face id")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (ValueError, KeyError) as error:
        raise Refused(f"its tokenizer can't be converted ({error}): use the model by its Hugging Face id") from error
    if byte_level and split in _DIGITS_THEN_GPT2:
        digits = pre_tokenizers.Digits(individual_digits=True)
        gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    tokenizer.model_max_length = config.max_position_embeddings
    return tokenizer


def _ends(reader: GGUFReader) -> list[int]:
    """Tokens that end a reply: of the sequence and, in chat models that keep the two apart, of the turn."""
    found = [_field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    ends = list(dict.fromkeys(token for token in found if token is not None))
    if not ends:
        raise Refused("its metadata names no end-of-sequence token: use the model by its Hugging Face id")
    return ends


def _write_weights(gguf: Path, out: Path, config: PreTrainedConfig, parameters: int, ends: list[int]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model, info = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        config=config,
        dtype=torch.bfloat16,
        # Left to itself, Transformers would keep the blocks packed where it has kernels for them.
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    taken = sum(parameter.numel() for parameter in model.parameters())
    if info["missing_keys"] or taken != parameters:
        raise Refused(
            f"it holds {parameters:,} weights where {type(model).__name__} takes {taken:,}, so some would be lost: "
            "use the model in safetensors form, by its Hugging Face id"
        )
    model.config.name_or_path = gguf.stem
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.save_pretrained(out)


def _verify(out: Path, prompt: str | None) -> None:
    """What a server relies on holds in the folder as written: text survives, replies end, chats are framed."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = AutoConfig.from_pretrained(out).get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise Refused(f"its tokenizer has {len(tokenizer)} tokens and its embedding {rows} rows: fetch another file")
    text = "Three steps:\n\n1. draft 12 tokens"
    back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    if back.strip() != text:
        raise Refused(f"its tokenizer turns {text!r} into {back!r}: use the model by its Hugging Face id")
    ends = GenerationConfig.from_pretrained(out).eos_token_id
    if tokenizer.eos_token_id not in (ends if isinstance(ends, list) else [ends]):
        raise Refused(f"its tokenizer ends at {tokenizer.eos_token!r} and its model at {ends}: fetch another file")
    _verify_chat(tokenizer, prompt)


def _verify_chat(tokenizer: PreTrainedTokenizerFast, prompt: str | None) -> None:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None and prompt is None:
        return  # a base model: it completes text, and chats are refused per request
    try:
        said = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, ValueError) as error:
        raise Refused(f"its chat template fails on one user message ({error}): fetch another file") from error
    if prompt is not None and said != prompt:
        raise Refused(f"its chat template writes {said!r} where {prompt!r} is right: install the pinned Transformers")


def _report_tqdm(label: str, emit: Emit) -> None:
    """Have the bars of Transformers, which takes its class from `tqdm.auto`, arrive as events."""
    import tqdm.auto  # type: ignore[import-untyped]

    steps = {"de-quantizing": "dequantizing", "loading": "loading the weights", "writing": "writing the weights"}

    class Reporter(tqdm.std.tqdm):  # type: ignore[misc]
        monitor_interval = 0
        begun = False

        def display(self, *_: object, **__: object) -> None:
            if not self.begun:
                words = str(self.desc).lower().split()
                emit({"begin": f"{label}: {next((steps[word] for word in words if word in steps), 'converting')}"})
                self.begun = True
            emit({"done": self.n, "total": self.total})

    tqdm.auto.tqdm = Reporter


def _exit_with_parent() -> None:
    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    job = json.loads(sys.argv[1])
    _exit_with_parent()
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def emit(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")

    _report_tqdm(job["label"], emit)
    try:
        convert(Path(job["gguf"]), Path(job["out"]), job["label"], job["prompt"], emit)
    except Refused as reason:
        emit({"refused": str(reason)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
