"""Whisper's tokenizer: text, special and timestamp tokens.

The text tokens are GPT-2's, or a multilingual byte-level BPE vocabulary trained the same way. The
special tokens follow in this order: end of text; start of transcript; one for each language;
translate and transcribe; start of LM; start of previous text; no speech; no timestamps; and 1501
timestamps from 0 to 30 s, 20 ms apart. The tokens of a window begin with the start of transcript, a
language and a task (only the start with an English-only model), and then "no timestamps" if
timestamps are not generated. Radford et al. 2022, arXiv:2212.04356, section 2.3.

The vocabulary is read from a `tokenizer.json`. The timestamp tokens follow the last special token.
"""

from __future__ import annotations

import functools
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bpe import Encoding
from bpe.formats import bytes_to_unicode
from bpe.pretokenize import GPT2

TIME_PRECISION = 0.02  # seconds between two timestamp tokens

# Language codes and English names, spelled as in the API.
_LANGUAGES = """
en:english zh:chinese de:german es:spanish ru:russian ko:korean fr:french ja:japanese pt:portuguese
tr:turkish pl:polish ca:catalan nl:dutch ar:arabic sv:swedish it:italian id:indonesian hi:hindi
fi:finnish vi:vietnamese he:hebrew uk:ukrainian el:greek ms:malay cs:czech ro:romanian da:danish
hu:hungarian ta:tamil no:norwegian th:thai ur:urdu hr:croatian bg:bulgarian lt:lithuanian la:latin
mi:maori ml:malayalam cy:welsh sk:slovak te:telugu fa:persian lv:latvian bn:bengali sr:serbian
az:azerbaijani sl:slovenian kn:kannada et:estonian mk:macedonian br:breton eu:basque is:icelandic
hy:armenian ne:nepali mn:mongolian bs:bosnian kk:kazakh sq:albanian sw:swahili gl:galician
mr:marathi pa:punjabi si:sinhala km:khmer sn:shona yo:yoruba so:somali af:afrikaans oc:occitan
ka:georgian be:belarusian tg:tajik sd:sindhi gu:gujarati am:amharic yi:yiddish lo:lao uz:uzbek
fo:faroese ht:haitian_creole ps:pashto tk:turkmen nn:nynorsk mt:maltese sa:sanskrit lb:luxembourgish
my:myanmar bo:tibetan tl:tagalog mg:malagasy as:assamese tt:tatar haw:hawaiian ln:lingala ha:hausa
ba:bashkir jw:javanese su:sundanese yue:cantonese
"""
LANGUAGES = {
    code: name.replace("_", " ") for code, name in (pair.split(":") for pair in _LANGUAGES.split())
}

# Languages written without spaces; each character counts as a word.
_WITHOUT_SPACES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
_NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")  # two spellings of one token


