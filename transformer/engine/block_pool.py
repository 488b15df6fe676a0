"""The blocks of a KV cache: reference counts and the prefix cache.

A block whose positions were filled by a prefill can serve every prompt with the same beginning:
keys and values depend only on the tokens up to their position. So a block can have several holders.
A block without holders stays cached until its memory is needed; the least recently used one is
evicted first. This is prefix caching (SGLang's RadixAttention, Zheng et al. 2023, arXiv:2312.07104;
vLLM uses hashes of blocks, as here).

Blocks are cached in chunks, the unit of prefill. The hash of a chunk stands for *all* tokens up to
its end: it is the SHA-256 of the previous chunk's hash and the chunk's own tokens. A client cannot
construct two prompts with the same hash, and so cannot read another client's keys and values.

Leaves out: caching generated tokens. A decoding step may round differently from a prefill, and a
request must give the same text with and without the prefix cache.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def hash_chunks(ids: Sequence[int], chunk: int) -> list[bytes]:
    """Return the hash of each whole chunk of a prompt.

    Args:
        ids: the token ids of the prompt.
        chunk: the number of tokens in a chunk.

    Returns:
        One SHA-256 digest a chunk, each of all tokens up to the end of its chunk. Tokens after the
        last whole chunk have no hash.
    """
    hashes, digest = [], b""
    for start in range(0, len(ids) - chunk + 1, chunk):
        tokens = array("q", ids[start : start + chunk]).tobytes()
        digest = hashlib.sha256(digest + tokens).digest()
        hashes.append(digest)
    return hashes


class BlockPool:
    """The blocks of one KV cache, numbered from 1, with a reference count each.

    Args:
        num_blocks: the number of blocks.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(1, num_blocks + 1))[::-1]  # no holder, not cached
        self._evictable: OrderedDict[int, None] = OrderedDict()  # no holder, cached; oldest first
        self._ref_counts = dict.fromkeys(range(1, num_blocks + 1), 0)
        self._block_by_hash: dict[bytes, int] = {}
        self._hashes_by_block: dict[int, list[bytes]] = {}  # only blocks with cached chunks

    @property
    def num_free_blocks(self) -> int:
        """Return the number of blocks without a holder, cached or not."""
        return len(self._free) + len(self._evictable)

    @property
    def num_cached_blocks(self) -> int:
        """Return the number of blocks that are cached and have no holder."""
        return len(self._evictable)

    def ref_count(self, block: int) -> int:
        """Return the number of holders of a block."""
        return self._ref_counts[block]

    def allocate(self) -> int:
        """Return a block with one holder, evicting the oldest cached block if no other is free.

        Raises:
            KeyError: no block is free.
        """
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            self._evict(block)
        self._ref_counts[block] = 1
        return block

    def retain(self, block: int) -> None:
        """Add a holder to a block that `find_cached` returned."""
        self._ref_counts[block] += 1
        self._evictable.pop(block, None)

    def release(self, block: int) -> None:
        """Remove a holder from a block.

        Release the last block of a sequence first: blocks are evicted in the order of release.
        """
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            if block in self._hashes_by_block:
                self._evictable[block] = None
            else:
                self._free.append(block)

    def cache(self, chunk_hash: bytes, block: int) -> None:
        """Register the next chunk of a held block. A hash that is registered keeps its block."""
        if chunk_hash not in self._block_by_hash:
            self._block_by_hash[chunk_hash] = block
            self._hashes_by_block.setdefault(block, []).append(chunk_hash)

    def find_cached(self, chunk_hashes: Sequence[bytes]) -> tuple[int, int] | None:
        """Return the cached block that holds the most of the given chunks.

        Args:
            chunk_hashes: the hashes of the chunks of one block, in order.

        Returns:
            The block and the number of its leading chunks that match, or None without a match.
        """
        for count in range(len(chunk_hashes), 0, -1):
            if (block := self._block_by_hash.get(chunk_hashes[count - 1])) is not None:
                return block, count
        return None

    def reset_prefix_cache(self) -> None:
        """Evict every cached chunk, after the KV cache was lost. Holders keep their blocks."""
        for block in list(self._hashes_by_block):
            self._evict(block)
        self._free += self._evictable
        self._evictable.clear()

    def _evict(self, block: int) -> None:
        for chunk_hash in self._hashes_by_block.pop(block):
            del self._block_by_hash[chunk_hash]
