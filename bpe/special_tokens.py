"""Special tokens in a text: how they are found, and refused where they are not allowed.

The contract and the message are those of tiktoken.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from typing import NoReturn


@functools.lru_cache(maxsize=128)
def special_token_regex(tokens: frozenset[str]) -> re.Pattern[str]:
    """A pattern with one group that finds any of `tokens`; of several at one place, the longest."""
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def check_disallowed_special(text: str, disallowed: Collection[str]) -> None:
    """Refuse a text that spells a special token.

    Raises:
        TypeError: it is no text.
        ValueError: it spells one of `disallowed`.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, not {text!r:.80}")
    if disallowed and (match := special_token_regex(frozenset(disallowed)).search(text)):
        _raise_disallowed(match.group())


def fix_surrogates(text: str) -> str:
    """The text without surrogates: pairs are joined, lone ones become U+FFFD, as in tiktoken."""
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
