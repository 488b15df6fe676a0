"""Does it fit: the API's arithmetic of prompt, completion and context.

Prompt and completion share the model's context. What does not fit is a 400 with OpenAI's own
sentence, which programs recognise to shorten a conversation and try again.
"""

import functools
import unicodedata
from typing import NamedTuple

from bpe import Encoding
from serve.api.errors import APIError


class Wording(NamedTuple):
    """What a route calls its input, and how it ends the sentence about too much of it."""

    param: str | None  # the field at fault
    prompt_too_long: str  # when the input alone is too long
    total_too_long: str  # when input and completion are


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
EDIT_WORDING = Wording(
    "input",
    ". However, your input and instruction resulted in {prompt} tokens. "
    "Please reduce the length of the input.",
    "",  # an edit has no length of its own
)


def resolve_max_tokens(
    wording: Wording, context: int, prompt: int, wanted: int | None, most: int
) -> int:
    """How many tokens the completion may have.

    Args:
        wording: `MESSAGES`, `PROMPT` or `EDIT`.
        context: the model's limit, in tokens.
        prompt: length of the prompt, in tokens.
        wanted: what the client asked for; None for as many as fit, up to ``most``.
        most: the route's own default.

    Raises:
        APIError: 400 context_length_exceeded.
    """
    left = context - prompt
    if left < 0 or (left == 0 and wanted != 0):
        raise _context_length_error(wording, context, prompt, None)
    if wanted is not None and wanted > left:
        raise _context_length_error(wording, context, prompt, wanted)
    return min(most, left) if wanted is None else wanted


def refuse_too_long(wording: Wording, context: int, encoding: Encoding, text: str) -> None:
    """Refuses megabytes of text before the tokenizer has to walk them.

    No token is longer than the longest, so a text has at least bytes / longest tokens. Counted are
    the bytes that will be tokenized: some vocabularies normalise text first, or drop bytes.

    Raises:
        APIError: 400 context_length_exceeded, where ``text`` cannot possibly fit.
    """
    if len(text) <= context:  # even one token a character would fit
        return
    if encoding.normalization == "NFC":
        text = unicodedata.normalize("NFC", text)
    size = len(text.encode().translate(None, encoding.dropped_bytes))
    least = -(-size // longest_token(encoding))
    if least > context:
        about = max(least, _estimate(encoding, text))
        raise _context_length_error(wording, context, f"about {about}", None)


def _estimate(encoding: Encoding, text: str, samples: int = 16, length: int = 1024) -> int:
    """The tokens of a long text, from samples all over it."""
    starts = range(0, len(text), -(-len(text) // samples))
    sampled = [text[start : start + length] for start in starts]
    tokens = sum(len(encoding.encode_ordinary(sample)) for sample in sampled)
    return tokens * len(text) // sum(map(len, sampled))


@functools.lru_cache(maxsize=64)
def longest_token(encoding: Encoding) -> int:
    """Bytes in the longest token of a vocabulary."""
    longest = 1
    for token in range(encoding.n_vocab):
        try:
            longest = max(longest, len(encoding.decode_single_token_bytes(token)))
        except KeyError:  # a gap in the numbering
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
    # The code in the text, too: LangChain looks for it in str(error), where openai 3 puts the text.
    code = "context_length_exceeded"
    return APIError(400, f"{sentence} ({code})", param=wording.param, code=code)
