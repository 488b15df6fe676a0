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
# A language model reads and writes numbers. This notebook shows how text becomes numbers: text is
# encoded as bytes, bytes that often occur together form tokens, and tokens have ids. We train a
# vocabulary on this repository, look at the tokens of words, and compare it with the vocabularies
# of OpenAI's models.
#
# *Needs:* a little Python. Nothing is downloaded.
# *Takes:* 15 seconds to run, half an hour to read.
# *Explains:* `bpe/train.py`, `bpe/pretokenize.py`, `bpe/merge.py`, `bpe/encoding.py`,
# `bpe/unigram.py`.

# %%
import html
import math
import random
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import checks
import matplotlib.pyplot as plt
from IPython.display import display

import bpe
from bpe.explain import lattice_diagram, measure, merge_diagram
from bpe.normalizers import SentencePieceNormalizer
from bpe.pretokenize import CL100K, GPT2, O200K, compile_pattern, split
from bpe.sentencepiece import SentencePiece
from bpe.train import build_vocab, count_pieces, merge_pair
from bpe.train_fast import learn_merges
from bpe.trainer import train
from bpe.unigram import Unigram

# %% [markdown]
# ## 1. Text is bytes
#
# Unicode assigns a number to every character, and UTF-8 encodes this number as one to four bytes.
# There are only 256 different bytes. With bytes as symbols, a model can read and write any text in
# any script, and no character is unknown.

# %%
for character in "aé世🙂":
    data = character.encode()
    print(f"{character}  U+{ord(character):04X}  {len(data)} bytes: {data.hex(' ').upper()}")

# %% [markdown]
# But a model needs one step for each symbol. The five bytes of "hello" take five steps; as a single
# symbol, "hello" would take one.
#
# ## 2. Merge frequent pairs
#
# *Byte-pair encoding* finds such symbols: count all pairs of adjacent symbols, replace the most
# frequent pair by a new symbol everywhere, and repeat. With capital letters as new symbols:

# %%
word = list("aaabdaaabac")
print("".join(word))
for new in "ZYX":
    pairs = Counter(pairwise(word))
    best = max(pairs, key=lambda pair: pairs[pair])
    word = merge_pair(word, best, new)
    print(f"{''.join(word):<12} {new} = {' + '.join(best)}, which occurred {pairs[best]} times")

# %% [markdown]
# Eleven symbols became five, and no information is lost: applying the three rules in reverse order
# restores the text. Training produces only this ordered list of rules. `learn_merges` in
# `bpe/train.py` is this loop over bytes. Here we use the `learn_merges` of `bpe/train_fast.py`,
# which is faster and returns the same merges.
#
# Our training text is the documentation of this repository and the source of its tokenizer.

# %%
ROOT = Path("..")
corpus = "\n\n".join(
    path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted(ROOT.glob("bpe/*.py"))]
)
print(f"{len(corpus):,} characters, {len(corpus.encode()):,} bytes")


def learned_tokens(counts: dict[bytes, int], merges: int) -> list[bytes]:
    """Return the tokens of the merges, in order, without the 256 bytes."""
    return list(build_vocab(learn_merges(counts, merges)))[256:]


def summarize(tokens: list[bytes]) -> None:
    longest = sorted(tokens, key=lambda token: len(token.strip()))[-4:]
    for title, examples in {"first:": tokens[:14], "longest:": longest}.items():
        print(f"{title:<8}", *[repr(token.decode("utf-8", "replace")) for token in examples])


without_pieces = learned_tokens({corpus.encode(): 1}, 1000)
summarize(without_pieces)

# %% [markdown]
# ## 3. Split the text into pieces first
#
# Without restrictions, the algorithm merges across words: ", a", or a complete line that occurs
# often. Such a token is useful in few contexts. Therefore the text is first split into pieces by a
# regular expression, and no token crosses the boundary of a piece. GPT-2, GPT-4 and GPT-4o split
# the same line as follows:

# %%
line = "  if camelCase's > 1234567: # don't\n\n"
for name, pattern in {"GPT-2": GPT2, "GPT-4": CL100K, "GPT-4o": O200K}.items():
    print(f"{name:<7}", "|".join(split([compile_pattern(pattern)], line)).replace("\n", "\\n"))

# %% [markdown]
# A space belongs to the word after it, so that " dog" is one token in the middle of a text. GPT-2
# does not split numbers; GPT-4 splits them into groups of three digits, from the left. (Why does
# this make addition hard?) GPT-4o ends a piece where a capital follows a small letter.
#
# Most pieces occur many times, so training needs only the count of each distinct piece:

