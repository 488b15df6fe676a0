"""Find added tokens in a text: special tokens, and other texts that always become one token.

An added token is matched before the text is split and merged. A special token (`<|im_end|>`) is
matched only if the caller allows it. Any other added token is matched in every text, so that its
text becomes one token regardless of the merges: the runs of spaces in GPT-NeoX, the HTML tags in
Gemma.

The rules are those of Hugging Face's `tokenizers` (`added_vocabulary.rs`): the leftmost match, and
the longest of several that begin at the same position.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import regex

from bpe.special_tokens import special_token_regex

WHITESPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""The characters that Unicode and Rust call whitespace; `str.isspace` adds U+001C to U+001F."""


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token that is matched in a text before the rest of the text is split and merged.

    Attributes:
        content: the text of the token.
        id: the token id.
        special: whether the token is matched only if the caller allows it.
        single_word: whether no letter, digit or underscore may be adjacent.
        lstrip: whether the match includes the whitespace before the token.
        rstrip: whether the match includes the whitespace after the token.
        normalized: whether the token is matched in the normalized text instead of the raw text.
    """

    content: str
    id: int
    special: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


class TokenSplitter:
    """Splits texts at the added tokens of one set."""

    def __init__(self, tokens: Collection[AddedToken]):
        """Compile the search for `tokens`, each of which must have a different `content`."""
        self.tokens = tuple(tokens)
        self._by_content = {token.content: token for token in tokens}
        self._pattern = special_token_regex(frozenset(self._by_content)) if tokens else None
        self._is_plain = not any(t.single_word or t.lstrip or t.rstrip for t in tokens)

    def split(self, text: str) -> list[str | AddedToken]:
        """Return the added tokens in a text and the non-empty texts between them, in order."""
        if self._pattern is None:
            return [text] if text else []
        if self._is_plain:
            parts = self._pattern.split(text)  # tokens at odd positions
            if len(parts) == 1:
                return parts if text else []
            find = self._by_content
            return [find[part] if i % 2 else part for i, part in enumerate(parts) if part]
        return list(self._split_with_flags(text))

    def _split_with_flags(self, text: str) -> Iterator[str | AddedToken]:
        assert self._pattern is not None
        begin = 0
        for match in self._pattern.finditer(text):
            token, start, end = self._by_content[match.group()], match.start(), match.end()
            in_word = (start and _WORD.match(text, start - 1)) or _WORD.match(text, end)
            if token.single_word and in_word:
                continue
            if token.lstrip:
                start -= len(text[begin:start]) - len(text[begin:start].rstrip(WHITESPACE))
            if token.rstrip:
                while end < len(text) and text[end] in WHITESPACE:
                    end += 1
            if begin < start:
                yield text[begin:start]
            yield token
            begin = end
        if begin < len(text):
            yield text[begin:]


@functools.lru_cache(maxsize=64)
def token_splitter(tokens: frozenset[AddedToken]) -> TokenSplitter:
    """Return a `TokenSplitter` for a set of added tokens; the 64 latest are cached."""
    return TokenSplitter(tokens)


_WORD = regex.compile(r"\w")
