"""Find special tokens in a text, and reject those that are not allowed.

The behavior and the error message are those of tiktoken.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from typing import NoReturn


@functools.lru_cache(maxsize=128)
def special_token_regex(tokens: frozenset[str]) -> re.Pattern[str]:
    """Return a pattern with one group that matches any of `tokens`, the longest at a position."""
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def check_disallowed_special(text: str, disallowed: Collection[str]) -> None:
    """Check that a text contains no disallowed special token.

    Raises:
        TypeError: if `text` is not a string.
        ValueError: if the text contains one of `disallowed`.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, not {text!r:.80}")
    if disallowed and (match := special_token_regex(frozenset(disallowed)).search(text)):
        _raise_disallowed(match.group())


def fix_surrogates(text: str) -> str:
    """Replace surrogates: pairs by their character, lone ones by U+FFFD, as in tiktoken."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _raise_disallowed(token: str) -> NoReturn:
    raise ValueError(
        f"Encountered text corresponding to disallowed special token {token!r}.\n"
        "To encode it as the special token, pass it to `allowed_special`, e.g. "
        f"`allowed_special={{{token!r}}}`.\n"
        "To encode it as ordinary text, disable the check for this token by passing "
        f"`disallowed_special=(enc.special_tokens_set - {{{token!r}}})`, "
        "or for all of them by passing `disallowed_special=()`.\n"
    )
