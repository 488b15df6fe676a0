"""Grammars that limit generated tokens: JSON schemas, regular expressions, context-free grammars.

A grammar is compiled by llguidance (https://github.com/guidance-ai/llguidance), an Earley parser
over derivatives of regular expressions that walks a trie of the vocabulary. Before each decoding
step it gives one bit per token: whether the text so far, with this token, can still become a text
of the grammar.

JSON is written as Python's `json.dumps` writes it: one space after a comma and a colon, no other
whitespace. Small models would otherwise fill an answer with line breaks.
"""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import llguidance
import numpy as np

import bpe
from transformer.engine import GrammarError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

GrammarFormat = Literal["json_schema", "regex", "grammar", "lark"]
MAX_CACHED_GRAMMARS = 64  # compiled grammars kept per model, and as many errors
MAX_GRAMMAR_BYTES = 2**18  # of a schema, a regular expression or a grammar
IDLE_SECONDS = 1.0  # time without requests after which the trie of a loaded model is built
_JSON_OPTIONS: JsonCompileOptions = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "lenient": False,  # refuse keywords that are not implemented
    "coerce_one_of": False,  # refuse a oneOf whose branches overlap
}
# Error messages without the state of the parser, which contains the whole grammar.
_LIMITS = llguidance.LLParserLimits(verbose_errors=False)


@dataclass(frozen=True)
class GrammarSource:
    """The text of a grammar.

    Attributes:
        format: "json_schema"; "regex", in the syntax of Rust's regex crate; "lark", in llguidance's
            variant of Lark; or "grammar", in that or in GBNF.
        text: the grammar.
        frame: a grammar in Lark of the text around it, which names it `@output`; empty for none.
    """

    format: GrammarFormat
    text: str
    frame: str = ""

    @classmethod
    def from_schema(cls, schema: Mapping[str, Any]) -> GrammarSource:
        """Return the source of a JSON schema."""
        return cls("json_schema", json.dumps(schema))

    @classmethod
    def from_choices(cls, choices: list[str]) -> GrammarSource:
        """Return the source of a grammar that allows exactly the given strings."""
        alternatives = " | ".join(json.dumps(choice) for choice in choices)
        return cls("grammar", f"start: {alternatives}")


def lark_schema(schema: Mapping[str, Any]) -> str:
    """Return a JSON schema as an expression of llguidance's variant of Lark."""
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}"


