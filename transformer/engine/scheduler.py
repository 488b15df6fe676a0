"""Who computes next within one model: continuous batching over a paged cache.

After Orca (Yu et al. 2022, OSDI) for batching at the level of single steps, vLLM (Kwon et al. 2023,
arXiv:2309.06180) for blocks of cache handed out as sequences grow, and Sarathi (Agrawal et al.
2023, arXiv:2308.16369) for reading prompts in chunks between steps. No arrays here, so that every
rule can be tested by hand.

A sequence waits, is admitted to a slot, has its prompt read chunk by chunk, then decodes.

- Clients are admitted in turn: each one's next sequence before anybody's second next. Within that,
  first come, first admitted; what waits for blocks is not overtaken. No client fills the queue.
- A chunk of reading alternates with a step of decoding, so neither starves the other. Chunks go by
  turns to the prompt with the least left, so that a short one need not wait for a long one, and to
  the oldest, so that the long one gets there too.
- Before a chunk is read, `blocks.py` is asked whether somebody has read it before.
- When blocks run out, the youngest sequence gives its own back and starts over later: it reads
  again what it had generated, and only then goes on delivering.

Leaves out: priorities.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformer.engine.block_pool import BlockPool, hash_chunks
from transformer.engine.requests import Busy, Event, SequenceRequest


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine."""

    request: SequenceRequest
    deliver: Callable[[Event], None]
    ids: list[int] = field(default_factory=list)  # the prompt, then what was generated
    num_computed_tokens: int = 0  # how many of them stand in the cache
    block_table: list[int] = field(default_factory=list)
    slot: int = -1
    num_cached_tokens: int = 0  # tokens of the prompt that somebody else had read
    chunk_hashes: list[bytes] = field(default_factory=list)  # of the chunks it shares
    num_registered_chunks: int = 0  # how many of those are known to others
    admission_round: int = 0  # of its client, see Scheduler.submit
    last_step: int = 0  # number of the step it last took part in
    num_delivered: int = 0  # generated tokens the client has
    num_scored: int = 0  # tokens of the prompt whose log-probability the client has
    chunk_scores: Any = None  # of the chunk just read, where they are asked for: sampling.Drawn
    preempted_ids: list[int] = field(default_factory=list)  # generated before it had to start over
    is_prefill_reported: bool = False  # the client was told that its prompt was read
    prefill_end: float = 0.0  # when that was; seconds of time.monotonic
    was_alone: bool = True  # nobody else was running when it was
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt)

    @property
    def num_generated(self) -> int:
        """How many tokens were generated so far."""
        return len(self.ids) - len(self.request.prompt)

    @property
    def is_prefilling(self) -> bool:
        """Whether part of the prompt is still to be read."""
        return self.num_computed_tokens < len(self.request.prompt)


@dataclass(frozen=True)
class Prefill:
    """Read the next chunk of one prompt, after copying a block onto another (from, to) if given."""

    sequence: Sequence
    block_copy: tuple[int, int] | None = None


@dataclass(frozen=True)
class Decode:
    """Read one token of each sequence and draw the next."""

    sequences: tuple[Sequence, ...]


