"""Structure of audio files: where one file ends and the next begins.

Files concatenated byte by byte are common: a recorder that appends, a long recording joined with
`cat`, a radio stream with one Ogg stream per track (RFC 3533, section 4: chaining). Most decoders
read the first file and report success. `split_files` finds the end of each file, from the lengths
that its headers state or else at the signature of the next file, so that each part is decoded
separately.

MPEG audio (ISO 11172-3) has no signature and states no length: a decoder goes from frame to frame.
`is_plain_mp3` verifies that frames fill the whole file.

Leaves out: two files of different formats of which the first states no length and the second has
no signature (raw AAC after FLAC or MP3).
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Callable
from typing import NamedTuple

MAX_PARTS = 1000  # concatenated files; more raise an error, which bounds the work

# Signatures of files: at least six fixed bytes, which are unlikely to occur in samples.
_SIGNATURE = re.compile(
    rb"""
    (?P<wav> (?: RIFF | RIFX | RF64 | BW64 ) .{4} WAVE )
  | (?P<avi> RIFF .{4} AVI\x20LIST )
  | (?P<w64> riff \x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1 )
  | (?P<aiff> FORM .{4} AIF[FC] )
  | (?P<caf> caff \x00\x01\x00\x00 desc )
  | (?P<flac> fLaC [\x00\x80] \x00\x00\x22 )
  | (?P<amr> \#!AMR (?: -WB )? \n )
  | (?P<voc> Creative\x20Voice\x20File\x1a )
  | (?P<tta> TTA1 [\x01\x02] \x00 )
  | (?P<ape> MAC\x20 [\x80-\xff] \x0f )
  | (?P<wv> wvpk .{4} [\x02-\x10] \x04 .{6} \x00{4} )
  | (?P<dsf> DSD\x20 \x1c \x00{7} )
  | (?P<flv> FLV \x01 [\x01\x04\x05] \x00\x00\x00\x09 )
  | (?P<ogg> OggS \x00 [\x02\x03] \x00{8} )
  | (?P<mp4> \x00\x00 .{2} ftyp [\x20-\x7e]{4} )
  | (?P<matroska> \x1a\x45\xdf\xa3 .{0,48}? \x42\x82 [\x84\x88] (?: webm | matroska ) )
  | (?P<asf> \x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c )
  | (?P<id3> ID3 [\x02-\x04] \x00 [\x00-\xf0] [\x00-\x7f]{4} )
    """,
    re.VERBOSE | re.DOTALL,
)
# The first bytes of each signature, which `bytes.find` searches fast, and their offset.
_PREFIXES = (
    *((prefix, 0) for prefix in (b"RIFF", b"RIFX", b"RF64", b"BW64", b"riff\x2e\x91", b"FORM")),
    *((prefix, 0) for prefix in (b"caff\0\1", b"fLaC", b"#!AMR", b"Creative Voice", b"TTA1")),
    *((prefix, 0) for prefix in (b"MAC ", b"wvpk", b"DSD \x1c", b"FLV\1", b"OggS\0")),
    *((prefix, 0) for prefix in (b"\x1a\x45\xdf\xa3", b"\x30\x26\xb2\x75", b"ID3")),
    (b"ftyp", 4),
)
_NESTING = {"matroska", "asf", "avi", "mp4", "flv"}  # can contain signatures of other formats
_UNKNOWN_SIZES = (0, 2**32 - 1)  # in a header that was never completed
_MAX_STEPS = 10_000  # chunks to follow within one file; bounds the work


class Part(NamedTuple):
    """One of several concatenated files.

    Attributes:
        data: the bytes of the part, without leading ID3v2 tags.
        is_certain: whether the part is certainly a file, because it is the first one or begins with
            a signature. Otherwise it can be audio, a tag or padding after the end of a file.
    """

    data: bytes
    is_certain: bool


def detect_format(data: bytes) -> str:
    """Return the format by the signature: "wav", "w64", "aiff", "flac", "ogg", ...; "" if unknown.

    Args:
        data: the bytes of a file.
    """
    match = _SIGNATURE.match(data)
    return (match.lastgroup or "") if match else ""


def split_files(data: bytes) -> list[Part]:
    """Split concatenated files.

    Args:
        data: the bytes of one or several files.

    Returns:
        The parts in order. Parts that contain only zeros are left out.

    Raises:
        ValueError: the data have more than `MAX_PARTS` parts.
    """
    signatures = functools.cache(lambda: _signatures(data))  # not needed if files state their end
    parts: list[Part] = []
    position = 0
    while position < len(data):
        start = _id3_end(data, position)
        match = _SIGNATURE.match(data, start)
        kind = (match.lastgroup or "") if match else ""
        end = _ENDS[kind](data, start) if kind in _ENDS else None
        if end is None:
            after = start + 1
            if kind == "flac":
                after = _flac_metadata_end(data, start)
            end = _next_file(signatures(), after, kind, len(data))
        end = max(end, position + 1)
        if data[start:end].strip(b"\0"):
            parts.append(Part(data[start:end], not parts or bool(kind)))
        if len(parts) > MAX_PARTS:
            raise ValueError(f"more than {MAX_PARTS} concatenated files")
        position = end
    return parts


def _signatures(data: bytes) -> list[tuple[int, str]]:
    """Return the position and the format of every signature in the bytes, in order."""
    signatures: list[tuple[int, str]] = []
    for prefix, offset in _PREFIXES:
        position = data.find(prefix, offset)
        while position >= 0:
            match = _SIGNATURE.match(data, position - offset)
            if match is not None:
                signatures.append((position - offset, match.lastgroup or ""))
            if len(signatures) > 10 * MAX_PARTS:
                raise ValueError(f"more than {MAX_PARTS} concatenated files")
            position = data.find(prefix, position + 1)
    return sorted(signatures)


def _next_file(signatures: list[tuple[int, str]], after: int, kind: str, size: int) -> int:
    """Return where the file after a file of format `kind`, which states no length, begins.

    That is the first suitable signature from the position `after` on, or else `size`, the end of
    the data.
    """
    for i in range(bisect.bisect_left(signatures, (after, "")), len(signatures)):
        position, other = signatures[i]
        # A tag between MPEG frames separates two files that FFmpeg decodes as one.
        if other == kind or (kind not in _NESTING and not (kind == "" and other == "id3")):
            return position
    return size


def _id3_end(data: bytes, start: int) -> int:
    """Return the end of the ID3v2 tags at `start` (ID3v2.4, section 3.1)."""
    while data[start : start + 3] == b"ID3" and len(data) >= start + 10:
        size = 0
        for byte in data[start + 6 : start + 10]:  # seven bits each
            size = size << 7 | byte & 0x7F
        has_footer = data[start + 5] & 0x10
        start += 10 + size + (10 if has_footer else 0)
    return min(start, len(data))


# The `_*_end` functions take the position of a file's signature (`start`) and return the end of the
# file by its headers; None if they do not state it, or state more bytes than there are.


def _wav_end(data: bytes, start: int) -> int | None:
    """Return the end of a WAV's data chunk, or that stated in the RIFF header if it is later."""
    order = "big" if data.startswith(b"RIFX", start) else "little"
    size = int.from_bytes(data[start + 4 : start + 8], order)
    long_sizes = data[start + 12 : start + 16] == b"ds64"  # RF64: EBU Tech 3306
    if long_sizes:
        size = int.from_bytes(data[start + 20 : start + 28], "little")
    position, is_data = start + 12, False
    for _ in range(_MAX_STEPS):
        if is_data or position + 8 > len(data):
            break
        length = int.from_bytes(data[position + 4 : position + 8], order)
        is_data = data[position : position + 4] == b"data"
        if is_data and long_sizes and length == _UNKNOWN_SIZES[1]:
            length = int.from_bytes(data[start + 28 : start + 36], "little")
        if is_data and length in _UNKNOWN_SIZES:
            return None
        position = _padded(data, position + 8 + length)
    if not is_data or position > len(data):
        return None
    end = _padded(data, start + 8 + size)
    return end if position <= end <= len(data) else position


def _padded(data: bytes, end: int) -> int:
    """Return `end`, the end of a RIFF chunk, plus 1 if the chunk has a padding byte.

    Chunks of odd length should have a padding byte, but some writers omit it.
    """
    return end + 1 if end % 2 and data[end : end + 1] == b"\0" else end


def _aiff_end(data: bytes, start: int) -> int | None:
    """Return the end of the FORM chunk of an AIFF file."""
    size = int.from_bytes(data[start + 4 : start + 8], "big")
    end = _padded(data, start + 8 + size)
    return None if size in _UNKNOWN_SIZES or end > len(data) else end


def _w64_end(data: bytes, start: int) -> int | None:
    """Return the end of a Sony Wave64 file, whose sizes have eight bytes."""
    size = int.from_bytes(data[start + 16 : start + 24], "little")
    return start + size if 24 < size <= len(data) - start else None


def _caf_end(data: bytes, start: int) -> int | None:
    """Return the end of the last chunk of a CAF file (Apple's Core Audio Format)."""
    position = start + 8
    for _ in range(_MAX_STEPS):
        if position + 12 > len(data) or not data[position : position + 4].isalpha():
            return position
        size = int.from_bytes(data[position + 4 : position + 12], "big", signed=True)
        if size < 0 or position + 12 + size > len(data):
            return None if data[position : position + 4] == b"data" else position
        position += 12 + size
    return None


def _ogg_end(data: bytes, start: int) -> int:
    """Return the offset where the Ogg file at `start` ends; in a chained Ogg, another one follows.

    The first pages of all multiplexed streams come before any other page, so a later first page
    begins the next file.
    """
    position, last, is_in_headers = start, len(data), True
    while position + 27 <= len(data):
        if data[position : position + 4] != b"OggS":
            # After damage, a decoder continues at the next page.
            position = data.find(b"OggS", position)
            if position < 0 or position + 27 > len(data):
                break
        begins_stream = bool(data[position + 5] & 2)
        if begins_stream and not is_in_headers:
            break
        is_in_headers = begins_stream
        position += _page_length(data, position)
        last = position
    return min(last, len(data))


def _page_length(data: bytes, start: int) -> int:
    """Return the length in bytes of the Ogg page at `start`."""
    num_segments = data[start + 26]
    return 27 + num_segments + sum(data[start + 27 : start + 27 + num_segments])


def _mp4_end(data: bytes, start: int) -> int | None:
    """Return the end of an MP4 file's last box, or the start of a second ftyp box.

    Boxes are defined in ISO 14496-12, section 4.2.
    """
    position = start
    for _ in range(_MAX_STEPS):
        kind = data[position + 4 : position + 8]
        if len(kind) < 4 or (kind == b"ftyp" and position > start):
            return position
        size = int.from_bytes(data[position : position + 4], "big")
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        if size < 8 or position + size > len(data):
            return None if kind in _MP4_BOXES else position
        position += size
    return None


_MP4_BOXES = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"sidx", b"styp"}


