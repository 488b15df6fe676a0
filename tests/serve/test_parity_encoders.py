"""Compare encoders with sentence-transformers, from text to vector or score.

The models have random weights, and the files of published models: modules, prompts, lower case, a
trained byte-level BPE or WordPiece tokenizer, and the special tokens of each family.
"""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.models.encoder import load_embedding_model
from serve.models.reranker import load_rerank_model

pytestmark = pytest.mark.parity

TEXTS = json.loads((Path(__file__).parents[1] / "golden" / "encoder" / "texts.json").read_text())
TEXTS = [text for text in TEXTS if text.strip()][::8]
SIZES = dict(
    vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, max_position_embeddings=130,
)  # fmt: skip
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def config(kind: str, **changes: Any) -> Any:
    import transformers

    ids = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
    modern = dict(local_attention=16, cls_token_id=0, sep_token_id=2)
    gqa = dict(num_key_value_heads=2, head_dim=8)
    gemma = dict(query_pre_attn_scalar=8, sliding_window=16, use_bidirectional_attention=True)
    kinds = {
        "bert": (transformers.BertConfig, {}),
        "roberta": (transformers.RobertaConfig, dict(max_position_embeddings=132)),
        "xlm-roberta": (transformers.XLMRobertaConfig, dict(max_position_embeddings=132)),
        "modernbert": (transformers.ModernBertConfig, modern),
        "nomic": (transformers.NomicBertConfig, {}),
        "qwen3": (transformers.Qwen3Config, gqa),
        "gemma3": (transformers.Gemma3TextConfig, gqa | gemma),
        "llama": (transformers.LlamaConfig, {}),
    }
    make_config, changes_of_kind = kinds[kind]
    return make_config(**SIZES | ids | changes_of_kind | changes)


