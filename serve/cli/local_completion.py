"""Generating in this process: from a prompt to pieces of text, with the figures.

The command line uses this; a server goes through `api/generation.py`. Both hand the engine the same
request, and `api/detokenize.py` makes text of its events for both.
"""

import contextlib
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import typer

from serve import settings
from serve.api.settings import ServerSettings
from serve.cli import console, local
from serve.exceptions import DoesNotFit, Failure, WrongUsage
from serve.models import benchmarks, generation_config

if TYPE_CHECKING:  # the engine brings JAX along
    from serve.models.decoder import DecoderModel

Message = Mapping[str, str]  # {"role": ..., "content": ...}


@dataclass(kw_only=True)
class Options:
    """How to answer. `sampling` holds what the user asked for; the model's defaults fill it up."""

    sampling: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None  # None: as many as the context holds
    stop: tuple[str, ...] = ()
    seed: int | None = None  # None: another one each time


class LocalCompletion:
    """One answer. Iterate over it for its text; the figures are complete when that ends.

    Attributes:
        text: The answer so far.
        prompt_tokens: Length of the prompt, in tokens.
        tokens: Tokens so far.
        reason: "stop", "length" or, while it is not over, "cancelled".
        first_token: Seconds until the first token, or None before it.
        decoding: Seconds from the first token to the last.
    """

    def __init__(self, model: "DecoderModel", prompt: Sequence[int], options: Options):
        """Checks that prompt and answer fit the model's context.

        Raises:
            DoesNotFit: They don't.
            WrongUsage: A sampling option is out of range.
        """
        from transformer.engine import SequenceRequest
        from transformer.sampling import SamplingParams

        room = model.context - len(prompt)
        wanted = room if options.max_tokens is None else options.max_tokens
        if room < 1 or wanted > room:
            raise DoesNotFit(
                f"the prompt has {len(prompt)} tokens and the answer may have {max(wanted, 1)}: "
                f"{model.id} holds {model.context} of both together"
            )
        seed = secrets.randbits(31) if options.seed is None else options.seed
        try:
            self._request = SequenceRequest(
                prompt=tuple(prompt),
                max_tokens=wanted,
                sampling_params=SamplingParams(
                    seed=seed,
                    **generation_config.resolve_params(options.sampling, model.default_sampling),
                ),
                stop_ids=model.tokenizer.stop_ids,
                top_logprobs=None,
            )
        except (TypeError, ValueError) as error:
            raise WrongUsage(str(error)) from None
        self._model, self._stop = model, options.stop
        self.text, self.prompt_tokens, self.completion_tokens = "", len(prompt), 0
        self.finish_reason, self.seed = "cancelled", seed
        self.first_token_seconds: float | None = None
        self.decode_seconds = 0.0

    def __iter__(self) -> Iterator[str]:
        """Yields the text piece by piece, never half a character. Leaving early stops the model."""
        from serve.api.detokenize import Detokenizer
        from transformer.engine import Failed

        assembler = Detokenizer(self._model.tokenizer.encoding, self._stop)
        started = time.perf_counter()
        with contextlib.closing(self._model.engine.generate(self._request)) as events:
            for event in events:
                if isinstance(event, Failed):
                    raise Failure(f"{self._model.id} could not go on: {event.message}")
                if (piece := assembler.update(event)) is None:
                    return
                if piece.num_generated > self.completion_tokens:
                    elapsed = time.perf_counter() - started
                    self.first_token_seconds = self.first_token_seconds or elapsed
                    self.decode_seconds = elapsed - self.first_token_seconds
                self.completion_tokens = piece.num_generated
                if piece.text:
                    self.text += piece.text
                    yield piece.text
                if piece.finish_reason:
                    self.finish_reason = piece.finish_reason
                    return

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed, from the first token on; None before the second."""
        return (
            (self.completion_tokens - 1) / self.decode_seconds
            if self.completion_tokens > 1 and self.decode_seconds
            else None
        )


def chat_prompt(model: "DecoderModel", messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation in the model's own template.

    Raises:
        WrongUsage: The model has no template.
        Failure: The template refuses these messages.
    """
    tokenizer = model.tokenizer
    if tokenizer.chat_template is None:
        raise WrongUsage(f"{model.id} has no chat template: use `pellucid complete`")
    try:
        return tokenizer.chat_template.encode(tokenizer.encoding, messages)
    except ValueError as error:
        raise Failure(f"the chat template of {model.id} failed: {error}") from None


