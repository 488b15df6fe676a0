"""Limits on single tokens: only some ids, no end of the text, or no end before a length.

They have the interface of a grammar, so the engine applies them as a bitmask, and combine with one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from transformer.engine import Grammar, GrammarMatcher


@dataclass(frozen=True, kw_only=True)
class TokenLimits:
    """Limits on the tokens of a sequence; a `transformer.engine.Grammar`.

    Attributes:
        bitmask: the tokens that can be generated at all, uint32 [ceil(n/32)].
        bitmask_before_end: those that can be generated while the text must not end.
        min_tokens: the number of tokens before the text may end; infinity if it never may.
        grammar: a grammar that limits the text, too; None for free text. Where it allows only
            tokens that the limits forbid, the grammar counts: its text is complete.
    """

    bitmask: np.ndarray
    bitmask_before_end: np.ndarray
    min_tokens: float
    grammar: Grammar | None = None

    @classmethod
    def create(
        cls,
        n_vocab: int,
        *,
        allowed_ids: Collection[int] = (),
        stop_ids: Collection[int] = (),
        min_tokens: float = 0,
        grammar: Grammar | None = None,
    ) -> TokenLimits:
        """Return limits for a vocabulary of `n_vocab` ids; no `allowed_ids` allow all ids."""
        is_allowed = np.zeros(-(-n_vocab // 32) * 32, bool)
        is_allowed[list(allowed_ids) or slice(n_vocab)] = True
        is_allowed_before_end = is_allowed.copy()
        is_allowed_before_end[list(stop_ids)] = False
        return cls(
            bitmask=_pack(is_allowed),
            bitmask_before_end=_pack(is_allowed_before_end),
            min_tokens=min_tokens,
            grammar=grammar,
        )

    def matcher(self) -> _Matcher:
        """Return the state before the first token."""
        return _Matcher(self, self.grammar.matcher() if self.grammar else None)


class _Matcher:
    """The state of limits and grammar in one sequence; a `transformer.engine.GrammarMatcher`."""

    def __init__(self, limits: TokenLimits, grammar: GrammarMatcher | None) -> None:
        self._limits, self._grammar, self._num_tokens = limits, grammar, 0

    @property
    def is_finished(self) -> bool:
        return self._grammar is not None and self._grammar.is_finished

    def token_bitmask(self) -> np.ndarray:
        may_end = self._num_tokens >= self._limits.min_tokens
        limits = self._limits.bitmask if may_end else self._limits.bitmask_before_end
        if self._grammar is None:
            return limits
        bitmask = self._grammar.token_bitmask()
        combined = bitmask & limits[: len(bitmask)]
        return combined if combined.any() else bitmask

    def accept(self, token: int) -> None:
        self._num_tokens += 1
        if self._grammar is not None:
            self._grammar.accept(token)


def _pack(is_allowed: np.ndarray) -> np.ndarray:
    """Return a mask [32 W] as uint32 [W]: token i is bit i % 32 of word i // 32."""
    return np.packbits(is_allowed, bitorder="little").view("<u4")