class Matcher:
    """The state of a grammar in one sequence; a `transformer.engine.GrammarMatcher`.

    Args:
        matcher: the state before the first token.
        num_tokens: the size of the vocabulary.
    """

    def __init__(self, matcher: llguidance.LLMatcher, num_tokens: int) -> None:
        self._matcher, self._num_words = matcher, -(-num_tokens // 32)

    @property
    def is_finished(self) -> bool:
        """Whether no token can follow."""
        return self._matcher.is_stopped()

    def token_bitmask(self) -> np.ndarray:
        """Return a bit per token, uint32 [ceil(n/32)]: whether the token can come next.

        Raises:
            GrammarError: the grammar exceeds a limit.
        """
        bits = self._matcher.compute_bitmask()
        self._check()
        return np.frombuffer(bits, np.uint32)[: self._num_words]  # there can be one word more

    def accept(self, token: int) -> None:
        """Advance by a token.

        Raises:
            GrammarError: the token is not allowed, or the grammar exceeds a limit.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(self._matcher.get_error().partition("\n")[0])


class CompiledGrammar:
    """A compiled grammar; a `transformer.engine.Grammar`."""

    def __init__(self, matcher: llguidance.LLMatcher, num_tokens: int) -> None:
        self._matcher, self._num_tokens = matcher, num_tokens

    def matcher(self) -> Matcher:
        """Return the state before the first token."""
        return Matcher(self._matcher.deep_copy(), self._num_tokens)


class GrammarCompiler:
    """Compiles grammars for the vocabulary of one tokenizer, and caches them.

    Compiling a grammar takes about a millisecond, but the first one needs the trie of the
    vocabulary, which takes up to a second. It is built once, by `build` or by `compile`. Any thread
    can call them.

    Args:
        tokenizer: the tokenizer of the model. Its stop tokens end a text of the grammar.
    """

    def __init__(self, tokenizer: bpe.Tokenizer) -> None:
        self._vocabulary = tokenizer
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[GrammarSource, CompiledGrammar] = OrderedDict()
        self._errors: OrderedDict[GrammarSource, str] = OrderedDict()  # messages
        self._lock, self._build_lock = threading.Lock(), threading.Lock()

    def build(self) -> llguidance.LLTokenizer:
        """Return the trie of the vocabulary, after building it if necessary."""
        with self._build_lock:
            if self._tokenizer is None:
                self._tokenizer = llguidance.LLTokenizer(
                    llguidance.TokenizerWrapper(_Vocabulary(self._vocabulary)),
                    n_vocab=self._vocabulary.encoding.n_vocab,
                    eos_token=sorted(self._vocabulary.stop_ids) or None,
                    slices=llguidance.LLTokenizer.json_slices(),
                )
            return self._tokenizer

    def compile(self, source: GrammarSource, *, is_kept: bool = True) -> CompiledGrammar:
        """Return a compiled grammar.

        Args:
            source: the grammar.
            is_kept: whether to cache the result, for grammars that will be compiled again. Errors
                are always cached.

        Raises:
            GrammarError: the grammar has an error, uses a keyword that is not supported, allows no
                text at all, or is too large.
        """
        if (size := len(source.text.encode())) > MAX_GRAMMAR_BYTES:
            raise GrammarError(f"the grammar has {size} bytes, more than {MAX_GRAMMAR_BYTES}")
        with self._lock:
            if source in self._compiled:
                self._compiled.move_to_end(source)
                return self._compiled[source]
            if source in self._errors:
                self._errors.move_to_end(source)
                raise GrammarError(self._errors[source])
        try:
            compiled = self._compile(source)
        except GrammarError as error:
            self._keep(self._errors, source, str(error))
            raise
        if is_kept:
            self._keep(self._compiled, source, compiled)
        return compiled

    def _keep(
        self, cache: OrderedDict[GrammarSource, Any], source: GrammarSource, value: Any
    ) -> None:
        with self._lock:
            cache[source] = value
            if len(cache) > MAX_CACHED_GRAMMARS:
                cache.popitem(last=False)

    def _compile(self, source: GrammarSource) -> CompiledGrammar:
        try:
            if source.format == "json_schema":
                grammar = llguidance.LLMatcher.grammar_from_json_schema(
                    source.text,
                    overrides=_JSON_OPTIONS,
                )
            else:
                grammar = llguidance.grammar_from(source.format, source.text)
        except ValueError as error:  # no JSON object, nested too deep, or invalid GBNF
            raise GrammarError(str(error)) from None
        if source.frame:
            is_json = source.format in ("json_schema", "regex")
            inner = json.loads(grammar)["grammars"][0] if is_json else {"lark_grammar": grammar}
            outer = {"lark_grammar": source.frame}
            grammar = json.dumps({"grammars": [outer, inner | {"name": "output"}]})
        tokenizer = self.build()
        compiled = CompiledGrammar(
            llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS),
            tokenizer.vocab_size,
        )
        if not compiled.matcher().token_bitmask().any():
            raise GrammarError("the grammar allows no text")
        return compiled


def build_when_idle(model: _HasGrammars) -> None:
    """Build the trie of a loaded model on a thread, so that no request waits for it.

    The build blocks all other Python threads for up to a second. So it begins when the model has
    been idle for `IDLE_SECONDS`: the first answers after the start are not delayed.
    """
    model_ref = weakref.ref(model)  # a waiting thread must not keep an unloaded model in memory

    def build() -> None:
        idle_since = time.monotonic()
        while (model := model_ref()) is not None and threading.main_thread().is_alive():
            if not model.is_idle:
                idle_since = time.monotonic()
            if time.monotonic() - idle_since >= IDLE_SECONDS:
                model.grammar_compiler.build()
                return
            del model
            time.sleep(IDLE_SECONDS / 10)

    threading.Thread(target=build, name="build-vocabulary-trie").start()


class _HasGrammars(Protocol):
    """A loaded model with grammars."""

    @property
    def is_idle(self) -> bool: ...

    @property
    def grammar_compiler(self) -> GrammarCompiler: ...


class _Vocabulary:
    """The vocabulary in the form that `llguidance.TokenizerWrapper` reads."""

    def __init__(self, tokenizer: bpe.Tokenizer) -> None:
        encoding = self._encoding = tokenizer.encoding
        known = frozenset(encoding.token_ids)
        self.bos_token_id = None
        self.eos_token_id = min(tokenizer.stop_ids, default=0)
        self.special_token_ids = [
            encoding.encode_single_token(token) for token in sorted(encoding.special_tokens_set)
        ]
        self.tokens = [
            encoding.decode_single_token_bytes(id) if id in known else b""
            for id in range(encoding.n_vocab)
        ]

    def __call__(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)
