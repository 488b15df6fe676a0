"""Create wordpiece-tokenizer.json and wordpiece.json with Hugging Face's tokenizers.

    python make_wordpiece.py

The small vocabulary is trained on the texts. The texts are encoded with the normalization of BERT's
uncased and of its cased models.
"""

import json
import sys
from pathlib import Path

from tokenizers import BertWordPieceTokenizer, Tokenizer
from tokenizers.processors import BertProcessing

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.golden.bpe.make_bpe import TEXTS  # noqa: E402

MORE = [
    "[CLS] spelled [SEP] out [MASK], [PAD][UNK] [mask] [SEP",
    "unaffable " + "x" * 100 + " " + "y" * 101 + " end",
    "İstanbul ΑΣΟΣ Straße ǅ ﬀ ẞ K Å ᾛ",
    "\u2e52a\u2e43b\u1734c\U0001e2ecd\u08e2e",  # added to Unicode after 8.0, or moved since
    "$1+2=3<4>5^6`7|8~9_a-b.c",
    "\u4e00\u9fff\u3400\U00020000\U0002b820\U0002b920\uac00\u3042\u30a2\uff21",
    "a\u0301e\u0300\u0323o\u0308\u20dd n\u0303 \u1e69 \u1e9b\u0323",
]
PAIRS = [
    ("What is the capital?", "Paris is the capital of France."),
    ("", "only the second"),
    ("only the first", ""),
    ("a much longer first text than the second one is", "short"),
    ("even number", "of pieces in"),
]


def main() -> None:
    texts = TEXTS + MORE
    trained = BertWordPieceTokenizer()
    passage = (ROOT / "tests/bench/passage.txt").read_text(encoding="utf-8")
    trained.train_from_iterator([passage, *texts], vocab_size=900, show_progress=False)
    ends = [(token, trained.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    trained.post_processor = BertProcessing(*ends)
    spec = json.loads(trained.to_str())
    path = HERE / "wordpiece-tokenizer.json"
    path.write_text(json.dumps(spec, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")

    golden = {"texts": texts, "pairs": PAIRS}
    for name, lowercase in {"uncased": True, "cased": False}.items():
        spec["normalizer"]["lowercase"] = lowercase
        tokenizer = Tokenizer.from_str(json.dumps(spec))
        ids = [tokenizer.encode(text).ids for text in texts]
        pairs = {}
        for length in (None, 3, 4, 7, 8, 11):
            tokenizer.no_truncation()
            if length is not None:
                tokenizer.enable_truncation(length)
            encodings = [tokenizer.encode(*pair) for pair in PAIRS]
            pairs[str(length)] = [[e.ids, e.type_ids] for e in encodings]
        golden[name] = {"ids": ids, "pairs": pairs}
    path = HERE / "wordpiece.json"
    path.write_text(json.dumps(golden, ensure_ascii=True) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
