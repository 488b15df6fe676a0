"""Compare the encoder families with golden files of transformers and sentence-transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.naming import naming
from tests.transformer.test_checkpoint_files import assert_same, write_safetensors
from tests.transformer.test_quantized import QUANTIZATION, quantize
from transformer import encoder, pooled_decoder
from transformer.checkpoint import bert, encoders
from transformer.encoder import Config

pytestmark = pytest.mark.heavy

GOLDEN = Path(__file__).parent.parent / "golden" / "encoder"
EMBEDDERS = (
    "roberta", "xlm-roberta", "nomic", "modernbert", "modernbert-biases", "qwen3", "gemma3",
)  # fmt: skip
CROSS_ENCODERS = ("cross-bert", "cross-roberta", "cross-modernbert")
TAPS = ("residual", "attention")


def run(params: Any, cfg: Any, ids: np.ndarray, segments: np.ndarray, types=None) -> Any:
    """Return token vectors and taps. Without jit, no program is compiled per model."""
    with jax.disable_jit():
        if isinstance(cfg, pooled_decoder.Config):
            return pooled_decoder.forward(params, cfg, ids, segments, taps=TAPS)
        return encoder.forward(params, cfg, ids, segments, types, taps=TAPS)


def check_intermediates(taps: dict[str, Any], golden: Any) -> None:
    is_token = golden["mask"] > 0
    # The last residual of transformers comes after the final norm; golden["last"] compares it.
    for ours, theirs in zip(taps["residual"][:-1], golden["residual"][:-1], strict=True):
        np.testing.assert_allclose(ours[is_token], theirs[is_token], atol=1e-4)
    for row, length in enumerate(golden["mask"].sum(1)):
        np.testing.assert_allclose(
            taps["attention"][:, row, :, :length, :length],
            golden["attention"][:, row, :, :length, :length],
            atol=1e-4,
        )


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("name", EMBEDDERS)
def test_embedder_matches_transformers_and_sentence_transformers(name: str) -> None:
    golden = np.load(GOLDEN / name / "golden.npz")
    params, cfg = encoders.load(GOLDEN / name)
    assert encoders.is_encoder(GOLDEN / name) and encoders.read_config(GOLDEN / name) == cfg
    x, taps = run(params, cfg, golden["ids"], golden["mask"])
    check_intermediates(taps, golden)
    is_token = golden["mask"] > 0
    np.testing.assert_allclose(x[is_token], golden["last"][is_token], atol=1e-4)
    vectors = encoder.pool(x, cfg, golden["mask"], 1, params.dense)[:, 0]
    assert vectors.shape == golden["vectors"].shape == (3, cfg.embedding_width)
    assert cosines(np.asarray(vectors), golden["vectors"]).min() > 0.99999
    np.testing.assert_allclose(vectors, golden["vectors"], atol=1e-4)


@pytest.mark.parametrize("name", CROSS_ENCODERS)
def test_cross_encoder_matches_transformers(name: str) -> None:
    golden = np.load(GOLDEN / name / "golden.npz")
    assert bert.is_cross_encoder(GOLDEN / name) and not encoders.is_encoder(GOLDEN / name)
    params, cfg = bert.load(GOLDEN / name)
    x, taps = run(params, cfg, golden["ids"], golden["mask"], golden["types"])
    check_intermediates(taps, golden)
    logits = encoder.score(encoder.pool(x, cfg, golden["mask"], 1)[:, 0], cfg, params.head)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)


@pytest.mark.parametrize("name", ["modernbert", "gemma3"])
def test_packed_texts_match_golden_vectors(name: str) -> None:
    """A text does not attend to other texts of its row, also with rotary positions and windows."""
    golden = np.load(GOLDEN / name / "golden.npz")
    params, cfg = encoders.load(GOLDEN / name)
    texts = [row[:n].tolist() for row, n in zip(golden["ids"], golden["mask"].sum(1), strict=True)]
    with jax.disable_jit():
        vectors = encoder.embed_all(params, cfg, texts)
    np.testing.assert_allclose(vectors, golden["vectors"], atol=1e-4)


def test_packed_pairs_match_golden_logits() -> None:
    golden = np.load(GOLDEN / "cross-bert" / "golden.npz")
    params, cfg = bert.load(GOLDEN / "cross-bert")
    lengths = golden["mask"].sum(1)
    pairs = [
        (ids[:n].tolist(), types[:n].tolist())
        for ids, types, n in zip(golden["ids"], golden["types"], lengths, strict=True)
    ]
    with jax.disable_jit():
        logits = encoder.score_all(params, cfg, pairs)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)


def test_score_all_without_head_raises_value_error() -> None:
    params, cfg = bert.load(GOLDEN / "roberta")
    with pytest.raises(ValueError):
        encoder.score_all(params, cfg, [([1, 2], [0, 0])])


# --- quantized weights and names of tensors ----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *[("cross-roberta", method) for method in QUANTIZATION],
        ("modernbert", "gptq"),  # queries, keys and values in one tensor
        ("cross-bert", "fp8"),
    ],
)
def test_quantized_folder_loads_as_its_dequantized_weights(
    name: str, method: str, tmp_path: Path
) -> None:
    """Bug: encoders in GPTQ, AWQ, compressed-tensors and FP8 were refused."""
    settings: Any = QUANTIZATION.get(method, {"quant_method": "fp8"})
    stored, expected = {}, {}
    for key, array in load_file(GOLDEN / name / "model.safetensors").items():
        stored[key] = expected[key] = array
        if "layer" not in key or array.ndim == 1:
            continue
        if method == "fp8":
            stored[key] = array.astype(jnp.float8_e4m3fn)
            stored[f"{key}_scale_inv"] = np.full((1, 1), 2, np.float32)
            expected[key] = stored[key].astype(np.float32) * 2
            continue
        parts, expected[key] = quantize(array, method, settings, 1)
        base = key.removesuffix("weight")
        stored |= {base + part: values for part, values in parts.items()}
        del stored[key]
        if f"{base}bias" not in stored and method == "gptq":  # as AutoGPTQ stores it
            stored[f"{base}bias"] = np.zeros(len(array), np.float32)
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    for folder in (packed, plain):
        shutil.copytree(GOLDEN / name, folder)
    save_file(expected, plain / "model.safetensors")
    if method == "fp8":
        write_safetensors(packed / "model.safetensors", stored)
    else:
        save_file(stored, packed / "model.safetensors")
    config = config_of(name) | {"quantization_config": settings}
    (packed / "config.json").write_text(json.dumps(config))
    params, cfg = bert.load(packed)
    assert cfg == bert.read_config(plain) == bert.read_config(packed)
    assert_same(params, bert.load(plain)[0])


def test_two_tensors_of_one_weight_are_rejected_with_their_names(tmp_path: Path) -> None:
    """Bug: the second tensor that maps to a name replaced the first."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "roberta", folder)
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.0.output.LayerNorm.weight"
    for other in (f"roberta.{name}", "encoder.layer.0.output.LayerNorm.gamma"):
        save_file(tensors | {other: tensors[name]}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=naming(folder / "model.safetensors", name, other)):
            bert.load(folder)


