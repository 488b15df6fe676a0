"""The scheduler of one model: continuous batching over a paged KV cache.

Batching per step follows Orca (Yu et al. 2022, OSDI), cache blocks that are allocated as sequences
grow follow vLLM (Kwon et al. 2023, arXiv:2309.06180), and chunked prefill between decoding steps
follows Sarathi (Agrawal et al. 2023, arXiv:2308.16369). This file uses no arrays, so that tests can
check every rule without a model.

A sequence waits, is admitted to a slot, is prefilled chunk by chunk, and then decodes.

- Sequences are admitted in rounds, one sequence per client and round. Within a round the order is
  first come, first served, and no sequence overtakes a sequence that waits for free blocks. One
  client can use only a part of the queue.
- Prefill chunks alternate with decoding steps, so that neither starves the other. Chunks alternate
  between the sequence with the shortest remaining prompt, which need not wait for a long prompt,
  and the oldest sequence, so that a long prompt also finishes.
- Before each prefill chunk, `block_pool.py` is searched for cached blocks of the same prompt.
- When no block is free, the youngest sequence is preempted: its blocks are released, and the
  sequence is recomputed later. Tokens that were delivered before are not delivered again.
- Sequences with a greater `priority`, such as those of batches, are admitted and prefilled when no
  other sequence waits for that, and are preempted first.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from transformer.engine.block_pool import BlockPool, hash_chunks
from transformer.engine.requests import Busy, Event, GrammarMatcher, SequenceRequest
from transformer.sampling import SampleOutput


@dataclass(eq=False)
class Sequence:
    """The state of one sequence in the engine, from request to last token.

    Attributes:
        request: what to generate.
        deliver: called with each event of the sequence; must not block.
        ids: the prompt, then the generated tokens.
        num_computed_tokens: the number of `ids` whose keys and values are in the KV cache.
        block_table: the numbers of the blocks of the sequence, in the order of positions.
        slot: the row of the sequence in the penalty state; -1 while the sequence waits.
        num_cached_tokens: the number of prompt tokens taken from the prefix cache.
        chunk_hashes: the hashes of the prompt chunks; empty if the prefix cache is not used.
        num_registered_chunks: the number of prompt chunks that are in the prefix cache.
        admission_round: the round in which the sequence is admitted; see `Scheduler.submit`.
        last_step: the number of the last decoding step of the sequence.
        num_delivered: the number of generated tokens delivered so far.
        num_scored: the number of prompt tokens whose log-probabilities were delivered.
        chunk_scores: log-probabilities of the last prefill chunk, if requested (`SampleOutput`).
        preempted_ids: the tokens generated before the sequence was preempted.
        is_prefill_reported: whether `PrefillDone` was delivered.
        prefill_end: the time of delivering `PrefillDone`, in seconds of the engine's clock.
        matcher: the state of the request's grammar after `ids`; None before the prefill, and
            without a grammar.
        token_bitmask: the tokens that the grammar allows next, uint32 [ceil(n/32)]; None for all.
        was_alone: whether no other sequence has run at the same time.
        is_cancelled: set by any thread; the engine ends the sequence before its next work item.
    """

    request: SequenceRequest
    deliver: Callable[[Event], None]
    ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    slot: int = -1
    num_cached_tokens: int = 0
    chunk_hashes: list[bytes] = field(default_factory=list)
    num_registered_chunks: int = 0
    admission_round: int = 0
    last_step: int = 0
    num_delivered: int = 0
    num_scored: int = 0
    chunk_scores: SampleOutput | None = None
    preempted_ids: list[int] = field(default_factory=list)
    is_prefill_reported: bool = False
    prefill_end: float = 0.0
    matcher: GrammarMatcher | None = None
    token_bitmask: np.ndarray | None = None
    was_alone: bool = True
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt)

    @property
    def num_generated(self) -> int:
        """Return the number of tokens generated so far."""
        return len(self.ids) - len(self.request.prompt)

    @property
    def is_prefilling(self) -> bool:
        """Whether part of the prompt is not computed yet."""
        return self.num_computed_tokens < len(self.request.prompt)


@dataclass(frozen=True)
class Prefill:
    """Work item: prefill the next chunk of one prompt, after copying a block (source, target)."""

    sequence: Sequence
    block_copy: tuple[int, int] | None = None


@dataclass(frozen=True)
class Decode:
    """Work item: one decoding step, which computes the last token of each sequence."""

    sequences: tuple[Sequence, ...]


class Scheduler:
    """Allocates slots and blocks, and decides what to compute next.

    Args:
        num_slots: the maximum number of running sequences.
        num_blocks: the number of blocks of the KV cache.
        block_size: the number of positions in a block.
        chunk_size: the number of positions in a prefill chunk; divides `block_size`.
        max_waiting: the maximum number of waiting sequences; one client can have a quarter of it.
    """

    def __init__(
        self, num_slots: int, num_blocks: int, block_size: int, chunk_size: int, max_waiting: int
    ) -> None:
        self.block_size, self.chunk_size = block_size, chunk_size
        self.max_waiting, self.max_waiting_per_client = max_waiting, max(max_waiting // 4, 1)
        self.num_slots = num_slots
        self.free_slots = list(range(num_slots))[::-1]
        self.block_pool = BlockPool(num_blocks)
        self.waiting: list[Sequence] = []  # in the order of admission
        self.running: list[Sequence] = []  # oldest first
        self._admission_round = 0  # that of the last sequence at the head of the queue
        self._steps = 0
        self.num_preemptions = 0
        self._did_prefill_last = self._did_oldest_last = False

    @property
    def is_idle(self) -> bool:
        """Whether no sequence waits or runs."""
        return not (self.waiting or self.running)

    def submit(self, sequence: Sequence) -> None:
        """Add a sequence to the queue.

        The sequences of a client are queued for consecutive rounds. If a client has no waiting
        sequences, its next sequence joins the round that is currently admitted.

        Raises:
            Busy: the queue is full, or the client has reached its limit.
        """
        client = sequence.request.client
        rounds = [other.admission_round for other in self.waiting if other.request.client == client]
        if not sequence.request.is_accepted:
            if len(self.waiting) >= self.max_waiting:
                raise Busy
            if len(rounds) >= self.max_waiting_per_client:
                raise Busy(num_waiting=len(rounds))
        sequence.admission_round = max(self._admission_round, max(rounds, default=-1) + 1)
        if sequence.request.use_prefix_cache and sequence.request.prompt_logprobs is None:
            sequence.chunk_hashes = hash_chunks(sequence.request.prompt, self.chunk_size)
        bisect.insort_right(self.waiting, sequence, key=_admission_order)

    def schedule(self, max_batch_size: int | None = None) -> Prefill | Decode | None:
        """Return the next work item with its blocks allocated; None if no sequence is left.

        Args:
            max_batch_size: the maximum number of sequences in a decoding step; None for no limit.
        """
        self._admit()
        prefilling = [s for s in self.running if s.is_prefilling]
        decoding = [s for s in self.running if not s.is_prefilling]
        urgent = min((s.request.priority for s in prefilling), default=0)
        prefilling = [s for s in prefilling if s.request.priority == urgent]
        # A prompt does not wait for decoding steps of sequences that can wait.
        has_to_alternate = any(s.request.priority <= urgent for s in decoding)
        if prefilling and not (has_to_alternate and self._did_prefill_last):
            self._did_prefill_last = True
            self._did_oldest_last = not self._did_oldest_last
            oldest = prefilling[0]
            shortest = min(prefilling, key=lambda s: len(s.request.prompt) - s.num_computed_tokens)
            sequence = oldest if self._did_oldest_last else shortest
            return Prefill(sequence, self._skip_cached_chunks(sequence))
        self._did_prefill_last = False
        decoding = sorted(decoding, key=lambda s: s.last_step)[:max_batch_size]
        for sequence in decoding:
            if sequence in self.running:  # not preempted by an earlier iteration
                self._append_block(sequence)
        decoding = [s for s in decoding if s in self.running]
        self._steps += 1
        for sequence in decoding:
            sequence.last_step = self._steps
        if decoding:
            return Decode(tuple(decoding))
        # If all decoding sequences were preempted, others can be admitted now.
        return None if self.is_idle else self.schedule(max_batch_size)

    def register(self, sequence: Sequence) -> None:
        """Add the computed chunks of a prompt to the prefix cache; call this after each prefill."""
        per_block = self.block_size // self.chunk_size
        done = min(sequence.num_computed_tokens // self.chunk_size, len(sequence.chunk_hashes))
        for i in range(sequence.num_registered_chunks, done):
            self.block_pool.cache(sequence.chunk_hashes[i], sequence.block_table[i // per_block])
        sequence.num_registered_chunks = max(sequence.num_registered_chunks, done)

    def finish(self, sequence: Sequence) -> None:
        """Remove a waiting or running sequence, and free its slot and blocks."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Release the blocks of a running sequence and queue it again, to be recomputed."""
        self.num_preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        generated = sequence.ids[len(sequence.request.prompt) :]
        sequence.preempted_ids = max(generated, sequence.preempted_ids, key=len)
        sequence.ids, sequence.num_computed_tokens = list(sequence.request.prompt), 0
        sequence.matcher = None
        sequence.num_registered_chunks = sequence.num_cached_tokens = 0
        # First in its round, because the others came later, or are younger and were preempted.
        bisect.insort_left(self.waiting, sequence, key=_admission_order)

    def _release(self, sequence: Sequence) -> None:
        for block in reversed(sequence.block_table):
            self.block_pool.release(block)
        self.free_slots.append(sequence.slot)
        sequence.block_table, sequence.slot = [], -1

    def _blocks_for(self, num_positions: int) -> int:
        return -(-num_positions // self.block_size)

    def _admit(self) -> None:
        while self.waiting:
            sequence = self.waiting[0]
            if not self.free_slots:
                if not self._preempt_for(sequence):
                    return
                continue
            # Sequences submitted from now on come after this one, even if it has to wait for
            # blocks.
            self._admission_round = max(self._admission_round, sequence.admission_round)
            # Allocate blocks for the prompt and for tokens delivered before a preemption.
            num_known = len(sequence.request.prompt) + sequence.num_delivered
            needed = self._blocks_for(num_known + (sequence.request.max_tokens > 0))
            shared = self._retain_cached_blocks(sequence)
            if needed - len(shared) > self.block_pool.num_free_blocks:
                for block in reversed(shared):
                    self.block_pool.release(block)
                if not self._preempt_for(sequence):
                    return
                continue
            self.waiting.pop(0)
            sequence.slot = self.free_slots.pop()
            sequence.block_table = shared + [
                self.block_pool.allocate() for _ in range(needed - len(shared))
            ]
            sequence.num_computed_tokens = sequence.num_cached_tokens = (
                len(shared) * self.block_size
            )
            sequence.num_registered_chunks = sequence.num_computed_tokens // self.chunk_size
            self.running.append(sequence)

    def _preempt_for(self, sequence: Sequence) -> bool:
        """Preempt the last of the running sequences that can wait; return whether there is one."""
        last = self._last_running()
        if last is None or last.request.priority <= sequence.request.priority:
            return False
        self.preempt(last)
        return True

    def _last_running(self) -> Sequence | None:
        """Return the running sequence to preempt first: the youngest of those that can wait."""
        youngest_first = reversed(self.running)
        return max(youngest_first, key=lambda s: s.request.priority, default=None)

    def _retain_cached_blocks(self, sequence: Sequence) -> list[int]:
        """Retain and return the cached blocks whose tokens all match the beginning of a prompt."""
        shared: list[int] = []
        while match := self._find_cached_block(sequence, len(shared)):
            block, length = match
            if length < (len(shared) + 1) * self.block_size:
                break
            self.block_pool.retain(block)
            shared.append(block)
        return shared

    def _find_cached_block(self, sequence: Sequence, index: int) -> tuple[int, int] | None:
        """Find a cached block for entry `index` of a sequence's block table.

        Returns:
            The block, and the number of prompt tokens that are computed up to its last matching
            chunk; None if no block matches.
        """
        per_block = self.block_size // self.chunk_size
        # The last prompt token is always computed: its logits give the first generated token.
        last = (len(sequence.request.prompt) - 1) // self.chunk_size
        first = index * per_block
        match = self.block_pool.find_cached(
            sequence.chunk_hashes[first : min(first + per_block, last)]
        )
        return match and (match[0], (first + match[1]) * self.chunk_size)

    def _skip_cached_chunks(self, sequence: Sequence) -> tuple[int, int] | None:
        """Skip the next prompt chunks if other sequences have cached them since admission.

        A cached block that matches entirely is shared. A block that matches in part is copied,
        because the sequence writes into the rest of the block.

        Returns:
            The blocks (source, target) of a copy to make before the prefill; None for no copy.
        """
        start, copy = sequence.num_computed_tokens, None
        while copy is None and (
            match := self._find_cached_block(
                sequence, sequence.num_computed_tokens // self.block_size
            )
        ):
            block, length = match
            if length <= sequence.num_computed_tokens:
                break
            index = sequence.num_computed_tokens // self.block_size
            current = sequence.block_table[index]
            if length % self.block_size:
                copy = block, current
            else:
                self.block_pool.retain(block)
                self.block_pool.release(current)
                sequence.block_table[index] = block
            sequence.num_computed_tokens = length
        sequence.num_cached_tokens += sequence.num_computed_tokens - start
        sequence.num_registered_chunks = max(
            sequence.num_registered_chunks, sequence.num_computed_tokens // self.chunk_size
        )
        return copy

    def _append_block(self, sequence: Sequence) -> None:
        """Allocate a block for the next position of a sequence if needed; preempt if none is free.

        The youngest of the sequences that can wait are preempted, which can be this sequence
        itself.
        """
        while self._blocks_for(sequence.num_computed_tokens + 1) > len(sequence.block_table):
            if self.block_pool.num_free_blocks:
                sequence.block_table.append(self.block_pool.allocate())
                continue
            last = self._last_running()
            assert last is not None
            self.preempt(last)
            if last is sequence:
                return


def _admission_order(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.priority, sequence.admission_round
