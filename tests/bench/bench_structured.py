"""Measure structured output: valid documents, and the time per token with and without a schema.

A chat model fills the schemas of `schemas.make_schemas`, sampled at temperature 0.7 with at most
256 tokens. A document counts as valid if the package jsonschema says so. Before that, schemas are
compiled to time their first bitmask, and a conversation is decoded with a schema and without,
alternating, to compare the medians of the time per token.

With `--servers`, running servers fill the schemas over HTTP instead, one request at a time, each
schema by all servers in turn. `response_format` has the spelling of llama.cpp's servers, so that
`python -m llama_cpp.server --model FILE` can be one of them.

Usage: python -m tests.bench.bench_structured [--schemas 300] [--rounds 11] [--json] [ID]
       python -m tests.bench.bench_structured --servers http://HOST:PORT/v1 ... [--schemas 60]
"""

import argparse
import json
import statistics
import time
from typing import Any

import jsonschema
import openai

from serve.api.structured_output import schema_source
from serve.models.decoder import DecoderModel, load_decoder
from serve.models.grammar import GrammarCompiler
from tests.bench.pulled import pulled_path
from tests.bench.schemas import make_schemas
from transformer.engine import Grammar, SequenceRequest, Token
from transformer.sampling import SamplingParams

MAX_TOKENS = 256
PROMPT = "Describe a {title} as a JSON document."


def request(model: DecoderModel, text: str, grammar: Grammar | None, seed: int, **fields):
    template, encoding = model.tokenizer.chat_template, model.tokenizer.encoding
    if template is None:
        raise SystemExit(f"{model.id} has no chat template: give the id of a chat model")
    prompt = template.encode(encoding, [{"role": "user", "content": text}])
    params = SamplingParams(temperature=0.7, seed=seed)
    return SequenceRequest(
        prompt=tuple(prompt),
        max_tokens=MAX_TOKENS,
        sampling_params=params,
        stop_ids=model.tokenizer.stop_ids,
        grammar=grammar,
        **fields,
    )


def is_valid(text: str, schema: dict[str, Any]) -> bool:
    """Return whether a text is a document of a schema; print it if not."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except ValueError as error:  # jsonschema's errors are not ValueErrors
        print(f"no JSON: {text!r}: {error}")
    except jsonschema.ValidationError as error:
        print(f"invalid: {text!r}: {error.message}")
    else:
        return True
    return False


def compare_servers(urls: list[str], model: str, count: int) -> dict[str, dict[str, float]]:
    """Return for each server how many schemas it filled, and its times in milliseconds."""
    clients = {
        url: openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=600) for url in urls
    }
    results: dict[str, list[tuple[bool, bool, float, float]]] = {url: [] for url in urls}
    # The first schema, a request that is not measured, lets each server load and compile.
    for seed, schema in enumerate(make_schemas(1) + make_schemas(count)):
        for url, client in clients.items():
            started, times, text, reason = time.perf_counter(), [], "", None
            for chunk in client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": PROMPT.format(**schema)}],
                temperature=0.7,
                seed=seed,
                max_tokens=MAX_TOKENS,
                stream=True,
                extra_body={"response_format": {"type": "json_object", "schema": schema}},
            ):
                for choice in chunk.choices:
                    if choice.delta.content:
                        times.append(1e3 * (time.perf_counter() - started))
                        text += choice.delta.content
                    reason = choice.finish_reason or reason
            finished = reason == "stop"
            step = (times[-1] - times[0]) / max(1, len(times) - 1)
            results[url].append((finished, finished and is_valid(text, schema), times[0], step))
    names = ("finished", "valid", "first_token_ms", "token_ms")
    compared = {}
    for url, rows in results.items():
        columns = dict(zip(names, zip(*rows[1:], strict=True), strict=True))
        compared[url] = {"schemas": count} | {
            name: statistics.median(values) if name.endswith("_ms") else sum(values)
            for name, values in columns.items()
        }
    return compared


def fill_schemas(model: DecoderModel, count: int) -> dict[str, float]:
    """Return how many schemas were filled within `MAX_TOKENS`, and how many of these are valid."""
    schemas = make_schemas(count)
    requests = [
        request(
            model,
            PROMPT.format(**schema),
            model.grammar_compiler.compile(schema_source("schema", schema)),
            seed,
        )
        for seed, schema in enumerate(schemas)
    ]
    started = time.perf_counter()
    completions = model.engine.generate_batch(requests)
    seconds = time.perf_counter() - started
    finished = valid = 0
    for schema, completion in zip(schemas, completions, strict=True):
        if completion.finish_reason == "stop":
            finished += 1
            valid += is_valid(model.tokenizer.encoding.decode(completion.ids), schema)
    num_tokens = sum(len(completion.ids) for completion in completions)
    return {
        "schemas": count,
        "finished": finished,
        "valid": valid,
        "tokens_per_second": num_tokens / seconds,
    }


def time_tokens(model: DecoderModel, rounds: int) -> dict[str, float]:
    """Return the median milliseconds per token with a schema and without, alternating."""
    (schema,) = make_schemas(1)
    schema["properties"]["story"] = {"type": "string"}
    schema["required"].append("story")
    grammar = model.grammar_compiler.compile(schema_source("schema", schema))
    milliseconds: dict[str, list[float]] = {"with_schema_ms": [], "without_schema_ms": []}
    for seed in range(rounds):
        for name, limit in zip(milliseconds, (grammar, None), strict=True):
            times = [
                time.perf_counter()
                for event in model.engine.generate(
                    request(model, "Tell a long story as JSON.", limit, seed)
                )
                if isinstance(event, Token)
            ]
            steps = [1e3 * (b - a) for a, b in zip(times, times[1:], strict=False)]
            milliseconds[name].append(statistics.median(steps))
    medians = {name: statistics.median(values) for name, values in milliseconds.items()}
    return medians | {"ratio": medians["with_schema_ms"] / medians["without_schema_ms"]}


def time_first_bitmasks(model: DecoderModel, count: int) -> dict[str, float]:
    """Return the median and the largest milliseconds to compile a schema and get a bitmask."""
    started = time.perf_counter()
    compiler = GrammarCompiler(model.tokenizer)
    compiler.build()
    seconds = time.perf_counter() - started
    times = []
    for schema in make_schemas(count, seed=1):
        started = time.perf_counter()
        compiler.compile(schema_source("schema", schema)).matcher().token_bitmask()
        times.append(1e3 * (time.perf_counter() - started))
    return {
        "vocabulary_seconds": seconds,
        "first_bitmask_ms": statistics.median(times),
        "first_bitmask_max_ms": max(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("id", nargs="?", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--schemas", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--servers", nargs="+", metavar="URL")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.servers:
        compared = compare_servers(options.servers, options.id, options.schemas)
        print(json.dumps(compared, indent=None if options.json else 2))
        return
    path = pulled_path(options.id)
    model = load_decoder(
        options.id, path, owned_by="", cache_budget=2**28, max_batch_size=16, notify=print
    )
    try:
        result = time_first_bitmasks(model, min(options.schemas, 100))
        if options.rounds:
            result |= time_tokens(model, options.rounds)
        result |= fill_schemas(model, options.schemas)
    finally:
        model.close(timeout=5)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:24s} {value:10.3f}")


if __name__ == "__main__":
    main()
