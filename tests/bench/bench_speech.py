"""Benchmark speech to text: Pellucid compared with faster-whisper, on the same weights and audio.

    python -m tests.bench.bench_speech [MODEL_FOLDER] [--threads 2] [--rounds 3] [--minutes 10]

The folder is in CTranslate2's layout (config.json, tokenizer.json, model.bin), as from `pellucid
pull whisper-tiny.en`. Both cases
measure the time from samples to text, with greedy decoding and full windows of 30 seconds:

- short clips: five recordings of 3 to 7 seconds, one after the other;
- a long file, built by `tests/audio/ten_minutes.py`: Pellucid in batches of 4 windows, and the
  `BatchedInferencePipeline` of faster-whisper, with its own voice activity detection, also in
  batches of 4.

First the texts are compared; the exit status is 1 if on the clips more than one word in 80 differs
from faster-whisper in float32, or if on the long file Pellucid has more errors than faster-whisper
by more than one word in 80. Then both are timed in alternation, and the fastest round of each
counts. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.audio import ten_minutes
from tests.bench.pulled import pulled_path

Transcriber = Callable[[np.ndarray], str]


def load_pellucid(folder: Path, dtype: str, batch_size: int) -> Transcriber:
    import audio

    whisper = audio.load_model(folder, dtype=dtype)
    options = audio.TranscriptionOptions(batch_size=batch_size)
    return lambda samples: (
        audio.transcribe(whisper, samples, language="en", transcription_options=options).text
    )


def link_for_ctranslate2(folder: Path, scratch: Path) -> Path:
    """Link the model into `scratch`, with the vocabulary.json that CTranslate2 needs."""
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    tokens = {id: token for token, id in spec["model"]["vocab"].items()}
    tokens |= {added["id"]: added["content"] for added in spec["added_tokens"]}
    begin = max(tokens) + 1 if "<|0.00|>" not in tokens.values() else None
    if begin is not None:  # timestamp tokens, which older files omit
        tokens |= {begin + i: f"<|{i * 0.02:.2f}|>" for i in range(1501)}
    (scratch / "vocabulary.json").write_text(json.dumps([tokens[id] for id in sorted(tokens)]))
    for name in ("config.json", "tokenizer.json", "model.bin"):
        (scratch / name).symlink_to(folder / name)
    return scratch


def load_faster_whisper(
    folder: Path, compute_type: str, threads: int, batch_size: int
) -> Transcriber:
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    model = WhisperModel(str(folder), device="cpu", compute_type=compute_type, cpu_threads=threads)
    if batch_size == 1:
        return lambda samples: _join_text(model.transcribe(samples, beam_size=1, language="en"))
    pipeline = BatchedInferencePipeline(model)
    return lambda samples: _join_text(
        pipeline.transcribe(samples, beam_size=1, language="en", batch_size=batch_size)
    )


def _join_text(result) -> str:
    return "".join(segment.text for segment in result[0]).strip()


def words(text: str) -> list[str]:
    """Return the words of a text, without case and punctuation."""
    return re.findall(r"[\w']+", text.lower())


def count_word_errors(text: str, other: str) -> int:
    """Return the number of substituted, inserted and deleted words between two texts."""
    a, b = words(text), words(other)
    opcodes = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in opcodes if kind != "equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="default whisper-tiny.en, pulled")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--minutes", type=float, default=10, help="minutes of the long file; 0: none"
    )
    parser.add_argument("--formats", nargs="+", default=["bfloat16"], help="of ours")
    args = parser.parse_args()
    args.folder = args.folder or pulled_path("whisper-tiny.en")
    with tempfile.TemporaryDirectory() as scratch:
        compare(args, link_for_ctranslate2(args.folder.resolve(), Path(scratch)))


def compare(args: argparse.Namespace, peer_folder: Path) -> None:
    clips = [utterance.samples for utterance in ten_minutes.read_aloud()[:5]]
    clips = [np.pad(clip, (3200, 3200)) for clip in clips]
    long, truth = ten_minutes.build()
    long = long[: int(args.minutes * 60 * ten_minutes.SAMPLE_RATE)]
    truth_text = " ".join(u.text for u in truth if u.end <= args.minutes * 60)
    cases: dict[str, tuple[list[np.ndarray], dict[str, Transcriber]]] = {}
    for name, sounds, batch_size in (("clips", clips, 1), ("long", [long], 4)):
        if not len(sounds[0]):
            continue
        runs = {
            f"pellucid {dtype}": load_pellucid(args.folder, dtype, batch_size)
            for dtype in args.formats
        }
        runs["faster-whisper int8"] = load_faster_whisper(
            peer_folder, "int8", args.threads, batch_size
        )
        cases[name] = sounds, runs

    def text(case: str, transcriber: Transcriber) -> str:
        return " ".join(transcriber(sound) for sound in cases[case][0])

    float32 = text("clips", load_faster_whisper(peer_folder, "float32", args.threads, 1))
    report: dict[str, dict] = {}
    for case, (_, runs) in cases.items():
        reference = float32 if case == "clips" else truth_text
        total = len(words(reference))
        num_errors = {
            name: count_word_errors(text(case, run), reference) for name, run in runs.items()
        }
        for name, count in num_errors.items():
            print(f"{case:6} {name:20} {count} of {total} words differ", flush=True)
        # On the clips compared with faster-whisper in float32, on the long file with the true text.
        allowed = total / 80 + (num_errors["faster-whisper int8"] if case == "long" else 0)
        report[case] = {"words": total, "differ": num_errors, "too_many": {
            name: count > allowed for name, count in num_errors.items()
            if name.startswith("pellucid")
        }}  # fmt: skip
    for case, (sounds, runs) in cases.items():
        best = dict.fromkeys(runs, np.full(len(sounds), np.inf))
        for _ in range(args.rounds):
            for i, sound in enumerate(sounds):
                for name, run in runs.items():
                    started = time.perf_counter()
                    run(sound)
                    best[name] = best[name].copy()
                    best[name][i] = min(best[name][i], time.perf_counter() - started)
        seconds = {name: float(times.sum()) for name, times in best.items()}
        length = sum(len(sound) for sound in sounds) / ten_minutes.SAMPLE_RATE
        for name, duration in seconds.items():
            print(f"{case:6} {name:20} {duration:7.2f} s, {length / duration:5.1f} times real time")
        peer = seconds["faster-whisper int8"]
        report[case] |= {"seconds": seconds, "ratios": {
            name: round(peer / duration, 2) for name, duration in seconds.items()
            if name.startswith("pellucid")
        }}  # fmt: skip
        print(f"{case:6} ratios", report[case]["ratios"], flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(report | {"peak_megabytes_of_all": round(peak)}))
    bad = {case: one["too_many"] for case, one in report.items() if any(one["too_many"].values())}
    if bad:
        raise SystemExit(f"texts differ in too many words: {bad}")


if __name__ == "__main__":
    main()
