"""Measure the duration of image requests, and their effect on a streamed chat.

    python -m tests.bench.bench_images [--rounds 5] [--tokens 64]

A server with emoji-64 and the default chat model runs these cases over a socket:

- one request for 1, 4 and 8 images;
- eight concurrent requests without seeds, which are batched, and eight with seeds, which are not;
  the ratio of their times is the speedup by batching;
- a streamed chat alone, and during requests for four images each: the median and the maximum time
  between two tokens.

The cases alternate in one run, and the fastest round of each counts. The last line of the output is
one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from openai import AsyncOpenAI, OpenAI

from serve import settings
from serve.api.app import create_app
from serve.api.settings import ServerSettings
from serve.models import catalogue, download, resolve
from serve.models.registry import Registry
from serve.models.spec import LoadOptions
from tests.serve import scripted

MODELS = ("smollm2-135m-instruct", "emoji-64")
_seeds = itertools.count()


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def generate(address: str, count: int) -> None:
    """Request ``count`` images at once."""
    with OpenAI(base_url=f"{address}/v1", api_key="any") as client:
        client.images.generate(prompt="a red apple", n=count)


def generate_concurrently(address: str, count: int, *, alone: bool) -> None:
    """Send ``count`` concurrent requests for one image each, with a seed if ``alone``."""

    async def main() -> None:
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key="any") as client:
            bodies = [{"seed": next(_seeds)} if alone else {} for _ in range(count)]
            await asyncio.gather(
                *[client.images.generate(prompt="a red apple", extra_body=body) for body in bodies]
            )

    asyncio.run(main())


def gaps(address: str, tokens: int) -> np.ndarray:
    """Return the milliseconds between consecutive tokens of a streamed answer."""
    with OpenAI(base_url=f"{address}/v1", api_key="any") as client:
        stream = client.chat.completions.create(
            model=MODELS[0],
            messages=[{"role": "user", "content": "Tell me a long story about a fox."}],
            max_tokens=tokens,
            stream=True,
        )
        times = [time.perf_counter() for part in stream if part.choices[0].delta.content]
    return np.diff(times) * 1e3


def gaps_meanwhile(address: str, tokens: int) -> np.ndarray:
    """Return the result of `gaps` while images are generated."""
    stop = threading.Event()

    def generate_images() -> None:
        while not stop.is_set():
            generate(address, 4)

    thread = threading.Thread(target=generate_images)
    thread.start()
    try:
        return gaps(address, tokens)
    finally:
        stop.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    models, home = catalogue.load(), settings.data_folder()
    model_files = [download.resolve_model(id, models, home, notify=print) for id in MODELS]
    with tempfile.TemporaryDirectory() as scratch:
        specs = [
            resolve.describe(
                files,
                LoadOptions(cache_budget=2**28, dtype="auto", home=Path(scratch), notify=print),
            )
            for files in model_files
        ]
        registry = Registry(specs, models.aliases)
        registry.load(registry.default)
        app = create_app(ServerSettings(home=Path(scratch)), registry)
        with scripted.serve_app(app) as address:
            best = measure(address, args.rounds, args.tokens)
        registry.close(5.0)
    print(json.dumps({name: round(value, 3) for name, value in best.items()}))


def measure(address: str, rounds: int, tokens: int) -> dict[str, float]:
    cases: dict[str, Callable[[], object]] = {
        "1 picture": lambda: generate(address, 1),
        "4 pictures": lambda: generate(address, 4),
        "8 pictures": lambda: generate(address, 8),
        "8 requests that share": lambda: generate_concurrently(address, 8, alone=False),
        "8 requests with seeds": lambda: generate_concurrently(address, 8, alone=True),
    }
    for work in cases.values():  # compile
        work()
    gaps(address, 4)
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, work in cases.items():
            best[name] = min(seconds(work), best.get(name, float("inf")))
        for name, times in (
            ("chat alone", gaps(address, tokens)),
            ("chat meanwhile", gaps_meanwhile(address, tokens)),
        ):
            for statistic, value in (("median", np.median(times)), ("longest", times.max())):
                key = f"{name}, {statistic} ms"
                best[key] = min(float(value), best.get(key, float("inf")))
    for name, value in best.items():
        print(f"{name:32} {value:8.2f}" + ("" if name.endswith("ms") else " s"))
    print(
        f"speedup of batching: x{best['8 requests with seeds'] / best['8 requests that share']:.2f}"
    )
    return best


if __name__ == "__main__":
    main()
