"""Data for tiny models: a chat template, special tokens, and training examples."""

import json

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
ANSWER = "zzzz"


def examples(number: int = 12) -> bytes:
    """Return a training file of chats with the same response in each."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": ANSWER},
            ]
        }
        for i in range(number)
    ]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def pairs(number: int = 12) -> bytes:
    """Return a training file of prompts and completions."""
    rows = [{"prompt": f"{i} ->", "completion": ANSWER} for i in range(number)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


# Qwen's template for tools, in few lines.
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
