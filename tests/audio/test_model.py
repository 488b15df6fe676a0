"""The Whisper model and its checkpoints: cached decoding, shared rows, taps, configs, saving."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from audio import checkpoint, model
from audio.config import Config
from tests.naming import naming

pytestmark = pytest.mark.heavy

CFG = Config.debug()


@pytest.fixture(scope="module")
def params() -> model.Params:
    rng = np.random.default_rng(0)
    initial = model.init(jax.random.key(0), CFG)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), initial)


@pytest.fixture(scope="module")
def audio_features(params) -> jax.Array:
    mel = np.random.default_rng(1).normal(size=(2, CFG.num_frames, CFG.num_mels))
    return model.encode(params, CFG, mel.astype(np.float32))[0]


IDS = np.random.default_rng(2).integers(0, CFG.vocab_size, (2, 12)).astype(np.int32)


def test_debug_config_has_under_50_000_weights():
    params = model.init(jax.random.key(0), CFG)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) < 50_000


def test_cached_decoding_equals_full_forward(params, audio_features):
    expected, _ = model.forward(params, CFG, audio_features, IDS)
    cache = model.init_cache(params, CFG, audio_features, size=8)
    for i in range(IDS.shape[1]):
        if i == cache.size:
            cache = model.grow_cache(cache, 16)
        logits, cache, _ = model.forward_cached(
            params, CFG, IDS[:, i : i + 1], cache, np.int32(i), np.zeros(1, np.int32)
        )
        np.testing.assert_allclose(logits[:, 0], expected[:, i], atol=1e-4)


def test_padding_after_the_text_is_masked(params, audio_features):
    at = np.array([2, 4], np.int32)
    cache = model.init_cache(params, CFG, audio_features, size=16)
    logits, cache, _ = model.forward_cached(
        params, CFG, IDS, cache, np.int32(0), at
    )  # 5 of 12 count
    expected, _ = model.forward(params, CFG, audio_features, IDS)
    np.testing.assert_allclose(logits, expected[:, at], atol=1e-4)
    logits, _, _ = model.forward_cached(
        params, CFG, IDS[:, 5:6], cache, np.int32(5), np.zeros(1, np.int32)
    )
    np.testing.assert_allclose(logits[:, 0], expected[:, 5], atol=1e-4)


def test_rows_that_share_audio_equal_separate_rows(params, audio_features):
    texts = np.concatenate([IDS, IDS[::-1]])[
        [0, 3, 1, 2]
    ]  # rows 0, 1 share window 0; 2, 3 window 1
    cache = model.init_cache(params, CFG, audio_features, size=12, rows_per_audio=2)
    positions = np.arange(12)
    logits, _, _ = model.forward_cached(params, CFG, texts, cache, np.int32(0), positions)
    separate, _ = model.forward(params, CFG, audio_features[np.array([0, 0, 1, 1])], texts)
    np.testing.assert_allclose(logits, separate, atol=1e-4)


def test_reorder_cache_returns_the_selected_rows(params, audio_features):
    cache = model.init_cache(params, CFG, audio_features, size=8, rows_per_audio=2)
    ids = np.arange(4, dtype=np.int32)[:, None]
    _, cache, _ = model.forward_cached(params, CFG, ids, cache, np.int32(0), np.zeros(1, np.int32))
    reordered = model.reorder_cache(cache, np.array([1, 1, 2, 2]))
    for i, row in enumerate([1, 1, 2, 2]):
        np.testing.assert_array_equal(reordered.keys[0][i], cache.keys[0][row])


def test_encoder_is_bidirectional_and_decoder_causal(params, audio_features):
    mel = np.zeros((1, CFG.num_frames, CFG.num_mels), np.float32)
    late = mel.copy()
    late[0, -1] = 1
    a, b = (model.encode(params, CFG, x)[0] for x in (mel, late))
    assert np.abs(a[0, 0] - b[0, 0]).max() > 1e-5
    other = IDS.copy()
    other[:, -1] += 1
    a, b = (
        model.forward(params, CFG, audio_features, ids)[0] for ids in (IDS, other % CFG.vocab_size)
    )
    np.testing.assert_allclose(a[:, :-1], b[:, :-1], atol=1e-5)


def test_taps_return_the_named_intermediates(params, audio_features):
    mel = np.ones((1, CFG.num_frames, CFG.num_mels), np.float32)
    out, tapped = model.encode(params, CFG, mel, taps=("residual", "attention"))
    assert tapped["residual"].shape == (3, 1, 50, 24)
    assert tapped["attention"].shape == (2, 1, 4, 50, 50)
    np.testing.assert_allclose(tapped["attention"].sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(out, model.encode(params, CFG, mel)[0], atol=1e-5)
    cfg = dataclasses.replace(CFG, alignment_heads=((1, 3), (0, 2)))
    _, tapped = model.forward(params, cfg, audio_features, IDS, taps=("alignment",))
    _, layer_heads = model.forward(
        params, CFG, audio_features, IDS, taps=("alignment",)
    )  # all of layer 1
    assert tapped["alignment"].shape == (2, 2, 12, 50)
    np.testing.assert_allclose(tapped["alignment"][:, 0], layer_heads["alignment"][:, 3], atol=1e-6)
    with pytest.raises(ValueError, match="taps"):
        model.encode(params, CFG, mel, taps=("logits",))


def test_encode_with_wrong_mel_shape_raises(params):
    with pytest.raises(ValueError, match=r"\[B, 100, 8\]"):
        model.encode(params, CFG, np.zeros((1, 99, 8), np.float32))


def test_changed_config_size_changes_parameter_shapes():
    for field in ("num_audio_layers", "num_text_layers", "d_ff", "vocab_size", "num_mels"):
        other = dataclasses.replace(CFG, **{field: getattr(CFG, field) + 1})
        shapes = [x.shape for x in jax.tree.leaves(model.abstract(other))]
        assert shapes != [x.shape for x in jax.tree.leaves(model.abstract(CFG))], field


def test_config_round_trips_and_error_names_wrong_field():
    assert Config.from_hf(CFG.to_hf()) == CFG
    tiny = Config.of_size("tiny.en", alignment_heads=((1, 0),))
    assert Config.from_hf(tiny.to_hf()) == tiny
    assert Config.of_size("large-v3-turbo").num_mels == 128
    with pytest.raises(ValueError, match=naming("size", "'huge'", "large-v3-turbo")):
        Config.of_size("huge")
    with pytest.raises(ValueError, match=naming("activation_function", "'gelu'", "'relu'")):
        Config.from_hf({**CFG.to_hf(), "activation_function": "relu"})
    with pytest.raises(ValueError, match=naming("alignment_heads", (2, 0))):
        Config.debug(alignment_heads=((2, 0),))
    with pytest.raises(ValueError, match=naming("num_heads", 0)):
        Config.debug(num_heads=0)


WHISPER_TINY = dict(
    _name_or_path="openai/whisper-tiny", activation_dropout=0.0, activation_function="gelu",
    apply_spec_augment=False, architectures=["WhisperForConditionalGeneration"],
    attention_dropout=0.0, begin_suppress_tokens=[220, 50257], bos_token_id=50257, d_model=384,
    decoder_attention_heads=6, decoder_ffn_dim=1536, decoder_layerdrop=0.0, decoder_layers=4,
    decoder_start_token_id=50258, dropout=0.0, encoder_attention_heads=6, encoder_ffn_dim=1536,
    encoder_layerdrop=0.0, encoder_layers=4, eos_token_id=50257, init_std=0.02, max_length=448,
    forced_decoder_ids=[[1, 50259], [2, 50359], [3, 50363]], is_encoder_decoder=True,
    max_source_positions=1500, max_target_positions=448, model_type="whisper", num_hidden_layers=4,
    num_mel_bins=80, pad_token_id=50257, scale_embedding=False, suppress_tokens=[1, 2, 7],
    transformers_version="4.27.0.dev0", use_cache=True, vocab_size=51865,
)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(torch_dtype="float32", use_weighted_layer_sum=False, median_filter_width=7),
        dict(suppress_tokens=[], forced_decoder_ids=None, _attn_implementation_autoset=True),
        dict(unsloth_fixed=True, quantization_config=None, tie_word_embeddings=None),
        dict(is_decoder=False, add_cross_attention=False, layer_types=None, dtype="bfloat16"),
    ],
)
def test_config_with_null_or_neutral_keys_is_accepted(change):
    """Bug: a config.json with null keys or keys without an effect was refused."""
    assert Config.from_hf(WHISPER_TINY | change) == Config.of_size("tiny")


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "relu"},
        {"scale_embedding": True},
        {"tie_word_embeddings": False},
        {"decoder_ffn_dim": 7},
        {"position_embedding_type": "alibi"},
        {"final_logit_softcapping": 30.0},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"alignment_heads": [1]},
    ],
)
def test_config_with_unsupported_value_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Config.from_hf(WHISPER_TINY | change)


def test_copy_of_tied_embedding_is_accepted_if_equal(params, tmp_path):
    checkpoint.save(tmp_path, params, CFG)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.decoder.embed_tokens.weight"]
    save_file(tensors | {"proj_out.weight": embedding.copy()}, path)
    loaded, _ = checkpoint.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    save_file(tensors | {"proj_out.weight": embedding + 1}, path)
    with pytest.raises(ValueError, match="proj_out.weight"):
        checkpoint.load(tmp_path)


def test_saved_checkpoint_loads_equal_in_every_dtype(params, tmp_path):
    checkpoint.save(tmp_path, params, CFG)
    loaded, cfg = checkpoint.load(tmp_path)
    assert cfg == CFG
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    quantized, _ = checkpoint.load(tmp_path, dtype="int8")
    assert quantized.decoder.layers[0].attn.q.weight.dtype == np.int8
    assert quantized.decoder.layers[0].cross_attn.k.weight.dtype == jax.numpy.bfloat16
    assert quantized.encoder.layers[0].attn.q.weight.dtype == jax.numpy.bfloat16
    with pytest.raises(ValueError, match="int8"):
        checkpoint.save(tmp_path, quantized, cfg)


def test_error_names_missing_or_unknown_tensor(params, tmp_path):
    from transformer.checkpoint import safetensors

    checkpoint.save(tmp_path, params, CFG)
    _, tensors = safetensors.read(tmp_path)
    arrays = {name: np.array(tensor.read(0, tensor.shape[0])) for name, tensor in tensors.items()}
    bias = arrays.pop("model.encoder.conv1.bias")
    safetensors.write(tmp_path, CFG.to_hf(), arrays)
    with pytest.raises(ValueError, match=naming(tmp_path, "model.encoder.conv1.bias")):
        checkpoint.load(tmp_path)
    safetensors.write(
        tmp_path, CFG.to_hf(), {**arrays, "model.encoder.conv1.bias": bias, "extra": bias}
    )
    with pytest.raises(ValueError, match=naming(tmp_path, "extra")):
        checkpoint.load(tmp_path)
