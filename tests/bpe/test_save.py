"""Saved vocabularies: bpe, tiktoken and tokenizers load them with the same result."""

import random

import pytest

import bpe
from bpe.pretokenize import PATTERNS
from bpe.save import recover_merges, save, tiktoken_lines, to_oniguruma, tokenizer_json
from bpe.trainer import train
from tests.bpe import tiny
from tests.naming import naming

SPECIAL = ("<|endoftext|>", "<|im_end|>")


@pytest.fixture(scope="module")
def texts(golden) -> list[str]:
    return golden("train")["texts"]


def trained(texts: list[str], pattern: str) -> bpe.Encoding:
    return train(texts, vocab_size=800, pattern=pattern, special_tokens=SPECIAL, min_frequency=1)


@pytest.mark.parametrize("name", PATTERNS)
def test_saved_files_load_same_encoding(name, texts, tmp_path):
    encoding = trained(texts, PATTERNS[name])
    save(encoding, tmp_path / "tokenizer.json")
    save(encoding, tmp_path / "mine.tiktoken")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["mine.tiktoken", "tokenizer.json"]
    from_json = bpe.load(tmp_path / "tokenizer.json").encoding
    from_ranks = bpe.from_tiktoken(
        tmp_path / "mine.tiktoken",
        pattern=PATTERNS[name],
        special_tokens=encoding.special_tokens,
    ).encoding
    for text in texts:
        ids = encoding.encode(text, allowed_special="all")
        assert from_json.encode(text, allowed_special="all") == ids
        assert from_ranks.encode(text, allowed_special="all") == ids


def test_encoding_with_merge_list_is_saved_as_json_only(tmp_path):
    encoding = tiny.encoding()
    save(encoding, tmp_path / "tokenizer.json")
    loaded = bpe.load(tmp_path / "tokenizer.json").encoding
    assert loaded.ranks == encoding.ranks and loaded.special_tokens == encoding.special_tokens
    for text in ("low lower lo low<|im_end|> aaaa 12", "loow"):
        ids = encoding.encode(text, allowed_special="all")
        assert loaded.encode(text, allowed_special="all") == ids
    with pytest.raises(ValueError, match=naming(".tiktoken", "tokenizer.json")):
        save(encoding, tmp_path / "x.tiktoken")
    assert not (tmp_path / "x.tiktoken").exists()


def test_token_without_merge_is_saved(tmp_path):
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256, b"whole": 257}
    with pytest.raises(ValueError, match=naming(257, "b'whole'")):
        recover_merges(ranks)
    encoding = bpe.Encoding("w", pattern=r"\w+|\W+", ranks=ranks, special_tokens={})
    save(encoding, tmp_path / "tokenizer.json")
    loaded = bpe.load(tmp_path / "tokenizer.json").encoding
    for text in ("whole", "ab", "wholeab"):
        assert loaded.encode(text) == encoding.encode(text)
    assert loaded.encode("whole") == [257]


def test_recover_merges_finds_parts_of_higher_rank():
    """The rank of a token may be lower than that of its parts: "abc" is 256, "ab" is 257."""
    ranks = {bytes([b]): b for b in range(256)} | {b"abc": 256, b"ab": 257}
    assert recover_merges(ranks) == [(b"ab", b"c"), (b"a", b"b")]


@pytest.mark.parametrize("name", ["p50k_edit", "cl100k_base", "o200k_harmony"])
def test_special_tokens_with_gaps_keep_their_ids(name, tmp_path):
    """Bug: files with gaps in the ids, or with two special tokens of one id, failed to load."""
    encoding = bpe.get_encoding(name)
    ranks = dict(list(encoding.ranks.items())[:400])  # the complete vocabulary takes seconds
    encoding = bpe.Encoding(
        name, pattern=encoding.patterns, ranks=ranks, special_tokens=encoding.special_tokens
    )
    save(encoding, tmp_path / "tokenizer.json")
    loaded = bpe.load(tmp_path / "tokenizer.json").encoding
    assert loaded.special_tokens == encoding.special_tokens
    assert loaded.decode([200018] if name == "o200k_harmony" else []) in ("", "<|endofprompt|>")


