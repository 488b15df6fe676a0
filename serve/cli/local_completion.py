"""Text generation in this process: from a prompt to text deltas, with statistics.

The command line uses this module; a server uses `api/generation.py`. Both send the same request to
the engine, and both detokenize its events with `api/detokenize.py`.
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

if TYPE_CHECKING:  # the engine imports JAX
    from serve.models.decoder import DecoderModel

Message = Mapping[str, str]  # {"role": ..., "content": ...}


@dataclass(kw_only=True)
class Options:
    """Options of a completion. Sampling options not in `sampling` have the model's defaults."""

    sampling: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None  # None: as many as fit into the context
    stop: tuple[str, ...] = ()
    seed: int | None = None  # None: a random seed


class LocalCompletion:
    """One completion. Iterating over it generates the text and updates the statistics.

    Attributes:
        text: the text generated so far.
        prompt_tokens: the length of the prompt, in tokens.
        completion_tokens: the number of tokens generated so far.
        finish_reason: "stop" or "length"; "cancelled" until the completion is finished.
        seed: the seed of the sampler.
        first_token_seconds: the time to the first token; None before it.
        decode_seconds: the time from the first token to the last.
    """

    def __init__(
        self,
        model: "DecoderModel",
        prompt: Sequence[int],
        options: Options,
        *,
        is_chat: bool = False,
    ):
        """Check that the prompt and the completion fit into the context of the model.

        Args:
            model: the model.
            prompt: the token ids to continue.
            options: the sampling options.
            is_chat: whether the text is the content of a message, without reasoning on a channel.

        Raises:
            DoesNotFit: they do not fit.
            WrongUsage: a sampling option is out of range.
        """
        from transformer.engine import SequenceRequest
        from transformer.sampling import SamplingParams

        room = model.context - len(prompt)
        max_tokens = room if options.max_tokens is None else options.max_tokens
        if room < 1 or max_tokens > room:
            raise DoesNotFit(
                f"the prompt has {len(prompt)} tokens and the answer may have "
                f"{max(max_tokens, 1)}, but {model.id} has a context of {model.context} tokens "
                "for both; shorten the prompt, or lower --max-tokens"
            )
        seed = secrets.randbits(31) if options.seed is None else options.seed
        try:
            self._request = SequenceRequest(
                prompt=tuple(prompt),
                max_tokens=max_tokens,
                sampling_params=SamplingParams(
                    seed=seed,
                    **generation_config.resolve_params(options.sampling, model.default_sampling),
                ),
                stop_ids=model.tokenizer.stop_ids,
                top_logprobs=None,
            )
        except (TypeError, ValueError) as error:
            raise WrongUsage(str(error)) from None
        self._model, self._stop, self._is_chat = model, options.stop, is_chat
        self.text, self.prompt_tokens, self.completion_tokens = "", len(prompt), 0
        self.finish_reason, self.seed = "cancelled", seed
        self.first_token_seconds: float | None = None
        self.decode_seconds = 0.0

    def __iter__(self) -> Iterator[str]:
        """Yield text deltas of whole characters. Leaving the loop early cancels the request.

        Raises:
            Failure: the engine failed.
        """
        from serve.api.detokenize import Detokenizer
        from serve.api.message_deltas import DeltaReader
        from transformer.engine import Failed

        detokenizer = Detokenizer(self._model.tokenizer.encoding, self._stop)
        reader = DeltaReader(None, self._model) if self._is_chat else None
        started = time.perf_counter()
        with contextlib.closing(self._model.engine.generate(self._request)) as events:
            for event in events:
                if isinstance(event, Failed):
                    raise Failure(f"{self._model.id} failed: {event.message}")
                if (delta := detokenizer.update(event)) is None:
                    return
                if delta.num_generated > self.completion_tokens:
                    elapsed = time.perf_counter() - started
                    self.first_token_seconds = self.first_token_seconds or elapsed
                    self.decode_seconds = elapsed - self.first_token_seconds
                self.completion_tokens = delta.num_generated
                text = delta.text
                if reader is not None:
                    text = "".join(fields.get("content", "") for fields, _ in reader.read(delta))
                if text:
                    self.text += text
                    yield text
                if delta.finish_reason:
                    self.finish_reason = delta.finish_reason
                    return

    @property
    def tokens_per_second(self) -> float | None:
        """Return the decoding speed after the first token; None before the second token."""
        return (
            (self.completion_tokens - 1) / self.decode_seconds
            if self.completion_tokens > 1 and self.decode_seconds
            else None
        )


def chat_prompt(model: "DecoderModel", messages: Sequence[Message]) -> list[int]:
    """Return the token ids of a conversation in the chat template of the model.

    Raises:
        WrongUsage: the model has no chat template.
        Failure: the template rejects the messages.
    """
    tokenizer = model.tokenizer
    if tokenizer.chat_template is None:
        raise WrongUsage(f"{model.id} has no chat template; use `pellucid complete`")
    try:
        return tokenizer.chat_template.encode(tokenizer.encoding, messages)
    except ValueError as error:
        raise Failure(f"the chat template of {model.id} failed: {error}") from None


def completion_prompt(model: "DecoderModel", text: str) -> list[int]:
    """Return the token ids of a text, after the BOS token if the model adds one."""
    tokenizer = model.tokenizer
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    return bos + tokenizer.encoding.encode_ordinary(text)


def as_response(
    model: "DecoderModel",
    reply: LocalCompletion,
    kind: Literal["chat.completion", "text_completion"],
) -> dict[str, Any]:
    """Return a completion in the format of the API, with its seed and timings.

    Args:
        model: the model that generated it.
        reply: the completion, finished or interrupted.
        kind: the `object` of the response.
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
    """Open a model in this process; yield it and the seconds it took to load.

    Args:
        name: as for `local.locate_model`.

    Raises:
        Failure: as in `local.locate_model` and `local.open_model`.
    """
    files = local.locate_model(name)
    started = time.perf_counter()
    with local.open_model(files, ServerSettings().cache_budget) as served:
        yield served, time.perf_counter() - started


def make_options(
    temperature: float | None,
    top_p: float | None,
    max_tokens: int | None,
    seed: int | None,
    stop: Sequence[str] | None,
) -> Options:
    """Return the options of a command line; None selects the default of the model.

    Raises:
        WrongUsage: a stop string is empty.
    """
    options = {"temperature": temperature, "top_p": top_p}
    sampling = {name: value for name, value in options.items() if value is not None}
    if not all(stop or ()):
        raise WrongUsage("--stop is empty, so every answer would be empty; give a text")
    return Options(sampling=sampling, max_tokens=max_tokens, stop=tuple(stop or ()), seed=seed)


def print_completion(
    model: "DecoderModel",
    reply: LocalCompletion,
    kind: Literal["chat.completion", "text_completion"],
    load_seconds: float,
    *,
    stats: bool,
    json: bool,
) -> None:
    """Generate a completion and print it: its text as it arrives, or at the end as API JSON.

    Args:
        model: the model that generates it.
        reply: the completion.
        kind: the `object` of the JSON response.
        load_seconds: the time that loading the model took, for `stats`.
        stats: whether to print statistics to stderr.
        json: whether to print JSON.

    Raises:
        Failure: the engine failed.
        typer.Exit: Ctrl-C interrupted the completion; the text so far is printed.
    """
    interrupted = False
    try:
        for text in reply:
            if not json:
                console.write(text, end="")
    except KeyboardInterrupt:
        interrupted = True  # print the text so far
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
    """Save the speed for the list of `pellucid models`, and return the statistics as one line."""
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
