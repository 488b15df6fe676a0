"""A decoder of 6000 weights in a GGUF file, and a user catalogue with it.

The catalogue lists the accurate dtypes, so that no command measures them, which is slow.
"""

from hashlib import sha256
from pathlib import Path

import gguf
import numpy as np

from bpe.formats import bytes_to_unicode
from tests.serve.tiny_data import SPECIAL, TEMPLATE

D_MODEL, D_FF, HEADS, KV_HEADS, HEAD_DIM, LAYERS, CONTEXT = 16, 24, 2, 1, 8, 1, 512
MODELS = """default = "tiny"

[models.tiny]
kind = "decoder"
serves = ["chat", "completions"]
publisher = "me"
licence = "MIT"
parameters = {parameters}
context = {context}
formats = ["float32"]
good_at = "tests"
sampling = {{ temperature = 0.5 }}

[[models.tiny.files]]
name = "tiny.gguf"
size = {size}
sha256 = "{sha256}"
parts = [{{ source = "pypi:nowhere==1.0!tiny.gguf", size = {size}, sha256 = "{sha256}" }}]

[aliases]
"gpt-3.5-turbo" = "tiny"
"""


def write_catalogue(home: Path) -> None:
    """Write `models.toml` and the model into a data folder, as if it had been pulled."""
    folder = home / "models" / "tiny"
    folder.mkdir(parents=True)
    parameters = write_gguf(folder / "tiny.gguf")
    content = (folder / "tiny.gguf").read_bytes()
    file_fields = {"size": len(content), "sha256": sha256(content).hexdigest()}
    text = MODELS.format(parameters=parameters, context=CONTEXT, **file_fields)
    (home / "models.toml").write_text(text, "utf-8")


def write_gguf(path: Path, architecture: str = "llama", tokenizer: str = "gpt2") -> int:
    """Write a decoder with a tokenizer of single bytes as GGUF; return the number of weights.

    Args:
        path: the file.
        architecture: "llama", or "qwen2", which has biases.
        tokenizer: "gpt2", or "llama" for a SentencePiece vocabulary with byte fallback.
    """
    writer = gguf.GGUFWriter(path, architecture)
    tokens = _add_sentencepiece(writer) if tokenizer == "llama" else _add_byte_level(writer)
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(D_FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(len(tokens))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), D_MODEL), "output_norm": (D_MODEL,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm": (D_MODEL,),
            f"blk.{i}.attn_q": (HEADS * HEAD_DIM, D_MODEL),
            f"blk.{i}.attn_k": (KV_HEADS * HEAD_DIM, D_MODEL),
            f"blk.{i}.attn_v": (KV_HEADS * HEAD_DIM, D_MODEL),
            f"blk.{i}.attn_output": (D_MODEL, HEADS * HEAD_DIM),
            f"blk.{i}.ffn_norm": (D_MODEL,),
            f"blk.{i}.ffn_gate": (D_FF, D_MODEL),
            f"blk.{i}.ffn_up": (D_FF, D_MODEL),
            f"blk.{i}.ffn_down": (D_MODEL, D_FF),
        }
    if architecture == "qwen2":
        for part, heads in {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}.items():
            bias = np.zeros(heads * HEAD_DIM, np.float32)
            writer.add_tensor(f"blk.0.attn_{part}.bias", bias)
    for name, shape in shapes.items():
        is_norm = len(shape) == 1
        array = np.ones(shape) if is_norm else random.normal(0, shape[-1] ** -0.5, shape)
        writer.add_tensor(f"{name}.weight", array.astype(np.float32 if is_norm else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(int(np.prod(shape)) for shape in shapes.values())


def _add_byte_level(writer: gguf.GGUFWriter) -> list[str]:
    """Add a vocabulary of bytes and one merge, and return its tokens."""
    characters = bytes_to_unicode()
    space = characters[ord(" ")]
    tokens = [characters[byte] for byte in range(256)]
    tokens += [f"{space}t", *SPECIAL]  # one merge: GGUF arrays must not be empty
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * len(SPECIAL))
    writer.add_token_merges([f"{space} t"])
    return tokens


def _add_sentencepiece(writer: gguf.GGUFWriter) -> list[str]:
    """Add a vocabulary in Llama 2's layout, of bytes, letters and one merge; return its tokens."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁t"]
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *letters,
        *SPECIAL,
    ]
    token_types = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2]
    token_types += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * len(letters)
    token_types += [gguf.TokenType.CONTROL] * len(SPECIAL)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)])
    writer.add_token_types(token_types)
    writer.add_bos_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)
    return tokens
