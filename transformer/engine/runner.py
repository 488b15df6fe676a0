"""What is computed: one chunk of a prompt, or one step of some running rows.

Rows are padded to one of a few batch sizes, never one: on a CPU a one-row product in a narrow
format is the slow one, and few sizes are few programs to compile. Programs are compiled ahead, on
any thread, while the device serves with those that are there: a step in two halves gives every row
the same bits as a step of all. JAX keeps compiled programs on disk for the next start.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from transformer import cache, generate, lora, sampling
from transformer.config import Config
from transformer.decoder import Params
from transformer.engine.requests import SequenceRequest
from transformer.engine.scheduler import Sequence as Row
from transformer.sampling import SampleOutput, SamplingParams

CHUNK_SIZE = 64  # prompt tokens read at once: well under a third of a second on two cores
BUCKETS = (2, 4, 8, 16)  # rows of a decoding step
NUM_SLOTS = BUCKETS[-1]
_GREEDY = SamplingParams(temperature=0.0)
SLOW_COMPILE_SECONDS = 2.0  # seconds; a program that took longer is told of
_copy_block = jax.jit(cache.copy_block, donate_argnames="kv_cache")


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
        self._params, self.cfg, self._num_ids = params, cfg, num_ids
        self.num_blocks, self._cache_dtype, self._notify = num_blocks, cache_dtype, notify
        self._table_width = min(cache.blocks_for(cfg.max_seq_len), num_blocks)
        self._programs: dict[str | int, Callable] = {}
        self._compiling = threading.Lock()
        self._reset_state()
        # What programs are compiled for. The arrays themselves come and go with every call.
        self._shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
            (self._cache, self._penalty_state),
        )

    def _reset_state(self) -> None:
        self._cache = cache.init(self.cfg, self.num_blocks, self._cache_dtype)
        # The last slot is for padding rows.
        self._penalty_state = sampling.init_penalty_state(NUM_SLOTS + 1, self.cfg.vocab_size)

    def recover(self) -> bool:
        """After a failed call: whether it took the cache with it, which is then made anew.

        A call donates the cache; one that fails halfway may have given it up without a successor.
        """
        is_lost = any(
            leaf.is_deleted() for leaf in jax.tree.leaves((self._cache, self._penalty_state))
        )
        if is_lost:
            self._reset_state()
        return is_lost

    @property
    def context(self) -> int:
        """Positions that a sequence may have: those of the model, or of the cache if it is less."""
        return min(self.cfg.max_seq_len, self.num_blocks * cache.BLOCK_SIZE)

    @property
    def num_bytes(self) -> int:
        """Memory of weights and cache."""
        cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._shapes))
        return cache_bytes + self.weight_bytes

    @property
    def weight_bytes(self) -> int:
        """Memory of weights alone."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._params))

    def with_adapter(self, adapter: lora.Adapter) -> Runner:
        """The same model with an adapter beside its weights, whose arrays both then have."""
        return Runner(
            lora.apply(self._params, adapter),
            self.cfg,
            self._num_ids,
            self.num_blocks,
            self._cache_dtype,
            self._notify,
        )

    # -- programs ------------------------------------------------------------------------------

    @property
    def max_batch_size(self) -> int:
        """Rows of the largest step that is compiled."""
        return max((size for size in BUCKETS if size in self._programs), default=BUCKETS[0])

    def compile(self, *names: str | int) -> None:
        """Compiles programs or fetches them from disk: "read", "score", or a number of rows.

        May be called from any thread, while others compute.
        """
        for name in names:
            self._program(name)

    def warm_up(self) -> None:
        """Runs what one conversation needs, once. Not while the engine computes."""
        row = Row(
            SequenceRequest(prompt=(0,), max_tokens=1, sampling_params=_GREEDY),
            deliver=lambda event: None,
        )
        row.slot = NUM_SLOTS
        self.prefill(row, (cache.NULL_BLOCK, cache.NULL_BLOCK))
        row.ids.append(0)
        self.decode([row])

    def _program(self, name: str | int) -> Callable:
        if name not in self._programs:
            with self._compiling:
                if name not in self._programs:
                    self._programs[name] = self._compile(name)
        return self._programs[name]

    def _compile(self, name: str | int) -> Callable:
        started = time.perf_counter()
        memory, past = self._shapes
        tables = np.zeros((1, self._table_width), np.int32)
        chunk, one = np.zeros((1, CHUNK_SIZE), np.int32), np.zeros(1, np.int32)
        if name == "read":
            lowered = generate.prefill.lower(self._params, self.cfg, memory, chunk, tables, one, 0)
            what = "reading prompts"
        elif name == "score":
            lowered = generate.prefill_with_logprobs.lower(
                self._params, self.cfg, memory, chunk, chunk[0], tables, one, 0,
                num_ids=self._num_ids,
            )  # fmt: skip
            what = "scoring prompts"
        else:
            lowered = generate.decode.lower(
                self._params,
                self.cfg,
                memory,
                past,
                *self._step_inputs([], name),
                num_ids=self._num_ids,
            )
            what = f"steps of {name} rows"
        with _cache_hits() as hits:
            program = lowered.compile()
        if (seconds := time.perf_counter() - started) > SLOW_COMPILE_SECONDS:
            how = "fetched from disk in" if hits else "compiled, and kept, in"
            self._notify(f"{what}: {how} {seconds:.1f} s")
        return program

    # -- work ----------------------------------------------------------------------------------

    def prefill(
        self, sequence: Row, block_copy: tuple[int, int] | None = None
    ) -> SampleOutput | None:
        """Reads the next chunk of a prompt; behind the last one, draws the first token.

        Args:
            row: what it reads of; `row.scores` is set where scores are asked for.
            copy: a block to be copied onto another before, as (from, to).
        """
        if block_copy is not None:
            self._cache = _copy_block(self._cache, *np.array(block_copy, np.int32))
        prompt, start = sequence.request.prompt, sequence.num_computed_tokens
        real = prompt[start : start + CHUNK_SIZE]
        ids = np.zeros((1, CHUNK_SIZE), np.int32)
        ids[0, : len(real)] = real
        where = self._block_tables([sequence]), np.array([start], np.int32), len(real) - 1
        if sequence.request.prompt_logprobs is None:
            logits, self._cache = self._program("read")(self._params, self._cache, ids, *where)
        else:
            following = np.zeros(CHUNK_SIZE, np.int32)
            following[: len(prompt) - start - 1] = prompt[start + 1 : start + CHUNK_SIZE + 1]
            logits, scores, self._cache = self._program("score")(
                self._params, self._cache, ids, following, *where
            )
            sequence.chunk_scores = _on_host(jax.tree.map(lambda leaf: leaf[: len(real)], scores))
        sequence.num_computed_tokens += len(real)
        if sequence.is_prefilling:
            logits.block_until_ready()  # a piece of work is over when it is over
            return None
        history = generate.prompt_mask_and_bias(
            prompt, sequence.request.sampling_params, self.cfg.vocab_size
        )
        self._penalty_state = generate.reset_slot(self._penalty_state, sequence.slot, *history)
        drawn, self._penalty_state = generate.sample(
            logits, self._penalty_state, self._sampling_inputs([sequence]), num_ids=self._num_ids
        )
        return _on_host(drawn)

    def decode(self, sequences: Sequence[Row]) -> SampleOutput:
        """Reads the last token of each row and draws the next."""
        size = next(size for size in BUCKETS if size >= len(sequences))
        drawn, self._cache, self._penalty_state = self._program(size)(
            self._params, self._cache, self._penalty_state, *self._step_inputs(sequences, size)
        )
        for row in sequences:
            row.num_computed_tokens += 1
        return _on_host(drawn)

    def _step_inputs(self, rows: Sequence[Row], size: int) -> tuple:
        """What a step of `size` rows is told: the last id of each, its blocks, its length, how."""
        pad = size - len(rows)
        ids = np.array([row.ids[row.num_computed_tokens] for row in rows] + [0] * pad, np.int32)
        starts = np.array([row.num_computed_tokens for row in rows] + [0] * pad, np.int32)
        return ids, self._block_tables(rows, pad), starts, self._sampling_inputs(rows, pad)

    def _block_tables(self, rows: Sequence[Row], pad: int = 0) -> np.ndarray:
        tables = np.full((len(rows) + pad, self._table_width), cache.NULL_BLOCK, np.int32)
        for table, row in zip(tables, rows, strict=False):
            table[: len(row.block_table)] = row.block_table
        return tables

    def _sampling_inputs(self, rows: Sequence[Row], pad: int = 0) -> sampling.SamplingMetadata:
        return sampling.batch_sampling_params(
            [row.request.sampling_params for row in rows] + [_GREEDY] * pad,
            [row.request.index for row in rows] + [0] * pad,
            [row.num_generated for row in rows] + [0] * pad,
            [row.slot for row in rows] + [NUM_SLOTS] * pad,
        )


@contextlib.contextmanager
def _cache_hits() -> Iterator[list[str]]:
    """Collect the programs that this thread has from JAX's cache on disk meanwhile."""
    hits, thread = [], threading.get_ident()

    def listen(event: str, **_: str | int) -> None:
        if event == "/jax/compilation_cache/cache_hits" and threading.get_ident() == thread:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


def _on_host(drawn: SampleOutput) -> SampleOutput:
    return SampleOutput(
        *(
            np.asarray(leaf)
            for leaf in (drawn.ids, drawn.logprobs, drawn.top_ids, drawn.top_logprobs)
        )
    )
