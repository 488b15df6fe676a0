"""Load the encodings of OpenAI models by name, offline: gpt2 to o200k_harmony.

    >>> bpe.get_encoding("cl100k_base").encode("hamburger")
    [71, 47775]
    >>> bpe.encoding_for_model("gpt-4o").name
    'o200k_base'

OpenAI publishes each vocabulary as a `.tiktoken` file (MIT license). `data/` has the tokens in the
order of their ranks as an LZMA-compressed file: first the lengths of all tokens, one byte each,
then the concatenated bytes. `save.tiktoken_lines` restores OpenAI's file exactly, which the tests
check with tiktoken. Seven names share three files: the tokens of GPT-2 are the first ones of
p50k_base, which adds runs of spaces for code.

The vocabularies were taken from the npm package js-tiktoken 1.0.21. The encoding of each model and
the special tokens follow tiktoken 0.14.
"""

from __future__ import annotations

import functools
import hashlib
import lzma
from dataclasses import dataclass
from importlib.resources import files
from itertools import accumulate, count, pairwise

from bpe.encoding import Encoding
from bpe.pretokenize import CL100K, GPT2, O200K

# The files in data/ and their SHA-256.
_PACKED_SHA256 = {
    "p50k_base": "7600f9c8e77402392bd09f3538489f623fb0a3bd625c405ff587448c831a808c",
    "cl100k_base": "119e0f78f31a2e2c32ed4a5d6728ae04bb294c7a4f583d78da4c35ba512e9a36",
    "o200k_base": "651ec77316f64b858e6cbec935bbd4d8a6c8959a51be08e5c5675bdd31cfd824",
}


@dataclass(frozen=True, kw_only=True)
class EncodingSpec:
    """The definition of a named encoding.

    Attributes:
        pattern: the split pattern.
        file: the name of the file in data/, without its suffix.
        num_tokens: the number of tokens to take from the beginning of the file.
        special_tokens: text to id.
        skipped_rank: the rank below `num_tokens` that no ordinary token has, because it is the id
            of a special token; None if there is no such rank.
    """

    pattern: str
    file: str
    num_tokens: int
    special_tokens: dict[str, int]
    skipped_rank: int | None = None


# The SHA-256 of the files that OpenAI publishes, by name without suffix.
TIKTOKEN_SHA256 = {
    "r50k_base": "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    "p50k_base": "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069",
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
}

_ENDOFTEXT = "<|endoftext|>"
_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_GPT2 = EncodingSpec(
    pattern=GPT2, file="p50k_base", num_tokens=50256, special_tokens={_ENDOFTEXT: 50256}
)
_HARMONY = ("start", "end", "message", "reserved_200009", "reserved_200010", "reserved_200011")

ENCODING_SPECS = {
    "gpt2": _GPT2,
    "r50k_base": _GPT2,
    "p50k_base": EncodingSpec(
        pattern=GPT2,
        file="p50k_base",
        num_tokens=50280,
        special_tokens={_ENDOFTEXT: 50256},
        skipped_rank=50256,
    ),
    "p50k_edit": EncodingSpec(
        pattern=GPT2,
        file="p50k_base",
        num_tokens=50280,
        special_tokens={_ENDOFTEXT: 50256} | {name: 50281 + i for i, name in enumerate(_FIM)},
        skipped_rank=50256,
    ),
    "cl100k_base": EncodingSpec(
        pattern=CL100K,
        file="cl100k_base",
        num_tokens=100256,
        special_tokens={_ENDOFTEXT: 100257}
        | {name: 100258 + i for i, name in enumerate(_FIM)}
        | {"<|endofprompt|>": 100276},
    ),
    "o200k_base": EncodingSpec(
        pattern=O200K,
        file="o200k_base",
        num_tokens=199998,
        special_tokens={_ENDOFTEXT: 199999, "<|endofprompt|>": 200018},
    ),
    # For the gpt-oss models. Two special tokens have the id 200018.
    "o200k_harmony": EncodingSpec(
        pattern=O200K,
        file="o200k_base",
        num_tokens=199998,
        special_tokens={_ENDOFTEXT: 199999, "<|endofprompt|>": 200018, "<|startoftext|>": 199998}
        | {f"<|reserved_{id}|>": id for id in (200000, 200001)}
        | {"<|return|>": 200002, "<|constrain|>": 200003, "<|reserved_200004|>": 200004}
        | {"<|channel|>": 200005}
        | {f"<|{name}|>": 200006 + i for i, name in enumerate(_HARMONY)}
        | {"<|call|>": 200012}
        | {f"<|reserved_{id}|>": id for id in range(200013, 201088)},
    ),
}

