"""The computation of the engine: one prefill chunk of a prompt, or one decoding step of a batch.

A batch is padded to one of a few sizes, so that few programs have to be compiled. The smallest size
is two, because XLA's matrix products with one row are slow in bfloat16 and int8 on a CPU, or one
with native kernels. Programs are
compiled ahead of time, on any thread, while the device uses smaller programs that are ready; the
results are bitwise identical for every batch size. JAX can cache compiled programs on disk.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from transformer import cache, generate, lora, sampling
from transformer.config import Config
from transformer.decoder import Params, has_native_step
from transformer.engine.requests import SequenceRequest
from transformer.engine.scheduler import Sequence
from transformer.sampling import SampleOutput, SamplingParams
from transformer.scoring import log_softmax

CHUNK_SIZE = 64  # prompt tokens per prefill: well under a third of a second on two cores
BUCKETS = (2, 4, 8, 16)  # batch sizes of a decoding step
NUM_SLOTS = BUCKETS[-1]
_GREEDY = SamplingParams(temperature=0.0)
SLOW_COMPILE_SECONDS = 2.0  # programs that take longer are reported to `notify`
_copy_block = jax.jit(cache.copy_block, donate_argnames="kv_cache")


class Runner:
    """A decoder on the device: weights, KV cache, penalty state and compiled programs.

    Args:
        params: the weights.
        cfg: the configuration of the model.
        num_ids: the size of the vocabulary, which can be smaller than the embedding table.
        num_blocks: the number of blocks of the KV cache.
        cache_dtype: the dtype of keys and values.
        notify: called with a message for each program that was slow to compile or to load.
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
        self.batch_sizes  # noqa: B018 (compile native kernels before the programs that need them)
        self._table_width = min(cache.blocks_for(cfg.max_seq_len), num_blocks)
        self._programs: dict[str | int, Callable] = {}
        self._compiling = threading.Lock()
        self._reset_state()
        # The token bitmask of a batch without grammars.
        self._all_tokens = np.full(
            (NUM_SLOTS, -(-self.cfg.vocab_size // 32)), 0xFFFFFFFF, np.uint32
        )
        self._all_tokens.flags.writeable = False
        # Programs are compiled for shapes: every call donates the arrays and returns new ones.
        self._shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
            (self._cache, self._penalty_state),
        )

    def _reset_state(self) -> None:
        self._cache = cache.init(self.cfg, self.num_blocks, self._cache_dtype)
        # The last slot is for padding rows.
        self._penalty_state = sampling.init_penalty_state(NUM_SLOTS + 1, self.cfg.vocab_size)

    def recover(self) -> bool:
        """Replace the KV cache if a failed call lost it; return whether it was lost.

        Each call donates the cache. If the call fails, the cache can be deleted already while no
        new cache is returned.
        """
        is_lost = any(
            leaf.is_deleted() for leaf in jax.tree.leaves((self._cache, self._penalty_state))
        )
        if is_lost:
            self._reset_state()
        return is_lost

    @property
    def context(self) -> int:
        """Return the maximum number of tokens in a sequence, limited by model and KV cache."""
        return min(self.cfg.max_seq_len, self.num_blocks * cache.BLOCK_SIZE)

    @property
    def num_bytes(self) -> int:
        """Return the size of weights, KV cache and penalty state in bytes."""
        cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._shapes))
        return cache_bytes + self.weight_bytes

    @property
    def weight_bytes(self) -> int:
        """Return the size of the weights in bytes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._params))

    def with_adapter(self, adapter: lora.Adapter) -> Runner:
        """Return a runner with a LoRA adapter that shares the weight arrays of this runner."""
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
        """Return the largest batch size for which a decoding step is compiled."""
        sizes = [size for size in self.batch_sizes if size in self._programs]
        return max(sizes, default=self.batch_sizes[0])

    @functools.cached_property
    def batch_sizes(self) -> tuple[int, ...]:
        """Return the batch sizes of a decoding step, the smallest first.

        The first call in a process can compile the native kernels.
        """
        started = time.perf_counter()
        is_native = has_native_step(self._params, self.cfg)
        if (seconds := time.perf_counter() - started) > SLOW_COMPILE_SECONDS:
            self._notify(f"native kernels: compiled or loaded from disk in {seconds:.1f} s")
        return (1, *BUCKETS) if is_native else BUCKETS

    def compile(self, *names: str | int) -> None:
        """Compile programs, or load them from JAX's cache on disk; can be called from any thread.

        Args:
            names: "read" for prefill, "score" for prefill with log-probabilities, or the batch size
                of a decoding step.
        """
        for name in names:
            self._program(name)

    def warm_up(self) -> None:
        """Run each program that a single conversation needs, so that requests do not compile it.

        Raises:
            ValueError: the logits are NaN.
        """
        sequence = Sequence(
            SequenceRequest(prompt=(0,), max_tokens=1, sampling_params=_GREEDY),
            deliver=lambda event: None,
        )
        sequence.slot = NUM_SLOTS
        self.prefill(sequence, (cache.NULL_BLOCK, cache.NULL_BLOCK))
        sequence.ids.append(0)
        if np.isnan(self.decode([sequence]).logprobs[0]):
            raise ValueError("the logits of the model are NaN: its weights are damaged or overflow")

    def _program(self, name: str | int) -> Callable:
        if name not in self._programs:
            with self._compiling:
                if name not in self._programs:
                    self._programs[name] = self._compile(name)
        return self._programs[name]

    def _compile(self, name: str | int) -> Callable:
        started = time.perf_counter()
        kv_cache, penalty_state = self._shapes
        tables = np.zeros((1, self._table_width), np.int32)
        chunk, start = np.zeros((1, CHUNK_SIZE), np.int32), np.zeros(1, np.int32)
        if name == "read":
            lowered = generate.prefill.lower(
                self._params, self.cfg, kv_cache, chunk, tables, start, 0
            )
            label = "prefill"
        elif name == "score":
            lowered = generate.prefill_with_logprobs.lower(
                self._params, self.cfg, kv_cache, chunk, chunk[0], tables, start, 0,
                num_ids=self._num_ids,
            )  # fmt: skip
            label = "prefill with log-probabilities"
        else:
            assert isinstance(name, int), f"unknown program {name!r}"
            lowered = generate.decode.lower(
                self._params,
                self.cfg,
                kv_cache,
                penalty_state,
                *self._step_inputs([], name),
                num_ids=self._num_ids,
            )
            label = f"decoding of {name} sequences"
        with _cache_hits() as hits:
            program = lowered.compile()
        if (seconds := time.perf_counter() - started) > SLOW_COMPILE_SECONDS:
            action = "loaded from disk" if hits else "compiled and cached"
            self._notify(f"{label}: {action} in {seconds:.1f} s")
        return program

    # -- work ----------------------------------------------------------------------------------

    def prefill(
        self, sequence: Sequence, block_copy: tuple[int, int] | None = None
    ) -> SampleOutput | None:
        """Compute the next chunk of a prompt; after the last chunk, sample the first token.

        Args:
            sequence: the sequence to prefill. `sequence.chunk_scores` is set if its request has
                `prompt_logprobs`.
            block_copy: the blocks (source, target) of a copy to make first; None for no copy.

        Returns:
            After the last chunk, the first token as arrays of one row on the host; before that,
            None.
        """
        if block_copy is not None:
            self._cache = _copy_block(self._cache, *np.array(block_copy, np.int32))
        prompt, start = sequence.request.prompt, sequence.num_computed_tokens
        chunk = prompt[start : start + CHUNK_SIZE]
        ids = np.zeros((1, CHUNK_SIZE), np.int32)
        ids[0, : len(chunk)] = chunk
        position_args = self._block_tables([sequence]), np.array([start], np.int32), len(chunk) - 1
        if sequence.request.prompt_logprobs is None:
            logits, self._cache = self._program("read")(
                self._params, self._cache, ids, *position_args
            )
        else:
            targets = np.zeros(CHUNK_SIZE, np.int32)
            targets[: len(prompt) - start - 1] = prompt[start + 1 : start + CHUNK_SIZE + 1]
            logits, scores, self._cache = self._program("score")(
                self._params, self._cache, ids, targets, *position_args
            )
            sequence.chunk_scores = _on_host(jax.tree.map(lambda leaf: leaf[: len(chunk)], scores))
        sequence.num_computed_tokens += len(chunk)
        if sequence.is_prefilling:
            logits.block_until_ready()  # a work item ends when its computation ends
            return None
        mask_and_bias = generate.prompt_mask_and_bias(
            prompt, sequence.request.sampling_params, self.cfg.vocab_size
        )
        self._penalty_state = generate.reset_slot(
            self._penalty_state, sequence.slot, *mask_and_bias
        )
        output, self._penalty_state = generate.sample(
            logits, self._penalty_state, self._sampling_inputs([sequence]), num_ids=self._num_ids
        )
        output = _on_host(output)
        if token_ids := sequence.request.logprob_token_ids:
            ids = np.array(token_ids, np.int32)
            logprobs = log_softmax(np.asarray(logits)[0, : self._num_ids])[ids]
            # The fields of SampleOutput are annotated as JAX arrays.
            output = output.replace(top_ids=ids[None], top_logprobs=logprobs[None])
        return output

    def decode(self, sequences: list[Sequence]) -> SampleOutput:
        """Run the model on the last token of each sequence, and sample its next token.

        Returns:
            The sampled tokens as arrays on the host. The first `len(sequences)` rows are those of
            the sequences; further rows are padding.
        """
        size = next(size for size in self.batch_sizes if size >= len(sequences))
        output, self._cache, self._penalty_state = self._program(size)(
            self._params, self._cache, self._penalty_state, *self._step_inputs(sequences, size)
        )
        for sequence in sequences:
            sequence.num_computed_tokens += 1
        return _on_host(output)

    def _step_inputs(self, sequences: list[Sequence], size: int) -> tuple:
        """Return last ids [B], block tables [B, S / BLOCK_SIZE], lengths [B] and sampling inputs.

        B is `size`; the sequences are padded to that number of rows.
        """
        pad = size - len(sequences)
        ids = np.array([s.ids[s.num_computed_tokens] for s in sequences] + [0] * pad, np.int32)
        starts = np.array([s.num_computed_tokens for s in sequences] + [0] * pad, np.int32)
        block_tables = self._block_tables(sequences, pad)
        return ids, block_tables, starts, self._sampling_inputs(sequences, pad)

    def _block_tables(self, sequences: list[Sequence], pad: int = 0) -> np.ndarray:
        tables = np.full((len(sequences) + pad, self._table_width), cache.NULL_BLOCK, np.int32)
        for table, sequence in zip(tables, sequences, strict=False):
            table[: len(sequence.block_table)] = sequence.block_table
        return tables

    def _sampling_inputs(
        self, sequences: list[Sequence], pad: int = 0
    ) -> sampling.SamplingMetadata:
        token_bitmask = self._all_tokens[: len(sequences) + pad]
        if any(sequence.token_bitmask is not None for sequence in sequences):
            token_bitmask = token_bitmask.copy()
        for row, sequence in zip(token_bitmask, sequences, strict=False):
            if sequence.token_bitmask is not None:
                row[:] = 0
                row[: len(sequence.token_bitmask)] = sequence.token_bitmask
        return sampling.batch_sampling_params(
            [s.request.sampling_params for s in sequences] + [_GREEDY] * pad,
            [s.request.index for s in sequences] + [0] * pad,
            [s.num_generated for s in sequences] + [0] * pad,
            [s.slot for s in sequences] + [NUM_SLOTS] * pad,
            token_bitmask,
        )


@contextlib.contextmanager
def _cache_hits() -> Iterator[list[str]]:
    """Yield a list that grows by one item per program that this thread loads from JAX's cache.

    The list grows only within the `with` block.
    """
    hits, thread = [], threading.get_ident()

    def on_event(event: str, **_: str | int) -> None:
        if event == "/jax/compilation_cache/cache_hits" and threading.get_ident() == thread:
            hits.append(event)

    jax.monitoring.register_event_listener(on_event)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(on_event)


def _on_host(output: SampleOutput) -> SampleOutput:
    """Wait for the arrays of an output, and copy them to the host."""
    arrays = (output.ids, output.logprobs, output.top_ids, output.top_logprobs)
    # The fields of SampleOutput are annotated as JAX arrays.
    return SampleOutput(*(np.asarray(a) for a in arrays))  # pyright: ignore[reportArgumentType]
