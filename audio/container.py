"""The structure of sound files: where one file ends and the next begins.

Files that were joined byte by byte are common: a recorder that appends, a long recording put
together with `cat`, a radio stream whose every track is an Ogg stream of its own (RFC 3533,
section 4: chaining). Most decoders read the first file and report success. `split` finds the
signatures that formats begin with, so that each part is decoded by itself.

MPEG audio (ISO 11172-3) has no signature and no end: a decoder goes from frame to frame.
`is_plain_mp3` proves that frames fill the whole file.

Leaves out: a part without a signature behind one that has no length (raw AAC behind FLAC).
"""

from __future__ import annotations

import re

# What files begin with: six fixed bytes or more, which samples do not spell by chance.
_SIGNATURES = rb"""
    (?P<wav> (?: RIFF | RIFX | RF64 | BW64 ) .{4} WAVE )
  | (?P<w64> riff \x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1 )
  | (?P<aiff> FORM .{4} AIF[FC] )
  | (?P<caf> caff \x00\x01\x00\x00 desc )
  | (?P<flac> fLaC [\x00\x80] \x00\x00\x22 )
  | (?P<amr> \#!AMR (?: -WB )? \n )
  | (?P<ogg> OggS \x00 [\x02\x03] \x00{8} )
  | (?P<mp4> \x00\x00 .{2} ftyp [\x20-\x7e]{4} )
  | (?P<matroska> \x1a\x45\xdf\xa3 .{0,48}? \x42\x82 [\x84\x88] (?: webm | matroska ) )
  | (?P<asf> \x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c )
  | (?P<avi> RIFF .{4} AVI\x20LIST )
"""
_SIGNATURE = re.compile(_SIGNATURES, re.VERBOSE | re.DOTALL)
_NESTING = {"matroska", "asf", "avi"}  # may hold files of other formats
_UNKNOWN_SIZES = (0, 2**32 - 1)  # of a header that its writer never finished


def name(data: bytes) -> str:
    """The format by its signature: wav, w64, aiff, caf, flac, amr, ogg, ...; else ""."""
    match = _SIGNATURE.match(data)
    return (match.lastgroup or "") if match else ""


def split(data: bytes) -> list[bytes]:
    """Split joined files.

    Returns:
        The parts in order, without ID3v2 tags in front. A part of zeros is left out.
    """
    starts, kind, position = [0], "", _id3_end(data, 0)
    while match := _SIGNATURE.search(data, position):
        found, start, position = match.lastgroup or "", match.start(), match.end()
        if kind in _NESTING and found != kind:
            continue
        kind = found
        starts.append(start)
        if kind in _ENDS:
            position = _ENDS[kind](data, start)
        if kind == "wav" and frame_length(data[_id3_end(data, position) :][:4]):
            starts.append(position)  # MPEG audio has no signature
            kind = ""
    ends = [*starts[1:], len(data)]
    parts = [data[_id3_end(data, a) : b] for a, b in zip(starts, ends, strict=True)]
    return [part for part in parts if part.strip(b"\0")]


def _id3_end(data: bytes, start: int) -> int:
    """Where the ID3v2 tags at `start` end (ID3v2.4, section 3.1)."""
    while data[start : start + 3] == b"ID3" and len(data) >= start + 10:
        size = 0
        for byte in data[start + 6 : start + 10]:  # seven bits each
            size = size << 7 | byte & 0x7F
        has_footer = data[start + 5] & 0x10
        start += 10 + size + (10 if has_footer else 0)
    return start


def _flac_metadata_end(data: bytes, start: int) -> int:
    """Where the frames of a FLAC begin (RFC 9639, section 8): its metadata may quote a WAV."""
    position, is_last = start + 4, False
    while not is_last and position + 4 <= len(data):
        is_last = data[position] >= 0x80
        position += 4 + int.from_bytes(data[position + 1 : position + 4], "big")
    return position


def _ogg_end(data: bytes, start: int) -> int:
    """Where the pages of a link of an Ogg chain end.

    Streams that are multiplexed begin with a page each, all of them before any other page.
    """
    is_in_headers = True
    while data[start : start + 4] == b"OggS" and start + 27 <= len(data):
        begins_stream = bool(data[start + 5] & 2)
        if begins_stream and not is_in_headers:
            break
        is_in_headers = begins_stream
        start += _page_length(data, start)
    return start


