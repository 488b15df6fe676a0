"""Create the golden files of SentencePiece: small vocabularies, and the ids of the references.

    python make_sentencepiece.py

It needs sentencepiece, tokenizers and transformers (`pip install -e '.[parity]'`). The vocabularies
are trained here, on the texts of make_bpe.py and on the documents of this project.

`sentencepiece.json` holds `texts`; `models`: for each name a `tokenizer.model` in base64, and for
each text the ids and the decoded text of sentencepiece; and `tokenizers`: for each name the
`tokenizer.json`, and for each text the ids of tokenizers.
"""

import base64
import io
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
sys.path.insert(0, str(ROOT))

import sentencepiece  # noqa: E402
import tokenizers  # noqa: E402
from sentencepiece import sentencepiece_model_pb2  # noqa: E402
from tokenizers import (  # noqa: E402  # noqa: E402
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from tests.golden.bpe.make_bpe import TEXTS, random_texts  # noqa: E402

RULES = "41 30A\tC5\n66 69\t66\n660 661\t31\nFF21\t41\n9\t20\nA\t20\n200B\t\n"  # hexadecimal
OPTIONS = {
    "llama": {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False},
    "gemma": {
        "model_type": "bpe",
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "split_digits": True,
        "user_defined_symbols": ["<start_of_turn>", "\u2581\u2581", "\u2581\u2581\u2581", "<h1>"],
    },
    "suffix": {"model_type": "bpe", "treat_whitespace_as_suffix": True},
    "unigram": {"model_type": "unigram"},
    "unigram-bytes": {
        "model_type": "unigram",
        "byte_fallback": True,
        "user_defined_symbols": ["<sep>"],
    },
}


def train(name: str, texts: list[str], rules: Path) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=out,
        vocab_size=600 if OPTIONS[name].get("byte_fallback") else 340,
        character_coverage=0.98,
        normalization_rule_tsv=str(rules),
        minloglevel=2,
        **OPTIONS[name],
    )
    model = sentencepiece_model_pb2.ModelProto.FromString(out.getvalue())
    return model.SerializeToString()


def merges_of(model) -> list[tuple[str, str]]:
    """Return the merges in the order of transformers' converter."""
    scores = {p.piece: p.score for p in model.pieces if p.type == 1}
    merges = []
    for piece, score in scores.items():
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        local = [(a, b, score) for a, b in pairs if a in scores and b in scores]
        merges += sorted(local, key=lambda m: (scores[m[0]], scores[m[1]]), reverse=True)
    return [(a, b) for a, b, _ in sorted(merges, key=lambda m: m[2], reverse=True)]


def convert(model, unigram: bool) -> Tokenizer:
    """Return the vocabulary in tokenizers, without normalizer and the other steps."""
    if unigram:
        vocab = [(p.piece, p.score) for p in model.pieces]
        tokenizer = Tokenizer(
            models.Unigram(vocab, 0, byte_fallback=model.trainer_spec.byte_fallback)
        )
    else:
        vocab = {p.piece: i for i, p in enumerate(model.pieces)}
        tokenizer = Tokenizer(
            models.BPE(
                vocab, merges_of(model), unk_token="<unk>", fuse_unk=True, byte_fallback=True
            )
        )
    tokenizer.add_special_tokens(
        [AddedToken(p.piece, normalized=False) for p in model.pieces if p.type in (2, 3)]
    )
    return tokenizer


