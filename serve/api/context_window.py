"""Check that prompt and completion fit the model's context window.

Prompt and completion share the context. A request that does not fit returns 400 with the sentence
of OpenAI's API, because client programs match that sentence to shorten a conversation and retry.
"""

import functools
from typing import NamedTuple

from bpe import Encoding
from serve.api.errors import APIError


class Wording(NamedTuple):
    """The parts of a route's error message for input that is too long."""

    param: str | None  # the request field that the error names
    prompt_too_long: str  # end of the sentence when the input alone is too long
    total_too_long: str  # end of the sentence when input and completion together are too long


CHAT_WORDING = Wording(
    "messages",
    ". However, your messages resulted in {prompt} tokens. "
    "Please reduce the length of the messages.",
    ". However, you requested {total} tokens ({prompt} in the messages, {completion} in the "
    "completion). Please reduce the length of the messages or completion.",
)
COMPLETION_WORDING = Wording(
    None,
    ". However, your prompt resulted in {prompt} tokens. Please reduce the length of the prompt.",
    ", however you requested {total} tokens ({prompt} in your prompt; {completion} for the "
    "completion). Please reduce your prompt; or completion length.",
)
RESPONSE_WORDING = CHAT_WORDING._replace(param="input")
EDIT_WORDING = Wording(
    "input",
    ". However, your input and instruction resulted in {prompt} tokens. "
    "Please reduce the length of the input.",
    "",  # a request for an edit has no max_tokens
)


def resolve_max_tokens(
    wording: Wording, context: int, prompt: int, max_tokens: int | None, default: int
) -> int:
    """Return the maximum number of tokens to generate, or refuse a prompt that does not fit.

    Args:
        wording: `CHAT_WORDING`, `COMPLETION_WORDING` or `EDIT_WORDING`.
        context: Length of the model's context window, in tokens.
        prompt: Length of the prompt, in tokens.
        max_tokens: The limit in the request; None for as many as fit, up to ``default``.
        default: The route's default for ``max_tokens``.

    Raises:
        APIError: 400 context_length_exceeded if prompt and ``max_tokens`` exceed ``context``.
    """
    remaining = context - prompt
    if remaining < 0 or (remaining == 0 and max_tokens != 0):
        raise _context_length_error(wording, context, prompt, None)
    if max_tokens is not None and max_tokens > remaining:
        raise _context_length_error(wording, context, prompt, max_tokens)
    return min(default, remaining) if max_tokens is None else max_tokens


def refuse_too_long(wording: Wording, context: int, encoding: Encoding, text: str) -> None:
    """Refuse a text that cannot fit the context, without tokenizing all of it.

    Tokenizing megabytes of text takes seconds. A text of S bytes has at least S / L tokens, where L
    is the length of the longest token of the vocabulary in bytes. S is counted after Unicode
    normalization and without the bytes that the tokenizer drops.

    Raises:
        APIError: 400 context_length_exceeded if ``text`` has more than ``context`` tokens by this
            bound.
    """
    if len(text) <= context:  # short enough to tokenize in full
        return
    size = len(encoding.normalize(text).encode().translate(None, encoding.dropped_bytes))
    lower_bound = -(-size // longest_token(encoding))
    if lower_bound > context:
        estimate = max(lower_bound, _estimate(encoding, text))
        raise _context_length_error(wording, context, f"about {estimate}", None)


def _estimate(encoding: Encoding, text: str, samples: int = 16, length: int = 1024) -> int:
    """Estimate the number of tokens of a long text from evenly spaced parts of it.

    Args:
        encoding: The model's vocabulary.
        text: The text.
        samples: Number of parts to tokenize.
        length: Length of a part, in characters.
    """
    starts = range(0, len(text), -(-len(text) // samples))
    sampled = [text[start : start + length] for start in starts]
    tokens = sum(len(encoding.encode_ordinary(sample)) for sample in sampled)
    return tokens * len(text) // sum(map(len, sampled))


@functools.lru_cache(maxsize=64)
def longest_token(encoding: Encoding) -> int:
    """Return the length of the longest token of a vocabulary, in bytes."""
    longest = 1
    for token in range(encoding.n_vocab):
        try:
            longest = max(longest, len(encoding.decode_single_token_bytes(token)))
        except KeyError:  # an id without a token
            continue
    return longest


def _context_length_error(
    wording: Wording, context: int, prompt: int | str, completion: int | None
) -> APIError:
    sentence = f"This model's maximum context length is {context} tokens"
    if completion is None:
        sentence += wording.prompt_too_long.format(prompt=prompt)
    else:
        total = int(prompt) + completion
        sentence += wording.total_too_long.format(total=total, prompt=prompt, completion=completion)
    # The message contains the code too: LangChain looks for it in str(error), which is the message.
    code = "context_length_exceeded"
    return APIError(400, f"{sentence} ({code})", param=wording.param, code=code)
