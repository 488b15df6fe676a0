"""A whole model in a folder that takes milliseconds to make and to train: bytes in, bytes out."""

import json
from pathlib import Path

import jax

import bpe
from bpe.formats import byte_characters
from tests.serve.scripted import TEMPLATE
from transformer import checkpoint
from transformer.config import Config
from transformer.decoder import init

CFG = Config.debug(max_seq_len=512)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def model(folder: Path, seed: int = 0) -> Path:
    """Writes a decoder under 50,000 weights with a tokenizer of single bytes and a template."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder, init(jax.random.key(seed), CFG), CFG)
    vocab = {character: byte for byte, character in byte_characters().items()}
    added = [
        {"id": 256 + i, "content": token, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for i, token in enumerate(SPECIAL)
    ]  # fmt: skip
    spec = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert bpe.load(folder).encoding.n_vocab == 259
    return folder
