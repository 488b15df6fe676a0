"""Make the golden files of the two language models with transformers, from the same GGUF files.

    python make_models.py smollm2-135m-instruct=PATH.gguf qwen2.5-coder-0.5b-instruct=PATH.gguf

It needs torch, transformers, accelerate and gguf (`pip install -e '.[parity]'`), and 3 GB
of memory.

transformers dequantizes the file and runs in float32. The prompts are encoded by our `bpe`, which
has its own golden files in tests/golden/bpe.

Each model has a `MODEL.npz`, with R tokens of all prompts and C = 64 tokens of greedy continuation:

    prompt_ids [R], prompt_lengths [10]
    columns [256]            the vocabulary ids whose logits are stored (all would take 400 MB)
    logits [R, 256]          float32
    greedy_ids [10, C]       the most likely tokens; end tokens do not stop the generation
    greedy_gaps [10, C]      difference to the second largest logit
    top_ids, top_logits [R + 10 * C, 5], logsumexp [R + 10 * C]
                             of prompt 0 and its continuation, then of prompt 1 and its, ...
    versions                 software versions
"""

import collections
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent.parent))

import bpe  # noqa: E402

NUM_COLUMNS = 256
NUM_GREEDY = 64
TOP = 5
CHAT = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "What is the capital of France?"},
]
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village between two rivers, there lived a clockmaker who",
    "Water boils at 100 °C at sea level. On a mountain 3,000 m high it boils at a lower temperature"
    ", because the pressure of the air is lower there. Cooks know this well: beans that are done "
    "in an hour by the sea take nearly two hours up there, unless one uses a pressure cooker, "
    "which",
    'def fibonacci(n: int) -> int:\n    """Returns the n-th Fibonacci number."""\n',
    "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; ++i) {\n\t",
    "SELECT customers.name, SUM(orders.total) AS spent\nFROM customers\nJOIN orders ON",
    "天地玄黄，宇宙洪荒。日月盈昃，",
    "Съешь же ещё этих мягких французских булок, да",
    "1 1 2 3 5 8 13 21 34 55 89 144 233",
]


def prompts(tokenizer: bpe.Tokenizer) -> list[list[int]]:
    plain = [tokenizer.encoding.encode(text) for text in PROMPTS]
    return [*plain, tokenizer.chat_template.encode(tokenizer.encoding, CHAT)]


@torch.inference_mode()
def continue_greedily(model, ids: list[int]) -> tuple[list[int], list[float]]:
    out, gaps = [], []
    step = model(torch.tensor([ids]), use_cache=True)
    for _ in range(NUM_GREEDY):
        best = step.logits[0, -1].topk(2)
        out.append(best.indices[0].item())
        gaps.append((best.values[0] - best.values[1]).item())
        step = model(torch.tensor([out[-1:]]), past_key_values=step.past_key_values, use_cache=True)
    return out, gaps


@torch.inference_mode()
def make(id: str, path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    encoded = prompts(bpe.load(path))
    columns = np.sort(
        np.random.default_rng(0).choice(model.config.vocab_size, NUM_COLUMNS, replace=False)
    ).astype(np.int32)
    results = collections.defaultdict(list)
    for ids in encoded:
        greedy, gaps = continue_greedily(model, ids)
        logits = model(torch.tensor([ids + greedy])).logits[0]
        top = logits.topk(TOP)
        results["logits"].append(logits[: len(ids), columns].numpy())
        results["greedy_ids"].append(np.array([greedy], np.int32))
        results["greedy_gaps"].append(np.array([gaps], np.float32))
        results["top_ids"].append(top.indices.numpy().astype(np.int32))
        results["top_logits"].append(top.values.numpy())
        results["logsumexp"].append(logits.double().logsumexp(-1).float().numpy())
        print(id, len(ids), "tokens, smallest gap", min(gaps), flush=True)
    np.savez_compressed(
        HERE / f"{id}.npz",
        prompt_ids=np.concatenate([np.array(ids, np.int32) for ids in encoded]),
        prompt_lengths=np.array([len(ids) for ids in encoded], np.int32),
        columns=columns,
        versions=versions(),
        **{name: np.concatenate(parts) for name, parts in results.items()},
    )


def versions() -> str:
    """Return the versions of the software that made a golden file."""
    packages = [f"{name} {version(name)}" for name in ("gguf", "numpy", "torch", "transformers")]
    return ", ".join([f"python {platform.python_version()}", *packages])


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        id, _, path = argument.partition("=")
        make(id, Path(path))
