"""Comparisons of encoders with sentence-transformers, live, from text to vector or score.

The models have random weights, and the files of published models: modules, prompts, lower case, a
trained byte-level BPE or WordPiece tokenizer, and the special tokens of each family. The parity
tests assert on the differences, and `tests/models_table.py` prints them.
"""

import asyncio
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from serve.models.encoder import load_embedding_model
from serve.models.reranker import load_rerank_model
from tests.transformer.comparisons import convert, vocabulary, write_bpe

TEXTS = json.loads((Path(__file__).parents[1] / "golden" / "encoder" / "texts.json").read_text())
TEXTS = [text for text in TEXTS if text.strip()][::8]
PAIRS = list(zip(TEXTS, TEXTS[::-1], strict=True))
SIZES = dict(
    vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, max_position_embeddings=130,
)  # fmt: skip
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
TOLERANCE = 1e-4  # of scores; of vectors, times their largest element if that exceeds 1
MAX_DISTANCE = 1e-5  # 1 - cosine similarity
# The last token of a decoder has seen the whole text; EmbeddingGemma is bidirectional.
POOLING = {"qwen3": "lasttoken", "llama": "lasttoken"}  # of other kinds: mean


_ROBERTA = dict(max_position_embeddings=132)
_GQA = dict(num_key_value_heads=2, head_dim=8)
_GEMMA = dict(query_pre_attn_scalar=8, sliding_window=16, use_bidirectional_attention=True)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # model_type -> class of transformers, fields
    "bert": ("BertConfig", {}),
    "roberta": ("RobertaConfig", _ROBERTA),
    "xlm-roberta": ("XLMRobertaConfig", _ROBERTA),
    "camembert": ("CamembertConfig", _ROBERTA),
    "modernbert": ("ModernBertConfig", dict(local_attention=16, cls_token_id=0, sep_token_id=2)),
    "nomic_bert": ("NomicBertConfig", {}),
    "qwen3": ("Qwen3Config", _GQA),
    "gemma3_text": ("Gemma3TextConfig", _GQA | _GEMMA),
    "llama": ("LlamaConfig", {}),
}


def config(kind: str, **changes: Any) -> Any:
    import transformers

    name, own = KINDS[kind]
    ids = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
    return getattr(transformers, name)(**SIZES | ids | own | changes)


