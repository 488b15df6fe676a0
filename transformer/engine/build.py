"""From weights to a running engine: allocate the KV cache, compile programs, start the engine.

    engine = build_engine(params, cfg)
    for completion in engine.generate_batch(requests):
        ...

An engine accepts requests as soon as the programs for the smallest batch are compiled. The programs
for larger batches are compiled on a separate thread and used once they are ready. With
`jax_compilation_cache_dir` set, JAX loads them from disk at the next start; this package does not
change JAX's configuration.
"""

from __future__ import annotations

import ctypes
import math
import platform
import threading
import time
import weakref
from collections.abc import Callable

import jax.numpy as jnp

from transformer import cache
from transformer.config import Config
from transformer.decoder import Params
from transformer.engine.device import Device
from transformer.engine.engine import Engine
from transformer.engine.runner import CHUNK_SIZE, NUM_SLOTS, Runner
from transformer.engine.scheduler import Scheduler

MAX_WAITING = 256  # maximum number of queued requests; further requests raise Busy
_compile_lock = threading.Lock()  # one background compilation at a time, as each uses a core


def build_engine(
    params: Params,
    cfg: Config,
    *,
    num_ids: int | None = None,
    cache_bytes: int = 256 * 2**20,
    cache_dtype=jnp.float32,
    max_batch_size: int = NUM_SLOTS,
    device: Device | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Engine:
    """Return an engine that generates with a model.

    Args:
        params: the weights, from `checkpoint.load`.
        cfg: the configuration of the model, from the same call.
        num_ids: the size of the vocabulary, which can be smaller than the embedding table; None for
            all rows of the embedding table.
        cache_bytes: the size of the KV cache of all sequences in bytes.
        cache_dtype: the dtype of keys and values.
        max_batch_size: the maximum number of sequences in a decoding step.
        device: the device thread; None for `default_device()`.
        notify: called with a message for each program that took long to compile or to load.

    Raises:
        ValueError: `cache_bytes` is less than one block, or the logits are NaN.
    """
    runner = build_runner(
        params, cfg, num_ids or cfg.vocab_size, cache_bytes, cache_dtype, notify=notify
    )
    return start_engine(runner, max_batch_size=max_batch_size, device=device)


def build_runner(
    params: Params,
    cfg: Config,
    num_ids: int,
    cache_bytes: int,
    cache_dtype,
    *,
    notify: Callable[[str], None] = lambda line: None,
) -> Runner:
    """Return a runner with as many KV cache blocks as fit into `cache_bytes`; see `build_engine`.

    Raises:
        ValueError: `cache_bytes` is less than one block.
    """
    block_bytes = cache.bytes_per_block(cfg, cache_dtype)
    num_blocks = cache_bytes // block_bytes
    if num_blocks < 1:
        raise ValueError(
            f"the KV cache must have at least one block of {cache.BLOCK_SIZE} tokens, "
            f"{math.ceil(block_bytes / 2**20)} MB, got {cache_bytes / 2**20:.0f} MB"
        )
    # More blocks than the sequences of all slots can fill would never be used.
    num_blocks = min(num_blocks, NUM_SLOTS * cache.blocks_for(cfg.max_seq_len))
    return Runner(params, cfg, num_ids, num_blocks, cache_dtype, notify)


def start_engine(
    runner: Runner,
    *,
    max_batch_size: int,
    device: Device | None = None,
    clock: Callable[[], float] = time.monotonic,
    on_speed: Callable[[int, float], None] = lambda tokens, seconds: None,
) -> Engine:
    """Start an engine with the smallest batch size, and compile larger ones in the background.

    Args:
        runner: the model and its KV cache.
        max_batch_size: the maximum number of sequences in a decoding step. If more sequences run,
            decoding steps alternate between them.
        device: the device thread; None for `default_device()`.
        clock: returns the time in seconds.
        on_speed: called with (tokens, seconds) of decoding when a sequence ends during which no
            other sequence ran.

    Raises:
        ValueError: the logits of the model are NaN.
    """
    runner.warm_up()
    _trim_heap()
    scheduler = Scheduler(NUM_SLOTS, runner.num_blocks, cache.BLOCK_SIZE, CHUNK_SIZE, MAX_WAITING)
    engine = Engine(runner, scheduler, runner.context, device, clock=clock, on_speed=on_speed)
    if larger := [size for size in runner.batch_sizes[1:] if size <= max_batch_size]:
        # Not a daemon thread, because a process that exits while XLA compiles would crash. The
        # references are weak so that this thread does not keep an unloaded model in memory.
        arguments = (weakref.ref(runner), weakref.ref(engine), [*larger, "score"])
        threading.Thread(target=_compile, args=arguments, name="compile").start()
    return engine


def _compile(
    runner_ref: weakref.ref[Runner], engine_ref: weakref.ref[Engine], names: list[str | int]
) -> None:
    for name in names:
        with _compile_lock:
            engine, runner = engine_ref(), runner_ref()
            if engine is None or not engine.is_alive or runner is None:
                return
            del engine
            runner.compile(name)
            del runner
            _trim_heap()


def _trim_heap() -> None:
    """Give memory freed by the compiler back to the system; glibc would keep about 100 MB of it."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
