"""Read the normalizers, pre-tokenizers and decoders of a `tokenizer.json`.

For a byte-level vocabulary they are converted to split patterns (`bpe.pretokenize`), and for a
vocabulary of characters to arguments of `bpe.sentencepiece.SentencePiece`. A step that cannot be
converted raises a ValueError with the file, the key and the step.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import regex

from bpe import normalizers
from bpe.added_tokens import WHITESPACE
from bpe.charsmap import Charsmap
from bpe.formats.checks import get_required, short_repr
from bpe.normalizers import SPACE_SYMBOL, Step
from bpe.pretokenize import GPT2, SMOLLM, NormalizationForm, compile_pattern, find_all


def steps_of(spec: Any, key: str, where: str) -> list[Any]:
    """Return the steps of a normalizer, pre-tokenizer or decoder as one flat list.

    Args:
        spec: one step, a Sequence of steps, or None.
        key: the key of the steps in a Sequence, for example "normalizers".
        where: the file and key, for error messages.
    """
    if spec is None:
        return []
    if isinstance(spec, dict) and spec.get("type") == "Sequence":
        inner = get_required(spec, key, list, where)
        return [step for item in inner for step in steps_of(item, key, where)]
    return [spec]


def _unsupported(step: Any, where: str) -> ValueError:
    return ValueError(f"{where}: {short_repr(step)} is not supported")


# Byte-level vocabularies


def byte_level_normalization(spec: Any, where: str) -> NormalizationForm | None:
    """Return the Unicode normalization form of a byte-level vocabulary, or None.

    Raises:
        ValueError: if the normalizer is neither null nor one normalization form.
    """
    steps = steps_of(spec, "normalizers", where)
    if not steps:
        return None
    for form in get_args(NormalizationForm):
        if steps == [{"type": form}]:
            return form
    forms = ", ".join(get_args(NormalizationForm))
    raise ValueError(f"{where}: {short_repr(spec)} is not supported; use null or one of {forms}")


def split_patterns(spec: Any, where: str) -> str | list[str]:
    """Return the split patterns that are equivalent to the `pre_tokenizer` of a byte-level BPE.

    Raises:
        ValueError: if a step is not supported, or the last step is not ByteLevel.
    """
    steps = steps_of(spec, "pretokenizers", where)
    patterns: list[str] = []
    for i, step in enumerate(steps):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                if i != len(steps) - 1:
                    raise ValueError(
                        f"{where}: expected ByteLevel as the last step, got step {i + 1} of "
                        f"{len(steps)}"
                    )
                if step.get("use_regex", True):
                    patterns.append(GPT2)
                if patterns == [r"\p{N}", GPT2]:
                    return SMOLLM  # equivalent, in one pass
                return patterns or [r"[\s\S]+"]
            case {"type": "Split", "behavior": "Removed"}:
                # Inverted, this step removes the text between matches. A pattern that matches all
                # text leaves nothing to remove, so "Isolated" is equivalent.
                if step.get("invert") is not True:
                    raise _unsupported(step, where)
                patterns.append(_pattern_of(step, where))
            case {"type": "Split" | "Digits" | "Punctuation"}:
                rule = _split_rule(step, where)
                if rule.behavior != "Isolated":
                    raise _unsupported(step, where)
                patterns.append(rule.pattern)
            case _:
                raise _unsupported(step, where)
    raise ValueError(f"{where}: expected ByteLevel as the last step, got {short_repr(steps[-1:])}")


# Pre-tokenizers


@dataclass(frozen=True)
class SplitRule:
    """A pre-tokenizer that splits at the matches of a pattern (`Split` of tokenizers).

    Attributes:
        pattern: the regular expression.
        behavior: how a match is treated: "Isolated" (it is a piece), "Removed",
            "MergedWithPrevious", "MergedWithNext", or "Contiguous" (adjacent matches are one
            piece).
        invert: whether `behavior` applies to the texts between matches instead of the matches.
    """

    pattern: str
    behavior: str = "Isolated"
    invert: bool = False

    def __call__(self, text: str) -> list[str]:
        """Return the pre-tokens of a text in order, without removed text."""
        spans = find_all(compile_pattern(self.pattern), text)
        parts: list[tuple[str, bool]] = []  # text, whether it is a match
        end = 0
        for start, stop in [*spans, (len(text), len(text))]:
            parts += [(text[end:start], self.invert), (text[start:stop], not self.invert)]
            end = stop
        pieces: list[str] = []
        was_match = False
        for part, is_match in parts:
            if not part:
                continue
            if is_match and self.behavior == "Removed":
                pass
            elif pieces and (
                (self.behavior == "MergedWithPrevious" and is_match and not was_match)
                or (self.behavior == "Contiguous" and is_match == was_match)
                or (self.behavior == "MergedWithNext" and was_match and not is_match)
            ):
                pieces[-1] += part
            else:
                pieces.append(part)
            was_match = is_match
        return pieces


_PUNCTUATION = r"[\p{P}!-/:-@\[-`{-~]"
_BEHAVIORS = {"Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"}


def _pattern_of(step: Mapping[str, Any], where: str) -> str:
    match step.get("pattern"):
        case {"Regex": str(pattern)}:
            return _checked_pattern(pattern, where)
        case {"String": str(text)}:
            return regex.escape(text)
    raise _unsupported(step, where)


def _checked_pattern(pattern: str, where: str) -> str:
    try:
        compile_pattern(pattern)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return pattern


def _split_rule(step: Mapping[str, Any], where: str) -> SplitRule:
    """Return the `SplitRule` that is equivalent to a step of a pre-tokenizer."""
    match step:
        case {"type": "Split", "behavior": str(behavior)} if behavior in _BEHAVIORS:
            invert = step.get("invert", False)
            if isinstance(invert, bool):
                return SplitRule(_pattern_of(step, where), behavior, invert)
        case {"type": "Digits", "individual_digits": bool(individual)}:
            return SplitRule(r"\p{N}" if individual else r"\p{N}+")
        case {"type": "Punctuation"}:
            behavior = step.get("behavior", "Isolated")
            if behavior in _BEHAVIORS:
                return SplitRule(_PUNCTUATION, behavior)
        case {"type": "WhitespaceSplit"}:
            return SplitRule(f"[{WHITESPACE}]", "Removed")
        case {"type": "Whitespace"}:
            return SplitRule(r"\w+|[^\w\s]+", "Removed", invert=True)
        case {"type": "CharDelimiterSplit", "delimiter": str(delimiter)}:
            return SplitRule(regex.escape(delimiter), "Removed")
    raise _unsupported(step, where)


@dataclass(frozen=True)
class PreTokenizers:
    """A sequence of split rules with an optional Metaspace between them.

    The text and the resulting pre-tokens contain ordinary spaces. Only the rules of `after` see
    U+2581 instead of spaces.

    Attributes:
        before: the rules before Metaspace, which are applied to texts with spaces.
        after: the rules after Metaspace, which are applied to texts with U+2581 for a space.
        prefix: whether a space is put before each pre-token of `before` that does not begin with
            one.
        split_before_space: whether to split before every space.
    """

    before: tuple[Callable[[str], list[str]], ...] = ()
    after: tuple[Callable[[str], list[str]], ...] = ()
    prefix: bool = False
    split_before_space: bool = False

    def __call__(self, text: str) -> list[str]:
        """Return the pre-tokens of a text in order."""
        pieces = [text]
        for rule in self.before:
            pieces = [part for piece in pieces for part in rule(piece)]
        if self.prefix:
            pieces = [piece if piece.startswith(" ") else " " + piece for piece in pieces]
        if self.split_before_space:
            pieces = [p for piece in pieces for p in regex.findall("(?s) ?[^ ]+| ", piece)]
        pieces = [piece.replace(" ", SPACE_SYMBOL) for piece in pieces]
        for rule in self.after:
            pieces = [part for piece in pieces for part in rule(piece)]
        return [piece.replace(SPACE_SYMBOL, " ") for piece in pieces]


class PreTokenization(NamedTuple):
    """The arguments of `SentencePiece` that are equivalent to a pre-tokenizer.

    Attributes:
        pre_tokenizer: as in `SentencePiece`.
        metaspace: as in `SentencePiece`.
        split_before_space: as in `SentencePiece`.
        steps: normalizers to apply after those of the file.
        escapes_spaces: whether the normalizer or the pre-tokenizer writes spaces as U+2581.
    """

    pre_tokenizer: PreTokenizers | None = None
    metaspace: str | None = None
    split_before_space: bool = False
    steps: tuple[Step, ...] = ()
    escapes_spaces: bool = False


def pre_tokenization(spec: Any, escapes_spaces: bool, where: str) -> PreTokenization:
    """Convert the pre-tokenizers of a vocabulary of characters to arguments of `SentencePiece`.

    Args:
        spec: the value of `pre_tokenizer`.
        escapes_spaces: whether the normalizer writes spaces as U+2581.
        where: the file and key, for error messages.

    Raises:
        ValueError: if a step is not supported.
    """
    before: list[Callable[[str], list[str]]] = []
    after: list[Callable[[str], list[str]]] = []
    steps = steps_of(spec, "pretokenizers", where)
    metaspace: str | None = None
    split = False
    has_metaspace = escapes_spaces
    for step in steps:
        if isinstance(step, dict) and step.get("type") == "Metaspace":
            if before and has_metaspace:
                raise _unsupported(step, where)
            metaspace, split = _metaspace(step, where)
            has_metaspace = True
            continue
        if not isinstance(step, dict):
            raise _unsupported(step, where)
        if has_metaspace and step.get("pattern") == {"String": " "}:
            continue  # has no effect, because no spaces are left (Gemma)
        (after if has_metaspace else before).append(_split_rule(step, where))
    words_only = before == [_split_rule({"type": "WhitespaceSplit"}, where)] and not after
    if words_only and metaspace == "always":
        return PreTokenization(None, None, True, (normalizers.JoinWords(),), True)
    if not before and not after:
        return PreTokenization(None, metaspace, split, (), has_metaspace)
    if before and metaspace == "first":
        raise ValueError(
            f"{where}: Metaspace with prepend_scheme 'first' after {short_repr(steps[0])} is not "
            "supported"
        )
    rules = PreTokenizers(
        tuple(before),
        tuple(after),
        prefix=bool(before) and metaspace == "always",
        split_before_space=split,
    )
    return PreTokenization(rules, None if before else metaspace, split, (), has_metaspace)


def _metaspace(step: Mapping[str, Any], where: str) -> tuple[str | None, bool]:
    """Return when a Metaspace puts a space before a text, and whether it splits at spaces.

    The first value is "always", "first" (only at the start of a text), or None for never.
    """
    if step.get("replacement", SPACE_SYMBOL) != SPACE_SYMBOL:
        raise _unsupported(step, where)
    scheme = step.get("prepend_scheme")
    if scheme is None:  # old files
        scheme = "always" if step.get("add_prefix_space", True) else "never"
    if scheme not in ("always", "first", "never"):
        raise _unsupported(step, where)
    return None if scheme == "never" else scheme, step.get("split", True) is not False


# Normalizers


def read_normalizers(spec: Any, where: str) -> tuple[list[Step], bool]:
    """Return the normalizers of a vocabulary of characters, and whether they write U+2581.

    Returns:
        The normalizers, and whether one of them replaces spaces by U+2581.

    Raises:
        ValueError: if a step is not supported, or damaged.
    """
    steps: list[Step] = []
    escapes_spaces = False
    for step in steps_of(spec, "normalizers", where):
        match step:
            case {"type": "Prepend", "prepend": str(prefix)}:
                steps.append(normalizers.Prepend(prefix))
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                escapes_spaces |= (old, new) == (" ", SPACE_SYMBOL)
                steps.append(normalizers.Replace(old, new))
            case {"type": "Replace", "pattern": {"Regex": str(old)}, "content": str(new)}:
                old = _checked_pattern(old, where)
                steps.append(normalizers.Replace(old, new, is_regex=True))
            case {"type": "NFC" | "NFD" | "NFKC" | "NFKD" as form}:
                steps.append(normalizers.UnicodeForm(form))
            case {"type": "Precompiled", "precompiled_charsmap": str(data)}:
                try:
                    charsmap = Charsmap(base64.b64decode(data, validate=True))
                except (binascii.Error, ValueError) as error:
                    raise ValueError(f"{where}: {error}") from error
                steps.append(normalizers.Precompiled(charsmap))
            case {"type": "Precompiled", "precompiled_charsmap": None}:
                pass
            case {"type": "Lowercase"}:
                steps.append(normalizers.Lowercase())
            case {"type": "StripAccents"}:
                steps.append(normalizers.StripAccents())
            case {"type": "Nmt"}:
                steps.append(normalizers.Nmt())
            case {"type": "Strip", "strip_left": bool(left), "strip_right": bool(right)}:
                steps.append(normalizers.Strip(left, right))
            case _:
                raise _unsupported(step, where)
    return steps, escapes_spaces


# Decoders


def decoder_strips_prefix(spec: Any, where: str) -> bool:
    """Return whether the decoder of a vocabulary of characters drops a space at the start.

    Raises:
        ValueError: if a step is not supported.
    """
    strips = False
    for step in steps_of(spec, "decoders", where):
        match step:
            case {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}:
                pass
            case {"type": "ByteFallback" | "Fuse"}:
                pass
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                strips |= start == 1
            case {"type": "Metaspace"}:
                strips |= _metaspace(step, where)[0] is not None
            case _:
                raise _unsupported(step, where)
    return strips
