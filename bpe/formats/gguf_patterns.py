"""The split patterns of the pre-tokenizers that GGUF files name in `tokenizer.ggml.pre`.

The groups of names are those of llama.cpp (`llama-vocab.cpp`), without "whitespace", which drops
characters. Where llama.cpp adapts a pattern to its regex engine, or splits by code (kimi-k2 and
afmoe), the pattern here is that of the original tokenizer.json. GGUF files do not contain the
normalization, and llama.cpp does not apply it; this module adds it as in the Hugging Face tokenizer
with which the model was trained.
"""

from __future__ import annotations

from typing import NamedTuple

from bpe.pretokenize import GPT2, LLAMA3, O200K, QWEN2, QWEN35, SMOLLM, NormalizationForm


class PreTokenizer(NamedTuple):
    """The settings that one value of `tokenizer.ggml.pre` stands for.

    Attributes:
        patterns: the split patterns, applied in turn.
        ignore_merges: as in `bpe.vocab.Vocab`.
        normalization: as in `bpe.vocab.Vocab`.
        add_bos: the value of `tokenizer.ggml.add_bos_token` if a file has no such key.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    normalization: NormalizationForm | None = None
    add_bos: bool = False


# The letters with upper and lower case in the patterns of DeepSeek's first models.
_CASED_LETTERS = (
    r"A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-"
    r"\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    r"\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-"
    r"\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15"
    r"\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    r"\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    r"\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d"
    r"\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183"
    r"\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    r"\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-"
    r"\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    r"\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*",
)

DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED_LETTERS}]+",
    r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}+",
)
_DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}",
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    rf" ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_TEKKEN = "|".join([*_CASED_WORDS, r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _SPACES])
_BAILINGMOE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SPARK = (
    r"\p{N}{1,3}",
    r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r" ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+",
    r"\p{N}",
)
_YOUTU = (
    r"[\uac00-\ud7a3\u3131-\u318e]+|"
    r"[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+|"
    r"[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "|".join(
        [
            *(f"{word}{_CONTRACTIONS}?" for word in _CASED_WORDS),
            r"\p{N}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            _SPACES,
        ]
    ),
)
_NO_HAN_CAPITALS, _NO_HAN_SMALL = rf"(?:(?!\p{{Han}}){_CAPITALS})", rf"(?:(?!\p{{Han}}){_SMALL})"
_KIMI_K2 = "|".join(
    [
        r"\p{Han}+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_NO_HAN_CAPITALS}*{_NO_HAN_SMALL}+{_CONTRACTIONS}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_NO_HAN_CAPITALS}+{_NO_HAN_SMALL}*{_CONTRACTIONS}?",
        r"\p{N}{1,3}",
        _SYMBOLS,
        _SPACES,
    ]
)
_AFMOE = (
    r"(?<!\p{N})\p{N}{1,2}(?=(?:\p{N}{3})*(?!\p{N}))|\p{N}{3}",  # groups of three from the right
    r"[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
    r"\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af"
    r"\u1100-\u11ff]+",
    _DEEPSEEK_V3[2],
)
_MINICPM5 = (
    r"\p{N}{1,3}",
    rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_SYMBOLS}|{_SPACES}",
)
_UFAKZEKA = rf"{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
_CHAMELEON = (
    "<sentinel:[0-9]+>",
    "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
    r"([\t\n]|    |  )",
    r"\p{N}",
    r"[\p{P}!-/:-@\[-`{-~]",
    GPT2,
)
_SEED_CODER = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_JAIS2 = (
    rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|\s*[\r\n]+|"
    + "".join(rf"\s{{{n}}}(?!\S)|" for n in (512, 256, 128, 64, 32, 16, 8, 4))
    + r"\s{1,2}(?!\S)|\s{1}"
)
_EXAONE_MOE = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

_GROUPS: dict[str, PreTokenizer] = {
    "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 jais trillion granite-docling"
    " jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe": PreTokenizer(
        (GPT2,)
    ),
    "mpt olmo modern-bert": PreTokenizer((GPT2,), normalization="NFC"),
    "default": PreTokenizer(DEFAULT),
    "smollm starcoder refact codeshell exaone minerva-7b mellum2": PreTokenizer((SMOLLM,)),
    "command-r": PreTokenizer((SMOLLM,), normalization="NFC"),
    "falcon": PreTokenizer(_FALCON),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": PreTokenizer(
        (LLAMA3,), ignore_merges=True, add_bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe": PreTokenizer((LLAMA3,)),
    "glm4 glm5": PreTokenizer((LLAMA3,), ignore_merges=True),
    "jais-2": PreTokenizer((_JAIS2,)),
    "qwen2 deepseek-r1-qwen f2llmv2": PreTokenizer((QWEN2,), normalization="NFC"),
    "qwen35": PreTokenizer((QWEN35,)),
    "megrez kormo stablelm2 hunyuan solar-open grok-2": PreTokenizer((QWEN2,)),
    "laguna": PreTokenizer((r"[^\n]+|[\n]+", QWEN2)),
    "gpt-4o llama4 kanana2 talkie minimax-m2": PreTokenizer((O200K,)),
    "granite-embed-multi-97m": PreTokenizer((O200K,), ignore_merges=True),
    "kimi-k2": PreTokenizer((_KIMI_K2,)),
    "youtu": PreTokenizer(_YOUTU, ignore_merges=True),
    "spark2_5": PreTokenizer(_SPARK),
    "afmoe": PreTokenizer(_AFMOE),
    "minicpm5": PreTokenizer(_MINICPM5, ignore_merges=True),
    "ufakzeka": PreTokenizer((_UFAKZEKA,)),
    "chameleon": PreTokenizer(_CHAMELEON, add_bos=True),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "tiny_aya cohere2moe": PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", O200K)),
    "deepseek-llm": PreTokenizer(_DEEPSEEK_LLM),
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": PreTokenizer(_DEEPSEEK_V3),
    "bailingmoe bailingmoe2 llada-moe": PreTokenizer((_BAILINGMOE,)),
    "seed-coder": PreTokenizer((_SEED_CODER,)),
    "exaone-moe": PreTokenizer((_EXAONE_MOE,)),
    "bloom poro-chat gpt3-finnish": PreTokenizer((_BLOOM,)),
    "viking": PreTokenizer((_BLOOM, r"\p{N}")),
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
}

PRE_TOKENIZERS = {name: value for names, value in _GROUPS.items() for name in names.split()}
"""The settings of each value of `tokenizer.ggml.pre`."""
