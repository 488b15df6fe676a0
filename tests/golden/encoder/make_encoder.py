"""Make the golden files of the encoder: tiny random BERTs, and MiniLM's embeddings of 200 texts.

    python make_encoder.py MINILM_FOLDER

It needs sentence-transformers and torch; the argument is the folder that `pellucid pull
all-minilm-l6-v2` downloads. It writes next to this file:

    mean/, cls/          a tiny random BERT as sentence-transformers saves it, with golden.npz:
        ids [3, 16], mask [3, 16]  token ids and attention mask
        residual [L + 1, 3, 16, D] input of each block and output of the last, float32
        attention [L, 3, N, 16, 16] attention weights
        vectors [3, D]             embedding of each row
        versions                   software versions
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


def versions() -> str:
    """Return the versions of the software that made a golden file."""
    names = ("numpy", "torch", "transformers", "sentence-transformers")
    packages = [f"{name} {version(name)}" for name in names]
    return ", ".join([f"python {platform.python_version()}", *packages])


if __name__ == "__main__":
    for pooling in ("mean", "cls"):
        make_tiny(pooling)
    written = texts()
    lines = json.dumps(written, ensure_ascii=False, indent=0) + "\n"
    (HERE / "texts.json").write_text(lines, "utf-8")
    reference = SentenceTransformer(sys.argv[1], device="cpu")
    vectors = reference.encode(written).astype(np.float16)
    np.savez_compressed(HERE / "minilm.npz", vectors=vectors, versions=versions())
