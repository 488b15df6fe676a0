"""Measure the CPU time per generated token outside the model, from engine to client socket.

    python tests/bench/bench_events.py [--tokens 1500] [--rounds 5]

The engine runs with a model runner that sleeps instead of computing, so that all CPU time is
overhead. The script prints microseconds of CPU time per token, summed over all threads, as the
minimum over rounds. Each stage includes the stages before it:

    engine    scheduler, device thread, and events delivered to synchronous code
    stream    events delivered to an event loop instead
    text      also detokenization and the search for stop strings
    chunks    also the chunks of the API, encoded as JSON
    http      also a socket, to a client in another process

If all cores compute a decoding step together, the step waits for the core that is busy with this
overhead. If a step takes 20 ms, 200 us are one per cent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic_core import to_json

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from serve.api.generation import Generation, Prompt  # noqa: E402
from serve.api.request_context import RequestContext  # noqa: E402
from serve.api.requests import CompletionBody  # noqa: E402
from serve.api.routes.completions import _chunks  # noqa: E402
from tests.serve import scripted  # noqa: E402
from transformer.engine import Device, Engine, SequenceRequest  # noqa: E402
from transformer.engine.scheduler import Scheduler  # noqa: E402
from transformer.sampling import SampleOutput, SamplingParams  # noqa: E402

STEP = 0.003  # seconds per decoding step
CLIENT = """
import socket, sys
at = sys.argv[1].split(":")
client = socket.create_connection((at[0], int(at[1])))
client.sendall(sys.stdin.buffer.read())
data = b""
while b"[DONE]" not in data:
    data = client.recv(65536)
"""


class SleepingRunner:
    """A runner that samples "a" for every sequence after `STEP` seconds."""

    max_batch_size = 16

    def prefill(self, sequence, block_copy):
        sequence.num_computed_tokens = len(sequence.request.prompt)
        return self._sample_output(1)

    def decode(self, sequences):
        time.sleep(STEP)
        for sequence in sequences:
            sequence.num_computed_tokens += 1
        return self._sample_output(len(sequences))

    def recover(self):
        return False

    def _sample_output(self, count):
        top = np.zeros((count, 3))
        return SampleOutput(np.full(count, ord("a")), np.zeros(count), top.astype(int), top)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    count = options.tokens
    context = count + 100
    engine = Engine(SleepingRunner(), Scheduler(16, 64, 256, 64, 256), context, Device())
    model = replace(scripted.model(), engine=engine, context=context)
    request = SequenceRequest(prompt=(1, 2, 3), max_tokens=count, sampling_params=SamplingParams())
    fields = {"model": "scripted", "prompt": "hello", "max_tokens": count, "stream": True}
    body = CompletionBody.model_validate(fields)

    def generation() -> Generation:
        return Generation(
            model, [Prompt(token_ids=[1, 2, 3], max_tokens=count)], body, 1, None, RequestContext()
        )

    async def consume(events, handle=lambda event: None) -> None:
        async with aclosing(events):
            async for event in events:
                handle(event)

    async def chunks() -> None:
        head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "scripted"}
        await consume(_chunks(body, generation(), head), to_json)

    async def text() -> None:
        await consume(generation().text_deltas())

    with scripted.serve_models(model) as address:
        data = json.dumps(fields).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        command = [sys.executable, "-c", CLIENT, address.removeprefix("http://")]
        stages = {
            "engine": lambda: list(engine.generate(request)),
            "stream": lambda: asyncio.run(consume(engine.stream(request))),
            "text": lambda: asyncio.run(text()),
            "chunks": lambda: asyncio.run(chunks()),
            "http": lambda: subprocess.run(command, input=head.encode() + data, check=True),
        }
        microseconds: dict[str, list[float]] = {name: [] for name in stages}
        for _ in range(options.rounds):
            for name, run in stages.items():
                before = time.process_time()
                run()
                microseconds[name].append((time.process_time() - before) / count * 1e6)
    engine.close(drain=False)
    for name, values in microseconds.items():
        print(f"{name:8} {min(values):6.0f} us per token")
        print(json.dumps({"case": name, "us": [round(value, 1) for value in values]}))


if __name__ == "__main__":
    main()