def _avi_end(data: bytes, start: int) -> int | None:
    """Return the end of an AVI's last RIFF chunk; all but the first are AVIX (OpenDML 1.02)."""
    position, kind = start, b"AVI "
    while data[position : position + 4] == b"RIFF" and data[position + 8 : position + 12] == kind:
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        if size in _UNKNOWN_SIZES or position + 8 + size > len(data):
            return None
        position, kind = _padded(data, position + 8 + size), b"AVIX"
    return position


def _asf_end(data: bytes, start: int) -> int | None:
    """Return the end of an ASF file's last top-level object; the first is the header."""
    position = start
    for _ in range(_MAX_STEPS):
        kind = data[position : position + 4]
        if kind not in _ASF_OBJECTS or (position > start and kind == data[start : start + 4]):
            return position
        size = int.from_bytes(data[position + 16 : position + 24], "little")
        if size < 24 or position + size > len(data):
            return None
        position += size
    return None


_ASF_OBJECTS = {  # header, data, index, simple index: the first bytes of their GUIDs
    b"\x30\x26\xb2\x75",
    b"\x36\x26\xb2\x75",
    b"\xd3\x29\xe2\xd6",
    b"\x90\x08\x00\x33",
}


def _matroska_end(data: bytes, start: int) -> int | None:
    """Return the end of the segment that follows a Matroska header (RFC 8794, section 4)."""
    header = _element_end(data, start)
    if header is None or data[header : header + 4] != b"\x18\x53\x80\x67":
        return None
    return _element_end(data, header)