# --- settings of config.json ------------------------------------------------------------------


def config_of(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "change", "facts"),
    [
        ("roberta", {"hidden_act": "relu"}, ["hidden_act", "'relu'"]),
        ("roberta", {"pad_token_id": -1}, ["pad_token_id", -1]),
        ("roberta", {"pad_token_id": 41}, ["pad_token_id", "max_position_embeddings", 41, 42]),
        ("roberta", {"is_decoder": True}, ["is_decoder", True]),
        ("nomic", {"rope_parameters": {"rope_type": "yarn", "factor": 2}}, ["yarn"]),
        ("nomic", {"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
        ("nomic", {"head_dim": 4}, ["head_dim", 4]),
        ("modernbert", {"layer_types": ["full_attention"]}, ["layer_types"]),
        ("modernbert", {"hidden_activation": "relu"}, ["hidden_activation", "'relu'"]),
        ("modernbert", {"rope_parameters": {"x": {}}}, ["rope_parameters", "'x'"]),
        ("modernbert", {"local_attention": 0}, ["local_attention", 0]),
        ("modernbert", {"position_embedding_type": "sans_pos"}, ["'sans_pos'"]),
    ],
)
def test_error_names_unsupported_key(name: str, change: dict, facts: list) -> None:
    with pytest.raises(ValueError, match=naming(*facts)):
        Config.from_hf(config_of(name) | change)


NOMIC_AI = dict(  # nomic-embed-text-v1.5
    activation_function="swiglu", architectures=["NomicBertModel"], attn_pdrop=0.0, causal=False,
    dense_seq_output=True, embd_pdrop=0.0, fused_bias_fc=True, fused_dropout_add_ln=True,
    initializer_range=0.02, layer_norm_epsilon=1e-12, max_trained_positions=2048,
    mlp_fc1_bias=False, mlp_fc2_bias=False, model_type="nomic_bert", n_embd=16, n_head=2,
    n_inner=24, n_layer=2, n_positions=40, pad_vocab_size_multiple=64, parallel_block=False,
    parallel_block_tied_norm=False, prenorm=False, qkv_proj_bias=False,
    reorder_and_upcast_attn=False, resid_pdrop=0.0, rotary_emb_base=1000, rotary_emb_fraction=1.0,
    rotary_emb_interleaved=False, rotary_emb_scale_base=None, rotary_scaling_factor=None,
    scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True, summary_activation=None,
    type_vocab_size=2, use_cache=True, use_flash_attn=True, use_rms_norm=False, use_xentropy=True,
    vocab_size=64,
)  # fmt: skip
MODERNBERT_4_48 = dict(  # answerdotai/ModernBERT-base, with the keys of its first version
    architectures=["ModernBertForMaskedLM"], attention_bias=False, attention_dropout=0.0,
    bos_token_id=1, classifier_activation="gelu", classifier_bias=False, classifier_dropout=0.0,
    classifier_pooling="mean", cls_token_id=1, decoder_bias=True, deterministic_flash_attn=False,
    embedding_dropout=0.0, eos_token_id=2, global_attn_every_n_layers=3,
    global_rope_theta=160000.0, gradient_checkpointing=False, hidden_activation="gelu",
    hidden_size=16, initializer_cutoff_factor=2.0, initializer_range=0.02, intermediate_size=24,
    layer_norm_eps=1e-5, local_attention=6, local_rope_theta=10000.0, max_position_embeddings=40,
    mlp_bias=False, mlp_dropout=0.0, model_type="modernbert", norm_bias=False, norm_eps=1e-5,
    num_attention_heads=2, num_hidden_layers=4, pad_token_id=0,
    position_embedding_type="absolute", reference_compile=None, sep_token_id=2,
    sparse_pred_ignore_index=-100, sparse_prediction=False, vocab_size=64,
)  # fmt: skip


def test_config_json_of_older_versions_gives_equal_config() -> None:
    assert Config.from_hf(NOMIC_AI) == Config.from_hf(config_of("nomic"))
    assert Config.from_hf(MODERNBERT_4_48) == Config.from_hf(config_of("modernbert"))
    cfg = Config.from_hf(MODERNBERT_4_48)
    assert [cfg.window(i) for i in range(4)] == [None, 3, 3, None]
    assert (cfg.rope_theta, cfg.local_rope_theta) == (160_000.0, 10_000.0)


@pytest.mark.parametrize("key", ["prenorm", "causal", "qkv_proj_bias", "use_rms_norm"])
def test_nomic_option_that_changes_the_forward_pass_is_rejected(key: str) -> None:
    with pytest.raises(ValueError, match=naming(key)):
        Config.from_hf(NOMIC_AI | {key: True})


def test_mixture_of_experts_of_nomic_is_rejected() -> None:
    with pytest.raises(ValueError, match=naming("moe_every_n_layers", 2)):
        Config.from_hf(NOMIC_AI | {"moe_every_n_layers": 2})


def test_positions_of_roberta_begin_after_padding() -> None:
    cfg = Config.from_hf(config_of("roberta"))
    assert (cfg.position_offset, cfg.max_seq_len, cfg.max_tokens) == (2, 40, 40)


# --- modules of sentence-transformers ---------------------------------------------------------


def copied(name: str, into: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / name, into / name))


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_module_in_wrong_order_or_unknown_is_rejected(tmp_path: Path) -> None:
    folder = copied("gemma3", tmp_path)
    path = folder / "modules.json"
    steps = json.loads(path.read_text())
    for change in (
        steps[:1],
        [steps[0], steps[2]],
        [*steps[:2], steps[4], steps[2]],
        [*steps[:2], steps[2] | {"type": "sentence_transformers.models.LayerNorm"}],
        [steps[0] | {"type": "sentence_transformers.models.StaticEmbedding"}, steps[1]],
    ):
        path.write_text(json.dumps(change))
        last = change[-1]["type"].rpartition(".")[2]
        with pytest.raises(ValueError, match=naming(path, f"'{last}'")):
            encoders.read_config(folder)
    for outside in ("../1_Pooling", "/1_Pooling"):
        path.write_text(json.dumps([steps[0], steps[1] | {"path": outside}]))
        with pytest.raises(ValueError, match=naming(path, outside)):
            encoders.read_config(folder)
    path.write_text(json.dumps([*steps[:2], {"type": "x.Dropout", "path": "5"}]))
    assert encoders.read_config(folder).embedding_width == 16  # dropout changes nothing


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"activation_function": "torch.nn.modules.activation.Mish"}, ["Mish"]),
        ({"activation_function": 3}, ["activation_function", 3]),
        ({"in_features": 15}, ["in_features", 15, 16]),
        ({"out_features": 0}, ["out_features", 0]),
        ({"use_residual": True}, ["use_residual", True]),
        ({"module_input_name": "token_embeddings"}, ["module_input_name", "'token_embeddings'"]),
    ],
)
def test_unsupported_dense_layer_is_rejected(tmp_path: Path, change: dict, facts: list) -> None:
    folder = copied("gemma3", tmp_path)
    edited(folder / "2_Dense" / "config.json", **change)
    with pytest.raises(ValueError, match=naming(*facts)):
        encoders.read_config(folder)


