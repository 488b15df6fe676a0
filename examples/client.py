"""Stream an answer from a server: `python examples/client.py http://127.0.0.1:8000 "Hello"`."""

import os
import sys

from openai import OpenAI

client = OpenAI(base_url=f"{sys.argv[1]}/v1", api_key=os.environ.get("PELLUCID_API_KEY", "any"))
model = client.models.list().data[0].id
messages = [{"role": "user", "content": sys.argv[2]}]
for chunk in client.chat.completions.create(model=model, messages=messages, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
