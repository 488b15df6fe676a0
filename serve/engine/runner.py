"""What is computed: one chunk of a prompt, or one step of all running rows.

Rows are padded to one of a few batch sizes, never one: on a CPU a one-row product in a narrow
format is the slow one, and few sizes are few programs to compile. JAX keeps compiled programs on
disk for the next start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import jax
import numpy as np

from serve.engine.requests import Request
from serve.engine.scheduler import Sequence as Row
from transformer import cache, generate, sampling
from transformer.config import Config
from transformer.decoder import Params
from transformer.sampling import Drawn, Sampling

CHUNK = 64  # prompt tokens read at once: well under a third of a second on two cores
BUCKETS = (2, 4, 8, 16)  # rows of a decoding step
NUM_SLOTS = BUCKETS[-1]
_GREEDY = Sampling(temperature=0.0)


class Runner:
    """A decoder on the device: its weights, its cache, and what its penalties remember.

    Args:
        params, cfg: the model.
        num_ids: ids of the vocabulary; the table may be padded beyond.
        num_blocks: blocks of the cache.
        cache_dtype: what keys and values are stored in.
        notify: told when a program had to be compiled, or fetched from disk.
    """

    def __init__(
        self,
        params: Params,
        cfg: Config,
        num_ids: int,
        num_blocks: int,
        cache_dtype,
        notify: Callable[[str], None] = lambda line: None,
    ):
        self._notify, self._seen = notify, set[str]()
        self._params, self._cfg, self._num_ids = params, cfg, num_ids
        self._num_blocks, self._cache_dtype = num_blocks, cache_dtype
        self._table_width = min(cache.blocks_for(cfg.max_seq_len), num_blocks)
        self._forget()

    def _forget(self) -> None:
        self._memory = cache.init(self._cfg, self._num_blocks, self._cache_dtype)
        # The last slot is for padding rows.
        self._past = sampling.history(NUM_SLOTS + 1, self._cfg.vocab_size)

    def recover(self) -> bool:
        """After a failed call: whether it took the cache with it, which is then made anew.

        A call donates the cache; one that fails halfway may have given it up without a successor.
        """
        is_lost = any(leaf.is_deleted() for leaf in jax.tree.leaves((self._memory, self._past)))
        if is_lost:
            self._forget()
        return is_lost

    def programs(self) -> list[Callable[[], object]]:
        """Every program there is; calling one compiles it, or fetches it from disk."""
        request = Request(prompt=(0,), max_tokens=1, sampling=_GREEDY)

        def nobody() -> Row:
            row = Row(request, deliver=lambda event: None)
            row.slot = NUM_SLOTS
            return row

        return [lambda: self.prefill(nobody())] + [
            lambda size=size: self.decode([nobody()] * size) for size in BUCKETS
        ]

    def prefill(self, row: Row) -> Drawn | None:
        """Reads the next chunk of a prompt; behind the last one, draws the first token."""
        with self._announced("prompt reading"):
            return self._prefill(row)

    def decode(self, rows: Sequence[Row]) -> Drawn:
        """Reads the last token of each row and draws the next."""
        size = next(size for size in BUCKETS if size >= len(rows))
        with self._announced(f"decoding of {size} rows"):
            return self._decode(rows, size)

    @contextmanager
    def _announced(self, program: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if program not in self._seen:
            self._seen.add(program)
            if (seconds := time.perf_counter() - started) > 1:
                self._notify(f"{program}: compiled, or fetched from disk, in {seconds:.1f} s")

    def _prefill(self, row: Row) -> Drawn | None:
        prompt, start = row.request.prompt, row.length
        if start == 0:
            history = generate.prompt_history(prompt, row.request.sampling, self._cfg.vocab_size)
            self._past = generate.begin(self._past, row.slot, *history)
        real = prompt[start : start + CHUNK]
        ids = np.zeros((1, CHUNK), np.int32)
        ids[0, : len(real)] = real
        where = self._tables([row]), np.array([start], np.int32), len(real) - 1
        if row.request.prompt_logprobs is None:
            logits, self._memory = generate.prefill(
                self._params, self._cfg, self._memory, ids, *where
            )
        else:
            following = np.zeros(CHUNK, np.int32)
            following[: len(prompt) - start - 1] = prompt[start + 1 : start + CHUNK + 1]
            logits, scores, self._memory = generate.score(
                self._params,
                self._cfg,
                self._memory,
                ids,
                following,
                *where,
                num_ids=self._num_ids,
            )
            row.scores = _on_host(jax.tree.map(lambda leaf: leaf[: len(real)], scores))
        row.length += len(real)
        if row.is_reading:
            logits.block_until_ready()  # a piece of work is over when it is over
            return None
        drawn, self._past = generate.draw(
            logits, self._past, self._settings([row]), num_ids=self._num_ids
        )
        return _on_host(drawn)

    def _decode(self, rows: Sequence[Row], size: int) -> Drawn:
        pad = size - len(rows)
        ids = np.array([row.ids[row.length] for row in rows] + [0] * pad, np.int32)
        starts = np.array([row.length for row in rows] + [0] * pad, np.int32)
        drawn, self._memory, self._past = generate.decode(
            self._params,
            self._cfg,
            self._memory,
            self._past,
            ids,
            self._tables(rows, pad),
            starts,
            self._settings(rows, pad),
            num_ids=self._num_ids,
        )
        for row in rows:
            row.length += 1
        return _on_host(drawn)

    def _tables(self, rows: Sequence[Row], pad: int = 0) -> np.ndarray:
        tables = np.full((len(rows) + pad, self._table_width), cache.TRASH, np.int32)
        for table, row in zip(tables, rows, strict=False):
            table[: len(row.blocks)] = row.blocks
        return tables

    def _settings(self, rows: Sequence[Row], pad: int = 0) -> sampling.Settings:
        return sampling.settings(
            [row.request.sampling for row in rows] + [_GREEDY] * pad,
            [row.request.choice for row in rows] + [0] * pad,
            [row.generated for row in rows] + [0] * pad,
            [row.slot for row in rows] + [NUM_SLOTS] * pad,
        )


def _on_host(drawn: Drawn) -> Drawn:
    return Drawn(
        *(
            np.asarray(leaf)
            for leaf in (drawn.ids, drawn.logprobs, drawn.top_ids, drawn.top_logprobs)
        )
    )
