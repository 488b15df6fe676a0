"""Continue a text: `python examples/generate.py MODEL.gguf "1, 2, 3,"`."""

import sys
from pathlib import Path

import bpe
from transformer import checkpoint
from transformer.generate import generate

params, cfg, metadata = checkpoint.load(Path(sys.argv[1]))
encoding = bpe.from_gguf(metadata).encoding
ids = encoding.encode(sys.argv[2])
stream = bpe.StreamDecoder(encoding, after_prompt=True)  # a character can span several tokens
for id in generate(params, cfg, ids, max_new_tokens=8):  # greedy by default
    print(stream.push(id), end="", flush=True)
print(stream.flush())
