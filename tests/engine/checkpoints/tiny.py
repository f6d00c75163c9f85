"""Tiny models in each form that a user may name, and a Hugging Face Hub of two pages on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADS, KV_HEADS, HEAD_SIZE, HIDDEN, INNER, LAYERS = 4, 2, 8, 32, 64, 2
LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Recorder:
    """A Progress that remembers, and calls `on_begin` with each label."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.notes: list[str] = []
        self.updates: list[tuple[str, int]] = []
        self.on_begin: Callable[[str], None] = lambda label: None

    def begin(self, label: str, total: int | None = None, unit: str = "steps") -> None:
        self.labels.append(label)
        self.on_begin(label)

    def update(self, done: int, total: int | None = None) -> None:
        self.updates.append((self.labels[-1], done))

    def note(self, text: str) -> None:
        self.notes.append(text)


def byte_alphabet() -> list[str]:
    """GPT-2's spelling of the 256 bytes: printable Latin-1 as itself, the others from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


VOCABULARY = [*SPECIAL, *byte_alphabet(), "ĊĊ"]


def tensors() -> dict[str, np.ndarray]:
    """A random tied Llama under its Hugging Face names, float32."""
    random = np.random.default_rng(0)
    sizes = {
        "self_attn.q_proj": (HEADS * HEAD_SIZE, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_SIZE, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_SIZE, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_SIZE),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    named = {f"model.layers.{i}.{name}.weight": size for i in range(LAYERS) for name, size in sizes.items()}
    named |= {"model.embed_tokens.weight": (len(VOCABULARY), HIDDEN), "model.norm.weight": (HIDDEN,)}
    return {name: random.standard_normal(size, dtype=np.float32) for name, size in named.items()}


def rope_factors() -> np.ndarray:
    """Llama 3.1's scaling of each frequency for a head of 8 at theta 500,000, by the published rule."""
    turn = 2 * np.pi * 500_000.0 ** (np.arange(HEAD_SIZE // 2) / (HEAD_SIZE // 2))  # wavelengths
    low, high, base, factor = 1.0, 4.0, 8192, 8.0
    smooth = np.clip((base / turn - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp pairs neighbouring rows of a head for rope where Hugging Face pairs the halves."""
    return weight.reshape(heads, 2, HEAD_SIZE // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _gguf_name(name: str) -> str:
    table = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers.": "blk.",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for theirs, ours in sorted(table.items(), key=lambda pair: -len(pair[0])):
        name = name.replace(theirs, ours)
    return name


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    rope_scaling: str | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """`tensors()` as a GGUF file; `extra` adds tensors that no Llama has."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(131072)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_rope_freq_base(500_000.0)
    if rope_scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope_scaling))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(VOCABULARY) - len(SPECIAL)))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for name, weight in tensors().items():
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
        writer.add_tensor(_gguf_name(name), weight if heads is None else _interleave(weight, heads))
    for name, weight in (extra or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_folder(folder: Path) -> Path:
    """The least that passes for a Hugging Face model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"weight": np.zeros((4, 4), np.float32)}, folder / "model.safetensors")
    return folder


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """What the Hub serves: owner/name to its files. `refusals` answers with (status, X-Error-Code) instead."""

    endpoint: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    served: list[str] = field(default_factory=list)

    def publish(self, repo: str, folder: Path) -> None:
        self.repositories[repo] = {file.name: file.read_bytes() for file in folder.iterdir()}


class HubHandler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._respond(body=False)

    def do_GET(self) -> None:
        self._respond(body=True)

    def _respond(self, *, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").removeprefix("api/models/").split("/")
        repo, action, target = "/".join(parts[:2]), parts[2], "/".join(parts[3:])
        files = self.hub.repositories.get(repo)
        if repo in self.hub.refusals:
            return self._refuse(*self.hub.refusals[repo])
        if files is None:
            return self._refuse(404, "RepoNotFound")
        revision = target.split("/")[0]
        if revision not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        if action == "revision":
            return self._json({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        if action == "tree":
            listing = [{"type": "file", "path": n, "size": len(d), "oid": _etag(d)} for n, d in files.items()]
            return self._json(listing)
        name = target.removeprefix(revision).strip("/")
        if name not in files:
            return self._refuse(404, "EntryNotFound")
        if body:
            self.hub.served.append(name)
        return self._send(files[name], "application/octet-stream", body=body)

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), "application/json", body=True)

    def _send(self, data: bytes, kind: str, *, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{_etag(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
