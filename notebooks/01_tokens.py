# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Tokens: from bytes to merges to ids
#
# A language model reads and writes numbers. Here is where they come from: text becomes bytes,
# bytes that often stand together become tokens, tokens have ids. We train a vocabulary on this
# repository, watch it cut words, and compare it with those of OpenAI's models.
#
# *Needs:* a little Python. Nothing is fetched.
# *Takes:* a quarter of a minute to run, half an hour to read.
# *Explains:* `bpe/train.py`, `bpe/pretokenize.py`, `bpe/merge.py`, `bpe/encoding.py`.

# %%
import html
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import checks
import matplotlib.pyplot as plt
from IPython.display import display

import bpe
from bpe.explain import measure, merge_diagram
from bpe.pretokenize import CL100K, GPT2, O200K, compile_pattern, split
from bpe.train import build_vocab, count_pieces, merge_pair
from bpe.train_fast import learn_merges
from bpe.trainer import train

# %% [markdown]
# ## 1. Text is bytes
#
# Unicode gives every character a number, and UTF-8 writes that number as one to four bytes. There
# are only 256 bytes. So bytes could be the alphabet of a model: it could read and write any text in
# any script, and no character would ever be unknown to it.

# %%
for character in "aé世🙂":
    data = character.encode()
    print(f"{character}  U+{ord(character):04X}  {len(data)} bytes: {data.hex(' ').upper()}")

# %% [markdown]
# But a model takes one step for each symbol it reads or writes. Five bytes for "hello" are five
# steps. If the five had a symbol of their own, it would be one.
#
# ## 2. Joining what often stands together
#
# *Byte-pair encoding* finds such symbols: count all pairs of neighbours, give the most frequent
# pair a new symbol, put it in everywhere, and begin again. With capital letters as new symbols:

# %%
word = list("aaabdaaabac")
print("".join(word))
for new in "ZYX":
    pairs = Counter(pairwise(word))
    best = max(pairs, key=lambda pair: pairs[pair])
    word = merge_pair(word, best, new)
    print(f"{''.join(word):<12} {new} = {' + '.join(best)}, which occurred {pairs[best]} times")

# %% [markdown]
# Eleven symbols became five, and nothing is lost: read backwards, the three rules give the text
# again. The list of rules, in order, is all that training produces. `learn` in `bpe/train.py` is
# this loop over bytes; the `learn` we use here is the fast one, which gives the same.
#
# Our text is what this repository says about itself, and the source of its tokenizer.

# %%
ROOT = Path("..")
corpus = "\n\n".join(
    path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted(ROOT.glob("bpe/*.py"))]
)
print(f"{len(corpus):,} characters, {len(corpus.encode()):,} bytes")


def learned(counts: dict[bytes, int], merges: int) -> list[bytes]:
    """The tokens that merges make, without the 256 bytes, in order."""
    return list(build_vocab(learn_merges(counts, merges)))[256:]


def summarize(tokens: list[bytes]) -> None:
    longest = sorted(tokens, key=lambda token: len(token.strip()))[-4:]
    for what, some in {"first:": tokens[:14], "longest:": longest}.items():
        print(f"{what:<8}", *[repr(token.decode("utf-8", "replace")) for token in some])


whole = learned({corpus.encode(): 1}, 1000)
summarize(whole)

# %% [markdown]
# ## 3. Pieces: where nothing may be joined
#
# Left alone, the algorithm joins across words: ", a" or a whole line that was copied often. Each
# such token fits one place and no other. So the text is cut first, by a regular expression, and no
# token crosses a cut. Here is how GPT-2, GPT-4 and GPT-4o cut the same line:

# %%
line = "  if camelCase's > 1234567: # don't\n\n"
for name, pattern in {"GPT-2": GPT2, "GPT-4": CL100K, "GPT-4o": O200K}.items():
    print(f"{name:<7}", "|".join(split([compile_pattern(pattern)], line)).replace("\n", "\\n"))

# %% [markdown]
# The space goes with the word behind it, so that " dog" is one token in the middle of a text.
# Numbers: GPT-2 took them whole, GPT-4 three digits at a time, from the left. (Can you see why that
# makes adding numbers hard?) GPT-4o ends a piece where a capital follows a small letter.
#
# A text repeats its pieces, so it is enough to count each different one once:

# %%
counts = count_pieces([corpus], GPT2)
print(f"{sum(counts.values()):,} pieces, {len(counts):,} of them different")
print(*[f"{piece.decode()!r} {count}" for piece, count in Counter(counts).most_common(8)])
in_pieces = learned(counts, 1000)
summarize(in_pieces)

# %% [markdown]
# ## 4. A vocabulary
#
# `train` does all of this: it counts pieces, learns merges, and makes an `Encoding`, which turns
# text into ids and ids into text. The first 256 ids are the bytes, then comes one for each merge.

# %%
encoding = train([corpus], vocab_size=4096, pattern=GPT2, special_tokens=["<|endoftext|>"])
print(encoding.n_vocab, "tokens;", "the last:", encoding.decode([encoding.n_vocab - 2]))


