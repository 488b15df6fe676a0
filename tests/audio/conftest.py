"""Fixtures: the audio clips, the outputs of openai-whisper, and the pulled Whisper models."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import audio

GOLDEN = Path(__file__).parent.parent / "golden" / "audio"
CASES = [  # model, clip, language
    ("whisper-tiny.en", "austen-0880", "en"),
    ("whisper-tiny.en", "austen-0890", "en"),
    ("whisper-base", "austen-0880", "en"),
    ("whisper-base", "coffee-fr", "fr"),
    ("whisper-base", "train-de", "de"),
    ("whisper-base", "bread-es", "es"),
]


@pytest.fixture(scope="session")
def clip() -> Callable[[str], np.ndarray]:
    """Return a function that loads the samples of a clip by its name."""
    return cache(lambda name: audio.load(GOLDEN / f"{name}.flac"))


@pytest.fixture(scope="session")
def golden() -> Callable[[str, str], dict[str, np.ndarray]]:
    """Return a function that loads the outputs of openai-whisper for a model and a clip."""

    @cache
    def load(model: str, clip: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{model}.npz") as arrays:
            return {
                name.partition("/")[2]: arrays[name]
                for name in arrays
                if name.startswith(f"{clip}/")
            }

    return load


@pytest.fixture(scope="session")
def whisper(model_file) -> Callable[[str], audio.Whisper]:
    """Return a function that loads a pulled model in float32 by its id."""
    return cache(lambda id: audio.load_model(model_file(id)))


def window(mel: np.ndarray, num_frames: int = 3000) -> np.ndarray:
    """Pad a spectrogram [T, M] to a window for the encoder: [1, num_frames, M]."""
    padded = np.zeros((1, num_frames, mel.shape[1]), np.float32)
    padded[0, : len(mel)] = mel
    return padded
