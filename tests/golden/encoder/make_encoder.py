"""Make the golden files of the encoders: tiny random ones, and MiniLM's embeddings of 200 texts.

    python make_encoder.py MINILM_FOLDER

It needs sentence-transformers and torch; the argument is the folder that `pellucid pull
all-minilm-l6-v2` downloads. It writes next to this file:

    mean/, cls/          a tiny random BERT as sentence-transformers saves it, with golden.npz:
        ids [3, 16], mask [3, 16]  token ids and attention mask
        residual [L + 1, 3, 16, D] input of each block and output of the last, float32
        attention [L, 3, N, 16, 16] attention weights
        vectors [3, D]             embedding of each row
        versions                   software versions
    FAMILY/              a tiny random encoder of each other family of `EMBEDDERS`, with modules;
                         golden.npz has the same arrays
    cross-FAMILY/        a tiny random cross-encoder of `CROSS_ENCODERS`; golden.npz has types
                         [3, 16], token types, and logits [3, labels] instead of vectors
    texts.json           200 texts: empty, long, many scripts, code, emoji, noise
    minilm.npz           vectors [200, 384], float16 (half a thousandth of an element; the cosine
                         moves by less than 1e-7), and versions

All weights of the tiny models are random, including biases and norms: zeros and ones would hide
mistakes.
"""

import json
import platform
import random
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer, models

HERE = Path(__file__).parent

SENTENCES = """
The cat sat on the mat.
A quick brown fox jumps over the lazy dog, twice.
What is the capital of France?
Water boils at 100 °C at sea level, and at 71 °C on Mount Everest.
def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)
SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name ORDER BY 2 DESC;
https://example.org/path?query=1&other=two#fragment
The meeting was moved from 3 p.m. on Tuesday to 10:30 a.m. on Thursday.
Don't you think it's naïve to expect déjà vu in a café?
E = mc^2, and F = ma; neither holds everywhere.
Der Zug nach Köln fährt um 14.35 Uhr von Gleis 7.
¿Dónde está la biblioteca? Está detrás de la plaza.
L'été dernier, nous avons traversé les Pyrénées à pied.
Il gatto dorme sul divano mentre fuori piove.
Kağıt, kalem ve defter aldım; İstanbul'a gidiyorum.
Đây là một câu tiếng Việt có nhiều dấu.
Wczoraj kupiłem świeże źdźbło trawy za pięć złotych.
Все счастливые семьи похожи друг на друга.
Η γρήγορη αλεπού πηδάει πάνω από το σκυλί.
השועל החום המהיר קופץ מעל הכלב העצלן.
الثعلب البني السريع يقفز فوق الكلب الكسول.
तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है।
সূর্য পূর্ব দিকে ওঠে।
เมื่อวานนี้ฝนตกหนักมาก
速い茶色の狐がのろまな犬を飛び越える。
敏捷的棕色狐狸跳过了懒狗。
빠른 갈색 여우가 게으른 개를 뛰어넘는다.
🙂🚀🍔 emoji 👩‍👩‍👧‍👦 with joiners and flags 🇫🇷
zzxqj vbnmk wrtpl qqqq 000000 ----- ;;;;;
antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis
x
ALL CAPITALS SHOUT AT THE READER
tabs\tand\u00a0odd\u2003spaces and\u200binvisible ones
[MASK] and [SEP] written out
She sells sea shells by the sea shore; the shells she sells are surely seashells.
The stock fell 4.2% after earnings missed estimates by $0.03 a share.
A recipe: 200 g flour, 3 eggs, 1/2 litre of milk, a pinch of salt.
Once upon a midnight dreary, while I pondered, weak and weary
ﬁne ligatures, ﬀ and ½ and № and ™
""".strip().splitlines()


def texts() -> list[str]:
    """Return 200 texts, the same every time."""
    rng = random.Random(0)
    result = ["", " ", "\n\n", *SENTENCES]
    while len(result) < 150:
        result.append(" ".join(rng.sample(SENTENCES, rng.randint(2, 5))))
    while len(result) < 190:
        words = " ".join(SENTENCES).split()
        result.append(" ".join(rng.choices(words, k=rng.randint(1, 250))))
    return result + [line * 40 for line in SENTENCES[:10]]  # longer than the maximum input


