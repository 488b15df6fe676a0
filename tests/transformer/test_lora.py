"""Tests of adapters: against PEFT, file round trips, merging, and invalid files."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.naming import naming
from tests.transformer.conftest import GOLDEN, randomize
from transformer import decoder, generate, lora
from transformer.config import Config
from transformer.layers import quantize
from transformer.weights import Linear

pytestmark = pytest.mark.heavy

FAMILIES = ("llama", "gpt2", "gemma3")
FOLDER = GOLDEN / "lora"
forward = jax.jit(decoder.forward, static_argnums=1)


def random_adapter(cfg: Config, **kwargs) -> lora.Adapter:
    return randomize(lora.init(jax.random.key(1), cfg, **dict(rank=4, alpha=6) | kwargs))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_match_peft(tiny, name):
    params, cfg, _ = tiny(name)
    golden = np.load(FOLDER / name / "golden.npz")
    adapter = lora.load(FOLDER / name, cfg)
    for changed in (lora.apply(params, adapter), lora.merge(params, adapter)):
        logits, _ = forward(changed, cfg, golden["ids"])
        np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)
    plain, _ = forward(params, cfg, golden["ids"])
    assert np.abs(plain - golden["logits"]).max() > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_save_then_load_is_bitwise_equal(tiny, tmp_path, name):
    _, cfg, _ = tiny(name)
    adapter = lora.load(FOLDER / name, cfg)
    lora.save(tmp_path, adapter, cfg, base_model=name)
    reloaded = lora.load(tmp_path, cfg)
    assert jax.tree.structure(reloaded) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, reloaded, adapter)
    theirs = load_file(FOLDER / name / "adapter_model.safetensors")
    ours = load_file(tmp_path / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key])


def test_initial_adapter_does_not_change_logits_and_has_gradient():
    cfg = Config.debug()
    params = randomize(decoder.init(jax.random.key(0), cfg))
    adapter = lora.init(jax.random.key(1), cfg, rank=4, alpha=8)
    ids = np.arange(12)[None]
    before, _ = forward(params, cfg, ids)
    np.testing.assert_array_equal(forward(lora.apply(params, adapter), cfg, ids)[0], before)

    def loss(adapter):
        return decoder.forward(lora.apply(params, adapter), cfg, ids)[0].sum()

    gradients = jax.grad(loss)(adapter)
    assert len(gradients) == 2 and set(gradients[0]) == set(lora.TARGET_MODULES)
    for loras in gradients:  # only B has a gradient at first, because it is zero
        assert all(np.abs(part.b).max() > 0 and not part.a.any() for part in loras.values())


def test_absent_target_modules_are_ignored():
    cfg = Config.debug(mlp="gelu")
    (first, _) = lora.init(jax.random.key(0), cfg, rank=1, alpha=1, target_modules=("gate", "up"))
    assert set(first) == {"up"}


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_adapter_on_bfloat16_or_int8_weights_is_close_to_float32(dtype):
    cfg = Config.debug()
    params = randomize(decoder.init(jax.random.key(0), cfg))
    adapter = random_adapter(cfg)

    def narrow(p):
        return p.replace(weight=p.weight.astype(jnp.bfloat16)) if dtype != "int8" else quantize(p)

    def is_linear(node):
        return isinstance(node, Linear)

    small = jax.tree.map(lambda p: narrow(p) if is_linear(p) else p, params, is_leaf=is_linear)
    ids = np.arange(12)[None]
    actual, _ = forward(lora.apply(small, adapter), cfg, ids)
    expected, _ = forward(lora.apply(params, adapter), cfg, ids)
    plain, _ = forward(params, cfg, ids)
    assert np.abs(actual - expected).max() < 0.15 * np.abs(plain - expected).max()
    if dtype == "int8":
        with pytest.raises(ValueError, match=naming("int8")):
            lora.merge(small, adapter)


def test_generation_with_applied_adapter_matches_merged():
    cfg = Config.debug()
    params = randomize(decoder.init(jax.random.key(0), cfg))
    adapter = random_adapter(cfg)
    applied = generate.generate(lora.apply(params, adapter), cfg, [1, 2, 3], max_new_tokens=8)
    merged = generate.generate(lora.merge(params, adapter), cfg, [1, 2, 3], max_new_tokens=8)
    assert list(applied) == list(merged)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"frobnicate": 1}, ["'frobnicate'"]),
        ({"peft_type": "IA3"}, ["peft_type", "'LORA'", "'IA3'"]),
        ({"use_dora": True}, ["use_dora", True]),
        ({"bias": "all"}, ["bias", "'none'", "'all'"]),
        ({"rank_pattern": {"q_proj": 2}}, ["rank_pattern", "{'q_proj': 2}"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights", "'pissa'"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save", "['lm_head']"]),
        ({"r": 0}, ["r", 0]),
        ({"r": 5}, ["lora_B.weight", "(48, 5)", "(48, 4)"]),
        ({"lora_alpha": "6"}, ["lora_alpha", "'6'"]),
        ({"r": None}, ["r", None]),
    ],
    ids=str,
)
def test_unsupported_adapter_config_is_rejected(tiny, tmp_path, change, facts):
    shutil.copytree(FOLDER / "llama", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=naming(tmp_path / "a", *facts)):
        lora.load(tmp_path / "a", tiny("llama").cfg)


def test_invalid_adapter_file_is_rejected(tiny, tmp_path):
    cfg, folder = tiny("llama").cfg, tmp_path / "a"
    shutil.copytree(FOLDER / "llama", folder)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = next(name for name in tensors if "layers.1" in name)
    save_file({name: array for name, array in tensors.items() if name != first}, weights)
    with pytest.raises(ValueError, match=naming(folder, first)):
        lora.load(folder, cfg)
    save_file(tensors | {"extra": np.zeros(3, "f4")}, weights)
    with pytest.raises(ValueError, match=naming(folder, "extra")):
        lora.load(folder, cfg)
    with pytest.raises(ValueError, match=naming(FOLDER / "llama", "layers.1")):
        lora.load(FOLDER / "llama", Config(**vars(cfg) | {"num_layers": 1}))
    weights.write_bytes((FOLDER / "llama" / weights.name).read_bytes()[:2000])
    with pytest.raises(ValueError, match=naming(weights)):
        lora.load(folder, cfg)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        lora.load(folder, cfg)


def test_save_of_unsupported_adapter_raises(tiny, tmp_path):
    cfg = tiny("gpt2").cfg
    for parts in (lora.TARGET_MODULES, ("q",)):
        with pytest.raises(ValueError, match=naming("c_attn.weight", "q", "k", "v")):
            lora.save(tmp_path, random_adapter(cfg, target_modules=parts), cfg)
    cfg = tiny("llama").cfg
    first, second = random_adapter(cfg)[0], random_adapter(cfg, rank=2)[1]
    with pytest.raises(ValueError, match=naming("rank", 2, 4)):
        lora.save(tmp_path, (first, second), cfg)


@pytest.mark.parametrize(
    ("kwargs", "facts"),
    [({"rank": 0}, ["rank", 0]), ({"target_modules": ("q", "x")}, ["target_modules", "'x'"])],
)
def test_init_with_invalid_argument_raises(kwargs, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        random_adapter(Config.debug(), **kwargs)


@pytest.mark.parity
@pytest.mark.parametrize("parts", [lora.TARGET_MODULES, ("q", "down")], ids=["all", "some"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma3"])
def test_saved_adapter_gives_same_logits_in_peft(tiny, tmp_path, name, parts):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    params, cfg, golden = tiny(name)
    adapter = random_adapter(cfg, rank=3, target_modules=parts)
    lora.save(tmp_path, adapter, cfg, base_model=str(GOLDEN / name))
    base = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.inference_mode():
        expected = model(torch.tensor(golden["ids"].astype(np.int64))).logits.numpy()
    logits, _ = forward(lora.apply(params, adapter), cfg, golden["ids"])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    assert np.abs(logits - golden["logits"]).max() > 0.1