class Scheduler:
    """Hands out slots and blocks, and says what to compute next.

    Args:
        num_slots: sequences that compute at a time.
        num_blocks: blocks of the cache, numbered from 1.
        block: positions in a block.
        chunk: positions of a prompt read at once; divides `block`.
        max_waiting: sequences that may wait; a quarter of them one client's.
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
        self._admission_round = 0  # of the sequence that was or is to be admitted last
        self._steps = 0
        self.num_preemptions = 0  # sequences that gave their blocks back
        self._did_prefill_last = self._did_oldest_last = False

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.running)

    def submit(self, sequence: Sequence) -> None:
        """Puts a sequence into the queue.

        Every client's sequences wait one a turn; a client who has none waiting joins the turn that
        is being admitted.

        Raises:
            Busy: the queue is full, or the client's part of it.
        """
        client = sequence.request.client
        turns = [other.admission_round for other in self.waiting if other.request.client == client]
        if not sequence.request.is_accepted:
            if len(self.waiting) >= self.max_waiting:
                raise Busy
            if len(turns) >= self.max_waiting_per_client:
                raise Busy(num_waiting=len(turns))
        sequence.admission_round = max(self._admission_round, max(turns, default=-1) + 1)
        if sequence.request.use_prefix_cache and sequence.request.prompt_logprobs is None:
            sequence.chunk_hashes = hash_chunks(sequence.request.prompt, self.chunk_size)
        bisect.insort_right(self.waiting, sequence, key=lambda other: other.admission_round)

    def schedule(self, max_batch_size: int | None = None) -> Prefill | Decode | None:
        """The next piece of work, with the blocks it needs already handed out.

        Args:
            max_rows: sequences that can decode together just now; None for all.
        """
        self._admit()
        reading = [s for s in self.running if s.is_prefilling]
        decoding = [s for s in self.running if not s.is_prefilling]
        if reading and not (decoding and self._did_prefill_last):
            self._did_prefill_last = True
            self._did_oldest_last = not self._did_oldest_last
            oldest = reading[0]
            shortest = min(reading, key=lambda s: len(s.request.prompt) - s.num_computed_tokens)
            sequence = oldest if self._did_oldest_last else shortest
            return Prefill(sequence, self._skip_cached_chunks(sequence))
        self._did_prefill_last = False
        decoding = sorted(decoding, key=lambda s: s.last_step)[:max_batch_size]
        for sequence in decoding:
            if sequence in self.running:  # it may have been put back for one before it
                self._append_block(sequence)
        decoding = [s for s in decoding if s in self.running]
        self._steps += 1
        for sequence in decoding:
            sequence.last_step = self._steps
        if decoding:
            return Decode(tuple(decoding))
        return None if self.is_idle else self.schedule(max_batch_size)  # the one there was gave way

    def register(self, sequence: Sequence) -> None:
        """Lets others find the chunks of a prompt that were read by now. Call it after each."""
        per_block = self.block_size // self.chunk_size
        done = min(sequence.num_computed_tokens // self.chunk_size, len(sequence.chunk_hashes))
        for i in range(sequence.num_registered_chunks, done):
            self.block_pool.cache(sequence.chunk_hashes[i], sequence.block_table[i // per_block])
        sequence.num_registered_chunks = max(sequence.num_registered_chunks, done)

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is; its slot and blocks are free again."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Takes what a sequence computed from it and puts it back into the queue, at its turn."""
        self.num_preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        generated = sequence.ids[len(sequence.request.prompt) :]
        sequence.preempted_ids = max(generated, sequence.preempted_ids, key=len)
        sequence.ids, sequence.num_computed_tokens = list(sequence.request.prompt), 0
        sequence.num_registered_chunks = sequence.num_cached_tokens = 0
        # Ahead of its turn: all that wait came later, or were put back because they are younger.
        bisect.insort_left(self.waiting, sequence, key=lambda other: other.admission_round)

    def _release(self, sequence: Sequence) -> None:
        for block in reversed(sequence.block_table):
            self.block_pool.release(block)
        self.free_slots.append(sequence.slot)
        sequence.block_table, sequence.slot = [], -1

    def _blocks_for(self, num_positions: int) -> int:
        return -(-num_positions // self.block_size)

    def _admit(self) -> None:
        while self.waiting and self.free_slots:
            sequence = self.waiting[0]
            # Whoever comes from now on comes after it, even if it has to wait.
            self._admission_round = max(self._admission_round, sequence.admission_round)
            # Room for the prompt and for what was delivered before it had to start over.
            known = len(sequence.request.prompt) + sequence.num_delivered
            needed = self._blocks_for(known + (sequence.request.max_tokens > 0))
            shared = self._retain_cached_blocks(sequence)
            if needed - len(shared) > self.block_pool.num_free_blocks:
                for block in reversed(shared):
                    self.block_pool.release(block)
                return
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

    def _retain_cached_blocks(self, sequence: Sequence) -> list[int]:
        """Holds the whole blocks that others have read of a prompt."""
        shared: list[int] = []
        while found := self._find_cached_block(sequence, len(shared)):
            block, length = found
            if length < (len(shared) + 1) * self.block_size:
                break
            self.block_pool.retain(block)
            shared.append(block)
        return shared

    def _find_cached_block(self, sequence: Sequence, place: int) -> tuple[int, int] | None:
        """The block to be had for one place of a prompt, and how far the prompt is read then."""
        per_block = self.block_size // self.chunk_size
        # The last token is always read, for what it says of the next one.
        last = (len(sequence.request.prompt) - 1) // self.chunk_size
        first = place * per_block
        found = self.block_pool.find_cached(
            sequence.chunk_hashes[first : min(first + per_block, last)]
        )
        return found and (found[0], (first + found[1]) * self.chunk_size)

    def _skip_cached_chunks(self, sequence: Sequence) -> tuple[int, int] | None:
        """Skips what others have read of a prompt meanwhile. Gives the copy this needs, if any.

        A whole block is shared. Of a block in part, the sequence needs one of its own to write on.
        """
        start, copy = sequence.num_computed_tokens, None
        while copy is None and (
            found := self._find_cached_block(
                sequence, sequence.num_computed_tokens // self.block_size
            )
        ):
            block, length = found
            if length <= sequence.num_computed_tokens:
                break
            place = sequence.num_computed_tokens // self.block_size
            own = sequence.block_table[place]
            if length % self.block_size:
                copy = block, own
            else:
                self.block_pool.retain(block)
                self.block_pool.release(own)
                sequence.block_table[place] = block
            sequence.num_computed_tokens = length
        sequence.num_cached_tokens += sequence.num_computed_tokens - start
        sequence.num_registered_chunks = max(
            sequence.num_registered_chunks, sequence.num_computed_tokens // self.chunk_size
        )
        return copy

    def _append_block(self, sequence: Sequence) -> None:
        """Makes sure the next position of a sequence has a block."""
        while self._blocks_for(sequence.num_computed_tokens + 1) > len(sequence.block_table):
            if self.block_pool.num_free_blocks:
                sequence.block_table.append(self.block_pool.allocate())
                continue
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is sequence:
                return