@pytest.mark.parametrize("name", ["gemma3", "roberta"])
def test_error_names_missing_or_misshapen_dense_tensor(tmp_path: Path, name: str) -> None:
    folder = copied(name, tmp_path)
    path = folder / "2_Dense" / "model.safetensors"
    content = load_file(path)
    save_file({**content, "linear.weight": content["linear.weight"].T.copy()}, path)
    with pytest.raises(ValueError, match=naming("dense.0.weight")):
        encoders.load(folder)
    save_file({"x": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match=naming("dense.0")):
        encoders.load(folder)


def test_prompts_and_lower_case_are_read(tmp_path: Path) -> None:
    folder = copied("roberta", tmp_path)
    path = folder / "config_sentence_transformers.json"
    path.write_text(
        '{"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}'
    )
    edited(folder / "sentence_bert_config.json", do_lower_case=True, max_seq_length=30)
    settings = encoders.read_settings(folder)
    assert settings.prompts == {"query": "query: ", "document": ""}
    assert (settings.default_prompt, settings.lowercase) == ("query: ", True)
    assert encoders.read_config(folder).max_tokens == 30
    edited(folder / "sentence_bert_config.json", max_seq_length=4000)
    assert encoders.read_config(folder).max_tokens == 40  # the positions
    edited(path, default_prompt_name="passage")
    with pytest.raises(ValueError, match=naming(path, "'passage'")):
        encoders.read_settings(folder)
    edited(path, default_prompt_name=None)
    edited(folder / "1_Pooling" / "config.json", include_prompt=False)
    with pytest.raises(ValueError, match=naming("include_prompt")):
        encoders.read_config(folder)


def test_transformer_in_subfolder_is_loaded(tmp_path: Path) -> None:
    """Folders of the first versions have the transformer in 0_Transformer."""
    folder = copied("modernbert", tmp_path)
    (folder / "0_Transformer").mkdir()
    for name in ("config.json", "model.safetensors", "sentence_bert_config.json"):
        (folder / name).rename(folder / "0_Transformer" / name)
    path = folder / "modules.json"
    steps = json.loads(path.read_text())
    path.write_text(json.dumps([steps[0] | {"path": "0_Transformer"}, *steps[1:]]))
    assert encoders.read_config(folder) == encoders.read_config(GOLDEN / "modernbert")
    assert encoders.read_settings(folder).folder == folder / "0_Transformer"


def test_unsupported_cross_encoder_is_rejected(tmp_path: Path) -> None:
    folder = copied("cross-modernbert", tmp_path)
    edited(folder / "config.json", classifier_activation="tanh")
    with pytest.raises(ValueError, match=naming("classifier_activation", "'tanh'")):
        bert.read_config(folder)
    folder = copied("nomic", tmp_path)
    (folder / "modules.json").unlink()
    edited(folder / "config.json", architectures=["NomicBertForSequenceClassification"])
    with pytest.raises(ValueError, match=naming("'nomic_bert'")):
        bert.read_config(folder)
