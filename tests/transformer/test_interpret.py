"""Tests of interpretability: against hidden states of transformers, plots, command line."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.naming import names, naming
from tests.transformer.conftest import GOLDEN as TINY
from tests.transformer.conftest import randomize
from transformer import checkpoint, interpret, lora, plots
from transformer.config import Config
from transformer.decoder import forward, init

pytestmark = pytest.mark.heavy

GOLDEN = Path(__file__).parent.parent / "golden" / "inspect"
NAMES = ("gpt2", "llama", "qwen2")


@pytest.fixture(params=NAMES)
def tiny_model(request, tiny):
    return tiny(request.param), dict(np.load(GOLDEN / f"{request.param}.npz"))


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_attention_maps_match_transformers(tiny_model):
    model, golden = tiny_model
    maps = interpret.attention(model.params, model.cfg, golden["ids"].tolist())
    np.testing.assert_allclose(maps, golden["attention"], atol=1e-5)


def test_logit_lens_matches_hidden_states_of_transformers(tiny_model):
    model, golden = tiny_model
    size = model.cfg.vocab_size
    result = interpret.logit_lens(model.params, model.cfg, golden["ids"].tolist(), size)
    by_id = np.zeros(golden["lens"].shape, np.float32)
    np.put_along_axis(by_id, np.asarray(result.ids), np.asarray(result.logprobs), -1)
    np.testing.assert_allclose(by_id, golden["lens"], atol=1e-4)
    assert (np.diff(result.logprobs, axis=-1) <= 0).all()
    p = np.exp(golden["lens"].astype(np.float64))
    np.testing.assert_allclose(result.entropy, -(p * np.log2(p)).sum(-1), atol=1e-4)


def test_alternatives_match_last_layer_of_logit_lens(tiny_model):
    model, golden = tiny_model
    ids, logprobs = golden["ids"], golden["lens"][-1, :-1]
    result = interpret.alternatives(model.params, model.cfg, ids.tolist(), 4)
    chosen = logprobs[np.arange(11), ids[1:]]
    np.testing.assert_allclose(result.token_logprobs, chosen, atol=1e-4)
    np.testing.assert_array_equal(result.rank, (logprobs > chosen[:, None]).sum(-1))
    np.testing.assert_array_equal(result.top_ids, np.argsort(-logprobs, axis=-1)[:, :4])
    assert float(interpret.loss(model.params, model.cfg, ids.tolist())) == pytest.approx(
        -chosen.mean(), abs=1e-5
    )


def test_ablated_head_matches_transformers(tiny_model):
    model, golden = tiny_model
    ids = golden["ids"]
    effects = interpret.head_effects(model.params, model.cfg, ids.tolist())
    compute = jax.jit(forward, static_argnums=1)
    whole = -golden["lens"][-1, np.arange(11), ids[1:]].mean()
    for layer, head in np.ndindex(*effects.shape):
        without = interpret.ablate(model.params, model.cfg, [(layer, head)])
        logits, _ = compute(without, model.cfg, ids[None])
        expected = golden["without"][layer, head]
        np.testing.assert_allclose(logits[0], expected, atol=1e-4)
        loss = -np.log(softmax(expected.astype(np.float64)))[np.arange(11), ids[1:]].mean()
        assert float(effects[layer, head]) == pytest.approx(loss - whole, abs=1e-4)


def test_ablation_of_several_heads_composes():
    cfg = Config.debug()
    params = init(jax.random.key(0), cfg)
    one = interpret.ablate(interpret.ablate(params, cfg, [(0, 1)]), cfg, [(1, 3)])
    both = interpret.ablate(params, cfg, [(0, 1), (1, 3)])
    jax.tree.map(np.testing.assert_array_equal, one, both)
    jax.tree.map(np.testing.assert_array_equal, interpret.ablate(params, cfg, []), params)


def test_ablation_includes_adapter():
    """Bug: an adapter of `out` still added the output of an ablated head."""
    cfg = Config.debug()
    params = init(jax.random.key(0), cfg)
    adapter = randomize(lora.init(jax.random.key(1), cfg, rank=4, alpha=8))
    compute = jax.jit(forward, static_argnums=1)
    applied, merged = (
        compute(interpret.ablate(change(params, adapter), cfg, [(0, 2)]), cfg, np.arange(9)[None])[
            0
        ]
        for change in (lora.apply, lora.merge)
    )
    np.testing.assert_allclose(applied, merged, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "facts"),
    [
        (lambda p, c: interpret.attention(p, c, []), [1, 1024, 0]),
        (lambda p, c: interpret.alternatives(p, c, [1]), [2, 1024, 1]),
        (lambda p, c: interpret.logit_lens(p, c, [1] * 1025), [1, 1024, 1025]),
        (lambda p, c: interpret.logit_lens(p, c, [320]), ["ids", 319, 320]),
        (lambda p, c: interpret.logit_lens(p, c, [1], 0), ["k", 320, 0]),
        (lambda p, c: interpret.ablate(p, c, [(2, 0)]), ["head 0", "layer 2"]),
        (lambda p, c: interpret.ablate(p, c, [(0, -1)]), ["head -1", "layer 0"]),
    ],
)
def test_invalid_ids_or_heads_are_rejected(call, facts):
    cfg = Config.debug()
    with pytest.raises(ValueError, match=naming(*facts)):
        call(init(jax.random.key(0), cfg), cfg)


def png(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    assert path.read_bytes().startswith(b"\x89PNG")
    return imread(path)


def test_plots_show_their_data_and_reject_wrong_layer_or_labels(tiny, tmp_path):
    model = tiny("llama")
    ids = [5, 9, 9, 20, 33]
    names = ["The", " cat", " $x$\n", "é", " averylongtoken"]
    maps = np.asarray(interpret.attention(model.params, model.cfg, ids))
    plots.attention(maps, names, 0, tmp_path / "a.png")
    plots.attention(maps, names, 1, tmp_path / "b.png")
    assert not np.array_equal(png(tmp_path / "a.png"), png(tmp_path / "b.png"))
    lens = interpret.logit_lens(model.params, model.cfg, ids)
    plots.logit_lens(lens, names, [names] * 3, tmp_path / "c.png")
    top = interpret.alternatives(model.params, model.cfg, ids, 3)
    plots.alternatives(top, names, [["a", "b", "c"]] * 4, tmp_path / "d.png")
    effects = interpret.head_effects(model.params, model.cfg, ids)
    plots.head_effects(effects, tmp_path / "e.png")
    for letter in "cde":
        assert png(tmp_path / f"{letter}.png").std() > 0.05
    with pytest.raises(ValueError, match=naming("layer", 1, 2)):
        plots.attention(maps, names, 2, tmp_path / "f.png")
    with pytest.raises(ValueError, match=naming("labels", 5, 4)):
        plots.logit_lens(lens, names[1:], [names] * 3, tmp_path / "f.png")
    with pytest.raises(ValueError, match=naming(49, plots.MAX_TOKENS)):
        plots.attention(np.ones((1, 1, 49, 49)), ["x"] * 49, 0, tmp_path / "f.png")
    assert not (tmp_path / "f.png").exists()


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "transformer", *arguments],
        capture_output=True,
        text=True,
        timeout=90,
    )


def test_command_prints_logit_lens_and_plots(tmp_path):
    golden = np.load(GOLDEN / "llama.npz")
    ids = [str(id) for id in golden["ids"]]
    completed = run("lens", str(TINY / "llama"), *ids, "-o", str(tmp_path / "lens.png"))
    assert completed.returncode == 0, completed.stderr
    best = np.array([line.split() for line in completed.stdout.splitlines()], int)
    np.testing.assert_array_equal(best[:, 1:], golden["lens"].argmax(-1))
    png(tmp_path / "lens.png")
    completed = run("alternatives", str(TINY / "llama"), "1", "999")
    assert completed.returncode == 1 and completed.stderr.count("\n") == 1
    assert names(completed.stderr, "python -m transformer", "ids", 95, 999)


@pytest.mark.parity
def test_smollm2_intermediates_match_transformers(model_file):
    import torch
    import transformers

    import bpe

    path = model_file("smollm2-135m-instruct")
    params, cfg, metadata = checkpoint.load(path)
    text = "The capital of France is Paris, and 2 + 2 = 4."
    ids = bpe.from_gguf(metadata).encoding.encode(text)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, attn_implementation="eager", dtype=torch.float32
    ).eval()
    leaving = []
    model.model.layers[-1].register_forward_hook(
        lambda _, __, out: leaving.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.inference_mode():
        theirs = model(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
        stream = [*theirs.hidden_states[:-1], leaving[0].reshape(1, len(ids), -1)]
        expected = [model.lm_head(model.model.norm(x))[0].log_softmax(-1) for x in stream]
    maps = interpret.attention(params, cfg, ids)
    np.testing.assert_allclose(maps, torch.cat(theirs.attentions), atol=1e-4)
    result = interpret.logit_lens(params, cfg, ids, 20)
    best = np.take_along_axis(torch.stack(expected).numpy(), np.asarray(result.ids), -1)
    np.testing.assert_allclose(result.logprobs, best, atol=1e-4)
