"""A tokenizer small enough to check by hand, with a chat template."""

import bpe
from tests.bpe import tiny

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENIZER = bpe.Tokenizer(
    encoding=tiny.encoding(),
    chat_template=bpe.ChatTemplate(TEMPLATE, eos_token="<|im_end|>"),
    eos_id=2,
)


def chat(*contents: str, **more) -> dict:
    """Return a row of alternating user and assistant messages; `more` goes into the last one."""
    messages = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": content}
        for i, content in enumerate(contents)
    ]
    messages[-1] |= more
    return {"messages": messages}
