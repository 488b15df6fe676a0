"""Compare the encoder with transformers and sentence-transformers, also for packed rows."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bpe
from tests.naming import naming
from tests.transformer.conftest import INVALID_VALUES, randomize
from transformer import encoder, packing
from transformer.checkpoint import bert
from transformer.encoder import Config, HeadConfig
from transformer.pooling import Dense

pytestmark = pytest.mark.heavy

GOLDEN = Path(__file__).parent.parent / "golden" / "encoder"
POOLINGS = ("mean", "cls")
CFG = Config.debug()


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def folder(pooling: str, into: Path) -> Path:
    """Return a copy of a tiny encoder, which a test can change."""
    for file in (GOLDEN / pooling).rglob("*"):
        if file.is_file() and file.name != "golden.npz":
            target = into / file.relative_to(GOLDEN / pooling)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return into


@pytest.mark.parametrize("pooling", POOLINGS)
def test_intermediates_match_transformers(pooling: str) -> None:
    params, cfg = bert.load(GOLDEN / pooling)
    golden = np.load(GOLDEN / pooling / "golden.npz")
    assert (cfg.pooling, cfg.normalize) == (pooling, pooling == "mean")
    x, taps = encoder.forward(
        params, cfg, golden["ids"], golden["mask"], taps=("residual", "attention")
    )
    is_token = golden["mask"] > 0
    for ours, theirs in zip(taps["residual"], golden["residual"], strict=True):
        np.testing.assert_allclose(ours[is_token], theirs[is_token], atol=1e-5)
    np.testing.assert_array_equal(x, taps["residual"][-1])
    for row, length in enumerate(golden["mask"].sum(1)):
        np.testing.assert_allclose(
            taps["attention"][:, row, :, :length, :length],
            golden["attention"][:, row, :, :length, :length],
            atol=1e-5,
        )
    vectors = encoder.pool(x, cfg, golden["mask"], 1)[:, 0]
    np.testing.assert_allclose(vectors, golden["vectors"], atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_packed_texts_match_single_texts(pooling: str) -> None:
    cfg = Config.debug(pooling=pooling)
    params = randomize(encoder.init(jax.random.key(0), cfg))
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 320, n).tolist() for n in (1, 1, 5, 5, 17, 32, 60, 128)]
    packed = encoder.embed_all(params, cfg, texts)
    for text, vector in zip(texts, packed, strict=True):
        alone, _ = encoder.forward(params, cfg, np.array([text]), np.ones((1, len(text)), np.int32))
        ones = np.ones((1, len(text)), np.int32)
        np.testing.assert_allclose(encoder.pool(alone, cfg, ones, 1)[0, 0], vector, atol=2e-5)


def test_packing_keeps_all_tokens_and_makes_batches_of_expected_shapes() -> None:
    rng = np.random.default_rng(0)
    for longest in (20, 256, 512):
        texts = [rng.integers(1, 1000, n).tolist() for n in rng.integers(1, longest + 1, 300)]
        texts += [[7]] * 50  # more short texts than fit into a row
        unpacked = {}
        for batch in packing.pack(texts, longest):
            assert batch.ids.shape in packing.batch_shapes(longest)
            assert not batch.ids[batch.segments == 0].any()
            assert batch.segments.max() <= batch.max_texts
            for text, row, slot in zip(batch.text_indices, batch.rows, batch.slots, strict=True):
                unpacked[int(text)] = batch.ids[row][batch.segments[row] == slot + 1].tolist()
        assert [unpacked[i] for i in range(len(texts))] == texts


def test_packing_has_little_padding() -> None:
    rng = np.random.default_rng(0)
    texts = [[1] * int(n) for n in rng.integers(12, 150, 256)]
    computed = sum(batch.ids.size for batch in packing.pack(texts, 256))
    assert sum(map(len, texts)) > 0.96 * computed


def test_embed_all_with_invalid_text_raises_value_error() -> None:
    cfg = Config.debug(max_tokens=10)
    params = encoder.init(jax.random.key(0), cfg)
    with pytest.raises(ValueError, match=naming("text 1", 11, 10)):
        encoder.embed_all(params, cfg, [[1], [1] * 11])
    with pytest.raises(ValueError, match=naming("text 0", "0 tokens")):
        encoder.embed_all(params, cfg, [[]])
    with pytest.raises(ValueError, match=naming("text 1", 320, 319)):
        encoder.embed_all(params, cfg, [[1], [1, 320]])
    assert encoder.embed_all(params, cfg, []).shape == (0, 32)


NUMBERS = [{"num_heads": 2}, {"norm_eps": 0.1}, {"normalize": False}, {"windows": (1, None)}]
NUMBERS += [{"pooling": mode} for mode in ("cls", "max", "weightedmean", "lasttoken")]
ROPE_NUMBERS = [{"rope_theta": 50.0}, {"local_rope_theta": 50.0}]
SHAPES = [
    {"num_layers": 3},
    {"d_model": 40},
    {"d_ff": 72},
    {"vocab_size": 330},
    {"max_seq_len": 130},
    {"num_types": 3},
    {"position_offset": 2},
    {"position": "rope"},
    {"mlp": "geglu"},
    {"pre_norm": True},
    {"attention_bias": False},
    {"mlp_bias": False},
    {"dense": (Dense(in_features=32, out_features=8),)},
    {"head": HeadConfig(num_labels=1)},
]


@pytest.mark.parametrize("change", NUMBERS + ROPE_NUMBERS, ids=str)
def test_changed_config_field_changes_embeddings(change: dict) -> None:
    cfg = Config.debug(position="rope", windows=(2, None)) if change in ROPE_NUMBERS else CFG
    params = randomize(encoder.init(jax.random.key(0), cfg))
    texts = [[1, 2, 3, 4], [5, 6, 7]]
    with jax.disable_jit():
        before = encoder.embed_all(params, cfg, texts)
        after = encoder.embed_all(params, dataclasses.replace(cfg, **change), texts)
    assert np.abs(before - after).max() > 1e-3


@pytest.mark.parametrize("change", SHAPES, ids=str)
def test_changed_config_field_changes_shapes(change: dict) -> None:
    def shapes(cfg: Config) -> list[tuple[int, ...]]:
        return [leaf.shape for leaf in jax.tree.leaves(encoder.abstract(cfg))]

    assert shapes(Config.debug()) != shapes(dataclasses.replace(Config.debug(), **change))


def test_every_config_field_is_tested() -> None:
    """`max_tokens` is covered by the tests of packing and of invalid texts."""
    changes = NUMBERS + ROPE_NUMBERS + SHAPES
    tested = {name for change in changes for name in change} | {"max_tokens"}
    assert tested == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"num_layers": 0}, ["num_layers", 0]),
        ({"num_heads": 5}, ["d_model", "num_heads", 32, 5]),
        ({"max_tokens": 129}, ["max_tokens", "max_seq_len", 129, 128]),
        ({"norm_eps": 0.0}, ["norm_eps", 0.0]),
        ({"pooling": "sum"}, ["pooling", "'mean'", "'cls'", "'sum'"]),
        ({"pooling": ()}, ["pooling", "()"]),
        ({"position": "alibi"}, ["position", "'alibi'"]),
        ({"rope_theta": -1.0}, ["rope_theta", -1.0]),
        ({"dense": (Dense(in_features=8, out_features=8),)}, ["in_features", 32, 8]),
        ({"normalize": 1}, ["normalize", 1]),
    ],
)
def test_invalid_config_is_rejected(change: dict, facts: list) -> None:
    with pytest.raises(ValueError, match=naming(*facts)):
        Config.debug(**change)


def test_to_hf_then_from_hf_returns_equal_config() -> None:
    cfg = Config.debug(max_tokens=64, pooling="cls", normalize=False, norm_eps=1e-5)
    reloaded = Config.from_hf(cfg.to_hf(), max_tokens=64, pooling="cls", normalize=False)
    assert reloaded == cfg


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ({"hidden_act": "relu"}, "'relu'"),
        ({"hidden_act": "gelu_new"}, "'gelu_new'"),
        ({"is_decoder": True}, True),
        ({"add_cross_attention": True}, True),
        ({"embedding_size": 16}, 16),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"model_type": "deberta-v2"}, "'deberta-v2'"),
        ({"position_embedding_type": "relative_key"}, "'relative_key'"),
        ({"partial_rotary_factor": 0.5}, 0.5),
        ({"hidden_size": None}, "config.json"),
    ],
)
def test_unsupported_config_json_is_rejected(change: dict, value: object) -> None:
    with pytest.raises(ValueError, match=naming(*change, value)):
        Config.from_hf(Config.debug().to_hf() | change)


@pytest.mark.parametrize("key", Config.debug().to_hf())
def test_config_json_value_of_any_type_is_read_or_raises_value_error(key: str) -> None:
    for value in INVALID_VALUES:
        with contextlib.suppress(ValueError):  # any other exception fails the test
            Config.from_hf(Config.debug().to_hf() | {key: value})


BERT = dict(
    architectures=["BertModel"], attention_probs_dropout_prob=0.1, gradient_checkpointing=False,
    hidden_act="gelu", hidden_dropout_prob=0.1, initializer_range=0.02, layer_norm_eps=1e-12,
    max_position_embeddings=512, model_type="bert", num_attention_heads=12, pad_token_id=0,
    position_embedding_type="absolute", transformers_version="4.8.2", type_vocab_size=2,
    use_cache=True, vocab_size=30522, num_hidden_layers=12, hidden_size=384, intermediate_size=1536,
)  # fmt: skip
GOOGLE = dict(  # bert-base-chinese
    directionality="bidi", pooler_fc_size=768, pooler_num_attention_heads=12,
    pooler_num_fc_layers=3, pooler_size_per_head=128, pooler_type="first_token_transform",
    vocab_size=21128, layer_norm_eps=None,
)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        dict(num_hidden_layers=6, _name_or_path="nreimers/MiniLM-L6-H384-uncased"),
        dict(
            classifier_dropout=None, id2label={"0": "LABEL_0"}, torch_dtype="float32"
        ),  # bge-small
        dict(torch_dtype="float16", _name_or_path="/mnt/models/gte-small"),
        dict(tokenizer_class="BertTokenizer", _attn_implementation_autoset=True),  # e5-small
        GOOGLE,
        dict(quantization_config=None, dtype="float32", is_decoder=False, bos_token_id=None),
    ],
)
def test_config_json_of_published_models_is_read(change: dict) -> None:
    cfg = Config.from_hf(BERT | change)
    assert (cfg.d_model, cfg.norm_eps, cfg.max_tokens) == (384, 1e-12, 512)


def test_config_json_without_size_is_rejected() -> None:
    config = Config.debug().to_hf()
    del config["intermediate_size"]
    with pytest.raises(ValueError, match=naming("config.json", "intermediate_size")):
        Config.from_hf(config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_then_load_is_bitwise_equal(dtype: str, tmp_path: Path) -> None:
    params, cfg = bert.load(GOLDEN / "cls", dtype=dtype)
    bert.save(tmp_path, params, cfg)
    reloaded, reloaded_cfg = bert.load(tmp_path, dtype=dtype)
    assert reloaded_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, reloaded, params)


def test_error_names_missing_unknown_or_misshapen_tensor(tmp_path: Path) -> None:
    path = folder("mean", tmp_path) / "model.safetensors"
    content = load_file(path)
    name = "encoder.layer.1.output.dense.weight"

    save_file({k: v for k, v in content.items() if k != name}, path)
    with pytest.raises(ValueError, match=naming(tmp_path, name)):
        bert.load(tmp_path)
    save_file(content | {"classifier.bias": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match=naming(tmp_path, "classifier.bias")):
        bert.load(tmp_path)
    save_file(content | {name: content[name].T.copy()}, path)
    with pytest.raises(ValueError, match=naming(name, "(32, 56)", "(56, 32)")):
        bert.load(tmp_path)
    save_file(content | {"embeddings.position_ids": np.arange(40)[None]}, path)
    bert.load(tmp_path)  # older files have this redundant tensor
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=naming(path)):
        bert.load(tmp_path)


def as_google_named(name: str) -> str:
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
    return "bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")


def test_bert_with_pretraining_heads_is_loaded(tmp_path: Path) -> None:
    """bert-base-uncased has such files; transformers also loads them as a bare encoder."""
    path = folder("mean", tmp_path) / "model.safetensors"
    expected, _ = bert.load(tmp_path)
    content = {as_google_named(name): tensor for name, tensor in load_file(path).items()}
    heads = {
        "cls.predictions.bias": np.zeros(3, np.float32),
        "cls.seq_relationship.weight": np.zeros((2, 32), np.float32),
        "bert.embeddings.position_ids": np.arange(40)[None],
    }
    save_file(content | heads, path)
    params, _ = bert.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_folder_without_modules_json_needs_pooling(tmp_path: Path) -> None:
    (folder("mean", tmp_path) / "modules.json").unlink()
    with pytest.raises(ValueError, match=naming("modules.json", "pooling", "normalize")):
        bert.load(tmp_path)
    _, cfg = bert.load(tmp_path, pooling="cls", normalize=False)
    assert (cfg.pooling, cfg.normalize) == ("cls", False)


def test_unsupported_module_or_pooling_is_rejected(tmp_path: Path) -> None:
    folder("mean", tmp_path)
    steps = json.loads((tmp_path / "modules.json").read_text())
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.write_text('{"pooling_mode_mean_tokens": true, "pooling_mode_first_tokens": true}')
    with pytest.raises(ValueError, match=naming(pooling, "'pooling_mode_first_tokens'")):
        bert.load(tmp_path)
    pooling.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    assert bert.load(tmp_path)[1].pooling == "cls"
    pooling.write_text('{"pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": true}')
    assert bert.read_config(tmp_path).pooling == ("max", "mean")
    steps[2]["type"] = "sentence_transformers.models.LayerNorm"
    (tmp_path / "modules.json").write_text(json.dumps(steps))
    with pytest.raises(
        ValueError, match=naming("modules.json", "Transformer", "Pooling", "'LayerNorm'")
    ):
        bert.load(tmp_path)


def test_max_tokens_is_read_from_each_file(tmp_path: Path) -> None:
    folder("mean", tmp_path)
    assert bert.load(tmp_path)[1].max_tokens == 40  # the position table
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 30}')
    assert bert.load(tmp_path)[1].max_tokens == 30
    (tmp_path / "tokenizer_config.json").write_text(f'{{"model_max_length": {10**30}}}')
    assert bert.load(tmp_path)[1].max_tokens == 40
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    assert bert.load(tmp_path)[1].max_tokens == 20
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": "20"}')
    with pytest.raises(ValueError, match=naming("max_seq_length", "'20'")):
        bert.load(tmp_path)


# --- all-MiniLM-L6-v2 -------------------------------------------------------------------------


def embedded(path: Path, texts: list[str], dtype: str) -> np.ndarray:
    params, cfg = bert.load(path, dtype=dtype)
    words = bpe.load_wordpiece(path)
    return encoder.embed_all(params, cfg, words.encode_batch(texts, max_length=cfg.max_tokens))


@pytest.mark.parametrize(("dtype", "min_cosine"), [("float32", 0.99999), ("bfloat16", 0.9999)])
def test_minilm_matches_golden_embeddings(
    dtype: str, min_cosine: float, model_file: Callable[[str], Path]
) -> None:
    texts = json.loads((GOLDEN / "texts.json").read_text("utf-8"))
    assert len(texts) == 200
    vectors = embedded(model_file("all-minilm-l6-v2"), texts, dtype)
    expected = np.load(GOLDEN / "minilm.npz")["vectors"]
    assert cosines(vectors, expected).min() > min_cosine
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize(("dtype", "min_cosine"), [("float32", 0.99999), ("bfloat16", 0.9999)])
def test_minilm_matches_sentence_transformers(
    dtype: str, min_cosine: float, model_file: Callable[[str], Path]
) -> None:
    from sentence_transformers import SentenceTransformer

    path = model_file("all-minilm-l6-v2")
    texts = json.loads((GOLDEN / "texts.json").read_text("utf-8"))
    expected = SentenceTransformer(str(path), device="cpu").encode(texts)
    assert cosines(embedded(path, texts, dtype), expected).min() > min_cosine


@pytest.mark.parity
@pytest.mark.parametrize("pooling", POOLINGS)
def test_saved_folder_loads_in_sentence_transformers(pooling: str, tmp_path: Path) -> None:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import BertTokenizerFast

    params, cfg = bert.load(GOLDEN / pooling)
    bert.save(tmp_path, params, cfg)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(155))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    golden = np.load(GOLDEN / pooling / "golden.npz")
    with torch.inference_mode():
        theirs = SentenceTransformer(str(tmp_path), device="cpu")(
            {
                "input_ids": torch.tensor(golden["ids"], dtype=torch.long),
                "attention_mask": torch.tensor(golden["mask"], dtype=torch.long),
            }
        )["sentence_embedding"]
    np.testing.assert_allclose(theirs, golden["vectors"], atol=1e-5)
