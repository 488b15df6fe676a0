"""The text that a server prints when it is ready: address, models, and two example requests."""

import json

from serve.models.kinds import KINDS
from serve.models.registry import Registry
from serve.models.spec import ModelSpec


def banner(address: str, registry: Registry, *, has_keys: bool) -> str:
    """Return the text that a server prints when it starts to listen.

    Args:
        address: the URL of the server without a path, such as "http://127.0.0.1:8000".
        registry: the models of the server, at least one of them loaded.
        has_keys: whether requests need an API key. The text shows a placeholder, never a key.
    """
    lines = []
    for model in registry.list_models():
        names = registry.aliases_of(model.id)
        also = f", also called {', '.join(names[:3])}" if names else ""
        if len(names) > 3:
            also += f" and {len(names) - 3} more"
        state = "loaded at its first request"
        if not isinstance(model, ModelSpec):
            state = f"{model.context:,} tokens of context, in {model.dtype}, {model.fingerprint}"
        lines.append(f"  {model.id}: {state}{also}")
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
    python = [
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{address}/v1", api_key="{key}")',
        f"answer = client.{example.call}(",
        *arguments,
        ")",
        f"print(answer.{example.result})",
        "",
    ]
    return "\n".join(
        [
            f"listening on {address}/v1 (Ctrl-C stops)",
            f"open {address}/ in a browser to chat, {address}/docs for the API",
            *lines,
            "",
            " ".join(curl),
            "",
            *(python if example.call else []),
        ]
    )
