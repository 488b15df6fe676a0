"""Generate 64 texts as one batch, without a server: `python examples/batch.py MODEL.gguf`."""

import json
import sys
from pathlib import Path

import bpe
from transformer import checkpoint
from transformer.engine import SequenceRequest, build_engine
from transformer.sampling import SamplingParams

params, cfg, metadata = checkpoint.load(Path(sys.argv[1]), dtype="bfloat16")
encoding = bpe.from_gguf(metadata).encoding
engine = build_engine(params, cfg)
prompts = [f"The number that comes after {n} is" for n in range(64)]
greedy = SamplingParams(temperature=0)
requests = [
    SequenceRequest(prompt=tuple(encoding.encode(prompt)), max_tokens=16, sampling_params=greedy)
    for prompt in prompts
]
for prompt, completion in zip(prompts, engine.generate_batch(requests), strict=True):
    print(json.dumps(prompt + encoding.decode(completion.ids)))
engine.close()
