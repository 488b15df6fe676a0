"""What a server prints once it listens: its models, and two snippets ready to paste."""

import json
from typing import Any

from serve.engine import EmbeddingModel
from serve.registry import Offer, Registry


def welcome(address: str, registry: Registry, *, has_keys: bool) -> str:
    """The text for a server at `address`, which has no path. Keys themselves are never printed."""
    lines = []
    for card in registry.list():
        names = registry.aliases_of(card.id)
        also = (
            f", also called {', '.join(names[:3])} and {len(names) - 3} more" if names[3:] else ""
        )
        how = "loaded when first asked for"
        if not isinstance(card, Offer):
            how = f"{card.context:,} tokens of context, in {card.format}, {card.fingerprint}"
        lines.append(f"  {card.id}: {how}{also}")
    (model, *_), key = registry.loaded(), "YOUR_KEY" if has_keys else "any"
    header = ' -H "Authorization: Bearer YOUR_KEY"' if has_keys else ""
    content: dict[str, Any]
    question = "What is the capital of France?"
    if isinstance(model, EmbeddingModel):
        route, content = "embeddings", {"input": question}
        call, result = "embeddings", "data[0].embedding[:8]"
    elif model.tokenizer.chat_template:
        route = "chat/completions"
        content = {"messages": [{"role": "user", "content": question}]}
        call, result = "chat.completions", "choices[0].message.content"
    else:
        route, content = "completions", {"prompt": "The capital of France is"}
        call, result = "completions", "choices[0].text"
    if not isinstance(model, EmbeddingModel):
        content["temperature"] = 0
    arguments = [f"    {field}={json.dumps(value)}," for field, value in content.items()]
    return "\n".join(
        [
            f"listening on {address}/v1 (Ctrl-C stops)",
            f"open {address}/ in a browser to chat, {address}/docs for the API",
            *lines,
            "",
            f'curl {address}/v1/{route} -H "Content-Type: application/json"{header} \\',
            f"  -d '{json.dumps({'model': model.id, **content})}'",
            "",
            "from openai import OpenAI",
            f'client = OpenAI(base_url="{address}/v1", api_key="{key}")',
            f"answer = client.{call}.create(",
            f'    model="{model.id}",',
            *arguments,
            ")",
            f"print(answer.{result})",
            "",
        ]
    )
