"""What Whisper's token ids mean: text, languages, tasks, and points in time.

The text tokens are GPT-2's, or a vocabulary made the same way over many languages. Behind them
stand the special ones, in this order: the end; the start; one for each language; translate and
transcribe; "language model only"; the start of what was said before; no speech; no timestamps; and
1501 points in time, 20 ms apart, from 0 to 30 s. A window begins with the start, a language, a
task, and perhaps "no timestamps" (an English-only model: just the start).

The vocabulary is read from a `tokenizer.json`; the points in time follow from the last special id.
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

TIME_PRECISION = 0.02  # between two points in time

# Codes of the languages and their English names, as the API spells them.
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

# Languages written without spaces, in which a character is the nearest thing to a word.
_WITHOUT_SPACES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
_NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")  # two spellings of one token


@dataclass(frozen=True)
class WhisperTokenizer:
    """A vocabulary of Whisper.

    Attributes:
        encoding: text to ids and back; knows the special tokens, not the points in time.
        is_multilingual: whether windows begin with a language and a task.
        languages: codes in the order of their tokens.
    """

    encoding: Encoding
    is_multilingual: bool
    languages: tuple[str, ...]
    eot: int  # end of the text of a window
    sot: int  # start of a window
    translate: int
    transcribe: int
    sot_prev: int  # start of what was said before the window
    no_speech: int
    no_timestamps: int

    @property
    def timestamp_begin(self) -> int:
        """The point in time 0.00; the others follow."""
        return self.no_timestamps + 1

    def language_id(self, language: str) -> int:
        """The token of a language given by its code or its English name.

        Raises:
            ValueError: this vocabulary has no such language.
        """
        return self.sot + 1 + self.languages.index(self.language_code(language))

    def language_code(self, language: str) -> str:
        """The code of a language given by its code or its English name.

        Raises:
            ValueError: this vocabulary has no such language.
        """
        wanted = language.strip().lower()
        code = next((code for code, name in LANGUAGES.items() if name == wanted), wanted)
        if code not in self.languages or (code != "en" and not self.is_multilingual):
            known = ", ".join(self.languages) if self.is_multilingual else "en"
            raise ValueError(f"language {language!r} is not known to this model; it knows {known}")
        return code

    def sot_sequence(self, language: str, task: str, *, timestamps: bool) -> tuple[int, ...]:
        """The tokens that a window begins with.

        Raises:
            ValueError: a language or task this model does not know.
        """
        if task not in ("transcribe", "translate"):
            raise ValueError(f"task must be 'transcribe' or 'translate', got {task!r}")
        ids = [self.sot]
        if self.is_multilingual:
            ids += [self.language_id(language), getattr(self, task)]
        elif task == "translate" or self.language_code(language) != "en":
            raise ValueError("this model knows English only, and cannot translate")
        return (*ids, *([] if timestamps else [self.no_timestamps]))

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text, in which nothing counts as a special token."""
        return tuple(self.encoding.encode_ordinary(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens and points in time are left out."""
        return self.encoding.decode([id for id in ids if id < self.eot])

    @functools.cached_property
    def non_speech_tokens(self) -> tuple[int, ...]:
        """Tokens that never stand for something said, and are not to be written.

        Transcripts made by people mark music, speakers and noises with signs and brackets; a model
        that learned from them would too. Hyphens and apostrophes are forbidden only where a word
        would begin with one. Of a sign that takes several tokens, only notes of music are forbidden
        (by their first token, which other symbols of that block share), or common ones would be.
        """
        notes = "♩♪♫♬♭♮♯"
        signs = [
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
        signs += ["('", '("', "((", "))", "(((", ")))", "[[", "]]", "{{", "}}", "♪♪", "♪♪♪"]
        found = {self.encode(" -")[0], self.encode(" '")[0]}
        for sign in [*signs, *notes]:
            for ids in (self.encode(sign), self.encode(" " + sign)):
                if len(ids) == 1 or sign in notes:
                    found.add(ids[0])
        return tuple(sorted(found))

    @functools.cached_property
    def suppress_tokens(self) -> tuple[int, ...]:
        """All tokens that are never to be written inside a window."""
        frame = range(self.eot + 1, self.no_timestamps)
        languages = range(self.sot + 1, self.sot + 1 + len(self.languages))
        return tuple(sorted({*self.non_speech_tokens, *(set(frame) - set(languages))}))

    def split_words(self, ids: Sequence[int], language: str) -> list[tuple[str, list[int]]]:
        """Cuts text ids into words, each with the space before it, punctuation apart."""
        characters = self._split_characters(ids)
        if language in _WITHOUT_SPACES:
            return characters
        words: list[tuple[str, list[int]]] = []
        for text, part in characters:
            is_new = part[0] >= self.eot or text.startswith(" ")
            if is_new or text.strip() in string.punctuation or not words:
                words.append((text, part))
            else:
                words[-1] = (words[-1][0] + text, words[-1][1] + part)
        return words

    def _split_characters(self, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Cuts ids wherever no character is split; bytes that are no text stay with their token."""
        whole, parts, pending, offset = self.encoding.decode(ids), [], [], 0
        for id in ids:
            pending.append(id)
            text = self.encoding.decode(pending)
            hole = text.find("\ufffd")
            # A hole that the whole text shows too will not be filled by more tokens.
            if hole < 0 or whole[offset + hole : offset + hole + 1] == "\ufffd":
                parts.append((text, pending))
                offset += len(text)
                pending = []
        return parts


def load(folder: Path, vocab_size: int) -> WhisperTokenizer:
    """Reads the `tokenizer.json` of a model folder.

    Args:
        vocab_size: the number of logits the model makes, points in time included.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or no vocabulary of Whisper.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        spec = json.loads(path.read_text("utf-8"))
        special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        ranks = {
            bytes(byte_of[c] for c in token): id
            for token, id in spec["model"]["vocab"].items()
            if token and token not in special  # one vocabulary has an empty token, never made
        }
        merges = [
            tuple(bytes(byte_of[c] for c in part) for part in _pair(merge))
            for merge in spec["model"]["merges"]
        ]
        # Points in time stand in newer files; they are counted from the last special one here.
        special = {token: id for token, id in special.items() if token[2:3] not in "0123456789"}
        encoding = Encoding(
            path.parent.name, pattern=GPT2, ranks=ranks, special_tokens=special, merges=merges
        )
        sot, translate = special["<|startoftranscript|>"], special["<|translate|>"]
        names = {id: token for token, id in special.items()}
        tokens = WhisperTokenizer(
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
        raise ValueError(f"{path}: no vocabulary of Whisper ({error!r})") from error
    if vocab_size - tokens.timestamp_begin != 1501:
        raise ValueError(
            f"{path}: its last special token is {tokens.no_timestamps}, which leaves "
            f"{vocab_size - tokens.timestamp_begin} of {vocab_size} for points in time, not 1501"
        )
    return tokens


def _pair(merge: str | list[str]) -> list[str]:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if len(pair) != 2:
        raise ValueError(f"merge {merge!r} does not join two tokens")
    return pair