def write_tokenizer(folder: Path, kind: str, has_types: bool = True) -> None:
    """Train a tokenizer of 400 tokens on `TEXTS`, with the special tokens of a model family."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    if kind in ("bert", "nomic"):
        trainer = trainers.WordPieceTrainer(
            vocab_size=400, special_tokens=["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
        )
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.train_from_iterator(TEXTS, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 0), ("[SEP]", 2)],
        )
        tokenizer.decoder = decoders.WordPiece()
        names = dict(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")
        if has_types:
            names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet
        )
        tokenizer.train_from_iterator(TEXTS, trainer)
        templates = {
            "qwen3": ("$A </s>", "$A $B </s>"),
            "llama": ("<s> $A", "<s> $A <s> $B"),
            "gemma3": ("<s> $A </s>", "<s> $A </s> <s> $B </s>"),
            "modernbert": ("<s> $A </s>", "<s> $A </s> $B </s>"),
        }
        if kind in templates:
            single, pair = templates[kind]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=single, pair=pair, special_tokens=[("<s>", 0), ("</s>", 2)]
            )
        else:
            tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", cls_token="<s>",
                     sep_token="</s>", unk_token="<unk>", mask_token="<mask>")  # fmt: skip
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=128, padding_side="right", **names
    )
    fast.save_pretrained(folder)


def randomize(module: Any) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(1.0 if is_scale else 0.0, 0.2)


def sentence_transformer(folder: Path, kind: str, poolings: Any, dense=(), normalize=True, **saved):
    """Save a random model, and return it as sentence-transformers loads it again."""
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(0)
    cfg = config(kind)
    model = transformers.AutoModel.from_config(cfg)
    randomize(model)
    model.save_pretrained(folder / "bare")
    write_tokenizer(folder / "bare", kind)
    modules = [Transformer(str(folder / "bare"), **saved.pop("transformer", {}))]
    modules.append(Pooling(cfg.hidden_size, pooling_mode=poolings))
    for inner, outer, activation in dense:
        modules.append(Dense(inner, outer, activation_function=activation))
        randomize(modules[-1])
    modules += [Normalize()] * normalize
    whole = SentenceTransformer(modules=modules, device="cpu", **saved)
    whole.save(str(folder / "whole"), create_model_card=False)
    return SentenceTransformer(str(folder / "whole"), device="cpu")


def served_vectors(folder: Path, prompt_name: str | None = None) -> np.ndarray:
    model = load_embedding_model("x", folder / "whole", owned_by="me", dtype="float32")
    chunks = [model.truncate(model.encode(text, prompt_name), model.context)[0] for text in TEXTS]
    return asyncio.run(model.embed(chunks))


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosines.min() > 0.99999
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(1.0, float(np.abs(b).max())))


@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "xlm-roberta", "modernbert", "nomic", "qwen3", "gemma3", "llama"]
)
def test_vectors_equal_sentence_transformers(kind: str, tmp_path: Path) -> None:
    pooling = "lasttoken" if kind in ("qwen3", "llama") else "mean"
    peer = sentence_transformer(tmp_path, kind, pooling)
    assert_same(served_vectors(tmp_path), peer.encode(TEXTS))


@pytest.mark.parametrize("pooling", [*POOLINGS, ("weightedmean", "cls"), POOLINGS], ids=str)
def test_vectors_of_each_pooling_equal_sentence_transformers(pooling: Any, tmp_path: Path) -> None:
    peer = sentence_transformer(tmp_path, "roberta", pooling, normalize=False)
    assert_same(served_vectors(tmp_path), peer.encode(TEXTS))


def test_vectors_with_dense_layers_and_prompts_equal_sentence_transformers(tmp_path: Path) -> None:
    import torch

    prompts = {"query": "search: ", "document": "text: ", "empty": ""}
    peer = sentence_transformer(
        tmp_path,
        "gemma3",
        "mean",
        [(32, 48, torch.nn.Identity()), (48, 16, torch.nn.ReLU())],
        prompts=prompts,
        default_prompt_name="document",
    )
    assert_same(served_vectors(tmp_path), peer.encode(TEXTS))
    for name in prompts:
        assert_same(served_vectors(tmp_path, name), peer.encode(TEXTS, prompt_name=name))


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_vectors_with_lower_case_and_length_limit_equal_sentence_transformers(
    kind: str, tmp_path: Path
) -> None:
    peer = sentence_transformer(
        tmp_path, kind, "cls", transformer=dict(do_lower_case=True, max_seq_length=20)
    )
    path = tmp_path / "whole" / "sentence_bert_config.json"
    saved = json.loads(path.read_text()) | dict(do_lower_case=True, max_seq_length=20)
    path.write_text(json.dumps(saved))
    # Version 6 writes lower case into tokenizer.json; earlier ones left that file alone.
    shutil.copy(tmp_path / "bare" / "tokenizer.json", tmp_path / "whole")
    assert_same(served_vectors(tmp_path), peer.encode(TEXTS))


@pytest.mark.parametrize(
    ("kind", "labels", "has_types"),
    [
        ("bert", 1, True),
        ("bert", 1, False),
        ("bert", 2, True),
        ("roberta", 1, True),
        ("xlm-roberta", 2, True),
        ("modernbert", 1, True),
        ("modernbert", 2, True),
    ],
)
def test_scores_of_pairs_equal_cross_encoder(
    kind: str, labels: int, has_types: bool, tmp_path: Path
) -> None:
    import torch
    import transformers
    from sentence_transformers import CrossEncoder

    torch.manual_seed(0)
    cfg = config(kind, num_labels=labels)
    model = transformers.AutoModelForSequenceClassification.from_config(cfg)
    randomize(model)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, kind, has_types)
    peer = CrossEncoder(str(tmp_path), device="cpu")
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    theirs = peer.predict(pairs)
    served = load_rerank_model("x", tmp_path, owned_by="me", dtype="float32")
    encoded = [served.tokenizer.encode_pair(*pair, max_length=served.context) for pair in pairs]
    ours = asyncio.run(served.score(encoded))
    if labels == 2:
        theirs = torch.softmax(torch.tensor(theirs), 1)[:, 1].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    peer.activation_fn = torch.nn.Identity()
    peer.save_pretrained(str(tmp_path / "saved"))  # with modules.json
    again = load_rerank_model("x", tmp_path / "saved", owned_by="me", dtype="float32")
    if labels == 1:
        logits = asyncio.run(again.score(encoded))
        np.testing.assert_allclose(logits, peer.predict(pairs), atol=1e-4)
