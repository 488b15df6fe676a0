"""The blocks of a cache: who holds them, and what they still remember.

A block whose positions were filled by reading a prompt can serve every prompt that begins alike:
keys and values depend on nothing but the tokens up to their position. So blocks have several
holders, and one that nobody holds any more keeps what it knows until its memory is needed, least
recently used first ("prefix caching": SGLang's RadixAttention, Zheng et al. 2023, arXiv:2312.07104;
vLLM does it with hashes of blocks, as here).

What a block knows is filed in chunks, the steps in which prompts are read, under names that stand
for *all* tokens up to the end of a chunk: the name of a chunk is the SHA-256 of the name before it
and its own tokens. Nobody can make up two prompts of the same name and read another's answer.

Leaves out: what was generated. A step of one token may round differently from the reading of a
chunk, and the same request must give the same text with and without this file.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def hash_chunks(ids: Sequence[int], chunk: int) -> list[bytes]:
    """A name for each whole chunk of a prompt, which stands for everything up to its end."""
    names, name = [], b""
    for start in range(0, len(ids) - chunk + 1, chunk):
        tokens = array("q", ids[start : start + chunk]).tobytes()
        name = hashlib.sha256(name + tokens).digest()
        names.append(name)
    return names


class BlockPool:
    """The blocks of one cache, numbered from 1.

    Args:
        count: how many there are.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(1, num_blocks + 1))[::-1]  # held by nobody, remembering nothing
        self._evictable: OrderedDict[int, None] = OrderedDict()  # held by nobody, oldest first
        self._ref_counts = dict.fromkeys(range(1, num_blocks + 1), 0)
        self._block_by_hash: dict[bytes, int] = {}
        self._hashes_by_block: dict[
            int, list[bytes]
        ] = {}  # of its chunks, for blocks that have any

    @property
    def num_free_blocks(self) -> int:
        """How many can be taken, those included that still remember something."""
        return len(self._free) + len(self._evictable)

    @property
    def num_cached_blocks(self) -> int:
        """How many are held by nobody and still remember something."""
        return len(self._evictable)

    def ref_count(self, block: int) -> int:
        """How many hold a block."""
        return self._ref_counts[block]

    def allocate(self) -> int:
        """A block for one new holder; if it remembered something, it forgets that."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            self._evict(block)
        self._ref_counts[block] = 1
        return block

    def retain(self, block: int) -> None:
        """Adds a holder to a block that `find` gave."""
        self._ref_counts[block] += 1
        self._evictable.pop(block, None)

    def release(self, block: int) -> None:
        """Takes a holder off. Of several, release the last of a row first: it is forgotten first"""
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            if block in self._hashes_by_block:
                self._evictable[block] = None
            else:
                self._free.append(block)

    def cache(self, name: bytes, block: int) -> None:
        """Files the next chunk of a held block. A name that is filed already stays where it is."""
        if name not in self._block_by_hash:
            self._block_by_hash[name] = block
            self._hashes_by_block.setdefault(block, []).append(name)

    def find_cached(self, names: Sequence[bytes]) -> tuple[int, int] | None:
        """Looks for a block that begins as a prompt goes on.

        Args:
            names: of the chunks of one block, in order.

        Returns:
            The block that holds most of them, and how many from its beginning; or None.
        """
        for count in range(len(names), 0, -1):
            if (block := self._block_by_hash.get(names[count - 1])) is not None:
                return block, count
        return None

    def reset_prefix_cache(self) -> None:
        """Drops everything remembered: the cache itself is gone. Holders keep their blocks."""
        for block in list(self._hashes_by_block):
            self._evict(block)
        self._free += self._evictable
        self._evictable.clear()

    def _evict(self, block: int) -> None:
        for name in self._hashes_by_block.pop(block):
            del self._block_by_hash[name]
