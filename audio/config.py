"""Config of a Whisper model: its sizes, and its alignment heads.

One frozen dataclass describes every size from tiny to large-v3-turbo. It is hashable, so `jax.jit`
takes it as a static argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformer import config_keys
from transformer.config import MAX_LAYERS, check_size

_SIZES = (
    "num_audio_layers",
    "num_text_layers",
    "num_heads",
    "d_model",
    "d_ff",
    "vocab_size",
    "num_mels",
    "max_audio_len",
    "max_text_len",
)

# The released sizes: layers of encoder and decoder, heads, width.
_RELEASED = {
    "tiny": (4, 4, 6, 384),
    "base": (6, 6, 8, 512),
    "small": (12, 12, 12, 768),
    "medium": (24, 24, 16, 1024),
    "large": (32, 32, 20, 1280),
    "large-v3": (32, 32, 20, 1280),
    "large-v3-turbo": (32, 4, 20, 1280),
}

# Keys of a Hugging Face config.json with the only supported value.
_FIXED = {
    "model_type": "whisper",
    "activation_function": "gelu",
    "scale_embedding": False,
    "is_encoder_decoder": True,
    "tie_word_embeddings": True,
    "use_weighted_layer_sum": False,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the audio encoder and the text decoder.

    Raises:
        ValueError: a field is out of range, or two fields contradict each other.
    """

    num_audio_layers: int
    num_text_layers: int
    num_heads: int  # N, in encoder and decoder
    d_model: int  # D
    d_ff: int  # F
    vocab_size: int  # V
    num_mels: int = 80  # M
    max_audio_len: int = 1500  # encoder positions: 30 s at 50 per second
    max_text_len: int = 448  # decoder positions, prompt included
    # Decoder (layer, head) pairs for word timestamps; empty: all heads of the upper half of layers.
    alignment_heads: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name in _SIZES:
            check_size(name, getattr(self, name))
        for name in ("num_audio_layers", "num_text_layers"):
            check_size(name, getattr(self, name), MAX_LAYERS)
        if self.d_model % self.num_heads:
            raise ValueError(
                f"d_model must be a multiple of num_heads, got {self.d_model} and {self.num_heads}"
            )
        for layer, head in self.alignment_heads:
            if not (0 <= layer < self.num_text_layers and 0 <= head < self.num_heads):
                raise ValueError(
                    f"alignment_heads must have layers below {self.num_text_layers} and heads "
                    f"below {self.num_heads}, got (layer, head) {(layer, head)}"
                )

    @property
    def head_dim(self) -> int:
        """Width of a head, H."""
        return self.d_model // self.num_heads

    @property
    def num_frames(self) -> int:
        """Spectrogram frames in a window: two per encoder position."""
        return 2 * self.max_audio_len

    @property
    def timing_heads(self) -> tuple[tuple[int, int], ...]:
        """Cross-attention heads for word timestamps, as (layer, head) pairs."""
        return self.alignment_heads or tuple(
            (layer, head)
            for layer in range(self.num_text_layers // 2, self.num_text_layers)
            for head in range(self.num_heads)
        )

    @classmethod
    def of_size(cls, name: str, **changes: Any) -> Config:
        """Return the config of a released size.

        Args:
            name: "tiny" to "large-v3-turbo"; with ".en" for an English-only model.
            **changes: fields to replace, with their values.

        Raises:
            ValueError: the size is unknown.
        """
        size, _, english = name.partition(".")
        if size not in _RELEASED or english not in ("", "en"):
            raise ValueError(f"size must be one of {', '.join(_RELEASED)}, got {name!r}")
        num_audio_layers, num_text_layers, num_heads, width = _RELEASED[size]
        fields: dict[str, Any] = dict(
            num_audio_layers=num_audio_layers,
            num_text_layers=num_text_layers,
            num_heads=num_heads,
            d_model=width,
            d_ff=4 * width,
            vocab_size=51864 if english else 51866 if "v3" in size else 51865,
            num_mels=128 if "v3" in size else 80,
        )
        return cls(**(fields | changes))

    @classmethod
    def debug(cls, **changes: Any) -> Config:
        """Return the config of a model with fewer than 50,000 weights, for tests.

        Args:
            **changes: fields to replace, with their values.
        """
        fields: dict[str, Any] = dict(
            num_audio_layers=2,
            num_text_layers=2,
            num_heads=4,
            d_model=24,
            d_ff=48,
            vocab_size=320,
            num_mels=8,
            max_audio_len=50,
            max_text_len=64,
        )
        return cls(**(fields | changes))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """Convert the dictionary of a Hugging Face `config.json`.

        Args:
            config: the dictionary; keys whose value is None are ignored.

        Raises:
            ValueError: a key is missing or has an unsupported value, or an unknown key could change
                the forward pass; see `config_keys.check`.
        """
        values = {key: value for key, value in config.items() if value is not None}
        for key, value in _FIXED.items():
            if values.pop(key, value) != value:
                raise ValueError(f"{key} must be {value!r}, got {config[key]!r}")
        names = {
            "num_audio_layers": "encoder_layers",
            "num_text_layers": "decoder_layers",
            "num_heads": "encoder_attention_heads",
            "d_model": "d_model",
            "d_ff": "encoder_ffn_dim",
            "vocab_size": "vocab_size",
            "num_mels": "num_mel_bins",
            "max_audio_len": "max_source_positions",
            "max_text_len": "max_target_positions",
        }
        fields = {}
        for field, key in names.items():
            if key not in values:
                raise ValueError(f"config must have the key {key}")
            fields[field] = values.pop(key)
        for key, field in (("decoder_attention_heads", "num_heads"), ("decoder_ffn_dim", "d_ff")):
            if (value := values.pop(key, fields[field])) != fields[field]:
                raise ValueError(f"{key} must equal the encoder's {fields[field]!r}, got {value!r}")
        heads = values.pop("alignment_heads", None) or ()
        if not isinstance(heads, list | tuple) or not all(
            isinstance(pair, list | tuple) and [type(i) for i in pair] == [int, int]
            for pair in heads
        ):
            raise ValueError(f"alignment_heads must be [layer, head] pairs, got {heads!r}")
        cfg = cls(**fields, alignment_heads=tuple((layer, head) for layer, head in heads))
        config_keys.check(values, cfg, "whisper", neutral_overrides=config_keys.LAYER_NORM)
        return cfg

    def to_hf(self) -> dict[str, Any]:
        """Return a `config.json` dictionary; `from_hf` converts it back to an equal config."""
        return {
            **_FIXED,
            "encoder_layers": self.num_audio_layers,
            "decoder_layers": self.num_text_layers,
            "encoder_attention_heads": self.num_heads,
            "decoder_attention_heads": self.num_heads,
            "d_model": self.d_model,
            "encoder_ffn_dim": self.d_ff,
            "decoder_ffn_dim": self.d_ff,
            "vocab_size": self.vocab_size,
            "num_mel_bins": self.num_mels,
            "max_source_positions": self.max_audio_len,
            "max_target_positions": self.max_text_len,
            "alignment_heads": [list(pair) for pair in self.alignment_heads],
        }