def _element_end(data: bytes, start: int) -> int | None:
    """Return the end of an EBML element with an id of four bytes; None if its size is unknown."""
    first = data[start + 4] if start + 4 < len(data) else 0
    if not first:
        return None
    length = 9 - first.bit_length()  # bytes of the size, by its leading zeros
    size = int.from_bytes(data[start + 4 : start + 4 + length], "big") - (1 << 7 * length)
    end = start + 4 + length + size
    return None if size == (1 << 7 * length) - 1 or end > len(data) else end


_ENDS: dict[str, Callable[[bytes, int], int | None]] = {
    "wav": _wav_end,
    "aiff": _aiff_end,
    "w64": _w64_end,
    "caf": _caf_end,
    "ogg": _ogg_end,
    "mp4": _mp4_end,
    "avi": _avi_end,
    "asf": _asf_end,
    "matroska": _matroska_end,
}


def _flac_metadata_end(data: bytes, start: int) -> int:
    """Return the end of a FLAC file's metadata (RFC 9639, section 8), where its frames begin.

    The metadata can contain a WAV header, which is not the start of another file.
    """
    position, is_last = start + 4, False
    while not is_last and position + 4 <= len(data):
        is_last = data[position] >= 0x80
        position += 4 + int.from_bytes(data[position + 1 : position + 4], "big")
    return position