def layouts(trained: dict[str, bytes]) -> dict[str, Tokenizer]:
    """Return vocabularies in the layouts that publishers use."""
    parsed = {
        name: sentencepiece_model_pb2.ModelProto.FromString(data) for name, data in trained.items()
    }
    charsmap = parsed["unigram"].normalizer_spec.precompiled_charsmap
    strip = [
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]  # fmt: skip
    result = {}

    llama2 = convert(parsed["llama"], unigram=False)
    llama2.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    llama2.decoder = decoders.Sequence(strip)
    llama2.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    result["llama2"] = llama2

    mistral = convert(parsed["llama"], unigram=False)
    mistral.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", "first", False)
    mistral.decoder = decoders.Sequence(strip)
    mistral.add_special_tokens([AddedToken("[INST]", normalized=False)])
    result["mistral"] = mistral

    phi3 = convert(parsed["llama"], unigram=False)
    phi3.normalizer = llama2.normalizer
    phi3.decoder = decoders.Sequence(strip)
    phi3.add_special_tokens(
        [AddedToken("<|user|>", normalized=False, rstrip=True), AddedToken("<|end|>", lstrip=True)]
    )
    phi3.add_tokens(
        [AddedToken("low", single_word=True, normalized=False), AddedToken("\u2581\u2581x")]
    )
    result["phi3"] = phi3

    gemma = convert(parsed["gemma"], unigram=False)
    gemma.normalizer = normalizers.Replace(" ", "\u2581")
    gemma.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    gemma.decoder = decoders.Sequence(strip[:3])
    gemma.add_tokens(
        [AddedToken(t, normalized=False) for t in OPTIONS["gemma"]["user_defined_symbols"]]
    )
    result["gemma"] = gemma

    t5 = convert(parsed["unigram"], unigram=True)
    t5.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(charsmap), normalizers.Strip(False, True),
            normalizers.Replace(tokenizers.Regex(" {2,}"), "\u2581"),
        ]
    )  # fmt: skip
    t5.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", "always", True)
    t5.decoder = decoders.Metaspace("\u2581", "always", True)
    t5.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    result["t5"] = t5

    xlmr = convert(parsed["unigram"], unigram=True)
    xlmr.normalizer = normalizers.Precompiled(charsmap)
    xlmr.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("\u2581", "always", True)]
    )
    xlmr.decoder = decoders.Metaspace("\u2581", "always", True)
    xlmr.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    xlmr.add_special_tokens([AddedToken("<mask>", normalized=True, lstrip=True)])
    result["xlmr"] = xlmr

    albert = convert(parsed["unigram-bytes"], unigram=True)
    albert.normalizer = normalizers.Sequence(
        [
            normalizers.Replace("``", '"'), normalizers.NFKD(), normalizers.StripAccents(),
            normalizers.Lowercase(), normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    )  # fmt: skip
    albert.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace("\u2581", "always", False),
            pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True),
        ]
    )  # fmt: skip
    albert.decoder = decoders.Metaspace("\u2581", "always", False)
    result["albert"] = albert
    return result


def main() -> None:
    rules = HERE / "rules.tsv"
    rules.write_text(RULES)
    documents = [p.read_text() for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]]
    corpus = [line for text in [*TEXTS, *documents] for line in text.splitlines() if line.strip()]
    try:
        trained = {name: train(name, corpus, rules) for name in OPTIONS}
    finally:
        rules.unlink()
    texts = [
        *TEXTS, *random_texts(40), " ", "  a  b ", "\u2581x \u2581\u2581x",
        "low lower <h1>low</h1>",
        "<|user|>\n hi <|end|>\n", "[INST] hi [/INST] yo</s>a", "<s>a <s> b", "a <mask> b",
        "A\u030a fine \u0660\u0661 \uff21\t\n\u200bx", "``Caf\u00e9'' 12,345.6", "\r\n\r\n e\u0301",
        "<start_of_turn>user\n   code  <h1>\u65e5\u672c\u8a9e\U0001f600",
        "\U0001f600\U0001f601 \ud55c\uae00",
    ]  # fmt: skip
    content = {
        "made with": {
            "sentencepiece": sentencepiece.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "texts": texts,
        "models": {},
        "tokenizers": {},
    }
    for name, data in trained.items():
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        ids = [processor.encode(text) for text in texts]
        content["models"][name] = {
            "model": base64.b64encode(data).decode(),
            "ids": ids,
            "decoded": [processor.decode(row) for row in ids],
        }
    for name, tokenizer in layouts(trained).items():
        content["tokenizers"][name] = {
            "tokenizer.json": json.loads(tokenizer.to_str()),
            "ids": [tokenizer.encode(text).ids for text in texts],
        }
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    (HERE / "sentencepiece.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
