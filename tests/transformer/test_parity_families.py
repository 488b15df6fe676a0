"""Every family beside transformers itself, on sequences longer than the golden files hold."""

import dataclasses
from functools import cache as once

import jax
import numpy as np
import pytest

from tests.transformer.conftest import TINY
from tests.transformer.parts import check_parts
from transformer import cache, checkpoint, decoder, rope

pytestmark = pytest.mark.parity
LENGTH = 352  # beyond the first block of the cache, every window, and every context before scaling
WINDOW = 60  # at the end the first block lies behind it


@once
def reference(name):
    """A random model of this family by transformers, like the golden ones, and ids for it."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.golden.transformer import make_tiny

    config = make_tiny.CONFIGS[name]
    if name == "gpt2":
        config.n_positions = 512
    elif getattr(config, "sliding_window", None) is not None:
        config.sliding_window = WINDOW
    torch.manual_seed(1)
    return make_tiny.random_model(config), torch.randint(config.vocab_size, (1, LENGTH))


@pytest.fixture(params=TINY)
def both(request, tmp_path):
    """(our weights and config, their model, ids, what theirs computes)."""
    import torch

    model, ids = reference(request.param)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    params, cfg, _ = checkpoint.load(tmp_path)
    with torch.inference_mode():
        return (params, cfg), model, ids, model(ids).logits.numpy()


def test_the_whole_without_a_cache(both):
    (params, cfg), _, ids, expected = both
    logits, _ = decoder.forward(params, cfg, ids.numpy())
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_the_whole_with_a_cache(both):
    """A prompt in chunks, then token by token over the edge of a block and out of the window."""
    (params, cfg), _, ids, expected = both
    extend = jax.jit(decoder.extend, static_argnums=1, donate_argnums=2)
    memory, tables, ids = cache.init(cfg, 2), np.array([[1, 2]]), ids.numpy()
    sizes = [64, 64, 64, *[1] * (LENGTH - 192)]
    for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        chunk = ids[:, start : start + size]
        x, memory = extend(params, cfg, memory, chunk, tables, np.array([start]))
        logits = decoder.unembed(params, cfg, x)
        np.testing.assert_allclose(logits, expected[:, start : start + size], rtol=0, atol=1e-4)


def test_every_part(both):
    from tests.golden.transformer.make_tiny import intermediates

    (params, cfg), model, ids, _ = both
    check_parts(params, cfg, {"ids": ids.numpy(), **intermediates(model, ids)})


def test_what_we_save_opens_in_transformers_bit_by_bit(both, tmp_path):
    import torch
    import transformers

    (params, cfg), model, ids, expected = both
    checkpoint.save(tmp_path / "ours", params, cfg)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    theirs, ours = model.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    with torch.inference_mode():
        np.testing.assert_array_equal(again.eval()(ids).logits.numpy(), expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma3"])
def test_rotary_frequencies_and_angles(name, tmp_path):
    """Scaled by Llama 3's rule, not at all, by YaRN, and linearly; local layers never."""
    import torch

    model, _ = reference(name)
    model.save_pretrained(tmp_path)
    _, cfg, _ = checkpoint.load(tmp_path)
    module, far = model.model.rotary_emb, torch.arange(LENGTH)[None]
    if name != "gemma3":
        pairs = [(module.inv_freq, module(torch.zeros(1), far), cfg)]
    else:
        local = dataclasses.replace(cfg, rope_theta=cfg.local_rope_theta, rope_scaling=None)
        pairs = [
            (getattr(module, f"{kind}_inv_freq"), module(torch.zeros(1), far, kind), own)
            for kind, own in (("full_attention", cfg), ("sliding_attention", local))
        ]
    for frequency, turned, own in pairs:
        found = rope.frequencies(own.head_dim, own.rope_theta, own.rope_scaling)
        np.testing.assert_allclose(found, frequency, rtol=1e-6)
        angles = rope.angles(far.numpy(), own.head_dim, own.rope_theta, own.rope_scaling)
        for ours, theirs in zip(angles, turned, strict=True):
            half = theirs[..., : own.head_dim // 2]
            np.testing.assert_allclose(ours[:, :, 0], half, rtol=0, atol=1e-4)
