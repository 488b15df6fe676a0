"""Writing vocabularies: what is read back, and what tiktoken and tokenizers make of it."""

import pytest

import bpe
from bpe.pretokenize import PATTERNS
from bpe.save import merges_of, save, tiktoken_lines, to_oniguruma, tokenizer_json
from bpe.train import train
from tests.bpe import tiny

SPECIAL = ("<|endoftext|>", "<|im_end|>")


@pytest.fixture(scope="module")
def texts(golden) -> list[str]:
    return golden("train")["texts"]


def trained(texts: list[str], pattern: str) -> bpe.Encoding:
    return train(texts, vocab_size=800, pattern=pattern, special_tokens=SPECIAL, min_frequency=1)


@pytest.mark.parametrize("name", PATTERNS)
def test_read_back(name, texts, tmp_path):
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


def test_merges_of_their_own_are_written_as_they_are(tmp_path):
    encoding = tiny.encoding()
    save(encoding, tmp_path / "tokenizer.json")
    again = bpe.load(tmp_path / "tokenizer.json").encoding
    assert again.ranks == encoding.ranks and again.special_tokens == encoding.special_tokens
    for text in ("low lower lo low<|im_end|> aaaa 12", "loow"):
        ids = encoding.encode(text, allowed_special="all")
        assert again.encode(text, allowed_special="all") == ids
    with pytest.raises(ValueError, match="its ids are no merge priorities"):
        save(encoding, tmp_path / "x.tiktoken")
    assert not (tmp_path / "x.tiktoken").exists()


def test_a_token_that_no_merge_makes_stays_a_token():
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256, b"whole": 257}
    assert merges_of(ranks) == [(b"a", b"b")]


def test_names(tmp_path):
    with pytest.raises(ValueError, match=r"out.txt: the name must end in .tiktoken or .json"):
        save(tiny.encoding(), tmp_path / "out.txt")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"\p{N}{1,3}+| ?\p{L}++", r"(?>\p{N}{1,3})| ?\p{L}++"),
        (r"[^\]}{$]{2}+|\s++$", r"(?>[^\]}{$]{2})|\s++\z"),
        (r"\$+|[$]|a$", r"\$+|[$]|a\z"),
        (r"\p{N}{1,3}|x{2,}", r"\p{N}{1,3}|x{2,}"),
    ],
)
def test_the_dialect_of_tokenizers(pattern, expected):
    assert to_oniguruma(pattern) == expected


def test_a_possessive_group_is_refused():
    with pytest.raises(ValueError, match="atomic group"):
        to_oniguruma(r"(?:ab){1,3}+")


@pytest.mark.parity
@pytest.mark.parametrize("name", PATTERNS)
def test_tokenizers_and_tiktoken_read_it(name, texts, tmp_path):
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
