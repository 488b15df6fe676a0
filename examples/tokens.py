"""Print the tokens of a text: `python examples/tokens.py "hamburger"`."""

import sys

import bpe

encoding = bpe.get_encoding("o200k_base")
ids = encoding.encode(sys.argv[1])
for id in ids:
    print(id, encoding.decode_single_token_bytes(id))
assert encoding.decode(ids) == sys.argv[1]
