"""The encodings of OpenAI's models by name, without a network: gpt2 to o200k_harmony.

    >>> bpe.get_encoding("cl100k_base").encode("hamburger")
    [71, 47775]
    >>> bpe.encoding_for_model("gpt-4o").name
    'o200k_base'

OpenAI publishes each vocabulary as a `.tiktoken` file (MIT licence). `data/` holds their tokens in
the order of their ranks, packed: first the lengths of all tokens, a byte each, then their bytes,
one behind the other, all of it compressed. `save.tiktoken_lines` gives OpenAI's file back to the
byte; the tests let tiktoken itself check that. Seven names share three files: GPT-2's tokens are
the beginning of p50k_base, which adds runs of spaces for code.

The tables were taken from the npm package js-tiktoken 1.0.21. What belongs to which model, and the
special tokens, follow tiktoken 0.14.
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
    """How a named encoding is made."""

    pattern: str
    file: str  # in data/, without its ending
    num_tokens: int  # from the beginning of the file
    special_tokens: dict[str, int]
    skipped_rank: int | None = None  # the rank that no token of the file has


# The SHA-256 of the files as OpenAI publishes them; other bytes under these names are damaged.
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
    # For the gpt-oss models. Their 200018 has two spellings.
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
    # Whole names first, then their beginnings, for dated versions and fine-tuned models.
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
    """The names that `get_encoding` knows."""
    return list(ENCODING_SPECS)


@functools.cache
def get_encoding(name: str) -> Encoding:
    """The encoding of that name; the same object every time.

    Raises:
        ValueError: there is none, or the packed vocabulary is damaged.
    """
    if not isinstance(name, str):
        raise ValueError(f"the name of an encoding must be a string, got {name!r}")
    if (vocabulary := ENCODING_SPECS.get(name)) is None:
        raise ValueError(f"unknown encoding {name!r}; there are {', '.join(ENCODING_SPECS)}")
    encoding = Encoding(
        name,
        pattern=vocabulary.pattern,
        ranks=load_ranks(name),
        special_tokens=vocabulary.special_tokens,
    )
    encoding.factory = get_encoding, (name,)
    return encoding


def encoding_name_for_model(model: str) -> str:
    """The name of the encoding that a model of OpenAI's uses.

    Raises:
        KeyError: no such model is known.
    """
    if (name := MODEL_TO_ENCODING.get(model)) is not None:
        return name
    for prefix, name in MODEL_PREFIX_TO_ENCODING.items():
        if model.startswith(prefix):
            return name
    raise KeyError(
        f"no encoding is known for the model {model!r}; name one of {', '.join(ENCODING_SPECS)} to "
        "bpe.get_encoding"
    )


def encoding_for_model(model: str) -> Encoding:
    """The encoding that a model of OpenAI's uses.

    Raises:
        KeyError: no such model is known.
    """
    return get_encoding(encoding_name_for_model(model))


def load_ranks(name: str) -> dict[bytes, int]:
    """Token bytes to rank of a named encoding, in the order of ranks.

    Raises:
        ValueError: the file that comes with this package is not what it was.
    """
    vocabulary = ENCODING_SPECS[name]
    path = files("bpe") / "data" / f"{vocabulary.file}.xz"
    packed = path.read_bytes()
    if hashlib.sha256(packed).hexdigest() != _PACKED_SHA256[vocabulary.file]:
        raise ValueError(f"{path}: its SHA-256 is not the expected one; install pellucid again")
    tokens = _unpack(lzma.decompress(packed))[: vocabulary.num_tokens]
    numbers = (rank for rank in count() if rank != vocabulary.skipped_rank)
    return dict(zip(tokens, numbers, strict=False))


def _unpack(data: bytes) -> list[bytes]:
    """Lengths, a byte each, then as many bytes as they say."""
    num_tokens, num_bytes = 0, 0
    while num_tokens + num_bytes < len(data):
        num_bytes += data[num_tokens]
        num_tokens += 1
    ends = accumulate(data[:num_tokens], initial=num_tokens)
    return [data[start:end] for start, end in pairwise(ends)]
