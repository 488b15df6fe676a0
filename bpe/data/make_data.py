"""Create the vocabularies of this folder from the npm package js-tiktoken (MIT license).

    npm pack js-tiktoken@1.0.21 && tar xzf js-tiktoken-1.0.21.tgz
    python bpe/data/make_data.py package

The package stores ranks as lines of "! rank token token ...": tokens in base64, with consecutive
ranks from `rank` on. `bpe/openai_encodings.py` describes the output format.
"""

import base64
import json
import lzma
import sys
from pathlib import Path

DATA_DIR = Path(__file__).parent


def main(package: Path) -> None:
    """Write the vocabularies of an unpacked npm package js-tiktoken to this folder, compressed."""
    for name in ("p50k_base", "cl100k_base", "o200k_base"):
        source = (package / "dist" / "ranks" / f"{name}.js").read_text()
        content = json.loads(source.removeprefix("export default ").rstrip().rstrip(";"))
        tokens = [
            base64.b64decode(token)
            for line in content["bpe_ranks"].splitlines()
            for token in line.split(" ")[2:]
        ]
        packed = bytes(map(len, tokens)) + b"".join(tokens)
        compressed = lzma.compress(packed, preset=9 | lzma.PRESET_EXTREME)
        (DATA_DIR / f"{name}.xz").write_bytes(compressed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
