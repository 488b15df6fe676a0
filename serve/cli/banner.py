"""What a server prints once it listens: its models, and two snippets ready to paste."""

import json
from typing import Any

from serve.models.encoder import EmbeddingModel
from serve.models.images import DrawingModel
from serve.models.registry import Offer, Registry
from serve.models.speech import SpeechModel

QUESTION = "What is the capital of France?"


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
    fields: dict[str, Any] = {"model": model.id}
    if isinstance(model, SpeechModel):
        route, call, result = "audio/transcriptions", "audio.transcriptions", "text"
    elif isinstance(model, DrawingModel):
        route, call, result = "images/generations", "images", "data[0].url"
        fields |= {"prompt": "a red apple"}
    elif isinstance(model, EmbeddingModel):
        route, call, result = "embeddings", "embeddings", "data[0].embedding[:8]"
        fields |= {"input": QUESTION}
    elif model.tokenizer.chat_template:
        route, call, result = "chat/completions", "chat.completions", "choices[0].message.content"
        fields |= {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    else:
        route, call, result = "completions", "completions", "choices[0].text"
        fields |= {"prompt": "The capital of France is", "temperature": 0}
    curl = [f"curl {address}/v1/{route}"]
    arguments = [f"    {field}={json.dumps(value)}," for field, value in fields.items()]
    if has_keys:
        curl.append('-H "Authorization: Bearer YOUR_KEY"')
    if isinstance(model, SpeechModel):
        curl.append(f'-F model={model.id} -F "file=@speech.wav"')
        arguments.append('    file=open("speech.wav", "rb"),')
    else:
        curl.append(f"-H \"Content-Type: application/json\" \\\n  -d '{json.dumps(fields)}'")
    return "\n".join(
        [
            f"listening on {address}/v1 (Ctrl-C stops)",
            f"open {address}/ in a browser to chat, {address}/docs for the API",
            *lines,
            "",
            " ".join(curl),
            "",
            "from openai import OpenAI",
            f'client = OpenAI(base_url="{address}/v1", api_key="{key}")',
            f"answer = client.{call}.{'generate' if call == 'images' else 'create'}(",
            *arguments,
            ")",
            f"print(answer.{result})",
            "",
        ]
    )
