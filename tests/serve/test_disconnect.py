"""Generation stops when nobody waits for it, and requests run side by side."""

import asyncio
import json
import socket
import time

import pytest
from openai import AsyncOpenAI

from serve.api.generation import SIDE_BY_SIDE, interleave
from tests.serve.scripted import wait_until


def send(address, body):
    """A request over a bare socket, which can be cut at any moment."""
    host, port = address.removeprefix("http://").split(":")
    data = json.dumps({"model": "scripted", **body}).encode()
    connection = socket.create_connection((host, int(port)))
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_generation(address, engine, stream):
    body = {"prompt": "endless", "max_tokens": 500, "n": 3, "stream": stream}
    connection = send(address, body)
    if stream:
        connection.recv(100)
    wait_until(lambda: engine.running == 3)
    connection.close()
    before = time.monotonic()
    wait_until(lambda: engine.running == 0)
    assert time.monotonic() - before < 0.5


def test_a_client_that_leaves_before_it_has_said_all_is_no_failure(address, http, caplog):
    """Starlette's own ClientDisconnect used to be reported as a crash of ours."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        assert http.get("/health").status_code == 200  # by now it is being read
    assert http.get("/health").status_code == 200
    assert not caplog.records


def test_leaving_a_stream_by_the_client_library(loose, engine):
    with loose.completions.create(
        model="scripted", prompt="endless", max_tokens=500, stream=True
    ) as stream:
        next(iter(stream))
        assert engine.running == 1
    wait_until(lambda: engine.running == 0)


def test_a_cancelled_task_of_the_async_client(address, engine):
    async def run():
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key="any") as client:
            asking = client.completions.create(model="scripted", prompt="endless", max_tokens=500)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asking, 0.2)

    asyncio.run(run())
    wait_until(lambda: engine.running == 0)


def test_a_stop_string_ends_the_computation(loose, engine):
    before = engine.tokens
    loose.completions.create(model="scripted", prompt="endless", max_tokens=500, stop="c")
    assert engine.tokens - before == 3


def test_choices_run_side_by_side_but_not_without_bound(loose, engine):
    engine.most_running = 0
    answer = loose.completions.create(model="scripted", prompt=["endless"] * 20, n=2, max_tokens=5)
    assert [choice.text for choice in answer.choices] == ["abcde"] * 40
    assert engine.most_running == SIDE_BY_SIDE


def test_choices_of_a_stream_interleave(loose):
    stream = loose.completions.create(
        model="scripted", prompt="endless", n=2, max_tokens=10, stream=True
    )
    order = [chunk.choices[0].index for chunk in stream]
    assert order != sorted(order)


def test_one_failing_stream_closes_the_others():
    closed = []

    async def endless():
        try:
            while True:
                await asyncio.sleep(0)
                yield "x"
        finally:
            closed.append(True)

    async def failing():
        yield "y"
        raise LookupError("gone")

    async def run():
        async for _ in interleave([endless(), failing(), endless()], 3):
            pass

    with pytest.raises(LookupError, match="gone"):
        asyncio.run(run())
    assert closed == [True, True]
