"""A byte-level vocabulary with 11 merges, small enough to check by hand, in several formats."""

import bpe
from bpe.formats import bytes_to_unicode
from bpe.pretokenize import GPT2, split

# In order of rank. "lo" + "w" and "l" + "ow" both make "low"; only the second is a merge.
MERGES = [
    (b"o", b"w"), (b"l", b"ow"), (b"e", b"r"), (b" ", b"low"), (b" low", b"er"), (b"l", b"o"),
    (b"\xf0", b"\x9f"), (b"\xf0\x9f", b"\x98"), (b"a", b"a"), (b"aa", b"aa"), (b"1", b"2"),
]  # fmt: skip
SPECIAL = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
# As in SmolLM2, special tokens come first, so the ids are not ranks.
TOKENS = [bytes([b]) for b in range(256)] + [a + b for a, b in MERGES]
IDS = {token: i + len(SPECIAL) for i, token in enumerate(TOKENS)}


def encoding(**changes) -> bpe.Encoding:
    arguments = {"pattern": GPT2, "ranks": IDS, "special_tokens": SPECIAL, "merges": MERGES}
    return bpe.Encoding("tiny", **(arguments | changes))


def encode_reference(encoding: bpe.Encoding, text: str) -> list[int]:
    """Return the ids of a text by splitting it and merging every piece, without caches."""
    pieces = split(encoding._patterns, encoding.normalize(text))
    return [id for piece in pieces for id in encoding.encode_piece(piece.encode())]


def as_text(token: bytes) -> str:
    characters = bytes_to_unicode()
    return "".join(characters[b] for b in token)


def tokenizer_json() -> dict:
    """Return the tokenizer.json of Hugging Face for the same vocabulary."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token, id in SPECIAL.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": SPECIAL | {as_text(token): id for token, id in IDS.items()},
            "merges": [[as_text(a), as_text(b)] for a, b in MERGES],
        },
    }


def gguf_metadata() -> dict:
    """Return the GGUF metadata of the same vocabulary, with one unused token at the end."""
    return {
        "general.architecture": "llama",
        "general.name": "Tiny",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*SPECIAL, *map(as_text, IDS), "[PAD]"],
        "tokenizer.ggml.token_type": [3, 3, 4] + [1] * len(IDS) + [5],
        "tokenizer.ggml.merges": [f"{as_text(a)} {as_text(b)}" for a, b in MERGES],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
