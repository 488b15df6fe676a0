"""Tokenize text with WordPiece, the algorithm of BERT and most embedding models.

After Wu et al., "Google's Neural Machine Translation System" (2016), section 4.1, as used in BERT
(Devlin et al., 2018). There are three steps: normalize (remove control characters, case and
accents), split into words and single punctuation marks, and cover each word from the left with the
longest tokens of the vocabulary. Tokens inside a word begin with "##": "pears" may become "pear",
"##s". A word that cannot be covered becomes one [UNK].

Case, accents and whitespace are lost and cannot be decoded. An encoder model does not need them.

BERT's rules use categories of Unicode. Common tokenizers take them from Unicode 8.0 (2015), which
does not classify marks and punctuation added later. This module does the same, with
`data/unicode8.txt`, so that ids do not depend on the version of Python. There are two exceptions:
the lower case of letters added after Unicode 14, and U+11938, which decomposes into two characters
since Unicode 13.
"""

from __future__ import annotations

import functools
import importlib.resources
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Literal

from bpe.post_processor import bert_processor
from bpe.special_tokens import special_token_regex

_CACHE_WORDS = 1 << 16  # a full cache is cleared

# The blocks of CJK ideographs; every ideograph is a word. (In BERT's code the last block but one
# begins at U+2B820; in Hugging Face's `tokenizers`, which this module follows, at U+2B920.)
_IDEOGRAPHS = (
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B920, 0x2CEAF), (0x2F800, 0x2FA1F),
)  # fmt: skip