def _page_length(data: bytes, start: int) -> int:
    """Bytes of the Ogg page at `start`."""
    num_segments = data[start + 26]
    return 27 + num_segments + sum(data[start + 27 : start + 27 + num_segments])


def _mp4_end(data: bytes, start: int) -> int:
    """Where the boxes of an MP4 end, or a second file type begins (ISO 14496-12, section 4.2)."""
    position = start
    while position + 8 <= len(data) and (
        position == start or data[position + 4 : position + 8] != b"ftyp"
    ):
        size = int.from_bytes(data[position : position + 4], "big")
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        if size == 0:  # to the end of the file
            return len(data)
        if size < 8 or position + size > len(data):
            break
        position += size
    return max(position, start + 12)


def _wav_end(data: bytes, start: int) -> int:
    """Where a WAV ends by its own header, or where to look for the next if that does not say."""
    order = "big" if data.startswith(b"RIFX", start) else "little"
    size = int.from_bytes(data[start + 4 : start + 8], order)
    end = start + 8 + size + size % 2
    return start + 12 if size in _UNKNOWN_SIZES or end > len(data) else end


_ENDS = {"wav": _wav_end, "flac": _flac_metadata_end, "ogg": _ogg_end, "mp4": _mp4_end}


def is_plain_wav(data: bytes) -> bool:
    """Whether a WAV holds one chunk of samples, whose length is stated and right."""
    order = "big" if data.startswith(b"RIFX") else "little"
    lengths, position = [], 12
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], order)
        if data[position : position + 4] == b"data":
            lengths.append(size)
            if size in _UNKNOWN_SIZES or position + 8 + size > len(data):
                return False
        position += 8 + size + size % 2
    return len(lengths) == 1


def is_plain_ogg(data: bytes) -> bool:
    """Whether an Ogg file is one stream of Vorbis or Opus, page after page to the end."""
    serials, position = set(), 0
    is_known = data[28:].startswith((b"\x01vorbis", b"OpusHead"))
    while data[position : position + 4] == b"OggS" and position + 27 <= len(data):
        serials.add(data[position + 14 : position + 18])
        position += _page_length(data, position)
    return is_known and len(serials) == 1 and position == len(data)


# Kilobits a second of layer III by the index in the header, and samples a second, for MPEG 1 and
# for MPEG 2; MPEG 2.5 halves the rates again.
_KILOBITS = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
_RATES = (44_100, 48_000, 32_000)


def frame_length(header: bytes) -> int:
    """Bytes of the MPEG layer III frame that begins with these four; 0 if none does."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return 0
    version = header[1] >> 3 & 3  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    bits, rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or bits in (0, 15) or rate == 3:
        return 0
    is_first = version == 3
    kilobits = _KILOBITS[0 if is_first else 1][bits]
    hertz = _RATES[rate] // {3: 1, 2: 2, 0: 4}[version]
    return (144 if is_first else 72) * 1000 * kilobits // hertz + (header[2] >> 1 & 1)


def is_plain_mp3(data: bytes) -> bool:
    """Whether frames of one kind fill an MP3, up to an ID3v1 tag, and their count is as stated.

    The first frame may hold no sound but a table of contents (Xing's and LAME's header), with the
    number of frames behind it. A decoder that believes it stops there.
    """
    end = len(data) - 128 if data[-128:-125] == b"TAG" else len(data)
    kind, count, stated, position = data[1:2], -1, None, 0
    while position < end and (length := frame_length(data[position : position + 4])):
        frame = data[position : position + length]
        is_table = any(mark in frame[:64] for mark in (b"Xing", b"Info", b"VBRI"))
        if frame[1:2] != kind or (is_table and position):
            return False
        if is_table:
            mark = max(frame.find(b"Xing"), frame.find(b"Info"))
            if mark < 0 or not frame[mark + 7] & 1:  # no count of frames
                return False
            stated = int.from_bytes(frame[mark + 8 : mark + 12], "big")
        count += 1
        position += length
    if stated is None:
        count += 1
    return position == end and count > 1 and stated in (None, count)