# Files that libsndfile is known to read to the end


def is_plain_wav(data: bytes) -> bool:
    """Return whether a WAV file has nothing but chunks, one of them a data chunk of known length.

    Args:
        data: the bytes of a file with a WAV signature.
    """
    order = "big" if data.startswith(b"RIFX") else "little"
    lengths, position = [], 12
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], order)
        if data[position : position + 4] == b"data":
            lengths.append(size)
            if size in _UNKNOWN_SIZES or position + 8 + size > len(data):
                return False
        position = _padded(data, position + 8 + size)
    return len(lengths) == 1 and position == len(data)


def is_plain_ogg(data: bytes) -> bool:
    """Return whether an Ogg file is one stream of Vorbis or Opus and nothing else.

    Args:
        data: the bytes of a file with an Ogg signature.
    """
    serials, position = set(), 0
    is_known = data[28:].startswith((b"\x01vorbis", b"OpusHead"))
    while data[position : position + 4] == b"OggS" and position + 27 <= len(data):
        serials.add(data[position + 14 : position + 18])
        position += _page_length(data, position)
    return is_known and len(serials) == 1 and position == len(data)


# Layer III: kilobits per second by the index in the header, for MPEG 1 and for MPEG 2, and the
# sample rates of MPEG 1. MPEG 2 halves the sample rates, MPEG 2.5 halves them again.
_KILOBITS = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
_RATES = (44_100, 48_000, 32_000)


def mp3_frame_length(header: bytes) -> int:
    """Return the length in bytes of an MPEG layer III frame; 0 if it is not a layer III frame.

    Args:
        header: the first four bytes of the frame.
    """
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return 0
    version = header[1] >> 3 & 3  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    bits, rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or bits in (0, 15) or rate == 3:
        return 0
    is_mpeg1 = version == 3
    kilobits = _KILOBITS[0 if is_mpeg1 else 1][bits]
    hertz = _RATES[rate] // {3: 1, 2: 2, 0: 4}[version]
    return (144 if is_mpeg1 else 72) * 1000 * kilobits // hertz + (header[2] >> 1 & 1)


def is_plain_mp3(data: bytes) -> bool:
    """Return whether an MP3 has only frames of one MPEG version and layer, as many as are stated.

    The first frame can hold the header of Xing and LAME instead of audio. This header states the
    number of frames after it, and a decoder that relies on it stops there. An ID3v1 tag after the
    last frame is accepted.

    Args:
        data: the bytes of a file without leading ID3v2 tags.
    """
    end = len(data) - 128 if data[-128:-125] == b"TAG" else len(data)
    kind, count, stated, position = data[1:2], -1, None, 0
    while position < end and (length := mp3_frame_length(data[position : position + 4])):
        frame = data[position : position + length]
        is_table = any(mark in frame[:64] for mark in (b"Xing", b"Info", b"VBRI"))
        if frame[1:2] != kind or (is_table and position):
            return False
        if is_table:
            mark = max(frame.find(b"Xing"), frame.find(b"Info"))
            if mark < 0 or len(frame) < mark + 12 or not frame[mark + 7] & 1:  # no count stated
                return False
            stated = int.from_bytes(frame[mark + 8 : mark + 12], "big")
        count += 1
        position += length
    if stated is None:
        count += 1
    return position == end and count > 1 and stated in (None, count)
