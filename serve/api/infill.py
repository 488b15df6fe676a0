"""Writing what stands between a prompt and a suffix.

A model trained to fill in the middle (Bavarian et al. 2022, arXiv:2207.14255) reads both sides,
each behind a token of its own, and then writes the middle: prefix, suffix, middle. Where the
vocabulary has those tokens, that is what happens. A chat model without them is asked to: the suffix
goes into an instruction, and the answer begins with the prompt, so that what the model writes next
is the middle already. It is a request, not a guarantee, that the answer leads to the suffix.

Leaves out: the order suffix, prefix, middle, and whole repositories as context.
"""

from collections.abc import Sequence

from bpe import Tokenizer
from serve.api.errors import unsupported
from serve.api.generation import Prompt

FIM_TOKENS = (  # of the tokens before prefix, suffix and middle
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
)
INSTRUCTION = (
    "Write a text that ends with the words below. Begin at once, without introduction or comment."
    "\n\nThe text ends with:\n{suffix}"
)
STOP_CHARACTERS = 40  # of the suffix: where it begins, the middle is over


def infill_prompt(tokenizer: Tokenizer, prefix: Sequence[int], suffix: str) -> Prompt:
    """What to continue so that the middle is written; `max_tokens` is left to the caller.

    Raises:
        APIError: 400 where the model can neither fill in nor be told to.
    """
    encoding = tokenizer.encoding
    specials = encoding.special_tokens
    for names in FIM_TOKENS:
        if all(name in specials for name in names):
            before, after, middle = (specials[name] for name in names)
            ids = [before, *prefix, after, *encoding.encode_ordinary(suffix), middle]
            # Whatever token of structure comes next, a file's end or another's name: it is over.
            return Prompt(token_ids=ids, max_tokens=0, stop_ids=frozenset(specials.values()))
    if tokenizer.chat_template is None:
        raise unsupported(
            "suffix",
            suffix,
            "It has no tokens for filling in, and no chat template to be told with.",
        )
    messages = [{"role": "user", "content": INSTRUCTION.format(suffix=suffix.strip())}]
    head = tokenizer.chat_template.encode(encoding, messages)
    stop = suffix.strip()[:STOP_CHARACTERS].partition("\n")[0]
    return Prompt(token_ids=[*head, *prefix], max_tokens=0, stop_strings=(stop,) if stop else ())
