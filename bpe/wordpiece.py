"""WordPiece: how BERT and the embedding models after it cut text, which is not by merges.

After Wu et al., "Google's Neural Machine Translation System" (2016), section 4.1, as BERT has it
(Devlin et al., 2018). Three steps: normalise (control characters go, letters lose case and
accents), cut into words and single punctuation marks, cover each word from the left with the
longest piece that the vocabulary has. Pieces inside a word are spelled with "##" in front: "pears"
may be "pear", "##s". A word that cannot be covered becomes [UNK] as a whole.

What is lost cannot be decoded: case, accents, white space. An encoder only reads, and has no need.

BERT's rules name categories of Unicode, and the tokenizers in use read them from Unicode 8.0
(2015): a mark or a punctuation character that was added since is an ordinary letter to them. We
follow, from `data/unicode8.txt`, so that ids do not change with the version of Python. Two things
still do: the lower case of letters added since Unicode 14, and U+11938, which falls into two
characters since Unicode 13.
"""

from __future__ import annotations

import functools
import importlib.resources
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Literal

from bpe.special_tokens import special_token_regex

_CACHE_WORDS = 1 << 16  # a cache that is full starts anew

# Scripts written without spaces, of which every character is a word of its own: the blocks of CJK
# ideographs. (BERT's own code begins the last but one at U+2B820; `tokenizers`, from which models
# are served, at U+2B920.)
_IDEOGRAPHS = (
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B920, 0x2CEAF), (0x2F800, 0x2FA1F),
)  # fmt: skip


