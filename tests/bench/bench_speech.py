"""Speech to text beside faster-whisper, on the same weights, sounds and machine.

    python -m tests.bench.bench_speech [MODEL_FOLDER] [--threads 2] [--rounds 3] [--minutes 10]

The folder is CTranslate2's (config.json, tokenizer.json, model.bin), as `pellucid pull
whisper-tiny.en` leaves it. Two cases, each from samples to text, each encoding the full window of
30 seconds, greedy:

- short clips: five recordings of 3 to 7 seconds, one after the other;
- a long file, built by `tests/audio/ten_minutes.py`: ours in batches of 4 windows against
  `BatchedInferencePipeline`, with its own voice-activity detector, also at 4.

First the texts are compared: of the words each of ours may differ in one of 80 from faster-whisper
in float32 on the clips, and on the long file from the truth in no more than faster-whisper's, and
one of 80 beside. Then the two take turns, and the fastest round of each counts. The last line is
one JSON object.
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


def ours(folder: Path, format: str, batch: int) -> Transcriber:
    import audio

    whisper = audio.load_model(folder, dtype=format)
    plan = audio.TranscriptionOptions(batch_size=batch)
    return lambda samples: (
        audio.transcribe(whisper, samples, language="en", transcription_options=plan).text
    )


def for_ctranslate2(folder: Path, scratch: Path) -> Path:
    """The folder with the vocabulary.json that CTranslate2 looks for, made of tokenizer.json."""
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    tokens = {id: token for token, id in spec["model"]["vocab"].items()}
    tokens |= {added["id"]: added["content"] for added in spec["added_tokens"]}
    begin = max(tokens) + 1 if "<|0.00|>" not in tokens.values() else None
    if begin is not None:  # the points in time, which older files leave out
        tokens |= {begin + i: f"<|{i * 0.02:.2f}|>" for i in range(1501)}
    (scratch / "vocabulary.json").write_text(json.dumps([tokens[id] for id in sorted(tokens)]))
    for name in ("config.json", "tokenizer.json", "model.bin"):
        (scratch / name).symlink_to(folder / name)
    return scratch


def theirs(folder: Path, format: str, threads: int, batch: int) -> Transcriber:
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    model = WhisperModel(str(folder), device="cpu", compute_type=format, cpu_threads=threads)
    if batch == 1:
        return lambda samples: _joined(model.transcribe(samples, beam_size=1, language="en"))
    pipeline = BatchedInferencePipeline(model)
    return lambda samples: _joined(
        pipeline.transcribe(samples, beam_size=1, language="en", batch_size=batch)
    )


def _joined(found) -> str:
    return "".join(segment.text for segment in found[0]).strip()


def words(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    return re.findall(r"[\w']+", text.lower())


def differing(text: str, other: str) -> int:
    """Words that must be changed, put in or left out to make one text of the other."""
    a, b = words(text), words(other)
    pieces = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in pieces if kind != "equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="default whisper-tiny.en, pulled")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10, help="of the long file; 0: none")
    parser.add_argument("--formats", nargs="+", default=["bfloat16"], help="of ours")
    args = parser.parse_args()
    args.folder = args.folder or pulled_path("whisper-tiny.en")
    with tempfile.TemporaryDirectory() as scratch:
        compare(args, for_ctranslate2(args.folder.resolve(), Path(scratch)))


def compare(args: argparse.Namespace, peer_folder: Path) -> None:
    clips = [said.samples for said in ten_minutes.read_aloud()[:5]]
    clips = [np.pad(clip, (3200, 3200)) for clip in clips]
    long, truth = ten_minutes.build()
    long = long[: int(args.minutes * 60 * ten_minutes.SAMPLE_RATE)]
    told = " ".join(said.text for said in truth if said.end <= args.minutes * 60)
    cases: dict[str, tuple[list[np.ndarray], dict[str, Transcriber]]] = {}
    for name, sounds, batch in (("clips", clips, 1), ("long", [long], 4)):
        if not len(sounds[0]):
            continue
        runs = {f"pellucid {format}": ours(args.folder, format, batch) for format in args.formats}
        runs["faster-whisper int8"] = theirs(peer_folder, "int8", args.threads, batch)
        cases[name] = sounds, runs

    def text(case: str, listener: Transcriber) -> str:
        return " ".join(listener(sound) for sound in cases[case][0])

    float32 = text("clips", theirs(peer_folder, "float32", args.threads, 1))
    report: dict[str, dict] = {}
    for case, (_, runs) in cases.items():
        reference = float32 if case == "clips" else told
        total = len(words(reference))
        wrong = {name: differing(text(case, run), reference) for name, run in runs.items()}
        for name, count in wrong.items():
            print(f"{case:6} {name:20} {count} of {total} words differ", flush=True)
        # On clips from their text in float32, on the long file from what was said.
        allowed = total / 80 + (wrong["faster-whisper int8"] if case == "long" else 0)
        report[case] = {"words": total, "differ": wrong, "too_many": {
            name: count > allowed for name, count in wrong.items() if name.startswith("pellucid")
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
        for name, taken in seconds.items():
            print(f"{case:6} {name:20} {taken:7.2f} s, {length / taken:5.1f} times real time")
        peer = seconds["faster-whisper int8"]
        report[case] |= {"seconds": seconds, "ratios": {
            name: round(peer / taken, 2) for name, taken in seconds.items()
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
