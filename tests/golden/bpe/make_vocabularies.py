"""Create the golden file of OpenAI's encodings with tiktoken, offline.

    python make_vocabularies.py

It needs tiktoken and tokenizers (`pip install -e '.[parity]'`). tiktoken downloads its vocabularies
unless they are in its cache. This script fills the cache with files created from our vocabularies,
and tiktoken compares their SHA-256 with the expected one.

`vocabularies.json` holds `texts` (of make_bpe.py), and for each encoding `digests`: for each text,
the number of ids and the first 8 hexadecimal digits of the SHA-256 of the ids as JSON.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent.parent))

import tiktoken  # noqa: E402

from bpe import openai_encodings  # noqa: E402
from tests.bpe.tiktoken_cache import fill  # noqa: E402
from tests.golden.bpe.make_bpe import TEXTS, random_texts  # noqa: E402


def digest(ids: list[int]) -> str:
    return f"{len(ids)} {hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:8]}"


def main() -> None:
    texts = TEXTS + random_texts(60)
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder))
        encodings = {name: tiktoken.get_encoding(name) for name in openai_encodings.ENCODING_SPECS}
    content = {
        "made with": {"tiktoken": tiktoken.__version__},
        "texts": texts,
        "digests": {
            name: [digest(encoding.encode(text, disallowed_special=())) for text in texts]
            for name, encoding in encodings.items()
        },
        "special_tokens": {name: dict(e._special_tokens) for name, e in encodings.items()},
    }
    # The thousand reserved tokens of Harmony follow a rule; the tests check their number.
    content["special_tokens"]["o200k_harmony"] = {
        token: id
        for token, id in content["special_tokens"]["o200k_harmony"].items()
        if not token.startswith("<|reserved_")
    }
    text = json.dumps(content, ensure_ascii=True, indent=1)
    (HERE / "vocabularies.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
