"""The tokenizers of encoder models: any vocabulary, and the special tokens around each text.

tokenizer = bpe.load_encoder_tokenizer(folder)
ids = tokenizer.encode("hello world")  # with the special tokens of the model: [CLS] ... [SEP]
ids, types = tokenizer.encode_pair("question", "document")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bpe import formats
from bpe.formats.checks import read_json
from bpe.formats.gguf import read_gguf_metadata
from bpe.formats.post_processor import read_post_processor
from bpe.post_processor import PostProcessor, Slot, bert_processor
from bpe.special_tokens import special_token_regex
from bpe.wordpiece import WordPiece


class EncoderTokenizer:
    """The tokenizer of an encoder model: converts texts to ids with special tokens around them.

    Attributes:
        post_processor: the special tokens around a text, and around a pair of texts.
        special_tokens: text to id of the special tokens, which are matched in texts.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        post_processor: PostProcessor,
        *,
        num_ids: int,
        special_tokens: Mapping[str, int],
        lowercase: bool = False,
        has_types: bool = True,
        tokenizer: formats.Tokenizer | None = None,
    ):
        """Create a tokenizer.

        Args:
            encode: converts a text to ids without special tokens around it.
            post_processor: the special tokens around a text, and around a pair of texts.
            num_ids: one more than the highest id.
            special_tokens: text to id of the special tokens.
            lowercase: whether to convert texts to lower case first, except special tokens.
            has_types: whether `encode_pair` returns the token type ids of the post-processor; if
                not, all are 0, as for a model without token types.
            tokenizer: the tokenizer that `encode` belongs to; None for WordPiece.
        """
        self._encode, self._num_ids, self._lowercase = encode, num_ids, lowercase
        self._has_types, self._tokenizer = has_types, tokenizer
        self.post_processor, self.special_tokens = post_processor, dict(special_tokens)

    def __len__(self) -> int:
        """Return one more than the highest id."""
        return self._num_ids

    def for_embedding_table(self, num_rows: int) -> EncoderTokenizer:
        """Return the tokenizer without the special tokens that have no row in an embedding table.

        Args:
            num_rows: the number of rows.

        Raises:
            ValueError: if another token has no row, or one that is added to each text.
        """
        tokenizer = self._tokenizer
        added = {id for slot in self.post_processor.pair for id in slot.ids}
        if tokenizer is None or max(added, default=0) >= num_rows:
            raise ValueError(
                f"the tokenizer has ids up to {len(self) - 1}, but the model's embedding table has "
                f"{num_rows} rows: use the tokenizer of this model"
            )
        return _from_tokenizer(
            tokenizer.for_embedding_table(num_rows),
            self.post_processor,
            self._lowercase,
            self._has_types,
        )

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Return the ids of the special tokens before a text."""
        return self.post_processor.prefix

    @property
    def suffix_ids(self) -> tuple[int, ...]:
        """Return the ids of the special tokens after a text."""
        return self.post_processor.suffix

    def encode(
        self, text: str, *, max_length: int | None = None, add_special_tokens: bool = True
    ) -> list[int]:
        """Encode one text.

        Args:
            text: the text.
            max_length: the maximum number of ids, special tokens included; the end of a longer text
                is cut off.
            add_special_tokens: whether to add special tokens around the text.

        Raises:
            ValueError: if `max_length` is too small for the special tokens.
        """
        ids = self._encode(self._lower(text) if self._lowercase else text)
        if not add_special_tokens:
            return ids[:max_length]
        return self.post_processor.process(ids, max_length)

    def encode_pair(
        self, first: str, second: str, *, max_length: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Encode a pair of texts; return the ids, and the token type id (0 or 1) of each token.

        Args:
            first: the first text.
            second: the second text.
            max_length: as in `PostProcessor.process_pair`.

        Raises:
            ValueError: if `max_length` is too small for the special tokens.
        """
        parts = [self.encode(text, add_special_tokens=False) for text in (first, second)]
        return self.process_pair(parts[0], parts[1], max_length)

    def process_pair(
        self, first: Sequence[int], second: Sequence[int], max_length: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Return the ids and token type ids of a pair of encoded texts with special tokens."""
        ids, types = self.post_processor.process_pair(first, second, max_length)
        return ids, types if self._has_types else [0] * len(ids)

    def encode_batch(
        self, texts: Iterable[str], *, max_length: int | None = None
    ) -> list[list[int]]:
        """Encode each text as `encode` does, without padding."""
        return [self.encode(text, max_length=max_length) for text in texts]

    def _lower(self, text: str) -> str:
        """Return a text in lower case, except special tokens; convert each character separately.

        `tokenizers` does the same; `str.lower` converts some letters by their neighbors.
        """
        if not self.special_tokens:
            return "".join(map(str.lower, text))
        # The group in the pattern makes `split` return the special tokens at odd indices.
        parts = special_token_regex(frozenset(self.special_tokens)).split(text)
        return "".join(
            part if i % 2 else "".join(map(str.lower, part)) for i, part in enumerate(parts)
        )


def load_encoder_tokenizer(
    path: str | Path, *, lowercase: bool = False, num_rows: int | None = None
) -> EncoderTokenizer:
    """Read the tokenizer of an encoder model.

    Args:
        path: a Hugging Face folder (`tokenizer.json`, or the `vocab.txt` of a BERT), or a GGUF
            file.
        lowercase: whether to convert texts to lower case first.
        num_rows: the number of rows of the model's embedding table; None for any. A special token
            without a row is dropped, as in `Tokenizer.for_embedding_table`, so that a text that
            contains it is encoded as ordinary text.

    Raises:
        FileNotFoundError: if the path does not exist, or the folder has no tokenizer.
        ValueError: if a file is damaged or has an unsupported setting, or a token without a row is
            not special or is added to each text.
    """
    path = Path(path)
    tokenizer = _load(path, lowercase)
    if num_rows is None or len(tokenizer) <= num_rows:
        return tokenizer
    try:
        return tokenizer.for_embedding_table(num_rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _load(path: Path, lowercase: bool) -> EncoderTokenizer:
    if not path.is_dir():
        return _from_gguf(path, lowercase)
    file, has_types = path / "tokenizer.json", _has_types(path / "tokenizer_config.json")
    if not file.exists() and (path / "vocab.txt").exists():
        return _from_wordpiece(formats.load_wordpiece(path), lowercase, has_types)
    if not file.exists():
        tokenizer = formats.load(path)
        return _from_tokenizer(tokenizer, _bos_and_eos(tokenizer), lowercase)
    spec = read_json(file)
    if isinstance(spec.get("model"), dict) and spec["model"].get("type") == "WordPiece":
        return _from_wordpiece(formats.load_wordpiece(path), lowercase, has_types)
    tokenizer = formats.load(path)
    where, special = f"{file}: post_processor", tokenizer.encoding.special_tokens
    processor = read_post_processor(spec.get("post_processor"), where, special)
    return _from_tokenizer(tokenizer, processor, lowercase, has_types)


def _has_types(path: Path) -> bool:
    """Return whether transformers passes `token_type_ids` to the model of a tokenizer_config.json.

    The key `model_input_names` decides. Without it, the tokenizer classes of specific models return
    `token_type_ids`, and the generic class (PreTrainedTokenizerFast) does not.
    """
    config = read_json(path) if path.exists() else {}
    names = config.get("model_input_names")
    if isinstance(names, list):
        return "token_type_ids" in names
    return config.get("tokenizer_class") not in ("PreTrainedTokenizerFast", "TokenizersBackend")


def _from_wordpiece(
    tokenizer: WordPiece, lowercase: bool, has_types: bool = True
) -> EncoderTokenizer:
    return EncoderTokenizer(
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        bert_processor(tokenizer.cls_id, tokenizer.sep_id),
        num_ids=len(tokenizer),
        special_tokens=tokenizer.special_tokens,
        lowercase=lowercase and not tokenizer.lowercase,
        has_types=has_types,
    )


def _from_tokenizer(
    tokenizer: formats.Tokenizer,
    processor: PostProcessor,
    lowercase: bool,
    has_types: bool = True,
) -> EncoderTokenizer:
    encoding = tokenizer.encoding
    return EncoderTokenizer(
        lambda text: encoding.encode(text, allowed_special="all"),
        processor,
        num_ids=encoding.n_vocab,
        special_tokens=encoding.special_tokens,
        lowercase=lowercase,
        has_types=has_types,
        tokenizer=tokenizer,
    )


def _from_gguf(path: Path, lowercase: bool) -> EncoderTokenizer:
    metadata = read_gguf_metadata(path)
    if metadata.get("tokenizer.ggml.model") == "bert":
        return _from_wordpiece(wordpiece_from_gguf(metadata, str(path)), lowercase)
    tokenizer = formats.load(path)
    # llama.cpp adds bos and eos to the texts of an encoder, and sep before the second of a pair.
    # Files without a key for sep are older than the key: they are of RoBERTa or XLM-R.
    defaults = {
        "bos": tokenizer.add_bos,
        "eos": True,
        "sep": metadata.get("general.architecture") == "bert",
    }
    sep = metadata.get("tokenizer.ggml.seperator_token_id", tokenizer.eos_id)  # its spelling
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "sep": sep}
    for name, default in defaults.items():
        if not metadata.get(f"tokenizer.ggml.add_{name}_token", default):
            ids[name] = None
    return _from_tokenizer(tokenizer, _around(**ids), lowercase)


def _bos_and_eos(tokenizer: Any) -> PostProcessor:
    return _around(
        tokenizer.bos_id if tokenizer.add_bos else None,
        tokenizer.eos_id if getattr(tokenizer, "add_eos", False) else None,
    )


def _around(bos: int | None, eos: int | None, sep: int | None = None) -> PostProcessor:
    """Return a post-processor for special tokens that are None or an id.

    It adds `bos` before the first text, `eos` after each, and `sep` before the second text.
    """
    before, after, between = (() if id is None else (Slot((id,)),) for id in (bos, eos, sep))
    a, b = Slot((), "A"), Slot((), "B")
    return PostProcessor((*before, a, *after), (*before, a, *after, *between, b, *after))


def wordpiece_from_gguf(metadata: Mapping[str, Any], where: str) -> WordPiece:
    """Return the WordPiece vocabulary of a GGUF file.

    In the file, tokens at the beginning of a word begin with U+2581. They become tokens without it,
    and the others become tokens with "##", as in a `vocab.txt`.

    Args:
        metadata: the metadata of the file.
        where: the file, for error messages.

    Raises:
        ValueError: if a key is missing or has an invalid value.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(types, list) or len(tokens) != len(types):
        raise ValueError(
            f"{where}: tokenizer.ggml.tokens and tokenizer.ggml.token_type must be lists of the "
            "same length"
        )
    vocab: dict[str, int] = {}
    special: list[str] = []
    for id, (raw, kind) in enumerate(zip(tokens, types, strict=True)):
        token = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
        if kind == 1:  # normal
            token = token[1:] if token.startswith("\u2581") else "##" + token
        else:
            token = token.removeprefix("\u2581")
            special.append(token)
        if vocab.setdefault(token, id) != id:
            raise ValueError(f"{where}: the token {token!r} has the ids {vocab[token]} and {id}")
    names = {id: token for token, id in vocab.items()}
    settings = {}
    for argument, keys, default in (
        ("cls_token", ("cls_token_id", "bos_token_id"), "[CLS]"),
        ("sep_token", ("seperator_token_id", "eos_token_id"), "[SEP]"),  # llama.cpp's spelling
        ("unk_token", ("unknown_token_id",), "[UNK]"),
        ("pad_token", ("padding_token_id",), "[PAD]"),
    ):
        ids = [metadata.get(f"tokenizer.ggml.{key}") for key in keys]
        id = next((id for id in ids if id is not None), None)
        settings[argument] = default if id is None else names.get(id, default)
    try:
        lowercase = metadata.get("tokenizer.ggml.normalizer.lowercase")
        if lowercase is None:  # an older file: lower case changes no token of an uncased model
            lowercase = all(token == token.lower() for token in vocab if token not in special)
        return WordPiece(
            vocab,
            special_tokens=special,
            lowercase=bool(lowercase),
            strip_accents=metadata.get("tokenizer.ggml.normalizer.strip_accents"),
            **settings,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
