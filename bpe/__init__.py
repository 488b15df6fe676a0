"""Text to token ids and back: byte-pair encoding, chat templates, and text that arrives in pieces.

Read in this order: `pretokenize` (cutting text into pieces), `merge` (the algorithm), `train`
(where merges come from), `vocab` and `encoding` (all of it together). Then `vocabularies` and
`formats` (those in use), `save`, `stream` and `chat`; `boundaries`, `seams`, `tables`, `bulk` and
`train_fast` (the same for much text, with NumPy), `trainer`; `wordpiece` (the other way to cut a
word). `python -m bpe "some text"` shows tokens, `explain` how they came about.

    import bpe

    tokenizer = bpe.load("model.gguf")
    ids = tokenizer.encoding.encode("hello world")
    text = tokenizer.encoding.decode(ids)
"""

from bpe.chat import ChatTemplate
from bpe.encoding import Encoding
from bpe.formats import (
    Tokenizer,
    from_folder,
    from_gguf,
    from_tiktoken,
    from_tokenizer_json,
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
    "get_encoding",
    "list_encoding_names",
    "load",
    "load_wordpiece",
]