def test_special_token_with_text_of_ordinary_token_is_rejected(tmp_path):
    encoding = tiny.encoding(special_tokens={"low": 5000})
    with pytest.raises(ValueError, match=naming("special token", "'low'", tiny.IDS[b"low"])):
        tokenizer_json(encoding)


def test_unsupported_suffix_is_rejected(tmp_path):
    with pytest.raises(ValueError, match=naming("out.txt", ".tiktoken", ".json")):
        save(tiny.encoding(), tmp_path / "out.txt")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"\p{N}{1,3}+| ?\p{L}++", r"(?>\p{N}{1,3})| ?\p{L}++"),
        (r"[^\]}{$]{2}+|\s++$", r"(?>[^\]}{$]{2})|\s++\z"),
        (r"\$+|[$]|a$", r"\$+|[$]|a\z"),
        (r"\p{N}{1,3}|x{2,}", r"\p{N}{1,3}|x{2,}"),
        (
            r"[\u0041\U00010400-\U0001044f]|\\U00010400",
            r"[\u0041\x{00010400}-\x{0001044f}]|\\U00010400",
        ),
    ],
)
def test_to_oniguruma_converts_other_syntax(pattern, expected):
    assert to_oniguruma(pattern) == expected


@pytest.mark.parametrize("pattern", ["(?s:.+)", "(?m)^x", "(?i-s:a.)"])
def test_to_oniguruma_rejects_flags(pattern):
    with pytest.raises(ValueError, match=naming(repr(pattern), "flags")):
        to_oniguruma(pattern)


def test_to_oniguruma_rejects_possessive_group():
    with pytest.raises(ValueError, match=naming("(?>...)")):
        to_oniguruma(r"(?:ab){1,3}+")


@pytest.mark.parity
@pytest.mark.parametrize("name", PATTERNS)
def test_saved_files_match_tokenizers_and_tiktoken(name, texts, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tiktoken = pytest.importorskip("tiktoken")
    read_ranks = pytest.importorskip("tiktoken.load").load_tiktoken_bpe
    encoding = trained(texts, PATTERNS[name])
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(encoding), encoding="utf-8")
    (tmp_path / "mine.tiktoken").write_text(tiktoken_lines(encoding), encoding="utf-8")
    huggingface = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    openai = tiktoken.Encoding(
        "mine",
        pat_str=PATTERNS[name],
        mergeable_ranks=read_ranks(str(tmp_path / "mine.tiktoken")),
        special_tokens=encoding.special_tokens,
    )
    for text in [*texts, "\n".join(texts)]:
        ids = encoding.encode(text, allowed_special="all")
        assert huggingface.encode(text).ids == ids
        assert openai.encode(text, allowed_special="all") == ids


@pytest.mark.parity
@pytest.mark.parametrize("name", ["gpt2", "p50k_edit", "cl100k_base"])
def test_named_encodings_match_tokenizers(name, texts):
    """Bug: tokenizers renumbered special tokens with gaps in their ids."""
    tokenizers = pytest.importorskip("tokenizers")
    encoding = bpe.get_encoding(name)
    huggingface = tokenizers.Tokenizer.from_str(tokenizer_json(encoding))
    for text in [*texts, "x".join(encoding.special_tokens)]:
        ids = encoding.encode(text, allowed_special="all")
        assert huggingface.encode(text).ids == ids
        assert huggingface.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parity
def test_random_vocabularies_match_tokenizers():
    """The tokens are random and in random order; no sequence of merges makes some of them."""
    tokenizers = pytest.importorskip("tokenizers")
    for seed in range(100):
        rng = random.Random(seed)
        tokens = {bytes(rng.choices(b"abc", k=rng.randint(2, 5))) for _ in range(20)}
        order = [*(bytes([b]) for b in range(256)), *rng.sample(sorted(tokens), len(tokens))]
        ranks = {token: id for id, token in enumerate(order)}
        encoding = bpe.Encoding("r", pattern=r"[\s\S]+", ranks=ranks, special_tokens={})
        huggingface = tokenizers.Tokenizer.from_str(tokenizer_json(encoding))
        for _ in range(50):
            text = "".join(rng.choices("abc", k=rng.randint(1, 12)))
            assert huggingface.encode(text).ids == encoding.encode(text), (seed, text)
