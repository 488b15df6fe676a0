"""Measure structured output: valid documents, and the time per token with and without a schema.

A chat model fills the schemas of `schemas.make_schemas`, sampled at temperature 0.7 with at most
256 tokens. A document counts as valid if the package jsonschema says so. Before that, schemas are
compiled to time their first bitmask, and a conversation is decoded with a schema and without,
alternating, to compare the medians of the time per token.

Usage: python -m tests.bench.bench_structured [--schemas 300] [--rounds 11] [--json] [ID]
"""

import argparse
import json
import statistics
import time

import jsonschema

from serve.api.structured_output import schema_source
from serve.models.decoder import DecoderModel, load_decoder
from serve.models.grammar import GrammarCompiler
from tests.bench.pulled import pulled_path
from tests.bench.schemas import make_schemas
from transformer.engine import Grammar, SequenceRequest, Token
from transformer.sampling import SamplingParams

MAX_TOKENS = 256


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


def fill_schemas(model: DecoderModel, count: int) -> dict[str, float]:
    """Return how many schemas were filled within `MAX_TOKENS`, and how many of these are valid."""
    schemas = make_schemas(count)
    requests = [
        request(
            model,
            f"Describe a {schema['title']} as a JSON document.",
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
            text = model.tokenizer.encoding.decode(completion.ids)
            try:
                jsonschema.validate(json.loads(text), schema)
                valid += 1
            except ValueError as error:  # jsonschema's errors are not ValueErrors
                print(f"no JSON: {text!r}: {error}")
            except jsonschema.ValidationError as error:
                print(f"invalid: {text!r}: {error.message}")
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
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
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
