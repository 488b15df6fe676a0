"""Convert text to token ids and back: byte-pair encoding, chat templates, incremental decoding.

Read in this order: `pretokenize` (splits text into pieces), `merge` (the algorithm), `train` (how
merges are learned), `vocab` and `encoding` (the complete tokenizer). Then `openai_encodings` and
`formats` (read published vocabularies), `save`, `stream` and `chat`; `fast_pretokenizer`,
`split_points`, `hash_table`, `fast_encoder` and `train_fast` (the same results for long texts, with
NumPy); `trainer` (from texts to an encoding, with `train_fast`); `sentencepiece`, with
`character_bpe` and `unigram` (the vocabularies of Llama 2, Gemma and T5); and `wordpiece` (the
tokenizer of BERT). `python -m bpe "some text"` prints the tokens of a text, and
`python -m bpe explain "some text"` the merges that produce them.

    import bpe

    tokenizer = bpe.load("model.gguf")
    ids = tokenizer.encoding.encode("hello world")
    text = tokenizer.encoding.decode(ids)
"""

from bpe.chat import ChatTemplate
from bpe.encoder_tokenizer import EncoderTokenizer, load_encoder_tokenizer
from bpe.encoding import Encoding
from bpe.formats import (
    Tokenizer,
    from_folder,
    from_gguf,
    from_tiktoken,
    from_tokenizer_json,
    from_tokenizer_model,
    load,
    load_wordpiece,
)
from bpe.openai_encodings import (
    encoding_for_model,
    encoding_name_for_model,
    get_encoding,
    list_encoding_names,
)
from bpe.stream import StopMatcher, StreamDecoder
from bpe.wordpiece import WordPiece

__all__ = [
    "ChatTemplate",
    "EncoderTokenizer",
    "Encoding",
    "StopMatcher",
    "StreamDecoder",
    "Tokenizer",
    "WordPiece",
    "encoding_for_model",
    "encoding_name_for_model",
    "from_folder",
    "from_gguf",
    "from_tiktoken",
    "from_tokenizer_json",
    "from_tokenizer_model",
    "get_encoding",
    "list_encoding_names",
    "load",
    "load_encoder_tokenizer",
    "load_wordpiece",
]