_MODELS = {
    # Full names. MODEL_PREFIX_TO_ENCODING has prefixes, for dated versions and fine-tuned models.
    "gpt2": "gpt2 gpt-2",
    "r50k_base": """
        davinci curie babbage ada text-davinci-001 text-curie-001 text-babbage-001 text-ada-001
        text-similarity-davinci-001 text-similarity-curie-001 text-similarity-babbage-001
        text-similarity-ada-001 text-search-davinci-doc-001 text-search-curie-doc-001
        text-search-babbage-doc-001 text-search-ada-doc-001 code-search-babbage-code-001
        code-search-ada-code-001""",
    "p50k_base": """
        text-davinci-003 text-davinci-002 code-davinci-002 code-davinci-001 code-cushman-002
        code-cushman-001 davinci-codex cushman-codex""",
    "p50k_edit": "text-davinci-edit-001 code-davinci-edit-001",
    "cl100k_base": """
        gpt-4 gpt-3.5-turbo gpt-3.5 gpt-35-turbo davinci-002 babbage-002 text-embedding-ada-002
        text-embedding-3-small text-embedding-3-large""",
    "o200k_base": "o1 o3 o4-mini gpt-5 gpt-4.1 gpt-4o",
}
MODEL_TO_ENCODING = {model: name for name, models in _MODELS.items() for model in models.split()}
MODEL_PREFIX_TO_ENCODING = {
    "o1-": "o200k_base",
    "o3-": "o200k_base",
    "o4-mini-": "o200k_base",
    "gpt-5": "o200k_base",
    "gpt-4.5-": "o200k_base",
    "gpt-4.1-": "o200k_base",
    "chatgpt-4o-": "o200k_base",
    "gpt-4o-": "o200k_base",
    "gpt-4-": "cl100k_base",
    "gpt-3.5-turbo-": "cl100k_base",
    "gpt-35-turbo-": "cl100k_base",
    "gpt-oss-": "o200k_harmony",
    "ft:gpt-4o": "o200k_base",
    "ft:gpt-4": "cl100k_base",
    "ft:gpt-3.5-turbo": "cl100k_base",
    "ft:davinci-002": "cl100k_base",
    "ft:babbage-002": "cl100k_base",
}


def list_encoding_names() -> list[str]:
    """Return the names that `get_encoding` accepts."""
    return list(ENCODING_SPECS)


@functools.cache
def get_encoding(name: str) -> Encoding:
    """Return the encoding with a name; every call returns the same object.

    Raises:
        ValueError: if there is no encoding with this name, or its data file is damaged.
    """
    if not isinstance(name, str):
        raise ValueError(f"the name of an encoding must be a string, got {name!r}")
    if (spec := ENCODING_SPECS.get(name)) is None:
        raise ValueError(f"unknown encoding {name!r}; choose one of {', '.join(ENCODING_SPECS)}")
    encoding = Encoding(
        name,
        pattern=spec.pattern,
        ranks=load_ranks(name),
        special_tokens=spec.special_tokens,
    )
    encoding.factory = get_encoding, (name,)
    return encoding


def encoding_name_for_model(model: str) -> str:
    """Return the name of the encoding that an OpenAI model uses.

    Raises:
        KeyError: if the model is unknown.
    """
    if (name := MODEL_TO_ENCODING.get(model)) is not None:
        return name
    for prefix, name in MODEL_PREFIX_TO_ENCODING.items():
        if model.startswith(prefix):
            return name
    raise KeyError(
        f"no encoding is known for the model {model!r}; call bpe.get_encoding with one of "
        f"{', '.join(ENCODING_SPECS)}"
    )


def encoding_for_model(model: str) -> Encoding:
    """Return the encoding that an OpenAI model uses.

    Raises:
        KeyError: if the model is unknown.
    """
    return get_encoding(encoding_name_for_model(model))


def load_ranks(name: str) -> dict[bytes, int]:
    """Return the ranks of a named encoding: token bytes to rank, in ascending order of ranks.

    Raises:
        ValueError: if the data file of this package is damaged.
    """
    spec = ENCODING_SPECS[name]
    path = files("bpe") / "data" / f"{spec.file}.xz"
    packed = path.read_bytes()
    if hashlib.sha256(packed).hexdigest() != _PACKED_SHA256[spec.file]:
        raise ValueError(f"{path} is damaged (wrong SHA-256); reinstall pellucid")
    tokens = _unpack(lzma.decompress(packed))[: spec.num_tokens]
    ranks = (rank for rank in count() if rank != spec.skipped_rank)
    return dict(zip(tokens, ranks, strict=False))


def _unpack(data: bytes) -> list[bytes]:
    """Return the tokens of a data file: their lengths, one byte each, then their bytes."""
    num_tokens, num_bytes = 0, 0
    while num_tokens + num_bytes < len(data):
        num_bytes += data[num_tokens]
        num_tokens += 1
    ends = accumulate(data[:num_tokens], initial=num_tokens)
    return [data[start:end] for start, end in pairwise(ends)]
