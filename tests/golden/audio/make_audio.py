"""Write the outputs of openai-whisper for the clips: `python -m tests.golden.audio.make_audio`.

Needs openai-whisper 20250625 with torch, and the pulled models whisper-tiny.en and whisper-base.
Large arrays are sampled at fixed steps to tens of kB, enough to find any difference.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from audio import load
from serve import settings
from serve.models import catalogue, download
from tests.audio.reference import reference

HERE = Path(__file__).parent
CLIPS = {
    "whisper-tiny.en": {"austen-0880": "en", "austen-0890": "en"},
    "whisper-base": {"austen-0880": "en", "coffee-fr": "fr", "train-de": "de", "bread-es": "es"},
}
MEL_STEP, SOUND_STEP, LOGIT_STEP = 21, 291, 303  # rows, rows, tokens


def main() -> None:
    import torch
    import whisper

    for id, clips in CLIPS.items():
        folder = download.find_path(catalogue.load().models[id], settings.data_folder())
        if folder is None:
            raise SystemExit(f"run `pellucid pull {id}` first")
        with tempfile.TemporaryDirectory() as scratch:
            model = reference(folder, Path(scratch))
        arrays: dict[str, np.ndarray] = {}
        for clip, language in clips.items():
            samples = load(HERE / f"{clip}.flac")
            mel = whisper.log_mel_spectrogram(samples, padding=whisper.audio.N_SAMPLES)
            mel = mel[:, : len(samples) // 160]
            window = whisper.pad_or_trim(mel, whisper.audio.N_FRAMES)
            with torch.no_grad():
                sound = model.encoder(window[None])
                options = {"language": language, "fp16": False}
                greedy = whisper.decode(model, window, whisper.DecodingOptions(**options))
                beams = whisper.decode(
                    model, window, whisper.DecodingOptions(**options, beam_size=3)
                )
                tokenizer = whisper.tokenizer.get_tokenizer(
                    model.is_multilingual, language=language, task="transcribe"
                )
                ids = [*tokenizer.sot_sequence, *greedy.tokens]
                logits = model.decoder(torch.tensor([ids]), sound)[0]
            transcript = model.transcribe(samples, temperature=0.0, word_timestamps=True, **options)
            words = [word for segment in transcript["segments"] for word in segment["words"]]
            arrays |= {
                f"{clip}/mel": mel.T[::MEL_STEP].numpy(),
                f"{clip}/sound": sound[0, ::SOUND_STEP].numpy(),
                f"{clip}/ids": np.array(ids, np.int32),
                f"{clip}/logits": logits[:, ::LOGIT_STEP].numpy(),
                f"{clip}/greedy": np.array(greedy.tokens, np.int32),
                f"{clip}/beams": np.array(beams.tokens, np.int32),
                f"{clip}/scores": np.array(
                    [greedy.avg_logprob, greedy.no_speech_prob, greedy.compression_ratio]
                ),
                f"{clip}/text": np.array(greedy.text),
                f"{clip}/words": np.array([word["word"] for word in words]),
                f"{clip}/times": np.array([[word["start"], word["end"]] for word in words]),
            }
        np.savez_compressed(HERE / f"{id}.npz", **arrays)


if __name__ == "__main__":
    main()