# %%
counts = count_pieces([corpus], GPT2)
print(f"{sum(counts.values()):,} pieces, {len(counts):,} of them distinct")
print(*[f"{piece.decode()!r} {count}" for piece, count in Counter(counts).most_common(8)])
with_pieces = learned_tokens(counts, 1000)
summarize(with_pieces)

# %% [markdown]
# ## 4. A vocabulary
#
# `train` performs all these steps: it counts pieces, learns merges, and creates an `Encoding`,
# which converts text to ids and ids to text. The first 256 ids are the bytes; then follows one id
# for each merge.

# %%
encoding = train([corpus], vocab_size=4096, pattern=GPT2, special_tokens=["<|endoftext|>"])
print(encoding.n_vocab, "tokens; the last merge:", encoding.decode([encoding.n_vocab - 2]))


class Tokens:
    """Tokens with their ids, displayed as colored boxes or as plain text."""

    def __init__(self, encoding: bpe.Encoding, text: str):
        self.ids = encoding.encode(text, allowed_special="all")
        self.texts = [t.decode("utf-8", "replace") for t in encoding.decode_tokens_bytes(self.ids)]

    def __repr__(self) -> str:
        return "|".join(self.texts) + "\n" + " ".join(map(str, self.ids))

    def _repr_html_(self) -> str:
        colors = ("#cfe3ff", "#ffe3c2", "#d3f2d3", "#f6d5ee", "#fff3b0")
        boxes = []
        for n, (token, id) in enumerate(zip(self.texts, self.ids, strict=True)):
            text = html.escape(token).replace(" ", "&middot;").replace("\n", "&crarr;<br>")
            boxes.append(
                f'<span style="background:{colors[n % 5]};color:#111;padding:1px 2px">'
                f'{text}<sub style="color:#555">{id}</sub></span>'
            )
        return f'<div style="line-height:2">{" ".join(boxes)}</div>'


sentence = "The tokenizer splits hamburgers and encodings into tokens. 🍔"
display(Tokens(encoding, sentence))

# %% [markdown]
# The training text contains "encodings" often and "hamburgers" never. Text that is similar to the
# training text needs fewer tokens.
#
# How many merges should one learn? We encode a text that is not in the training data with more and
# more of the merges. Every token has a row of numbers in the first and the last layer of the model,
# so a larger vocabulary makes the model larger, and the gain decreases.

# %%
unseen = "\n".join(
    path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("transformer/*.py"))[:8]
)
sizes = [256 << i for i in range(5)]
chars_per_token = []
for size in sizes:
    ranks = {token: id for token, id in encoding.ranks.items() if id < size}
    smaller = bpe.Encoding(f"first {size}", pattern=GPT2, ranks=ranks, special_tokens={})
    measures = measure(smaller, unseen)
    chars_per_token.append(measures.per_token(measures.characters))

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.plot(sizes, chars_per_token, "o-", color="#3b6ea5")
axis.set_xscale("log", base=2)
axis.set_xticks(sizes, map(str, sizes))
axis.set_ylim(0)
axis.set_xlabel("tokens in the vocabulary")
axis.set_ylabel("characters per token")
axis.set_title("A text that is not in the training data")
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## 5. Encoding repeats the merges
#
# Encoding applies the learned merges to a piece: of all pairs that can be merged, merge the one
# that was learned first, and repeat. The number of a merge is its *rank*. The lines connect the
# bytes of a token.

# %%
print(merge_diagram(encoding, " tokenizers"))
print()
print(merge_diagram(encoding, " naïve"))

# %% [markdown]
# ## 6. Unigram: the most probable tokens
#
# Merging is not the only way to encode. The vocabularies of T5 and XLM-R are *Unigram* models
# (Kudo, 2018): each token has a probability, and a text becomes those tokens whose probabilities
# have the highest product. The logarithm of a probability is the *score* of the token, so that
# products become sums.
#
# To learn the probabilities, we start from the tokens of section 4, and from how often encoding
# produced each of them. Then we repeat two steps: encode every word with the current scores, and
# set the scores according to the counts of the tokens. Each repetition makes the training text more
# probable. (SentencePiece starts from many more tokens, and then removes the least useful ones.)

# %%
words = Counter(f" {word}" for word in corpus.split())


def count_tokens(encode) -> Counter[str]:
    """Return how often each token occurs in all words; every character is also a token."""
    counts = Counter({character: 1 for word in words for character in word})
    for word, count in words.items():
        for token in encode(word):
            counts[token] += count
    return counts


