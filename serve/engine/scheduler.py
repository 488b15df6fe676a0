"""Who computes next: continuous batching over a paged cache.

After Orca (Yu et al. 2022, OSDI) for batching at the level of single steps, and vLLM (Kwon et al.
2023, arXiv:2309.06180) for blocks of cache handed out as sequences grow. No arrays here, so that
every rule can be tested by hand.

A sequence waits, is admitted to a slot, has its prompt read chunk by chunk, then decodes. One chunk
of prefill alternates with one decoding step of all running sequences, so neither starves the other.
When blocks run out, the youngest sequence gives its own back and starts over later: it reads again
what it had generated, and only then goes on delivering.

Leaves out: priorities, and prefixes shared between sequences.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from serve.engine.requests import Busy, Event, Request


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine."""

    request: Request
    deliver: Callable[[Event], None]
    ids: list[int] = field(default_factory=list)  # the prompt, then what was generated
    length: int = 0  # how many of them stand in the cache
    blocks: list[int] = field(default_factory=list)
    slot: int = -1
    delivered: int = 0  # generated tokens the client has
    scored: int = 0  # tokens of the prompt whose log-probability the client has
    scores: Any = None  # of the chunk just read, where they are asked for: sampling.Drawn
    known: list[int] = field(default_factory=list)  # generated before it had to start over
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
    """Read the next chunk of one prompt."""

    sequence: Sequence


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
        max_waiting: sequences that may wait.
    """

    def __init__(self, num_slots: int, num_blocks: int, block: int, max_waiting: int) -> None:
        self.block, self.max_waiting = block, max_waiting
        self.free_slots = list(range(num_slots))[::-1]
        self.free_blocks = list(range(1, num_blocks + 1))[::-1]
        self.waiting: deque[Sequence] = deque()
        self.active: list[Sequence] = []  # oldest first
        self._read_last = False

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.active)

    def submit(self, sequence: Sequence) -> None:
        """Puts a sequence into the queue.

        Raises:
            Busy: the queue is full.
        """
        if len(self.waiting) >= self.max_waiting:
            raise Busy
        self.waiting.append(sequence)

    def next(self) -> Prefill | Decode | None:
        """The next piece of work, with the blocks it needs already handed out."""
        self._admit()
        reading = [s for s in self.active if s.is_reading]
        decoding = [s for s in self.active if not s.is_reading]
        if reading and not (decoding and self._read_last):
            self._read_last = True
            return Prefill(reading[0])
        self._read_last = False
        for sequence in decoding:
            if sequence in self.active:  # it may have been put back for one before it
                self._grow(sequence)
        decoding = [s for s in decoding if s in self.active]
        return Decode(tuple(decoding)) if decoding else None

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is; its slot and blocks are free again."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.active:
            self.active.remove(sequence)
            self.free_blocks += sequence.blocks
            self.free_slots.append(sequence.slot)
            sequence.blocks, sequence.slot = [], -1

    def start_over(self, sequence: Sequence) -> None:
        """Takes what a sequence computed from it and puts it at the head of the queue."""
        self.finish(sequence)
        generated = sequence.ids[len(sequence.request.prompt) :]
        sequence.known = max(generated, sequence.known, key=len)
        sequence.ids, sequence.length = list(sequence.request.prompt), 0
        self.waiting.appendleft(sequence)

    def _blocks_for(self, num_positions: int) -> int:
        return -(-num_positions // self.block)

    def _admit(self) -> None:
        while self.waiting and self.free_slots:
            sequence = self.waiting[0]
            # Room for the prompt and for what was delivered before it had to start over.
            known = len(sequence.request.prompt) + sequence.delivered
            needed = self._blocks_for(known + (sequence.request.max_tokens > 0))
            if needed > len(self.free_blocks):
                return  # in turn: a later, shorter one does not overtake
            self.waiting.popleft()
            sequence.slot = self.free_slots.pop()
            sequence.blocks = [self.free_blocks.pop() for _ in range(needed)]
            self.active.append(sequence)

    def _grow(self, sequence: Sequence) -> None:
        """Makes sure the next position of a sequence has a block."""
        while self._blocks_for(sequence.length + 1) > len(sequence.blocks):
            if self.free_blocks:
                sequence.blocks.append(self.free_blocks.pop())
                continue
            youngest = self.active[-1]
            self.start_over(youngest)
            if youngest is sequence:
                return