@dataclass(frozen=True)
class WhisperTokenizer:
    """Whisper's tokenizer of one model: text encoding, and the ids of the special tokens.

    Attributes:
        encoding: converts text to token ids and back; it has the special tokens but not the
            timestamps.
        is_multilingual: whether the tokens of a window begin with a language and a task.
        languages: language codes in the order of their tokens.
    """

    encoding: Encoding
    is_multilingual: bool
    languages: tuple[str, ...]
    eot: int  # end of text
    sot: int  # start of transcript
    translate: int
    transcribe: int
    sot_prev: int  # start of the previous text
    no_speech: int
    no_timestamps: int

    @property
    def timestamp_begin(self) -> int:
        """Id of the timestamp token of 0.00 s; the ids of later times follow."""
        return self.no_timestamps + 1

    def language_id(self, language: str) -> int:
        """Return the token id of a language.

        Args:
            language: a code or an English name, in any case.

        Raises:
            ValueError: the model does not support the language.
        """
        return self.sot + 1 + self.languages.index(self.language_code(language))

    def language_code(self, language: str) -> str:
        """Return the code of a language given by code or name.

        Args:
            language: a code or an English name, in any case.

        Raises:
            ValueError: the model does not support the language.
        """
        normalized = language.strip().lower()
        code = next((code for code, name in LANGUAGES.items() if name == normalized), normalized)
        if code not in self.languages or (code != "en" and not self.is_multilingual):
            supported = ", ".join(self.languages) if self.is_multilingual else "en"
            raise ValueError(f"language must be one of {supported}; got {language!r}")
        return code

    def sot_sequence(self, language: str, task: str, *, timestamps: bool) -> tuple[int, ...]:
        """Return the token ids that the tokens of a window begin with.

        Args:
            language: a code or an English name.
            task: "transcribe" or "translate".
            timestamps: whether timestamp tokens are to be generated.

        Raises:
            ValueError: the model does not support the language or task.
        """
        if task not in ("transcribe", "translate"):
            raise ValueError(f"task must be 'transcribe' or 'translate', got {task!r}")
        ids = [self.sot]
        if self.is_multilingual:
            ids += [self.language_id(language), getattr(self, task)]
        elif task == "translate" or self.language_code(language) != "en":
            raise ValueError(
                f"this model is English-only: task must be 'transcribe' and language 'en', "
                f"got {task!r} and {language!r}"
            )
        return (*ids, *([] if timestamps else [self.no_timestamps]))

    def encode(self, text: str) -> tuple[int, ...]:
        """Encode text to token ids; the text of a special token is encoded as ordinary text."""
        return tuple(self.encoding.encode_ordinary(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text; special tokens and timestamps are skipped."""
        return self.encoding.decode([id for id in ids if id < self.eot])

    @functools.cached_property
    def non_speech_tokens(self) -> tuple[int, ...]:
        """Sorted ids of tokens that annotate sounds rather than transcribe words.

        They are suppressed when decoding, because training transcripts mark music, speakers and
        noises with symbols and brackets. Hyphens and apostrophes are included only at the start of
        a word. Of symbols that take several tokens, only musical notes are included, by their first
        token, which other symbols of their Unicode block share. The ids equal `non_speech_tokens`
        of openai-whisper.
        """
        notes = "♩♪♫♬♭♮♯"
        symbols = [
            *'"#()*+/:;<=>@[\\]^_`{|}~「」『』',
            "<<",
            ">>",
            "<<<",
            ">>>",
            "--",
            "---",
            "-(",
            "-[",
        ]
        symbols += ["('", '("', "((", "))", "(((", ")))", "[[", "]]", "{{", "}}", "♪♪", "♪♪♪"]
        suppressed = {self.encode(" -")[0], self.encode(" '")[0]}
        for symbol in [*symbols, *notes]:
            for ids in (self.encode(symbol), self.encode(" " + symbol)):
                if len(ids) == 1 or symbol in notes:
                    suppressed.add(ids[0])
        return tuple(sorted(suppressed))

    @functools.cached_property
    def suppress_tokens(self) -> tuple[int, ...]:
        """Sorted ids of all tokens to suppress: non-speech and special tokens, except languages."""
        special = range(self.eot + 1, self.no_timestamps)
        languages = range(self.sot + 1, self.sot + 1 + len(self.languages))
        return tuple(sorted({*self.non_speech_tokens, *(set(special) - set(languages))}))

    def split_words(self, ids: Sequence[int], language: str) -> list[tuple[str, list[int]]]:
        """Split token ids into words, each with its leading space; punctuation marks are separate.

        Args:
            ids: text tokens; an end-of-text token among them becomes a word of its own.
            language: a code; in languages written without spaces, each character is a word.

        Returns:
            The text and the ids of each word, in order.
        """
        characters = self._split_characters(ids)
        if language in _WITHOUT_SPACES:
            return characters
        words: list[tuple[str, list[int]]] = []
        for text, text_ids in characters:
            is_new = text_ids[0] >= self.eot or text.startswith(" ")
            if is_new or text.strip() in string.punctuation or not words:
                words.append((text, text_ids))
            else:
                words[-1] = (words[-1][0] + text, words[-1][1] + text_ids)
        return words

    def _split_characters(self, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Split token ids into the shortest parts that do not split a character.

        Return the text and the ids of each part. A byte that is not valid UTF-8 counts as a
        character of its own.
        """
        decoded, characters, pending, offset = self.encoding.decode(ids), [], [], 0
        for id in ids:
            pending.append(id)
            text = self.encoding.decode(pending)
            invalid = text.find("\ufffd")
            # U+FFFD that the whole decoded text has at this position too is invalid UTF-8, not the
            # beginning of a character.
            if invalid < 0 or decoded[offset + invalid : offset + invalid + 1] == "\ufffd":
                characters.append((text, pending))
                offset += len(text)
                pending = []
        return characters


def load(folder: Path, vocab_size: int) -> WhisperTokenizer:
    """Load the `tokenizer.json` of a model folder.

    Args:
        folder: the model folder.
        vocab_size: V, the size of the model's vocabulary, timestamp tokens included.

    Raises:
        FileNotFoundError: the folder has no tokenizer.json.
        ValueError: the file is damaged, or does not have Whisper's special tokens.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        spec = json.loads(path.read_text("utf-8"))
        special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        ranks = {
            bytes(byte_of[c] for c in token): id
            for token, id in spec["model"]["vocab"].items()
            if token and token not in special  # a released one has an empty token
        }
        merges = []
        for merge in spec["model"]["merges"]:
            first, second = (bytes(byte_of[c] for c in token) for token in _pair(merge))
            merges.append((first, second))
        # Only newer files list the timestamp tokens; their ids follow the last special token.
        special = {token: id for token, id in special.items() if token[2:3] not in "0123456789"}
        encoding = Encoding(
            path.parent.name, pattern=GPT2, ranks=ranks, special_tokens=special, merges=merges
        )
        sot, translate = special["<|startoftranscript|>"], special["<|translate|>"]
        names = {id: token for token, id in special.items()}
        tokenizer = WhisperTokenizer(
            encoding=encoding,
            is_multilingual=special["<|endoftext|>"] > 50256,
            languages=tuple(names[id].strip("<|>") for id in range(sot + 1, translate)),
            eot=special["<|endoftext|>"],
            sot=sot,
            translate=translate,
            transcribe=special["<|transcribe|>"],
            sot_prev=special["<|startofprev|>"],
            no_speech=next(special[name] for name in _NO_SPEECH if name in special),
            no_timestamps=special["<|notimestamps|>"],
        )
    except FileNotFoundError:
        raise
    except (KeyError, TypeError, StopIteration, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a Whisper vocabulary ({error!r})") from error
    if vocab_size - tokenizer.timestamp_begin != 1501:
        raise ValueError(
            f"{path}: the id of the last special token must be {vocab_size - 1502} for a "
            f"vocabulary of {vocab_size}, 1501 timestamps included; got {tokenizer.no_timestamps}"
        )
    return tokenizer


def _pair(merge: str | list[str]) -> list[str]:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if len(pair) != 2:
        raise ValueError(f"a merge must consist of two tokens, got {merge!r}")
    return pair