def write_tokenizer(folder: Path, kind: str, has_types: bool = True) -> None:
    """Train a tokenizer of 400 tokens on `TEXTS`, with the special tokens of a model family."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    if kind in ("bert", "nomic_bert"):
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
        return save_byte_level(folder, kind, tokenizer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=128, padding_side="right", **names
    )
    fast.save_pretrained(folder)


def save_byte_level(folder: Path, kind: str, tokenizer: Any, max_length: int = 128) -> None:
    """Save a byte-level BPE tokenizer with the special tokens of a model family."""
    import transformers
    from tokenizers import processors

    bos, eos = ((token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>"))
    templates = {
        "qwen3": ("$A </s>", "$A $B </s>"),
        "llama": ("<s> $A", "<s> $A <s> $B"),
        "gemma3_text": ("<s> $A </s>", "<s> $A </s> <s> $B </s>"),
        "modernbert": ("<s> $A </s>", "<s> $A </s> $B </s>"),
    }
    if kind in templates:
        single, pair = templates[kind]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[bos, eos]
        )
    else:
        tokenizer.post_processor = processors.RobertaProcessing(eos, bos)
    names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", cls_token="<s>",
                 sep_token="</s>", unk_token="<unk>", mask_token="<mask>")  # fmt: skip
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, padding_side="right", **names
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


class Difference(NamedTuple):
    """The largest difference of two sets of vectors."""

    distance: float  # 1 - cosine similarity
    relative: float  # absolute difference, divided by the largest element if that exceeds 1

    @property
    def is_small(self) -> bool:
        return self.distance < MAX_DISTANCE and self.relative <= TOLERANCE


def compare(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    assert ours.shape == theirs.shape
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    scale = max(1.0, float(np.abs(b).max()))
    return Difference(float(1 - cosines.min()), float(np.abs(a - b).max()) / scale)


def vector_difference(kind: str, folder: Path) -> Difference:
    """Compare the vectors of a kind of model."""
    peer = sentence_transformer(folder, kind, POOLING.get(kind, "mean"))
    return compare(served_vectors(folder), peer.encode(TEXTS))


def pooling_difference(pooling: str | tuple[str, ...], folder: Path) -> Difference:
    """Compare the vectors of a pooling."""
    peer = sentence_transformer(folder, "roberta", pooling, normalize=False)
    return compare(served_vectors(folder), peer.encode(TEXTS))


def dense_difference(folder: Path) -> Difference:
    """Compare the vectors of a model with dense layers and prompts, for each prompt."""
    import torch

    prompts = {"query": "search: ", "document": "text: ", "empty": ""}
    peer = sentence_transformer(
        folder,
        "gemma3_text",
        "mean",
        [(32, 48, torch.nn.Identity()), (48, 16, torch.nn.ReLU())],
        prompts=prompts,
        default_prompt_name="document",
    )
    found = [compare(served_vectors(folder), peer.encode(TEXTS))]
    for name in prompts:
        theirs = peer.encode(TEXTS, prompt_name=name)
        found.append(compare(served_vectors(folder, name), theirs))
    return Difference(*map(max, zip(*found, strict=True)))


def score_difference(kind: str, labels: int, has_types: bool, folder: Path) -> float:
    """Compare the scores of a cross-encoder, and those of the model as `CrossEncoder` saves it.

    Args:
        kind: The kind of model.
        labels: 1, or 2 for a classifier, whose score is the probability of the second label.
        has_types: Whether the tokenizer names token types as an input of the model.
        folder: An empty folder to write to.
    """
    import torch
    import transformers
    from sentence_transformers import CrossEncoder

    torch.manual_seed(0)
    cfg = config(kind, num_labels=labels)
    model = transformers.AutoModelForSequenceClassification.from_config(cfg)
    randomize(model)
    model.save_pretrained(folder)
    write_tokenizer(folder, kind, has_types)
    peer = CrossEncoder(str(folder), device="cpu")
    theirs = peer.predict(PAIRS)
    if labels == 2:
        theirs = torch.softmax(torch.tensor(theirs), 1)[:, 1].numpy()
    differences = [float(np.abs(served_scores(folder) - theirs).max())]
    peer.activation_fn = torch.nn.Identity()
    peer.save_pretrained(str(folder / "saved"))  # with modules.json
    logits = served_scores(folder / "saved")
    if labels == 1:
        differences.append(float(np.abs(logits - peer.predict(PAIRS)).max()))
    return max(differences)


def served_scores(path: Path) -> np.ndarray:
    model = load_rerank_model("x", path, owned_by="me", dtype="float32")
    pairs = [model.tokenizer.encode_pair(*pair, max_length=model.context) for pair in PAIRS]
    return asyncio.run(model.score(pairs))


# Kind of cross-encoder -> the files from which llama.cpp's converter can read its vocabulary.
CONVERTIBLE = {
    "roberta": ("tokenizer.json",),
    "xlm-roberta": ("sentencepiece.bpe.model", "tokenizer.json"),
    "modernbert": ("tokenizer.json",),
}


def converted_score_difference(
    kind: str, llama_cpp: Path, folder: Path, labels: int, file: str = "tokenizer.json"
) -> float:
    """Compare the scores of a cross-encoder that llama.cpp's converter made a GGUF file.

    Args:
        kind: A kind of model, a key of `CONVERTIBLE`.
        llama_cpp: A folder with convert_hf_to_gguf.py and models/.
        folder: An empty folder to write to.
        labels: As in `score_difference`.
        file: The file from which the converter reads the vocabulary.

    Raises:
        AssertionError: The scores differ from those of the safetensors.
    """
    import torch
    import transformers
    from sentence_transformers import CrossEncoder

    source = folder / "hf"
    source.mkdir()
    torch.manual_seed(0)
    # The converter takes two labels without names for the default, and writes none.
    names = {i: f"relevance {i}" for i in range(labels)}
    if kind == "xlm-roberta":
        vocab_size = write_unigram(source, file)
        cfg = config(kind, vocab_size=vocab_size, type_vocab_size=1, id2label=names)
    else:
        write_gpt2(source, kind, llama_cpp)
        ids = dict(bos_token_id=50257, pad_token_id=50258, eos_token_id=50259)
        if kind == "roberta":  # positions begin after the id of the padding token
            ids |= dict(max_position_embeddings=50259 + 130)
        else:
            # Published files have a second name of norm_eps, which the converter reads.
            ids |= dict(cls_token_id=50257, sep_token_id=50259, layer_norm_eps=1e-5)
        cfg = config(kind, vocab_size=50262, id2label=names, **ids)
    model = transformers.AutoModelForSequenceClassification.from_config(cfg)
    randomize(model)
    model.save_pretrained(source)
    theirs = CrossEncoder(str(source), device="cpu").predict(PAIRS)
    if labels == 2:
        theirs = torch.softmax(torch.tensor(theirs), 1)[:, 1].numpy()
    from_folder = served_scores(source)
    if kind != "xlm-roberta":
        # The converter recognizes a vocabulary by ids, those of special tokens included. From these
        # keys it writes what it writes from the post-processor of published files.
        added = dict(add_bos_token=True, add_eos_token=True, add_sep_token=kind == "roberta")
        for name, change in (("tokenizer", {"post_processor": None}), ("tokenizer_config", added)):
            path = source / f"{name}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
    ours = served_scores(convert(llama_cpp, source))
    np.testing.assert_allclose(ours, from_folder, rtol=0, atol=1e-6)
    return float(np.abs(ours - theirs).max())


def write_unigram(folder: Path, file: str) -> int:
    """Train a tokenizer as XLM-R has on `TEXTS`, and return the number of its tokens.

    Args:
        folder: The folder to write to.
        file: "tokenizer.json" to write no sentencepiece.bpe.model.
    """
    import transformers
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3), model_prefix=str(folder / "sentencepiece.bpe"),
        model_type="unigram", vocab_size=300, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = transformers.XLMRobertaTokenizer.from_pretrained(folder, model_max_length=130)
    tokenizer.save_pretrained(folder)
    if file == "tokenizer.json":
        (folder / "sentencepiece.bpe.model").unlink()
    return len(tokenizer)


def write_gpt2(folder: Path, kind: str, llama_cpp: Path) -> None:
    """Write the vocabulary of GPT-2, followed by the special tokens of a model family."""
    import tokenizers

    write_bpe(folder, vocabulary(llama_cpp / "models" / "ggml-vocab-gpt-2.gguf"))
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(SPECIAL)
    save_byte_level(folder, kind, tokenizer, max_length=130)
