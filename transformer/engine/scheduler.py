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

from transformer.engine.blocks import Blocks, chunk_names
from transformer.engine.requests import Busy, Event, Request


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine."""

    request: Request
    deliver: Callable[[Event], None]
    ids: list[int] = field(default_factory=list)  # the prompt, then what was generated
    length: int = 0  # how many of them stand in the cache
    blocks: list[int] = field(default_factory=list)
    slot: int = -1
    cached: int = 0  # tokens of the prompt that somebody else had read
    names: list[bytes] = field(default_factory=list)  # of the chunks it shares
    filed: int = 0  # how many of those are known to others
    turn: int = 0  # of its client, see Scheduler.submit
    stepped: int = 0  # number of the step it last took part in
    delivered: int = 0  # generated tokens the client has
    scored: int = 0  # tokens of the prompt whose log-probability the client has
    scores: Any = None  # of the chunk just read, where they are asked for: sampling.Drawn
    known: list[int] = field(default_factory=list)  # generated before it had to start over
    has_begun: bool = False  # the client was told that its prompt was read
    began: float = 0.0  # when that was; seconds of time.monotonic
    was_alone: bool = True  # nobody else was running when it was
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt)

    @property
    def generated(self) -> int:
        """How many tokens were generated so far."""
        return len(self.ids) - len(self.request.prompt)

    @property
    def is_reading(self) -> bool:
        """Whether part of the prompt is still to be read."""
        return self.length < len(self.request.prompt)


@dataclass(frozen=True)
class Prefill:
    """Read the next chunk of one prompt, after copying a block onto another (from, to) if given."""

    sequence: Sequence
    copy: tuple[int, int] | None = None


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
        self, num_slots: int, num_blocks: int, block: int, chunk: int, max_waiting: int
    ) -> None:
        self.block, self.chunk = block, chunk
        self.max_waiting, self.max_of_one = max_waiting, max(max_waiting // 4, 1)
        self.num_slots = num_slots
        self.free_slots = list(range(num_slots))[::-1]
        self.blocks = Blocks(num_blocks)
        self.waiting: list[Sequence] = []  # in the order of admission
        self.active: list[Sequence] = []  # oldest first
        self._turn = 0  # of the sequence that was or is to be admitted last
        self._steps = 0
        self.restarts = 0  # sequences that gave their blocks back
        self._read_last = self._read_oldest_last = False

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.active)

    def submit(self, sequence: Sequence) -> None:
        """Puts a sequence into the queue.

        Every client's sequences wait one a turn; a client who has none waiting joins the turn that
        is being admitted.

        Raises:
            Busy: the queue is full, or the client's part of it.
        """
        client = sequence.request.client
        turns = [other.turn for other in self.waiting if other.request.client == client]
        if not sequence.request.is_later:
            if len(self.waiting) >= self.max_waiting:
                raise Busy
            if len(turns) >= self.max_of_one:
                raise Busy(waiting=len(turns))
        sequence.turn = max(self._turn, max(turns, default=-1) + 1)
        if sequence.request.reuse and sequence.request.prompt_logprobs is None:
            sequence.names = chunk_names(sequence.request.prompt, self.chunk)
        bisect.insort_right(self.waiting, sequence, key=lambda other: other.turn)

    def next(self, max_rows: int | None = None) -> Prefill | Decode | None:
        """The next piece of work, with the blocks it needs already handed out.

        Args:
            max_rows: sequences that can decode together just now; None for all.
        """
        self._admit()
        reading = [s for s in self.active if s.is_reading]
        decoding = [s for s in self.active if not s.is_reading]
        if reading and not (decoding and self._read_last):
            self._read_last = True
            self._read_oldest_last = not self._read_oldest_last
            oldest = reading[0]
            shortest = min(reading, key=lambda s: len(s.request.prompt) - s.length)
            sequence = oldest if self._read_oldest_last else shortest
            return Prefill(sequence, self._adopt(sequence))
        self._read_last = False
        decoding = sorted(decoding, key=lambda s: s.stepped)[:max_rows]
        for sequence in decoding:
            if sequence in self.active:  # it may have been put back for one before it
                self._grow(sequence)
        decoding = [s for s in decoding if s in self.active]
        self._steps += 1
        for sequence in decoding:
            sequence.stepped = self._steps
        if decoding:
            return Decode(tuple(decoding))
        return None if self.is_idle else self.next(max_rows)  # the one there was gave way

    def file(self, sequence: Sequence) -> None:
        """Lets others find the chunks of a prompt that were read by now. Call it after each."""
        per_block = self.block // self.chunk
        done = min(sequence.length // self.chunk, len(sequence.names))
        for i in range(sequence.filed, done):
            self.blocks.remember(sequence.names[i], sequence.blocks[i // per_block])
        sequence.filed = max(sequence.filed, done)

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is; its slot and blocks are free again."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.active:
            self.active.remove(sequence)
            self._release(sequence)

    def start_over(self, sequence: Sequence) -> None:
        """Takes what a sequence computed from it and puts it back into the queue, at its turn."""
        self.restarts += 1
        self.active.remove(sequence)
        self._release(sequence)
        generated = sequence.ids[len(sequence.request.prompt) :]
        sequence.known = max(generated, sequence.known, key=len)
        sequence.ids, sequence.length = list(sequence.request.prompt), 0
        sequence.filed = sequence.cached = 0
        # Ahead of its turn: all that wait came later, or were put back because they are younger.
        bisect.insort_left(self.waiting, sequence, key=lambda other: other.turn)

    def _release(self, sequence: Sequence) -> None:
        for block in reversed(sequence.blocks):
            self.blocks.release(block)
        self.free_slots.append(sequence.slot)
        sequence.blocks, sequence.slot = [], -1

    def _blocks_for(self, num_positions: int) -> int:
        return -(-num_positions // self.block)

    def _admit(self) -> None:
        while self.waiting and self.free_slots:
            sequence = self.waiting[0]
            # Whoever comes from now on comes after it, even if it has to wait.
            self._turn = max(self._turn, sequence.turn)
            # Room for the prompt and for what was delivered before it had to start over.
            known = len(sequence.request.prompt) + sequence.delivered
            needed = self._blocks_for(known + (sequence.request.max_tokens > 0))
            shared = self._share(sequence)
            if needed - len(shared) > self.blocks.available:
                for block in reversed(shared):
                    self.blocks.release(block)
                return
            self.waiting.pop(0)
            sequence.slot = self.free_slots.pop()
            sequence.blocks = shared + [self.blocks.take() for _ in range(needed - len(shared))]
            sequence.length = sequence.cached = len(shared) * self.block
            sequence.filed = sequence.length // self.chunk
            self.active.append(sequence)

    def _share(self, sequence: Sequence) -> list[int]:
        """Holds the whole blocks that others have read of a prompt."""
        shared: list[int] = []
        while found := self._find(sequence, len(shared)):
            block, length = found
            if length < (len(shared) + 1) * self.block:
                break
            self.blocks.hold(block)
            shared.append(block)
        return shared

    def _find(self, sequence: Sequence, place: int) -> tuple[int, int] | None:
        """The block to be had for one place of a prompt, and how far the prompt is read then."""
        per_block = self.block // self.chunk
        # The last token is always read, for what it says of the next one.
        last = (len(sequence.request.prompt) - 1) // self.chunk
        first = place * per_block
        found = self.blocks.find(sequence.names[first : min(first + per_block, last)])
        return found and (found[0], (first + found[1]) * self.chunk)

    def _adopt(self, sequence: Sequence) -> tuple[int, int] | None:
        """Skips what others have read of a prompt meanwhile. Gives the copy this needs, if any.

        A whole block is shared. Of a block in part, the sequence needs one of its own to write on.
        """
        start, copy = sequence.length, None
        while copy is None and (found := self._find(sequence, sequence.length // self.block)):
            block, length = found
            if length <= sequence.length:
                break
            place = sequence.length // self.block
            own = sequence.blocks[place]
            if length % self.block:
                copy = block, own
            else:
                self.blocks.hold(block)
                self.blocks.release(own)
                sequence.blocks[place] = block
            sequence.length = length
        sequence.cached += sequence.length - start
        sequence.filed = max(sequence.filed, sequence.length // self.chunk)
        return copy

    def _grow(self, sequence: Sequence) -> None:
        """Makes sure the next position of a sequence has a block."""
        while self._blocks_for(sequence.length + 1) > len(sequence.blocks):
            if self.blocks.available:
                sequence.blocks.append(self.blocks.take())
                continue
            youngest = self.active[-1]
            self.start_over(youngest)
            if youngest is sequence:
                return