def completion_prompt(model: "DecoderModel", text: str) -> list[int]:
    """Token ids of raw text, after the token that begins a text where the model wants one."""
    tokenizer = model.tokenizer
    begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    return begin + tokenizer.encoding.encode_ordinary(text)


def as_response(
    model: "DecoderModel",
    reply: LocalCompletion,
    kind: Literal["chat.completion", "text_completion"],
) -> dict[str, Any]:
    """An answer in the shape the API gives it, plus its seed and timings.

    Args:
        model: Who answered.
        reply: The answer, over or interrupted.
        kind: The `object` of the response.
    """
    is_chat = kind == "chat.completion"
    message = {"role": "assistant", "content": reply.text}
    content = {"message": message} if is_chat else {"text": reply.text}
    reason = None if reply.finish_reason == "cancelled" else reply.finish_reason
    return {
        "object": kind,
        "created": int(time.time()),
        "model": model.id,
        "system_fingerprint": model.fingerprint,
        "seed": reply.seed,
        "choices": [{"index": 0, **content, "finish_reason": reason}],
        "usage": {
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        },
        "timings": {
            "first_token_seconds": reply.first_token_seconds,
            "tokens_per_second": reply.tokens_per_second,
        },
    }


@contextlib.contextmanager
def open_model_timed(name: str | None) -> Iterator["tuple[DecoderModel, float]"]:
    """A model in this process, and the seconds it took to load."""
    place = local.locate_model(name)
    started = time.perf_counter()
    with local.open_model(place, ServerSettings().cache_budget) as served:
        yield served, time.perf_counter() - started


def make_options(
    temperature: float | None,
    top_p: float | None,
    max_tokens: int | None,
    seed: int | None,
    stop: Sequence[str] | None,
) -> Options:
    """What the user asked for; the rest is the model's."""
    given = {"temperature": temperature, "top_p": top_p}
    asked = {name: value for name, value in given.items() if value is not None}
    if not all(stop or ()):
        raise WrongUsage("--stop is empty: it would end every answer before it begins")
    return Options(sampling=asked, max_tokens=max_tokens, stop=tuple(stop or ()), seed=seed)


def print_completion(
    model: "DecoderModel",
    reply: LocalCompletion,
    kind: Literal["chat.completion", "text_completion"],
    load_seconds: float,
    *,
    stats: bool,
    json: bool,
) -> None:
    """Prints an answer as it comes, or whole as JSON in the API's shape."""
    interrupted = False
    try:
        for text in reply:
            if not json:
                console.write(text, end="")
    except KeyboardInterrupt:
        interrupted = True  # keep what came
    line = stats_line(model, reply, load_seconds)
    if json:
        console.write_json(as_response(model, reply, kind))
    else:
        console.write("")
    if stats:
        console.info(line)
    if interrupted:
        raise typer.Exit(130)


def stats_line(
    model: "DecoderModel", reply: LocalCompletion, load_seconds: float | None = None
) -> str:
    """Notes the run's speed for `pellucid models`, and puts it into one line."""
    home = settings.data_folder()
    benchmarks.record(
        home,
        model.id,
        tokens=reply.completion_tokens - 1,
        seconds=reply.decode_seconds,
        memory=model.memory,
    )
    parts = ["in-process"]
    if load_seconds is not None:
        parts.append(f"load {load_seconds:.1f} s")
    if reply.first_token_seconds is not None:
        parts.append(f"first token {reply.first_token_seconds * 1000:.0f} ms")
    if speed := reply.tokens_per_second:
        parts.append(f"{speed:.0f} tok/s")
    parts += [f"{reply.prompt_tokens} + {reply.completion_tokens} tokens", reply.finish_reason]
    return f"[{' · '.join(parts)}]"
