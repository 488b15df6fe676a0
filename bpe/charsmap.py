r"""Read and apply the "precompiled charsmap" of SentencePiece: replacements of characters.

The map contains the rules of NFKC, and additional rules of SentencePiece, as a trie (a double array
of Darts-clone) followed by the replacements, each ended by a zero byte. At each position the
longest key is replaced; a character without a key stays.

`tokenizers` applies the same map to graphemes: a grapheme of up to five bytes is replaced as a
whole, by the replacement of the *shortest* key that it begins with. So "\r\n" becomes one space
there, and two in SentencePiece. `replace_graphemes` does this, for ids as in a `tokenizer.json`.
"""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING

import regex

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_MAX_KEY_BYTES, _MAX_KEYS = 64, 1 << 20
_MAX_GRAPHEME_BYTES = 5
_MULTI = (  # a control character, such as a newline, is a grapheme of its own
    r"\p{Grapheme_Cluster_Break=Prepend}*[^\p{Grapheme_Cluster_Break=Control}\r\n]"
    r"[\p{Grapheme_Cluster_Break=Extend}"
    r"\p{Grapheme_Cluster_Break=ZWJ}\p{Grapheme_Cluster_Break=SpacingMark}]+"
)


class Charsmap:
    """A precompiled charsmap of SentencePiece: short texts (keys) and their replacements."""

    def __init__(self, data: bytes):
        """Parse a charsmap.

        Args:
            data: the bytes of `precompiled_charsmap`.

        Raises:
            ValueError: if the data is damaged.
        """
        self._data = data
        if len(data) < 4 or not 0 < (size := struct.unpack_from("<I", data)[0]) <= len(data) - 4:
            raise ValueError(
                "precompiled_charsmap is damaged: expected a size of the trie, and a trie of that "
                f"size, in {len(data)} bytes"
            )
        if size % 4:
            raise ValueError(
                f"precompiled_charsmap is damaged: expected a trie of a multiple of 4 bytes, got "
                f"{size}"
            )
        self._replacements = data[4 + size :]
        try:
            keys = self._read_keys(data[4 : 4 + size])
            self._keys = {key.decode(): value.decode() for key, value in keys.items()}
        except (IndexError, ValueError) as error:
            raise ValueError(f"precompiled_charsmap is damaged: {error}") from None
        self._single = {ord(key): value for key, value in self._keys.items() if len(key) == 1}
        multi = [key for key in self._keys if len(key) > 1]
        self._longest = max(map(len, multi), default=1)
        following = "".join(map(regex.escape, sorted({c for key in multi for c in key[1:]})))
        # Matches the only texts in which a key of several characters can occur: any character, then
        # characters that occur in such a key after its first character.
        self._multi = regex.compile(f"(?s)[^{following}]?[{following}]+") if multi else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Charsmap) and self._data == other._data

    def __hash__(self) -> int:
        return hash(self._data)

    def __reduce__(self) -> tuple[type[Charsmap], tuple[bytes]]:
        return Charsmap, (self._data,)

    def _read_keys(self, trie: bytes) -> dict[bytes, bytes]:
        """Return all keys of the trie with their replacements.

        A unit of 32 bits is a node: its label (bits 0 to 7), whether it has a value (bit 8), and
        the offset to its children. The value is in a unit without a label: the offset of the
        replacement (bits 0 to 30).
        """
        import numpy as np

        from bpe.hash_table import concat_ranges

        units, keys = np.frombuffer(trie, "<u4"), {}
        # The child of a node with the label b is at the node's offset XOR b.
        label = units & np.uint32(0x800000FF)
        nodes = np.flatnonzero((label > 0) & (label < 256)).astype(np.uint32)
        offset_of_parent = nodes ^ label[nodes]
        order = np.argsort(offset_of_parent, kind="stable")
        nodes, offset_of_parent = nodes[order], offset_of_parent[order]
        bases, prefixes = _offsets(units[:1]), [b""]
        while prefixes:
            if len(prefixes[0]) > _MAX_KEY_BYTES:
                raise ValueError(f"a key has more than {_MAX_KEY_BYTES} bytes")
            if len(prefixes) > _MAX_KEYS:
                raise ValueError(f"there are more than {_MAX_KEYS} keys")
            first = np.searchsorted(offset_of_parent, bases)
            count = np.searchsorted(offset_of_parent, bases, side="right") - first
            parent = np.repeat(np.arange(len(bases)), count).tolist()
            index = nodes[concat_ranges(first, count)]
            unit = units.take(index)
            bases = index ^ _offsets(unit)
            prefixes = [
                prefixes[i] + byte
                for i, byte in zip(parent, map(_BYTES.__getitem__, unit & 0xFF), strict=True)
            ]
            with_value = np.flatnonzero(unit >> np.uint32(8) & np.uint32(1))
            starts = (units[bases[with_value]] & np.uint32(0x7FFFFFFF)).tolist()
            for i, start in zip(with_value.tolist(), starts, strict=True):
                end = self._replacements.find(b"\0", start)
                if start >= len(self._replacements) or end < 0:
                    raise ValueError(f"there is no replacement at offset {start}")
                keys[prefixes[i]] = self._replacements[start:end]
        return keys

    def replace(self, text: str) -> str:
        """Replace the longest key at each position, as SentencePiece does."""
        if self._multi is None:
            return text.translate(self._single)
        parts, end = [], 0
        for match in self._multi.finditer(text):
            parts += [text[end : match.start()].translate(self._single), self._scan(match.group())]
            end = match.end()
        return "".join([*parts, text[end:].translate(self._single)])

    def _scan(self, text: str) -> str:
        result, i = [], 0
        while i < len(text):
            for length in range(min(self._longest, len(text) - i), 0, -1):
                if (value := self._keys.get(text[i : i + length])) is not None:
                    result.append(value)
                    i += length
                    break
            else:
                result.append(text[i])
                i += 1
        return "".join(result)

    def replace_graphemes(self, text: str) -> str:
        """Replace each grapheme of up to five bytes by its shortest key, as `tokenizers` does."""
        parts, end = [], 0
        for match in _multi_graphemes().finditer(text):
            grapheme = match.group()
            if len(grapheme.encode()) > _MAX_GRAPHEME_BYTES:
                continue
            prefixes = (grapheme[:n] for n in range(1, len(grapheme) + 1))
            value = next((self._keys[key] for key in prefixes if key in self._keys), None)
            if value is not None:
                parts += [text[end : match.start()].translate(self._single), value]
                end = match.end()
        return "".join([*parts, text[end:].translate(self._single)])


def _offsets(units: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Return, for each unit of the trie, the offset from the unit to its children."""
    import numpy as np

    return (units >> np.uint32(10)) << ((units & np.uint32(1 << 9)) >> np.uint32(6))


_BYTES = [bytes([byte]) for byte in range(256)]


@functools.cache
def _multi_graphemes() -> regex.Pattern[str]:
    return regex.compile(rf"(?s)\r\n|{_MULTI}")