def unigram_encoding(counts: Counter[str]) -> SentencePiece:
    """Return a Unigram vocabulary whose probabilities are proportional to the counts."""
    scores = {token: math.log(count / counts.total()) for token, count in counts.items()}
    ids = {token: id for id, token in enumerate(scores, 1)}
    return SentencePiece(
        "unigram",
        model=Unigram(ids, scores, unk_id=0),
        pieces=ids,
        special_tokens={"<unk>": 0},
        unk_id=0,
        normalizer=SentencePieceNormalizer(),  # puts a space before the first word
        dummy_prefix=True,
    )


def encode_with_merges(word: str) -> list[str]:
    tokens = [
        token.decode("utf-8", "ignore")
        for token in encoding.decode_tokens_bytes(encoding.encode_ordinary(word))
    ]
    return [token for token in tokens if token]


unigram = unigram_encoding(count_tokens(encode_with_merges))
log_likelihoods = []
for _ in range(4):
    model = unigram.model
    paths = {word: [word[i:j] for i, j, _ in model.best_path(word)] for word in words}
    total = sum(n * sum(model.scores[token] for token in paths[word]) for word, n in words.items())
    log_likelihoods.append(total / words.total())
    print(f"{unigram.n_vocab:,} tokens, {log_likelihoods[-1]:.3f} is the mean score of a word")
    unigram = unigram_encoding(count_tokens(paths.__getitem__))

# %% [markdown]
# The tokens that are possible at each position of a word form a *lattice*. The diagram lists them
# with their scores; a star marks the tokens of the best path.

# %%
print(lattice_diagram(unigram, " encoder"))

# %% [markdown]
# A word of $n$ characters can be divided in $2^{n-1}$ ways. It is not necessary to try them all:
# the best path to a position consists of a last token and of the best path to the position where
# that token begins. So one pass from left to right finds the best path: the *Viterbi algorithm*.
# Here it is compared with trying all ways, and with merging:


# %%
def best_of_all(word: str) -> float:
    """Return the highest score of all divisions of a word into tokens."""
    scores, best = unigram.model.scores, -math.inf
    for k in range(len(word)):
        for cuts in combinations(range(1, len(word)), k):
            tokens = [word[i:j] for i, j in pairwise([0, *cuts, len(word)])]
            if all(token in scores for token in tokens):
                best = max(best, sum(scores[token] for token in tokens))
    return best


print(f"{'':<14} {'Unigram':<24} {'score':>8} {'of all':>8}   merges")
compared = []
for example in (" tokenizers", " hamburgers", " encodings", " decode", " unequal"):
    path = [example[i:j] for i, j, _ in unigram.model.best_path(example)]
    score = sum(unigram.model.scores[token] for token in path)
    compared.append((score, best_of_all(example)))
    numbers = f"{score:8.3f} {compared[-1][1]:8.3f}"
    print(f"{example:<14} {'|'.join(path):<24} {numbers}   {'|'.join(encode_with_merges(example))}")

# %% [markdown]
# Merging decides one pair at a time and never takes a decision back; Unigram compares whole paths.
# In training, a model can also be shown other paths than the best, at random, so that it sees
# several divisions of one word (*subword regularization*).
#
# `python -m bpe explain` draws the lattice of a Unigram vocabulary, and the merges of others.

# %% [markdown]
# ## 7. Decoding
#
# Decoding looks up the bytes of each id, and decodes the bytes as UTF-8. Every text can be encoded
# and decoded without loss, even if it is unlike the training text, because each byte is a token:

# %%
rng = random.Random(0)
random_texts = ["".join(chr(rng.randrange(0xD800)) for _ in range(20)) for _ in range(1000)]
print("round trips:", sum(encoding.decode(encoding.encode(text)) == text for text in random_texts))

# %% [markdown]
# The reverse is not true: not every list of ids is valid text. A token can be a part of a
# character. If the output of a model ends with such a token, decoding replaces the incomplete bytes
# by "\ufffd".

# %%
ids = encoding.encode("🙂")
print(ids, [token.hex(" ").upper() for token in encoding.decode_tokens_bytes(ids)])
print("all but the last:", encoding.decode(ids[:-1]))

# %% [markdown]
# *Special tokens* represent structure, such as the end of a document or of a message. No merge
# produces them. A user who types one must not be able to end the document, so by default encoding
# raises an error. The caller chooses how to encode it:

# %%
user_text = "low<|endoftext|>"
try:
    encoding.encode(user_text)
except ValueError as error:
    print(str(error).splitlines()[0])
print("as text: ", encoding.encode(user_text, disallowed_special=()))
print("as token:", encoding.encode(user_text, allowed_special="all"))