@torch.inference_mode()
def make_tiny(pooling: str) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
    )
    model = transformers.BertModel(config, add_pooling_layer=True).eval()
    for key, parameter in model.named_parameters():
        is_scale = parameter.ndim == 1 and key.endswith("weight")
        parameter.normal_(1.0 if is_scale else 0.0, 0.2)
    folder = HERE / pooling
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    # sentence-transformers needs a tokenizer; this one has a word for each id.
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(155))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    body = models.Transformer(str(folder), max_seq_length=32)
    pool = models.Pooling(config.hidden_size, pooling_mode=pooling)
    steps = [body, pool, models.Normalize()] if pooling == "mean" else [body, pool]
    whole = SentenceTransformer(modules=steps, device="cpu").eval()
    shutil.rmtree(folder)
    whole.save(str(folder), create_model_card=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json",
                 "config_sentence_transformers.json"):  # fmt: skip
        (folder / name).unlink(missing_ok=True)

    ids = torch.randint(5, 160, (3, 16))
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[1, 9:] = 0
    mask[2, 2:] = 0
    eager = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    out = eager(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    vectors = whole({"input_ids": ids, "attention_mask": mask})["sentence_embedding"]
    np.savez_compressed(
        folder / "golden.npz",
        ids=ids.numpy().astype(np.int32),
        mask=mask.numpy().astype(np.int32),
        residual=torch.stack(out.hidden_states).numpy(),
        attention=torch.stack(out.attentions).numpy(),
        vectors=vectors.numpy(),
        versions=versions(),
    )


SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=2, max_position_embeddings=40)  # fmt: skip
ROBERTA = SIZES | dict(max_position_embeddings=42, pad_token_id=1)
MODERN = SIZES | dict(num_hidden_layers=4, local_attention=6, pad_token_id=0, bos_token_id=1,
                      eos_token_id=2, cls_token_id=1, sep_token_id=2)  # fmt: skip
DECODER = SIZES | dict(num_key_value_heads=1, head_dim=8, pad_token_id=0)
# Each: its config, its poolings, its dense layers (in, out, bias, activation), Normalize or not.
EMBEDDERS = {
    "roberta": (
        transformers.RobertaConfig(**ROBERTA),
        ("cls", "max", "mean_sqrt_len_tokens"),
        [(48, 12, True, torch.nn.Tanh())],
        False,
    ),
    "xlm-roberta": (
        transformers.XLMRobertaConfig(**ROBERTA, type_vocab_size=1),
        ("mean", "weightedmean", "lasttoken"),
        [],
        True,
    ),
    "nomic": (transformers.NomicBertConfig(**SIZES), ("mean",), [], True),
    "modernbert": (transformers.ModernBertConfig(**MODERN), ("cls",), [], True),
    "modernbert-biases": (
        transformers.ModernBertConfig(
            **MODERN, norm_bias=True, attention_bias=True, mlp_bias=True, hidden_activation="silu"
        ),
        ("mean",),
        [(16, 8, False, torch.nn.GELU())],
        True,
    ),
    "qwen3": (transformers.Qwen3Config(**DECODER), ("lasttoken",), [], True),
    "gemma3": (  # EmbeddingGemma
        transformers.Gemma3TextConfig(
            **DECODER | dict(num_hidden_layers=3),
            query_pre_attn_scalar=8,
            sliding_window=6,
            sliding_window_pattern=2,
            use_bidirectional_attention=True,
        ),
        ("mean",),
        [(16, 24, False, torch.nn.Identity()), (24, 16, False, torch.nn.Identity())],
        True,
    ),
}
CROSS_ENCODERS = {
    "cross-bert": transformers.BertConfig(**SIZES, num_labels=1),
    "cross-roberta": transformers.RobertaConfig(**ROBERTA, num_labels=3),
    "cross-modernbert": transformers.ModernBertConfig(
        **MODERN, num_labels=2, classifier_pooling="mean"
    ),
}
KEPT = {"config.json", "model.safetensors", "modules.json", "sentence_bert_config.json"}


