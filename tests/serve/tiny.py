"""A tiny decoder over bytes in a folder, which takes milliseconds to write and to train."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import jax

import bpe
from bpe.formats import bytes_to_unicode
from serve.api.app import create_app
from serve.api.settings import ServerSettings
from serve.models import resolve
from serve.models.registry import Registry
from serve.models.spec import LoadOptions, ModelFiles
from tests.serve.scripted import serve_app
from tests.serve.tiny_data import ANSWER, SPECIAL, TEMPLATE, examples, pairs
from transformer import checkpoint
from transformer.config import Config
from transformer.decoder import init

__all__ = ["ANSWER", "CFG", "SPECIAL", "examples", "model", "pairs", "serving"]

CFG = Config.debug(max_seq_len=512)


def model(folder: Path, seed: int = 0, cfg: Config = CFG) -> Path:
    """Write a decoder of under 50,000 weights with a byte tokenizer and a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder, init(jax.random.key(seed), cfg), cfg)
    vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    added_tokens = [
        {"id": 256 + i, "content": token, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for i, token in enumerate(SPECIAL)
    ]  # fmt: skip
    spec = {
        "version": "1.0",
        "added_tokens": added_tokens,
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


@contextmanager
def serving(home: Path, folder: Path, **settings) -> Iterator[str]:
    """Run a complete server of the model in `folder` as `tiny`, and yield its address."""
    budget = 2 * 2**20
    spec = resolve.describe(
        ModelFiles("tiny", folder, "me"),
        LoadOptions(cache_budget=budget, dtype="float32", home=home, notify=lambda line: None),
    )
    adapter_specs = resolve.AdapterSpecs(home, budget, {"tiny": folder})
    registry = Registry(
        [spec], {"curie": "tiny", "gpt-3.5-turbo": "tiny"}, adapter_specs=adapter_specs
    )
    app = create_app(ServerSettings(home=home, **settings), registry)
    with serve_app(app) as address, closing(registry), closing(app.state.job_runner):
        yield address