class Tokens:
    """Tokens as coloured boxes with their ids; as plain text where there are no colours."""

    def __init__(self, encoding: bpe.Encoding, text: str):
        self.ids = encoding.encode(text, allowed_special="all")
        self.pieces = [t.decode("utf-8", "replace") for t in encoding.decode_tokens_bytes(self.ids)]

    def __repr__(self) -> str:
        return "|".join(self.pieces) + "\n" + " ".join(map(str, self.ids))

    def _repr_html_(self) -> str:
        colours = ("#cfe3ff", "#ffe3c2", "#d3f2d3", "#f6d5ee", "#fff3b0")
        boxes = []
        for n, (piece, id) in enumerate(zip(self.pieces, self.ids, strict=True)):
            text = html.escape(piece).replace(" ", "&middot;").replace("\n", "&crarr;<br>")
            boxes.append(
                f'<span style="background:{colours[n % 5]};color:#111;padding:1px 2px">'
                f'{text}<sub style="color:#555">{id}</sub></span>'
            )
        return f'<div style="line-height:2">{" ".join(boxes)}</div>'


sentence = "The tokenizer cuts hamburgers and encodings into tokens. 🍔"
display(Tokens(encoding, sentence))

# %% [markdown]
# It has read much about encodings and nothing about hamburgers, and it shows. A vocabulary is
# frugal with text like that which it was trained on.
#
# How many merges should one learn? Here is a text that was not trained on, cut with the first few
# merges, then more and more of them. Every token has a row of numbers in the model's first and last
# layer, so doubling the vocabulary has its price; and the gain gets smaller.

# %%
unseen = "\n".join(
    path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("transformer/*.py"))[:8]
)
sizes = [256 << i for i in range(5)]
reach = []
for size in sizes:
    ranks = {token: id for token, id in encoding.ranks.items() if id < size}
    first = bpe.Encoding(f"first {size}", pattern=GPT2, ranks=ranks, special_tokens={})
    found = measure(first, unseen)
    reach.append(found.per_token(found.characters))

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.plot(sizes, reach, "o-", color="#3b6ea5")
axis.set_xscale("log", base=2)
axis.set_xticks(sizes, map(str, sizes))
axis.set_ylim(0)
axis.set_xlabel("tokens in the vocabulary")
axis.set_ylabel("characters a token")
axis.set_title("A text that was not trained on")
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## 5. Encoding repeats the merges
#
# To encode a piece is to do to it what training did: of all pairs that may be joined, join the one
# that was learned first. The number of a merge is its *rank*; lines show what has grown together.

# %%
print(merge_diagram(encoding, " tokenizers"))
print()
print(merge_diagram(encoding, " naïve"))

# %% [markdown]
# ## 6. And back
#
# Decoding is a look into a table, id to bytes, and then bytes to text. Whatever was encoded comes
# back, also what nobody trained on, since each byte by itself is a token:

# %%
rng = random.Random(0)
strange = ["".join(chr(rng.randrange(0xD800)) for _ in range(20)) for _ in range(1000)]
print("came back:", sum(encoding.decode(encoding.encode(text)) == text for text in strange))

# %% [markdown]
# The reverse does not hold: not every list of ids is text. A token may be half a character, and a
# model that stops there leaves bytes that mean nothing; decoding shows them as "\ufffd".

# %%
ids = encoding.encode("🙂")
print(ids, [token.hex(" ").upper() for token in encoding.decode_tokens_bytes(ids)])
print("all but the last:", encoding.decode(ids[:-1]))

# %% [markdown]
# *Special tokens* mark what is no text: the end of a document, the turn of a speaker. No bytes lead
# to them. A user who types one must not thereby end the document, so encoding refuses, unless we
# say what we mean:

# %%
typed = "low<|endoftext|>"
try:
    encoding.encode(typed)
except ValueError as error:
    print(str(error).splitlines()[0])
print("as text: ", encoding.encode(typed, disallowed_special=()))
print("as token:", encoding.encode(typed, allowed_special="all"))

# %% [markdown]
# ## 7. Vocabularies in use
#
# Those of OpenAI's models come with `bpe`: `gpt2` has 50,257 tokens, `cl100k_base` (GPT-4)
# 100,277, `o200k_base` (GPT-4o) 200,019. One sentence, the first of the Universal Declaration of
# Human Rights, in five languages:

# %%
SENTENCES = {
    "English": "All human beings are born free and equal in dignity and rights.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "Chinese": "人人生而自由，在尊严和权利上一律平等。",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
}
NAMES = ("gpt2", "cl100k_base", "o200k_base")
encodings = {name: bpe.get_encoding(name) for name in NAMES}
tokens = {
    name: [len(encodings[name].encode(text)) for text in SENTENCES.values()] for name in NAMES
}

figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
for n, (name, colour) in enumerate(zip(NAMES, ("#c9c9c9", "#8fb3d9", "#3b6ea5"), strict=True)):
    bars = axis.bar([i + 0.28 * (n - 1) for i in range(5)], tokens[name], 0.26, color=colour)
    axis.bar_label(bars, fontsize=8)
    bars.set_label(name)
axis.set_xticks(range(5), SENTENCES)
axis.set_ylabel("tokens")
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
plt.show()

display(Tokens(encodings["o200k_base"], SENTENCES["English"]))
display(Tokens(encodings["gpt2"], SENTENCES["Hindi"][:12]))

# %% [markdown]
# Who pays by the token, or has room for so many of them, pays more in some languages than in
# others; each vocabulary has narrowed that gap by reading more of them. In GPT-2's, Hindi is hardly
# more than bytes: most of the boxes hold no character at all.
#
# OpenAI's rule of thumb says that a token is about 4 characters, or three quarters of a word, of
# English. Let us measure (`python -m bpe count -f FILE` does the same):

# %%
print(f"{'':<20} {'characters':>10} {'words':>7}   a token, o200k_base")
for name, text in {
    "README.md": (ROOT / "README.md").read_text(encoding="utf-8"),
    "bpe/encoding.py": (ROOT / "bpe/encoding.py").read_text(encoding="utf-8"),
    **{f"{name}, as above": text for name, text in SENTENCES.items()},
}.items():
    found = measure(encodings["o200k_base"], text)
    characters, words = found.per_token(found.characters), found.per_token(found.words)
    print(f"{name:<20} {characters:>10.2f} {words:>7.2f}")

# %% [markdown]
# ## 8. What we have seen, as assertions

# %%
assert "".join(word) == "XdXac", "four a's twice, and so on"
assert not any(b" " in token.strip() for token in in_pieces), "no token spans two words"
assert any(b" " in token.strip() for token in whole), "without pieces, some do"
assert reach == sorted(reach) and reach[0] < 1.1, "each merge more, and tokens reach further"
assert all(encoding.decode(encoding.encode(text)) == text for text in strange)
assert encoding.encode(typed, allowed_special="all")[-1] == encoding.eot_token
assert [encodings[name].n_vocab for name in NAMES] == [50257, 100277, 200019]
assert tokens["gpt2"][4] > 4 * tokens["o200k_base"][4], "Hindi has become much shorter"
assert encodings["cl100k_base"].encode("hello world") == [15339, 1917]
print("all true")

# %% [markdown]
# ## Exercises
#
# Fill in a function, run its cell, and the check says whether it is right.
#
# **1.** The heart of training: given pieces, as tuples of tokens, and how often each occurs: how
# often does each pair of neighbours?


# %% tags=["stub"]
def count_pairs(pieces: dict[tuple[bytes, ...], int]) -> dict[tuple[bytes, bytes], int]:
    """How often each pair of neighbours occurs in all pieces together."""
    ...


checks.report(checks.count_pairs, count_pairs)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def count_pairs(pieces: dict[tuple[bytes, ...], int]) -> dict[tuple[bytes, bytes], int]:
#     counts = {}
#     for piece, times in pieces.items():
#         for pair in zip(piece, piece[1:]):
#             counts[pair] = counts.get(pair, 0) + times
#     return counts
# ```
# </details>
#
# **2.** The heart of encoding: the tokens of one piece. `ranks` says which bytes are tokens, and
# which was learned first. The check compares with the library on a thousand strings.


# %% tags=["stub"]
def merge_piece(piece: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Joins, again and again, the neighbours that make the token of lowest rank."""
    ...


checks.report(checks.merge_piece, merge_piece)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def merge_piece(piece: bytes, ranks: dict[bytes, int]) -> list[bytes]:
#     parts = [piece[i : i + 1] for i in range(len(piece))]
#     while True:
#         joined = [left + right for left, right in zip(parts, parts[1:])]
#         allowed = [token for token in joined if token in ranks]
#         if not allowed:
#             return parts
#         i = joined.index(min(allowed, key=ranks.get))  # the leftmost of the lowest
#         parts[i : i + 2] = [joined[i]]
# ```
# </details>
#
# **3.** Which tokens of a text are no text by themselves? Given the bytes of each, return the
# positions of those that a screen could not show.


# %% tags=["stub"]
def broken_tokens(tokens: list[bytes]) -> list[int]:
    """Positions of the tokens that are not valid UTF-8 on their own."""
    ...


checks.report(checks.broken_tokens, broken_tokens)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def broken_tokens(tokens: list[bytes]) -> list[int]:
#     broken = []
#     for i, token in enumerate(tokens):
#         try:
#             token.decode()
#         except UnicodeDecodeError:
#             broken.append(i)
#     return broken
# ```
# </details>
#
# Read next: `bpe/pretokenize.py`, `bpe/merge.py`, `bpe/train.py` and `bpe/encoding.py`, in that
# order; `bpe/wordpiece.py` for the other way to cut a word, which embedding models use.