def randomize(model: torch.nn.Module) -> None:
    """Give every weight a random value: the scales of norms about 1, the others about 0."""
    for key, parameter in model.named_parameters():
        is_scale = parameter.ndim == 1 and key.endswith("weight")
        is_shifted = "Gemma" in type(model).__name__  # its scale is 1 + weight
        parameter.normal_(1.0 if is_scale and not is_shifted else 0.0, 0.2)


def inputs(padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask of three texts of 16, 9 and 2 tokens."""
    ids = torch.randint(3, 64, (3, 16))
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[1, 9:] = 0
    mask[2, 2:] = 0
    return ids.masked_fill(mask == 0, padding), mask


def save_golden(folder: Path, out, **arrays: torch.Tensor) -> None:
    np.savez_compressed(
        folder / "golden.npz",
        residual=torch.stack(out.hidden_states).numpy(),
        attention=torch.stack(out.attentions).numpy(),
        versions=versions(),
        **{
            name: array.numpy().astype(np.float32 if array.is_floating_point() else np.int32)
            for name, array in arrays.items()
        },
    )


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer with a word for each id; sentence-transformers needs one."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *(f"w{i}" for i in range(59))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


@torch.inference_mode()
def make_embedder(name: str) -> None:
    config, poolings, dense, is_normalized = EMBEDDERS[name]
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    randomize(model)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    body = models.Transformer(str(folder), model_kwargs={"attn_implementation": "eager"})
    body.max_seq_length = 32
    steps = [body, models.Pooling(config.hidden_size, pooling_mode=poolings)]
    for inner, outer, bias, activation in dense:
        steps.append(models.Dense(inner, outer, bias=bias, activation_function=activation))
        randomize(steps[-1])
    whole = SentenceTransformer(
        modules=steps + [models.Normalize()] * is_normalized, device="cpu"
    ).eval()
    shutil.rmtree(folder)
    whole.save(str(folder), create_model_card=False)
    for file in folder.iterdir():
        if file.is_file() and file.name not in KEPT:
            file.unlink()
    ids, mask = inputs(config.pad_token_id)
    out = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    vectors = whole({"input_ids": ids, "attention_mask": mask})["sentence_embedding"]
    save_golden(folder, out, ids=ids, mask=mask, vectors=vectors, last=out.last_hidden_state)


@torch.inference_mode()
def make_cross_encoder(name: str) -> None:
    config = CROSS_ENCODERS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(
        config, attn_implementation="eager"
    ).eval()
    randomize(model)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    ids, mask = inputs(config.pad_token_id)
    types = torch.zeros_like(ids)
    extra = {}
    if config.model_type == "bert":
        types[:, 1:] = mask[:, 1:]
        extra["token_type_ids"] = types
    out = model(
        ids, attention_mask=mask, output_hidden_states=True, output_attentions=True, **extra
    )
    save_golden(folder, out, ids=ids, mask=mask, types=types, logits=out.logits)


def versions() -> str:
    """Return the versions of the software that made a golden file."""
    names = ("numpy", "torch", "transformers", "sentence-transformers")
    packages = [f"{name} {version(name)}" for name in names]
    return ", ".join([f"python {platform.python_version()}", *packages])


if __name__ == "__main__":
    for pooling in ("mean", "cls"):
        make_tiny(pooling)
    for name in EMBEDDERS:
        make_embedder(name)
    for name in CROSS_ENCODERS:
        make_cross_encoder(name)
    written = texts()
    lines = json.dumps(written, ensure_ascii=False, indent=0) + "\n"
    (HERE / "texts.json").write_text(lines, "utf-8")
    reference = SentenceTransformer(sys.argv[1], device="cpu")
    vectors = reference.encode(written).astype(np.float16)
    np.savez_compressed(HERE / "minilm.npz", vectors=vectors, versions=versions())
