"""From weights to a running engine: the size of the cache, the programs, the scheduler.

    engine = build_engine(params, cfg)
    for completion in engine.generate_batch(requests):
        ...

An engine answers as soon as the smallest programs are compiled. Those for larger batches are
compiled meanwhile on a thread of their own, and used from then on. Where
`jax_compilation_cache_dir` is set, JAX fetches them from disk the next time; this package leaves
JAX's configuration alone.
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
from transformer.engine.runner import BUCKETS, CHUNK_SIZE, NUM_SLOTS, Runner
from transformer.engine.scheduler import Scheduler

MAX_WAITING = 256  # requests in the queue before others are turned away
_compile_lock = threading.Lock()  # compiling ahead, of all models: it takes memory and a core


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
        params, cfg: the model, as `checkpoint.load` returns it.
        num_ids: ids of the vocabulary; None for every row of the token table.
        cache_bytes: memory for the keys and values of all sequences.
        cache_dtype: dtype of keys and values.
        max_rows: most sequences in a decoding step.
        device: the thread that computes; None for the process's own.
        notify: called with a line for each program that takes long to compile.

    Raises:
        ValueError: `cache_bytes` holds no block.
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
    """Return a runner whose cache has as many blocks as fit; arguments as of `build_engine`.

    Raises:
        ValueError: `cache_bytes` holds no block.
    """
    block_bytes = cache.bytes_per_block(cfg, cache_dtype)
    num_blocks = cache_bytes // block_bytes
    if num_blocks < 1:
        raise ValueError(
            f"a cache of {cache_bytes / 2**20:.0f} MB holds no block of {cache.BLOCK_SIZE} tokens: "
            f"give it {math.ceil(block_bytes / 2**20)} MB or more"
        )
    # Never more than every slot could fill.
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
    """Return an engine that can decode two sequences now; larger batches are compiled meanwhile.

    Args:
        runner: the model and its cache.
        max_rows: most sequences in a decoding step; larger steps are taken in parts.
        device, clock, on_speed: as of `Engine`.
    """
    runner.warm_up()
    _trim_heap()
    scheduler = Scheduler(NUM_SLOTS, runner.num_blocks, cache.BLOCK_SIZE, CHUNK_SIZE, MAX_WAITING)
    engine = Engine(runner, scheduler, runner.context, device, clock=clock, on_speed=on_speed)
    if later := [size for size in BUCKETS[1:] if size <= max_batch_size]:
        # Not a daemon: a process that ends in the middle of compiling would crash. Its references
        # are weak: a model that is let go meanwhile shall not stay for its sake.
        arguments = (weakref.ref(runner), weakref.ref(engine), [*later, "score"])
        threading.Thread(target=_compile, args=arguments, name="compile").start()
    return engine


def _compile(
    runner: weakref.ref[Runner], engine: weakref.ref[Engine], names: list[str | int]
) -> None:
    for name in names:
        with _compile_lock:
            if (alive := engine()) is None or not alive.is_alive or (own := runner()) is None:
                return
            del alive
            own.compile(name)
            del own
            _trim_heap()


def _trim_heap() -> None:
    """Returns what the compiler freed to the system: glibc would keep some 100 MB of it."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
