"""The blocks of a KV cache: reference counts and the prefix cache.

A block that was filled by a prefill can be used for every prompt with the same beginning, because
keys and values depend only on the tokens up to their position. So several sequences can hold a
reference to the same block. A block without references stays cached until its memory is needed; the
least recently used block is evicted first. This is prefix caching (SGLang's RadixAttention, Zheng
et al. 2023, arXiv:2312.07104; vLLM uses hashes of blocks, as here).

The unit of caching is the chunk, which is also the unit of prefill; a block has one or more chunks.
The hash of a chunk identifies *all* tokens up to its end: it is the SHA-256 of the previous chunk's
hash and the chunk's own tokens. A client cannot construct another prompt with the same hash, and so
cannot use keys and values of another client's different prompt.

Leaves out: caching generated tokens. A decoding step can round differently from a prefill, but a
request must generate the same tokens with and without the prefix cache.
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
        One SHA-256 digest per whole chunk, each of all tokens up to the end of the chunk. Tokens
        after the last whole chunk are not hashed.
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
        # Blocks without references:
        self._free = list(range(1, num_blocks + 1))[::-1]  # not cached
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached; oldest first
        self._ref_counts = dict.fromkeys(range(1, num_blocks + 1), 0)
        self._block_by_hash: dict[bytes, int] = {}
        self._hashes_by_block: dict[int, list[bytes]] = {}  # only blocks with cached chunks

    @property
    def num_free_blocks(self) -> int:
        """Return the number of blocks without references, cached or not."""
        return len(self._free) + len(self._evictable)

    @property
    def num_cached_blocks(self) -> int:
        """Return the number of blocks that are cached and have no references."""
        return len(self._evictable)

    def ref_count(self, block: int) -> int:
        """Return the number of references to a block."""
        return self._ref_counts[block]

    def allocate(self) -> int:
        """Return a block with one reference; evict the oldest cached block if no other is free.

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
        """Add a reference to a block that `find_cached` returned."""
        self._ref_counts[block] += 1
        self._evictable.pop(block, None)

    def release(self, block: int) -> None:
        """Remove a reference to a block.

        Blocks are evicted in the order of release, so release the last block of a sequence first.
        """
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            if block in self._hashes_by_block:
                self._evictable[block] = None
            else:
                self._free.append(block)

    def cache(self, chunk_hash: bytes, block: int) -> None:
        """Register the next chunk of a block in the prefix cache; the block must have a reference.

        If a block is registered for this hash already, nothing changes.

        Args:
            chunk_hash: the hash of all tokens up to the end of the chunk, from `hash_chunks`.
            block: the block that contains the keys and values of the chunk.
        """
        if chunk_hash not in self._block_by_hash:
            self._block_by_hash[chunk_hash] = block
            self._hashes_by_block.setdefault(block, []).append(chunk_hash)

    def find_cached(self, chunk_hashes: Sequence[bytes]) -> tuple[int, int] | None:
        """Return the cached block that begins with as many of the given chunks as possible.

        Args:
            chunk_hashes: the hashes of the chunks that one block can contain, in order.

        Returns:
            The block, and the number of chunks that it begins with; None if no block has the first.
        """
        for count in range(len(chunk_hashes), 0, -1):
            if (block := self._block_by_hash.get(chunk_hashes[count - 1])) is not None:
                return block, count
        return None

    def reset_prefix_cache(self) -> None:
        """Evict all cached chunks because the KV cache was lost. Reference counts do not change."""
        for block in list(self._hashes_by_block):
            self._evict(block)
        self._free += self._evictable
        self._evictable.clear()

    def _evict(self, block: int) -> None:
        for chunk_hash in self._hashes_by_block.pop(block):
            del self._block_by_hash[chunk_hash]