class WordPiece:
    """A WordPiece vocabulary with the rules of BERT. `bpe.load_wordpiece` reads one from a file.

    Attributes:
        vocab: token to id; tokens inside a word begin with `continuing_subword_prefix`.
        special_tokens: text to id of the special tokens.
        unk_id: the id for a word that cannot be covered.
        cls_id: the id before a text.
        sep_id: the id after a text.
        pad_id: the id that pads the rows of a batch, or None.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        *,
        special_tokens: Iterable[str] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        lowercase: bool = True,
        strip_accents: bool | None = None,
        handle_chinese_chars: bool = True,
        continuing_subword_prefix: str = "##",
        max_input_chars_per_word: int = 100,
        unk_token: str = "[UNK]",
        cls_token: str = "[CLS]",
        sep_token: str = "[SEP]",
        pad_token: str = "[PAD]",
    ):
        """Create a tokenizer.

        Args:
            vocab: token to id.
            special_tokens: the special tokens of `vocab`; `unk_token`, `cls_token` and `sep_token`
                are added to them.
            lowercase: whether to convert letters to lower case.
            strip_accents: whether to remove accents; None means the value of `lowercase`.
            handle_chinese_chars: whether every CJK ideograph is a word.
            continuing_subword_prefix: the prefix of tokens inside a word.
            max_input_chars_per_word: longer words become `unk_token`.
            unk_token: the token for a word that cannot be covered.
            cls_token: the token before a text.
            sep_token: the token after a text.
            pad_token: the token that pads the rows of a batch; it may be missing in `vocab`.

        Raises:
            ValueError: if a special token other than `pad_token` is not in `vocab`, or an id is
                repeated.
        """
        self.vocab = dict(vocab)
        self._id_to_token = {id: token for token, id in self.vocab.items()}
        if len(self._id_to_token) != len(self.vocab):
            tokens = [token for token, id in self.vocab.items() if self._id_to_token[id] != token]
            raise ValueError(
                f"WordPiece vocabulary: the tokens {tokens[0]!r} and "
                f"{self._id_to_token[self.vocab[tokens[0]]]!r} have the same id"
            )
        special = dict.fromkeys([unk_token, cls_token, sep_token, *special_tokens])
        if missing := [
            token for token in special if token not in self.vocab and token != pad_token
        ]:
            raise ValueError(f"WordPiece vocabulary lacks the special token {missing[0]!r}")
        self.special_tokens = {token: vocab[token] for token in special if token in vocab}
        self.unk_id, self.cls_id, self.sep_id = vocab[unk_token], vocab[cls_token], vocab[sep_token]
        self.pad_id = vocab.get(pad_token)
        self.continuing_subword_prefix = continuing_subword_prefix
        self.max_input_chars_per_word = max_input_chars_per_word
        self.lowercase = lowercase
        self.strip_accents = lowercase if strip_accents is None else strip_accents
        self.handle_chinese_chars = handle_chinese_chars

        self._longest_token = max(map(len, self.vocab))
        self._clean = _CharacterMap(
            functools.partial(_clean, handle_chinese_chars=handle_chinese_chars)
        )
        self._fold = _CharacterMap(
            functools.partial(_fold, lowercase=lowercase, strip_accents=self.strip_accents)
        )
        self._cache: dict[str, tuple[int, ...]] = {}

    def __repr__(self) -> str:
        return f"<WordPiece of {len(self.vocab)} tokens>"

    def __len__(self) -> int:
        """Return one more than the highest id."""
        return max(self._id_to_token) + 1

    # Encoding

    def encode(
        self,
        text: str,
        *,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        allowed_special: Literal["all"] | AbstractSet[str] = "all",
    ) -> list[int]:
        """Encode one text as [CLS] text [SEP].

        Args:
            text: the text.
            max_length: the maximum number of ids, including [CLS] and [SEP]; the end of a longer
                text is cut off.
            add_special_tokens: whether to add [CLS] and [SEP].
            allowed_special: the special tokens to encode as such where the text contains them, for
                example [MASK]. The default is all, as in Hugging Face's tokenizers; with an empty
                set, they are ordinary text.

        Raises:
            ValueError: if `max_length` is too small for [CLS] and [SEP].
        """
        ids = self._encode_text(text, allowed_special)
        if not add_special_tokens:
            return ids[:max_length]
        return bert_processor(self.cls_id, self.sep_id).process(ids, max_length)

    def encode_pair(
        self,
        first: str,
        second: str,
        *,
        max_length: int | None = None,
        allowed_special: Literal["all"] | AbstractSet[str] = "all",
    ) -> tuple[list[int], list[int]]:
        """Encode a pair of texts as [CLS] first [SEP] second [SEP].

        If the texts are too long, the end of the longer text is cut off until both have equal
        length, and then the end of both.

        Args:
            first: the first text.
            second: the second text.
            max_length: the maximum number of ids, including special tokens.
            allowed_special: as in `encode`.

        Returns:
            The ids, and the token type id of each: 0 up to the first [SEP], 1 after it.

        Raises:
            ValueError: if `max_length` is too small for the three special tokens.
        """
        a, b = self._encode_text(first, allowed_special), self._encode_text(second, allowed_special)
        return bert_processor(self.cls_id, self.sep_id).process_pair(a, b, max_length)

    def encode_batch(
        self,
        texts: Iterable[str],
        *,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        allowed_special: Literal["all"] | AbstractSet[str] = "all",
    ) -> list[list[int]]:
        """Encode each text as `encode` does, without padding.

        Args:
            texts: the texts.
            max_length: as in `encode`.
            add_special_tokens: as in `encode`.
            allowed_special: as in `encode`.

        Raises:
            ValueError: if `max_length` is too small for [CLS] and [SEP].
        """
        return [
            self.encode(
                text,
                max_length=max_length,
                add_special_tokens=add_special_tokens,
                allowed_special=allowed_special,
            )
            for text in texts
        ]

    def _encode_text(self, text: str, allowed: Literal["all"] | AbstractSet[str]) -> list[int]:
        special = self.special_tokens.keys()
        if allowed != "all":
            special = special & allowed
        if not special:
            return self._encode_ordinary(text)
        ids: list[int] = []
        # The group in the pattern makes `split` return the special tokens at odd indices.
        for i, part in enumerate(special_token_regex(frozenset(special)).split(text)):
            if i % 2:
                ids.append(self.special_tokens[part])
            elif part:
                ids += self._encode_ordinary(part)
        return ids

    def _encode_ordinary(self, text: str) -> list[int]:
        cache = self._cache
        ids: list[int] = []
        for word in self.pre_tokenize(text):
            if (word_ids := cache.get(word)) is None:
                if len(cache) >= _CACHE_WORDS:
                    cache.clear()
                word_ids = cache[word] = tuple(self.encode_word(word))
            ids += word_ids
        return ids

    # The three steps

    def normalize(self, text: str) -> str:
        """Return the normalized text, with spaces around punctuation marks and ideographs."""
        if not text.isascii():  # join surrogate pairs; lone ones become U+FFFD, removed below
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = text.translate(self._clean)
        if self.strip_accents:
            text = unicodedata.normalize("NFD", text)  # é becomes e and a combining accent
        return text.translate(self._fold)

    def pre_tokenize(self, text: str) -> list[str]:
        """Return the normalized words and punctuation marks of a text.

        >>> special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        >>> bert = WordPiece({token: id for id, token in enumerate(special)})
        >>> bert.pre_tokenize("Don't naïvely 数える!")
        ['don', "'", 't', 'naively', '数', 'える', '!']
        """
        return self.normalize(text).split()

    def encode_word(self, word: str) -> list[int]:
        """Return the ids that cover a normalized word: the longest tokens from the left."""
        if len(word) > self.max_input_chars_per_word:
            return [self.unk_id]
        ids, start = [], 0
        while start < len(word):
            prefix = self.continuing_subword_prefix if start else ""
            for end in range(min(len(word), start + self._longest_token), start, -1):
                if (id := self.vocab.get(prefix + word[start:end])) is not None:
                    break
            else:
                return [self.unk_id]
            ids.append(id)
            start = end
        return ids

    # Decoding

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the token of each id, including `continuing_subword_prefix`.

        Raises:
            KeyError: if the vocabulary has no such id.
        """
        return [self._id_to_token[id] for id in ids]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Decode ids to normalized words, separated by spaces.

        Args:
            ids: the ids.
            skip_special_tokens: whether to leave out special tokens.

        Raises:
            KeyError: if the vocabulary has no such id.
        """
        words: list[str] = []
        for token in self.convert_ids_to_tokens(ids):
            if skip_special_tokens and token in self.special_tokens:
                continue
            if words and token.startswith(self.continuing_subword_prefix):
                words[-1] += token[len(self.continuing_subword_prefix) :]
            else:
                words.append(token)
        return " ".join(words)


# Characters


class _CharacterMap(dict[int, str]):
    """A mapping for `str.translate`, filled when a character first occurs."""

    def __init__(self, replace: Callable[[str], str]):
        self._replace = replace

    def __missing__(self, code: int) -> str:
        self[code] = replaced = self._replace(chr(code))
        return replaced


def _clean(character: str, *, handle_chinese_chars: bool) -> str:
    """Return the replacement of a character in the first pass of `normalize`.

    This pass replaces whitespace, removes control characters and isolates ideographs.
    """
    if character in "\t\n\r":
        return " "
    category = unicodedata.category(character)
    if category in ("Zs", "Zl", "Zp"):
        return " "
    # Cc: control characters; Co: private use.
    if category in ("Cc", "Co") or character == "\ufffd" or _unicode8().get(character) == "Cf":
        return ""
    if handle_chinese_chars and any(low <= ord(character) <= high for low, high in _IDEOGRAPHS):
        return f" {character} "
    return character


def _fold(character: str, *, lowercase: bool, strip_accents: bool) -> str:
    """Return the replacement of a character in the second pass of `normalize`.

    This pass removes accents, isolates punctuation marks and converts to lower case.
    """
    category = _unicode8().get(character)
    if strip_accents and category == "Mn":
        return ""
    symbol = character.isascii() and character.isprintable() and not character.isalnum()
    if (symbol and character != " ") or category == "P":  # in ASCII also $ + < = > ^ ` | ~
        return f" {character} "
    return character.lower() if lowercase else character


@functools.cache
def _unicode8() -> dict[str, str]:
    """Return a mapping of character to Unicode 8.0 category, for the categories Cf, Mn and P."""
    categories = {}
    lines = importlib.resources.files("bpe").joinpath("data/unicode8.txt").read_text("ascii")
    for line in lines.splitlines():
        if not line.startswith("#"):
            codes, category = line.split()
            first, _, last = codes.partition("..")
            for code in range(int(first, 16), int(last or first, 16) + 1):
                categories[chr(code)] = category
    return categories
