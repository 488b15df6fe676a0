"""Compare `audio.load` with the program ffmpeg: `python -m tests.audio.compare_ffmpeg`.

Makes more than 150 files from two clips with ffmpeg: many containers and codecs, concatenated and
truncated files, files with leading or trailing bytes or a wrong name. Prints the durations that
ffmpeg and `audio.load` decode, and with `--text MODEL_FOLDER` the transcripts of both. ffmpeg
decodes only the first of concatenated files of most formats; then the duration is compared with the
sum over the parts. If durations differ by more than 50 ms per part, the file is marked and the exit
code is 1. Files that only `audio.load` decodes are not errors.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import audio
from audio.load import SAMPLE_RATE

CLIPS = [
    Path(__file__).parent.parent / "golden" / "audio" / f"austen-{number}.flac"
    for number in ("0880", "0930")
]
VARIANTS = """
wav: -c:a pcm_u8 | -c:a pcm_s16le | -c:a pcm_s24le | -c:a pcm_s32le | -c:a pcm_f32le
wav: -c:a pcm_f64le | -c:a pcm_mulaw | -c:a pcm_alaw | -c:a adpcm_ima_wav | -c:a adpcm_ms
wav: -c:a libgsm_ms -ar 8000 | -c:a g722 | -c:a g726 -ar 8000 | -c:a libmp3lame | -ac 6
wav: -ar 8000 | -ar 11025 | -ar 22050 | -ar 44100 -ac 2 | -ar 96000 | -ar 192000 | -rf64 always
w64: | -c:a pcm_s24le
aiff: | -c:a pcm_f32be | -c:a pcm_mulaw
caf: | -c:a pcm_alaw
au: | -c:a pcm_mulaw
voc:
flac: | -ac 6 | -ar 96000 -sample_fmt s32
ogg: -c:a libvorbis | -c:a libopus | -c:a flac | -c:a libspeex
mp3: | -ar 8000 | -write_xing 0 | -b:a 320k -ar 48000 -ac 2 | -q:a 9 -ar 44100
mp2: -ar 44100
m4a: | -c:a alac
mp4: -c:a aac -movflags frag_keyframe+empty_moov | -c:a libopus | -c:a libmp3lame
mov: -c:a pcm_s16le
3gp: -c:a aac
aac:
latm: -c:a aac
webm: | -c:a libvorbis
mka: | -c:a flac
wma: | -c:a wmav1
ac3:
eac3:
dts: -strict -2 -ar 48000
tta:
wv:
ts: -c:a aac
mpg:
avi:
flv: -c:a aac -ar 44100
wtv:
rm: -c:a ac3
amr: -c:a libopencore_amrnb -ar 8000
nut:
adx:
ast: -c:a pcm_s16be_planar
mmf: -ar 8000
rso: -ar 8000
spdif: -c:a ac3 -ar 48000
swf: -ar 44100
mxf: -ar 48000
sox:
ircam:
"""
CONCATENATED = (
    "wav",
    "flac",
    "mp3",
    "ogg",
    "m4a",
    "aac",
    "webm",
    "aiff",
    "caf",
    "w64",
    "wma",
    "ts",
    "mka",
    "avi",
    "au",
    "wv",
    "tta",
    "voc",
    "amr",
    "mov",
)


def ffmpeg(*arguments: str | Path) -> bytes:
    """Return the bytes that ffmpeg writes to stdout, which can be incomplete after errors."""
    command = ["ffmpeg", "-v", "error", "-nostdin", "-y", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False).stdout


def write_variants(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield two files, one per clip, for each combination of format and options in `VARIANTS`."""
    for line in VARIANTS.strip().splitlines():
        suffix, _, options = line.partition(":")
        for option in options.split("|"):
            label = "_".join(option.replace("-", " ").replace(":", " ").split()) or "default"
            pair = [folder / f"{label}-{i}.{suffix}" for i in range(2)]
            for clip, path in zip(CLIPS, pair, strict=True):
                ffmpeg("-i", clip, *option.split(), path)
            if all(path.is_file() and path.stat().st_size for path in pair):
                yield pair[0], pair[1]


def write_files(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield each file to decode, with the files whose ffmpeg durations add up to its own."""
    pairs = list(write_variants(folder))
    yield from ((first, [first]) for first, _ in pairs)
    suffixes = set()
    for first, other in pairs:
        suffix, data = first.suffix[1:], first.read_bytes()
        if suffix not in CONCATENATED or (suffix in suffixes and suffix != "ogg"):
            continue
        suffixes.add(suffix)
        middle = len(data) // 2
        for name, changed in {
            "concatenated": data + other.read_bytes(),
            "truncated": data[:middle],
            "begins-inside": data[len(data) // 3 :],
            "trailing-zeros": data + bytes(2000),
            "leading-id3": b"ID3\x04\0\0\0\0\x02\0" + bytes(256) + data,
        }.items():
            path = folder / f"{name}-{first.stem}.{suffix}"
            path.write_bytes(changed)
            yield path, [first, other] if name == "concatenated" else [path]
    wrong = folder / "a-flac-called.mp3"
    wrong.write_bytes(CLIPS[0].read_bytes())
    yield wrong, [wrong]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", metavar="FOLDER", help="transcribe with this Whisper")
    whisper = audio.load_model(folder) if (folder := parser.parse_args().text) else None
    num_files = num_different = 0
    with tempfile.TemporaryDirectory() as name:
        for path, parts in write_files(Path(name)):
            to_raw = ("-f", "s16le", "-ac", "1", "-ar", str(SAMPLE_RATE), "-")
            whole, *separate = (ffmpeg("-i", file, *to_raw) for file in [path, *parts])
            raw = max(
                whole, b"".join(separate), key=len
            )  # ffmpeg reads all of an MP3, with the padding
            theirs = np.frombuffer(raw, "<i2").astype(np.float32) / 2**15
            try:
                ours, fault = audio.load(path), ""
            except ValueError as error:
                ours, fault = np.zeros(0, np.float32), str(error).rpartition(": ")[2][:40]
            differs = (
                abs(len(ours) - len(theirs)) > 0.05 * SAMPLE_RATE * len(parts) and len(theirs) > 0
            )
            num_files, num_different = num_files + 1, num_different + differs
            durations = f"{len(theirs) / SAMPLE_RATE:7.3f} {len(ours) / SAMPLE_RATE:7.3f}"
            print(
                f"{path.name:50} {durations} {'DIFFERS' if differs else '':7} {fault}", flush=True
            )
            if whisper is not None:
                for label, samples in (("ffmpeg", theirs), ("ours", ours)):
                    text = audio.transcribe(whisper, samples).text if len(samples) else ""
                    print(f"    {label:7} {text}", flush=True)
    print(f"{num_files} files, {num_different} durations differ by more than 50 ms per part")
    if num_different:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