# %% [markdown]
# ## 8. The vocabularies of OpenAI
#
# `bpe` includes the vocabularies of OpenAI's models: `gpt2` has 50,257 tokens, `cl100k_base`
# (GPT-4)
# 100,277, `o200k_base` (GPT-4o) 200,019. We encode the first sentence of the Universal Declaration
# of Human Rights in five languages:

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
for n, (name, color) in enumerate(zip(NAMES, ("#c9c9c9", "#8fb3d9", "#3b6ea5"), strict=True)):
    bars = axis.bar([i + 0.28 * (n - 1) for i in range(5)], tokens[name], 0.26, color=color)
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
# Prices and context lengths are counted in tokens, so the same text costs more in some languages
# than in others. Each newer vocabulary has reduced the difference, because more of its training
# text was in these languages. With GPT-2's vocabulary, Hindi is encoded almost as single bytes:
# most of the boxes contain no complete character.
#
# OpenAI's rule of thumb is that a token is about 4 characters, or three quarters of a word, of
# English. We measure it (`python -m bpe count -f FILE` does the same):

# %%
print(f"{'':<20} {'characters':>10} {'words':>7}   per token of o200k_base")
for name, text in {
    "README.md": (ROOT / "README.md").read_text(encoding="utf-8"),
    "bpe/encoding.py": (ROOT / "bpe/encoding.py").read_text(encoding="utf-8"),
    **{f"{name}, as above": text for name, text in SENTENCES.items()},
}.items():
    measures = measure(encodings["o200k_base"], text)
    characters = measures.per_token(measures.characters)
    words = measures.per_token(measures.words)
    print(f"{name:<20} {characters:>10.2f} {words:>7.2f}")

# %% [markdown]
# ## 9. Summary, as assertions

# %%
assert "".join(word) == "XdXac", "the three merges of section 2"
assert not any(b" " in token.strip() for token in with_pieces), "no token spans two words"
assert any(b" " in token.strip() for token in without_pieces), "without pieces, some do"
assert chars_per_token == sorted(chars_per_token), "more merges make longer tokens"
assert chars_per_token[0] < 1.1, "without merges, a token is one byte"
assert log_likelihoods == sorted(log_likelihoods), "each repetition makes the text more probable"
assert all(math.isclose(a, b) for a, b in compared), "no path is better than that of Viterbi"
assert all(encoding.decode(encoding.encode(text)) == text for text in random_texts)
assert encoding.encode(user_text, allowed_special="all")[-1] == encoding.eot_token
assert [encodings[name].n_vocab for name in NAMES] == [50257, 100277, 200019]
assert tokens["gpt2"][4] > 4 * tokens["o200k_base"][4], "Hindi needs far fewer tokens"
assert encodings["cl100k_base"].encode("hello world") == [15339, 1917]
print("all true")

# %% [markdown]
# ## Exercises
#
# Complete each function and run its cell; the check prints whether the function is right.
#
# **1.** The central step of training: given pieces, as tuples of tokens, and the count of each,
# count each pair of adjacent tokens.


# %% tags=["stub"]
def count_pairs(pieces: dict[tuple[bytes, ...], int]) -> dict[tuple[bytes, bytes], int]:
    """Return the count of each pair of adjacent tokens in all pieces."""
    ...


checks.report(checks.count_pairs, count_pairs)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def count_pairs(pieces: dict[tuple[bytes, ...], int]) -> dict[tuple[bytes, bytes], int]:
#     counts = {}
#     for piece, count in pieces.items():
#         for pair in zip(piece, piece[1:]):
#             counts[pair] = counts.get(pair, 0) + count
#     return counts
# ```
# </details>
#
# **2.** The central step of encoding: compute the tokens of one piece. `ranks` maps the bytes of
# each token to its rank; lower ranks were learned first. The check compares your function with the
# library on a thousand strings.


# %% tags=["stub"]
def merge_piece(piece: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Repeatedly merge the adjacent tokens that form the token of lowest rank."""
    ...


checks.report(checks.merge_piece, merge_piece)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def merge_piece(piece: bytes, ranks: dict[bytes, int]) -> list[bytes]:
#     parts = [piece[i : i + 1] for i in range(len(piece))]
#     while True:
#         merged = [left + right for left, right in zip(parts, parts[1:])]
#         allowed = [token for token in merged if token in ranks]
#         if not allowed:
#             return parts
#         i = merged.index(min(allowed, key=ranks.get))  # the leftmost pair of lowest rank
#         parts[i : i + 2] = [merged[i]]
# ```
# </details>
#
# **3.** Some tokens of a text cannot be displayed separately. Given the bytes of each token, return
# the positions of these tokens.


# %% tags=["stub"]
def broken_tokens(tokens: list[bytes]) -> list[int]:
    """Return the positions of the tokens that are not valid UTF-8."""
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
# order; `bpe/unigram.py` and `bpe/wordpiece.py` about the tokenizers of many embedding models.
