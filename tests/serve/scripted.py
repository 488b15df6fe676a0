"""A model with scripted responses, and a server for it on a real socket.

`ScriptedEngine` behaves like the engine (events in order, one end, closing cancels) without
computing: its response depends on a word in the prompt. Its vocabulary is the 256 bytes, so that a
character outside ASCII takes several tokens, and three special tokens.
"""

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import uvicorn
from fastapi import FastAPI

import bpe
from serve.api.app import create_app
from serve.api.settings import ServerSettings
from serve.models import catalogue
from serve.models.decoder import DecoderModel
from serve.models.registry import Registry
from serve.models.spec import ModelSpec
from tests.serve.tiny_data import TEMPLATE
from tests.waiting import wait_until
from transformer.engine import (
    Busy,
    Done,
    Event,
    Failed,
    PrefillDone,
    PromptLogprobs,
    SequenceRequest,
    Stats,
    Token,
)

HELLO = "Hello, wörld! 😀 Bye."  # the default response
CONTEXT = 512
IM_START, IM_END, END_OF_TEXT = 256, 257, 258

SPECIAL = {"<|im_start|>": IM_START, "<|im_end|>": IM_END, "<|endoftext|>": END_OF_TEXT}
FIM_TOKENS = {"<|fim_prefix|>": 259, "<|fim_suffix|>": 260, "<|fim_middle|>": 261}


def byte_encoding(special_tokens: dict[str, int]) -> bpe.Encoding:
    ranks = {bytes([byte]): byte for byte in range(256)}
    return bpe.Encoding("bytes", pattern=r"[\s\S]", ranks=ranks, special_tokens=special_tokens)


encoding = byte_encoding(SPECIAL)
fim_encoding = byte_encoding(SPECIAL | FIM_TOKENS)


def tokenizer(template: str | None, encoding: bpe.Encoding = encoding) -> bpe.Tokenizer:
    return bpe.Tokenizer(
        encoding=encoding,
        chat_template=template and bpe.ChatTemplate(template),
        bos_id=None,
        eos_id=IM_END,
        add_bos=False,
        stop_ids=frozenset({IM_END, END_OF_TEXT}),
    )


class ScriptedEngine:
    """An engine with scripted responses; ``requests`` and ``running`` record its requests.

    Args:
        encoding: the vocabulary of ``answer``.

    Attributes:
        answer: the response to every prompt, with special tokens; None for the responses below.
    """

    def __init__(self, encoding: bpe.Encoding = encoding) -> None:
        self.encoding = encoding
        self.answer: str | None = None
        self.requests: list[SequenceRequest] = []
        self.running = 0
        self.most_running = 0
        self.tokens = 0

    async def stream(self, request: SequenceRequest) -> AsyncIterator[Event]:
        known = self.encoding if self.encoding is not encoding else fim_encoding
        prompt = known.decode(request.prompt)
        if "busy" in prompt:
            raise Busy
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            if "fail at once" in prompt:
                yield Failed("the numbers went bad")
                return
            cached = 4 if "cached" in prompt else 0
            yield PrefillDone(cached)
            if "never in time" in prompt:
                yield Done("timeout")
                return
            if request.prompt_logprobs is not None:
                for start in range(0, len(request.prompt), 4):
                    ids = enumerate(request.prompt[start : start + 4], start)
                    yield PromptLogprobs(
                        tuple(self.prompt_token(at, id, request) for at, id in ids)
                    )
            reply = encoding.encode_ordinary(self.reply(prompt, request))
            if self.answer is not None:
                reply = self.encoding.encode(self.answer, allowed_special="all")
            if prompt.startswith("half"):
                reply = [0xA9, ord("!")]
            for count, id in enumerate(reply):
                if count == request.max_tokens:
                    yield Done("length")
                    return
                await asyncio.sleep(0.001 if "endless" in prompt else 0)
                self.tokens += 1
                yield self.token(id, request)
                if count == 2 and "fail later" in prompt:
                    yield Failed("the numbers went bad")
                    return
                if count == 2 and "crash" in prompt:
                    raise RuntimeError("secret: a bug in the engine")
                if count == 2 and "shutdown" in prompt:
                    yield Done("cancelled")
                    return
            yield Done(
                "stop", self.token(IM_END, request) if request.top_logprobs is not None else None
            )
        finally:
            self.running -= 1

    @property
    def is_idle(self) -> bool:
        return self.running == 0

    def stats(self) -> Stats:
        return Stats(finished={}, running=self.running, generated_tokens=self.tokens, slots=16)

    def reply(self, prompt: str, request: SequenceRequest) -> str:
        sampling = request.sampling_params
        if prompt == "<|fim_prefix|>emoji(<|fim_suffix|>) end<|fim_middle|>":
            return "filled in"
        if "endless" in prompt:
            return "abcdefghij" * 1000
        if "seed" in prompt:
            return f"{sampling.seed}/{request.index}"
        if "best" in prompt:
            return str(request.index)
        if "special" in prompt:
            return f"{request.prompt[0]}"
        if "nothing hey" in prompt:
            return ""
        if "emoji" in prompt:
            return "😀" * 3
        return HELLO

    def token(self, id: int, request: SequenceRequest) -> Token:
        if request.top_logprobs is None:
            return Token(id, None, ())
        # Of the four choices of a `best_of` request, the third is the likeliest.
        likely = -1.0 - (request.index - 2) % 4 if chr(id).isdigit() else -0.25
        top = ((id, likely), (0x41, -2.5), (0xFF, float("-inf")))
        return Token(id, likely, top[: request.top_logprobs])

    def prompt_token(self, position: int, id: int, request: SequenceRequest) -> Token:
        if position == 0:
            return Token(id)
        top = ((id, -position / 8), (0x42, -9.5))
        return Token(id, -position / 8, top[: request.prompt_logprobs])


def model(
    id: str = "scripted",
    template: str | None = TEMPLATE,
    encoding: bpe.Encoding = encoding,
) -> DecoderModel:
    return DecoderModel(
        id=id,
        created=1_700_000_000,
        owned_by="pellucid",
        tokenizer=tokenizer(template, encoding),
        context=CONTEXT,
        engine=ScriptedEngine(encoding),  # type: ignore[arg-type]
        fingerprint="fp_scripted",
    )


@contextmanager
def serve_models(*models: DecoderModel | ModelSpec, **settings: object) -> Iterator[str]:
    """Run a server of ``models`` on a thread and a free port; yield its URL without /v1."""
    chat_pattern = replace(catalogue.load().patterns[0], model=models[0].id)
    aliases = {"gpt-4": models[0].id, "mine": models[0].id}
    registry = Registry([*models], aliases, patterns=[chat_pattern])
    with tempfile.TemporaryDirectory() as home:  # not the user's data folder, which may hold keys
        settings = {"home": Path(home), **settings}
        app = create_app(ServerSettings(**settings), registry)  # type: ignore[arg-type]
        with serve_app(app) as address, closing(app.state.job_runner):
            yield address


@contextmanager
def serve_app(app: FastAPI) -> Iterator[str]:
    """Run an application on a thread, on a free port; yield its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
