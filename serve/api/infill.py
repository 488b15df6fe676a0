"""Fill in the text between a prompt and a suffix.

A model trained to fill in the middle (FIM; Bavarian et al. 2022, arXiv:2207.14255) reads prefix and
suffix, each after a special token, and then generates the middle. Where the vocabulary has these
tokens, this module uses them. A chat model without them gets an instruction that contains the
suffix, and the prefix as the start of its answer, so that it continues with the middle; nothing
guarantees that the answer leads to the suffix.

Not implemented: the SPM order (suffix, prefix, middle), and the format for whole repositories.
"""

from collections.abc import Sequence

from bpe import Tokenizer
from serve.api.errors import unsupported
from serve.api.generation import Prompt

FIM_TOKENS = (  # the tokens before prefix, suffix and middle
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
)
INSTRUCTION = (
    "Write a text that ends with the words below. Begin at once, without introduction or comment."
    "\n\nThe text ends with:\n{suffix}"
)
STOP_CHARACTERS = 40  # generation stops at the first characters of the suffix, up to this many


def infill_prompt(tokenizer: Tokenizer, prefix: Sequence[int], suffix: str) -> Prompt:
    """Return the prompt whose continuation is the middle. The caller sets its `max_tokens`.

    Args:
        tokenizer: The model's tokenizer.
        prefix: Token ids of the text before the middle (the request's `prompt`).
        suffix: The text after the middle.

    Raises:
        APIError: 400 if the model has neither FIM tokens nor a chat template.
    """
    encoding = tokenizer.encoding
    specials = encoding.special_tokens
    for names in FIM_TOKENS:
        if all(name in specials for name in names):
            before, after, middle = (specials[name] for name in names)
            ids = [before, *prefix, after, *encoding.encode_ordinary(suffix), middle]
            # Any special token (end of file, name of the next file) ends the middle.
            return Prompt(token_ids=ids, max_tokens=0, stop_ids=frozenset(specials.values()))
    if tokenizer.chat_template is None:
        raise unsupported(
            "suffix",
            suffix,
            "The model has neither fill-in-the-middle tokens nor a chat template: leave out "
            "'suffix', or use another model.",
        )
    messages = [{"role": "user", "content": INSTRUCTION.format(suffix=suffix.strip())}]
    head = tokenizer.chat_template.encode(encoding, messages)
    stop = suffix.strip()[:STOP_CHARACTERS].partition("\n")[0]
    return Prompt(token_ids=[*head, *prefix], max_tokens=0, stop_strings=(stop,) if stop else ())