class WordPiece:
    """A WordPiece vocabulary with BERT's rules. `bpe.load_wordpiece` reads one from a file.

    Attributes:
        vocab: piece to id; pieces that continue a word begin with `prefix`.
        special_tokens: spelling to id of the tokens that stand for themselves.
        unk_id, cls_id, sep_id: the tokens for a word that cannot be covered, before a text, and
            after it.
        pad_id: the token that fills rows of a batch up, if there is one.
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
        """
        Args:
            vocab: piece to id.
            special_tokens: those of `vocab` that stand for themselves; the others named below are
                added to them.
            lowercase: whether letters lose their case.
            strip_accents: whether they lose their accents; None: if they lose their case.
            split_ideographs: whether every CJK ideograph is a word.
            prefix: how pieces inside a word begin.
            longest_word: words of more characters are `unk` without a try.
            unk: what stands for a word that cannot be covered.
            cls: what stands before a text.
            sep: what stands after a text.
            pad: what fills up rows of a batch; the vocabulary may lack it.

        Raises:
            ValueError: if `unk`, `cls`, `sep` or a special token is no piece, or ids repeat.
        """
        self.vocab = dict(vocab)
        self._id_to_token = {id: piece for piece, id in self.vocab.items()}
        if len(self._id_to_token) != len(self.vocab):
            raise ValueError("WordPiece vocabulary: two pieces have the same id")
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
        return f"<WordPiece of {len(self.vocab)} pieces>"

    def __len__(self) -> int:
        """One more than the highest id."""
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
        """Encodes one text: [CLS] text [SEP].

        Args:
            text: any string.
            max_length: how many ids at most, with [CLS] and [SEP]; the end of the text is cut off.
            add_special_tokens: whether [CLS] and [SEP] are put around the text.
            allowed_special: the special tokens that the text may spell: [MASK] written out is then
                the token. By default all, as in Hugging Face's tokenizers; a set of none reads
                their names as ordinary text.

        Raises:
            ValueError: if `max_length` has no room for [CLS] and [SEP].
        """
        ids = self._encode_text(text, allowed_special)
        room = _max_text_length(max_length, 2 if add_special_tokens else 0)
        ids = ids[:room]
        return [self.cls_id, *ids, self.sep_id] if add_special_tokens else ids

    def encode_pair(
        self,
        first: str,
        second: str,
        *,
        max_length: int | None = None,
        allowed_special: Literal["all"] | AbstractSet[str] = "all",
    ) -> tuple[list[int], list[int]]:
        """Encodes two texts that are read together: [CLS] first [SEP] second [SEP].

        If they are too long, the longer loses its end until both are of equal length, then both do.

        Args:
            first: any string.
            second: any string.
            max_length: how many ids at most, special tokens included.
            allowed_special: as in `encode`.

        Returns:
            The ids, and for each its type: 0 up to the first [SEP], 1 after it.

        Raises:
            ValueError: if `max_length` has no room for the three special tokens.
        """
        a, b = self._encode_text(first, allowed_special), self._encode_text(second, allowed_special)
        room = _max_text_length(max_length, 3)
        if room is not None and len(a) + len(b) > room:
            short = min(len(a), len(b), room // 2)
            if len(a) <= len(b):
                a, b = a[:short], b[: room - short]
            else:
                a, b = a[: room - short], b[:short]
        ids = [self.cls_id, *a, self.sep_id, *b, self.sep_id]
        return ids, [0] * (len(a) + 2) + [1] * (len(b) + 1)

    def encode_batch(
        self,
        texts: Iterable[str],
        *,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        allowed_special: Literal["all"] | AbstractSet[str] = "all",
    ) -> list[list[int]]:
        """Encodes each text as `encode` does; rows keep their own lengths.

        Raises:
            ValueError: if `max_length` has no room for [CLS] and [SEP].
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
        # The group in the pattern makes `split` return the special tokens at the odd places.
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
            if (found := cache.get(word)) is None:
                if len(cache) >= _CACHE_WORDS:
                    cache.clear()
                found = cache[word] = tuple(self.encode_word(word))
            ids += found
        return ids

    # The three steps

    def normalize(self, text: str) -> str:
        """The text as words will be looked up, with spaces around what is a word by itself."""
        if not text.isascii():  # join surrogate pairs; lone surrogates become U+FFFD, then nothing
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = text.translate(self._clean)
        if self.strip_accents:
            text = unicodedata.normalize("NFD", text)  # é: e and an accent, two characters
        return text.translate(self._fold)

    def pre_tokenize(self, text: str) -> list[str]:
        """The words and punctuation marks of a text, normalised.

        >>> special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        >>> bert = WordPiece({token: id for id, token in enumerate(special)})
        >>> bert.pre_tokenize("Don't naïvely 数える!")
        ['don', "'", 't', 'naively', '数', 'える', '!']
        """
        return self.normalize(text).split()

    def encode_word(self, word: str) -> list[int]:
        """The ids that cover a word: from the left, always the longest piece that fits."""
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

    # Back

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        """The spelling of each id, with the prefix where it continues a word.

        Raises:
            KeyError: if the vocabulary has no such id.
        """
        return [self._id_to_token[id] for id in ids]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The words of the ids, one space between any two; what `normalize` dropped stays lost.

        Raises:
            KeyError: if the vocabulary has no such id.
        """
        words: list[str] = []
        for piece in self.convert_ids_to_tokens(ids):
            if skip_special_tokens and piece in self.special_tokens:
                continue
            if words and piece.startswith(self.continuing_subword_prefix):
                words[-1] += piece[len(self.continuing_subword_prefix) :]
            else:
                words.append(piece)
        return " ".join(words)


def _max_text_length(max_length: int | None, special: int) -> int | None:
    if max_length is not None and max_length < special:
        raise ValueError(f"max_length={max_length} is less than the {special} special tokens")
    return None if max_length is None else max_length - special


# Characters


class _CharacterMap(dict[int, str]):
    """A table for `str.translate`, computed for a character when it first occurs."""

    def __init__(self, replace: Callable[[str], str]):
        self._replace = replace

    def __missing__(self, code: int) -> str:
        self[code] = replaced = self._replace(chr(code))
        return replaced


def _clean(character: str, *, handle_chinese_chars: bool) -> str:
    """The first pass: white space becomes a space, what cannot be seen goes."""
    if character in "\t\n\r":
        return " "
    category = unicodedata.category(character)
    if category in ("Zs", "Zl", "Zp"):
        return " "
    # Cc: control characters; Co: private use, which has no meaning that a model could know.
    if category in ("Cc", "Co") or character == "\ufffd" or _unicode8().get(character) == "Cf":
        return ""
    if handle_chinese_chars and any(low <= ord(character) <= high for low, high in _IDEOGRAPHS):
        return f" {character} "
    return character


def _fold(character: str, *, lowercase: bool, strip_accents: bool) -> str:
    """The second pass, after decomposition: accents and case go, punctuation stands alone."""
    category = _unicode8().get(character)
    if strip_accents and category == "Mn":
        return ""
    symbol = character.isascii() and character.isprintable() and not character.isalnum()
    if (symbol and character != " ") or category == "P":  # in ASCII also $ + < = > ^ ` | ~
        return f" {character} "
    return character.lower() if lowercase else character


@functools.cache
def _unicode8() -> dict[str, str]:
    """Character to "Cf", "Mn" or "P", for the characters that Unicode 8.0 puts there."""
    categories = {}
    lines = importlib.resources.files("bpe").joinpath("data/unicode8.txt").read_text("ascii")
    for line in lines.splitlines():
        if not line.startswith("#"):
            codes, category = line.split()
            first, _, last = codes.partition("..")
            for code in range(int(first, 16), int(last or first, 16) + 1):
                categories[chr(code)] = category
    return categories
