"""What a server prints once it listens: its models, and two snippets ready to paste."""

import json

from serve.models.kinds import KINDS
from serve.models.registry import Registry
from serve.models.spec import ModelSpec


def banner(address: str, registry: Registry, *, has_keys: bool) -> str:
    """The text for a server at `address`, which has no path. Keys themselves are never printed."""
    lines = []
    for card in registry.list_models():
        names = registry.aliases_of(card.id)
        also = (
            f", also called {', '.join(names[:3])} and {len(names) - 3} more" if names[3:] else ""
        )
        how = "loaded when first asked for"
        if not isinstance(card, ModelSpec):
            how = f"{card.context:,} tokens of context, in {card.dtype}, {card.fingerprint}"
        lines.append(f"  {card.id}: {how}{also}")
    (model, *_), key = registry.loaded(), "YOUR_KEY" if has_keys else "any"
    example = KINDS[model.kind].example(model)
    fields = {"model": model.id, **example.fields}
    curl = [f"curl {address}/v1/{example.route}"]
    arguments = [f"    {field}={json.dumps(value)}," for field, value in fields.items()]
    if has_keys:
        curl.append('-H "Authorization: Bearer YOUR_KEY"')
    if example.file:
        curl.append(f'-F model={model.id} -F "file=@{example.file}"')
        arguments.append(f'    file=open("{example.file}", "rb"),')
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
            f"answer = client.{example.call}(",
            *arguments,
            ")",
            f"print(answer.{example.result})",
            "",
        ]
    )
