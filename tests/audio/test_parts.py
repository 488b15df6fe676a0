"""What needs no weights: vocabulary, rules, warping, speech spans, subtitles, model.bin."""

import itertools
import struct
from dataclasses import replace

import jax
import numpy as np
import pytest

from audio import DecodingOptions, ctranslate2, decode, subtitles, timing, vad
from audio.decode import DecodingResult, TemperatureFallback
from audio.timing import Word
from audio.tokenizer import TIME_PRECISION
from audio.tokenizer import load as load_tokens
from audio.transcribe import (
    Segment,
    Transcript,
    has_inner_pause,
    next_window,
    split_at_pauses,
    split_at_timestamps,
    window_length,
)
from tests.audio.ten_minutes import hum, pink, white
from tests.naming import naming

RATE = 16_000


@pytest.fixture(scope="module")
def tokens(model_file):
    return load_tokens(model_file("whisper-base"), 51865)


# tokens


def test_special_tokens(tokens):
    assert tokens.is_multilingual and len(tokens.languages) == 99
    assert (tokens.eot, tokens.sot, tokens.timestamp_begin) == (50257, 50258, 50364)
    assert tokens.language_id("en") == 50259 and tokens.language_id("German") == 50261
    opening = tokens.sot_sequence("fr", "translate", timestamps=False)
    assert opening == (50258, 50265, 50358, 50363)
    with pytest.raises(ValueError, match=naming("language", "'klingon'")):
        tokens.language_id("klingon")


def test_what_is_never_written_is_what_the_model_file_says(model_file):
    import json

    for id, size in (("whisper-base", 51865), ("whisper-tiny.en", 51864)):
        folder = model_file(id)
        listed = json.loads((folder / "config.json").read_text())["suppress_ids"]
        assert set(load_tokens(folder, size).suppress_tokens) == set(listed)


def test_words(tokens):
    text = " Don't 12:30, café 😀!"
    words = tokens.split_words(tokens.encode(text), "en")
    assert [word for word, _ in words] == [" Don't", " 12", ":30", ",", " café", " 😀", "!"]
    assert [id for _, ids in words for id in ids] == list(tokens.encode(text))
    assert [word for word, _ in tokens.split_words(tokens.encode("日本語"), "ja")] == ["日本", "語"]


def test_a_vocabulary_of_another_size(model_file):
    with pytest.raises(ValueError, match=naming(51864, 50363)):
        load_tokens(model_file("whisper-base"), 51864)


# rules


def probabilities(tokens, ids, boost=None):
    """What may follow some ids, when all words are alike but for `boost`."""
    logits = np.zeros((1, 51865), np.float32)
    for id, value in (boost or {}).items():
        logits[0, id] = value
    is_first = not ids
    blocked = decode._suppress_mask(tokens, DecodingOptions(), 51865, is_first)
    begin = tokens.timestamp_begin
    ranges = (begin, begin, begin + 51) if is_first else decode._allowed_ranges(ids, tokens, 51865)
    return np.asarray(
        decode._constrained_logprobs(
            logits, blocked, np.array([ranges], np.int32), np.int32(begin), True
        )
    )[0]


def test_a_window_begins_with_a_point_in_its_first_second(tokens):
    allowed = np.flatnonzero(np.isfinite(probabilities(tokens, [])))
    assert allowed.tolist() == list(range(50364, 50364 + 51))


def test_points_come_in_pairs_and_never_run_backwards(tokens):
    begin, word = tokens.timestamp_begin, tokens.encode(" hello")[0]
    after_start = np.isfinite(probabilities(tokens, [begin + 5], boost={word: 20}))
    assert after_start[word] and not after_start[begin:].any()
    after_word = np.isfinite(probabilities(tokens, [begin + 5, word], boost={word: 20}))
    assert after_word[word] and after_word[tokens.eot]
    assert not after_word[begin : begin + 6].any() and after_word[begin + 6 :].all()
    after_end = np.isfinite(
        probabilities(tokens, [begin + 5, word, begin + 9], boost={tokens.eot: 20})
    )
    assert after_end[tokens.eot] and not after_end[word]
    assert not after_end[begin : begin + 9].any() and after_end[begin + 9 :].all()
    after_pair = np.isfinite(
        probabilities(tokens, [begin, word, begin + 9, begin + 9], boost={word: 20})
    )
    assert after_pair[word] and not after_pair[begin:].any()


def test_points_together_outweigh_a_word(tokens):
    begin, word = tokens.timestamp_begin, tokens.encode(" hello")[0]
    ids = [begin, word]
    # 1500 points of weight 1 stand against one word of weight e^7 = 1097, then e^8 = 2981.
    assert not np.isfinite(probabilities(tokens, ids, boost={word: 7}))[:begin].any()
    assert np.isfinite(probabilities(tokens, ids, boost={word: 8}))[word]


def test_drawing_follows_the_probabilities_and_the_rules():
    logits = np.tile(np.log(np.float32([0.1, 0.2, 0.3, 0.4, 1.0])), (4000, 1))
    blocked = np.array([True, False, False, False, False])
    ranges = np.tile(np.int32([0, 4, 4]), (4000, 1))  # the last id is a point in time: not now
    keys = jax.random.split(jax.random.key(0), 4000)
    rules = (blocked, ranges, np.int32(4), True)
    ids, logprobs = decode._sample_ids(logits, *rules, keys, np.int32(3), np.float32(0.5))
    squares = np.square([0, 2, 3, 4, 0]) / 29  # half the temperature squares the odds
    np.testing.assert_allclose(np.bincount(ids, minlength=5) / 4000, squares, atol=0.03)
    np.testing.assert_allclose(np.exp(logprobs), np.array([0, 2, 3, 4, 0])[ids] / 9, rtol=1e-5)
    top, _ = decode._greedy_ids(
        np.zeros((1, 5), np.float32), blocked, ranges[:1], np.int32(4), True
    )
    assert top.tolist() == [1]  # the first of equals


def test_suppressed_and_blank(tokens):
    first = replace(DecodingOptions(), timestamps=False)
    blank = tokens.encode(" ")[0]
    assert decode._suppress_mask(tokens, first, 51865, True)[[blank, tokens.eot]].all()
    assert not decode._suppress_mask(tokens, first, 51865, False)[[blank, tokens.eot]].any()
    everything = replace(first, suppress_non_speech=False, suppress_blank=False)
    assert not decode._suppress_mask(tokens, everything, 51865, True).any()


def test_opening(tokens):
    from audio.config import Config

    cfg = Config.of_size("base")
    options = DecodingOptions(prompt=tuple(range(300)), hotwords="Pellucid", prefix="Well,")
    opening = decode._prompt_tokens(tokens, cfg, options)
    hot, prefix = tokens.encode(" Pellucid"), tokens.encode(" Well,")
    assert opening[0] == tokens.sot_prev
    assert opening[1 : 1 + len(hot)] == hot
    sot = opening.index(tokens.sot)
    assert sot == 224 and opening[sot - 1] == 299  # the end of the prompt counts
    assert opening[-len(prefix) :] == prefix


@pytest.mark.parametrize(
    "fields", [{"temperature": 3}, {"beam_size": 0}, {"best_of": 2}, {"patience": 0}]
)
def test_options_out_of_range(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        DecodingOptions(**fields)


def result(ids=(), logprobs=(), **fields):
    known = dict(
        text="", avg_logprob=-0.1, no_speech_prob=0.0, temperature=0.0, compression_ratio=1.0
    )
    return DecodingResult(ids=tuple(ids), logprobs=tuple(logprobs), **(known | fields))


def test_fallback():
    ladder = TemperatureFallback()
    assert not ladder.needs_fallback(result())
    assert ladder.needs_fallback(result(compression_ratio=3.0))
    assert ladder.needs_fallback(result(avg_logprob=-2.0))
    assert not ladder.needs_fallback(result(avg_logprob=-2.0, no_speech_prob=0.9))
    assert ladder.is_silence(result(avg_logprob=-2.0, no_speech_prob=0.9))
    assert not ladder.is_silence(result(no_speech_prob=0.9))
    # A text that repeats itself where hardly anybody speaks is made up.
    looping = result(compression_ratio=3.0, no_speech_prob=0.9)
    assert ladder.is_silence(looping) and not ladder.needs_fallback(looping)
    assert not ladder.is_silence(result(compression_ratio=3.0, no_speech_prob=0.3))


def test_fallback_keeps_the_likeliest_attempt():
    """The last attempt was kept, drawn at temperature 1: a German clip became nonsense at -2.97."""
    ladder, likely = TemperatureFallback(), result(avg_logprob=-1.1, temperature=0.2)
    guess = result(avg_logprob=-2.9, temperature=1.0)
    assert ladder.best([result(avg_logprob=-1.4), likely, guess]) is likely
    looping = result(avg_logprob=-0.2, compression_ratio=3.0)
    assert ladder.best([looping, likely, guess]) is likely
    assert ladder.best([looping, replace(looping, avg_logprob=-0.1)]).avg_logprob == -0.1
    fine = result(avg_logprob=-0.9, temperature=0.4)
    assert ladder.best([looping, likely, fine]) is fine


def test_cut(tokens):
    begin = tokens.timestamp_begin
    ids = (begin, 5, 6, begin + 10, begin + 12, 7, begin + 20)
    parts = split_at_timestamps(result(ids, [0.0] * 7), tokens)
    assert [part[0] for part in parts] == [ids[:4], ids[4:]]
    assert split_at_timestamps(result(), tokens) == []


# timing


def test_next_window(tokens):
    def part(*ids):
        return ids, (0.0,) * len(ids)

    def at(seconds):
        return tokens.timestamp_begin + round(seconds / TIME_PRECISION)

    first, closed, opened = part(at(0), 7, at(2)), part(at(2), 8, at(4)), part(at(2), 8)
    speech = [(0.0, 4.0), (10.0, 13.0)]

    def following(parts, spans=()):
        return next_window(parts, 0, 1000, spans, tokens)

    assert following([first, closed]) == ([first, closed], 1000, False)
    assert following([first, closed], speech[:1]) == ([first, closed], 1000, False)
    # somebody speaks after the end: from 10 s only if the window reaches as far
    assert following([first, closed], [(0.0, 4.0), (7.0, 9.0)]) == ([first, closed], 400, False)
    assert following([first, closed], speech) == ([first, closed], 1000, False)
    assert following([first, opened]) == ([first], 200, True)  # begins with what goes on behind it
    assert following([opened]) == ([opened], 1000, True)
    assert following([]) == ([], 1000, True)


def test_warping_finds_the_cheapest_path():
    rng = np.random.default_rng(0)
    for _ in range(20):
        cost = rng.normal(size=(3, 4))
        rows, columns = timing.dtw(cost)
        steps = set(zip(np.diff(rows).tolist(), np.diff(columns).tolist(), strict=True))
        assert (rows[0], columns[0], rows[-1], columns[-1]) == (0, 0, 2, 3)
        assert steps <= {(0, 1), (1, 0), (1, 1)}
        assert cost[rows, columns].sum() == pytest.approx(cheapest(cost, 2, 3))


def cheapest(cost, i, j):
    """By trying everything."""
    if i == j == 0:
        return cost[0, 0]
    ways = [(i - 1, j), (i, j - 1), (i - 1, j - 1)]
    return cost[i, j] + min(cheapest(cost, a, b) for a, b in ways if a >= 0 and b >= 0)


def test_median_filter():
    x = np.random.default_rng(0).normal(size=(2, 20))
    padded = np.pad(x, [(0, 0), (3, 3)], mode="reflect")
    expected = [np.median(padded[:, i : i + 7], axis=-1) for i in range(20)]
    np.testing.assert_allclose(timing.median_filter(x), np.transpose(expected))
    short = x[:, :3]
    assert timing.median_filter(short) is short


def test_punctuation_joins_its_word():
    texts = [" Well", ",", ' "', "yes", '."']
    words = [Word(text, i, i + 1.0, 1.0, (i,)) for i, text in enumerate(texts)]
    ((own, _),) = timing.assign_words(words, [(0.0, 5.0)], [5], last_end=0.0)
    assert [word.text for word in own] == [" Well,", ' "yes', '."']
    assert [word.ids for word in own] == [(0, 1), (2, 3), (4,)]


# voice activity


def speechlike(seconds, seed=0):
    """Noise in syllables, four a second."""
    t = np.arange(int(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).normal(size=len(t))
    return (0.1 * noise * np.clip(np.sin(2 * np.pi * 4 * t), 0, 1)).astype(np.float32)


def quiet(seconds, level=1e-4, seed=1):
    return np.random.default_rng(seed).normal(0, level, int(seconds * RATE)).astype(np.float32)


@pytest.mark.parametrize("level", [0.0, 1e-4, 2e-3])
def test_spans(level):
    sound = np.concatenate([quiet(2), speechlike(3), quiet(2), speechlike(4), quiet(1)])
    sound = sound + quiet(12, level, 2)
    spans = vad.speech_spans(sound)
    assert len(spans) == 2
    np.testing.assert_allclose(spans, [(2, 5), (7, 11)], atol=0.1)


@pytest.mark.parametrize("level", [0.0, 1e-5, 1e-3, 0.1, 0.5])
def test_noise_is_no_speech(level):
    assert vad.speech_spans(quiet(20, level)) == []


@pytest.mark.parametrize("kind", [white, pink, hum])
@pytest.mark.parametrize("decibels", [-50, -15])
def test_what_comes_and_goes_but_does_not_move_is_no_speech(kind, decibels):
    rng = np.random.default_rng(0)
    sound = quiet(12)
    sound[4 * RATE : 8 * RATE] += kind(rng, 4 * RATE) * 10 ** (decibels / 20)
    assert vad.speech_spans(sound) == []


@pytest.mark.parametrize("kind", [white, pink, hum])
def test_speech_is_found_in_noise_almost_as_loud(kind, clip):
    sound = np.concatenate([quiet(3), clip("austen-0890"), quiet(3)])
    power = np.mean(clip("austen-0890") ** 2)
    noise = kind(np.random.default_rng(0), len(sound)) * np.sqrt(power / 10 ** (5 / 10))
    found = sum(end - start for start, end in vad.speech_spans(sound + noise))
    assert 4.3 < found < 5.5  # of 5.0 seconds


def test_pauses_are_shortened_and_times_set_right():
    spans = [(5.0, 6.0), (6.8, 8.0), (20.0, 21.5)]
    kept = vad.retained_frames(spans, 3000)
    assert len(kept) == (9.5 - 3.5 + 23 - 18.5) * 100
    assert vad.remap_spans(spans, kept) == [(1.5, 2.5), (3.3, 4.5), (7.5, 9.0)]
    assert kept[[0, 599, 600]].tolist() == [350, 949, 1850]
    assert vad.remap_spans(spans, np.arange(3000)) == spans
    assert vad.retained_frames([], 3000).size == 0


def test_no_time_lies_in_a_pause():
    spans = [(1.0, 2.0), (4.0, 5.0)]
    for given, placed in (
        ((1.2, 1.8), (1.2, 1.8)),
        ((0.2, 3.0), (1.0, 2.0)),
        ((2.5, 6.0), (4.0, 5.0)),
        ((1.9, 4.5), (4.0, 4.5)),  # the last moment before a pause is part of it
        ((1.2, 4.1), (1.2, 2.0)),
        ((2.5, 3.5), (2.5, 3.5)),  # nothing was found there: it stays
    ):
        assert vad.snap_to_speech(*given, spans) == placed
    assert vad.snap_to_speech(1.0, 2.0, []) == (1.0, 2.0)


def test_windows_are_cut_in_pauses():
    sound = np.concatenate([speechlike(50), quiet(2), speechlike(10), quiet(1), speechlike(5)])
    spans, loud = vad.speech_spans(sound), vad.loudness(sound)
    windows = vad.split_into_windows(loud, spans)
    assert all(end - start <= 30 for start, end in windows)
    assert windows[0][0] == 0 and windows[-1][1] == len(loud) / 100
    assert all(a == b for (_, a), (b, _) in itertools.pairwise(windows))
    assert 50 < windows[1][1] < 52 and len(windows) == 3
    assert vad.split_into_windows(loud, []) == []


def test_a_window_ends_in_the_last_pause_that_fits():
    spans = [(0.0, 10.0), (11.0, 20.0), (22.0, 29.5), (31.0, 80.0)]
    assert window_length(0, 9000, 3000, spans) == 2100  # 30.25 s would be too late
    assert window_length(3100, 9000, 3000, spans) == 3000  # no pause: a whole window
    assert window_length(7000, 9000, 3000, spans) == 2000  # the rest
    assert window_length(0, 9000, 3000, ()) == 3000


# segments at pauses


def test_a_segment_is_cut_where_it_lies_across_a_pause(tokens):
    begin = tokens.timestamp_begin
    texts = [" One", " two", ".", " Three"]
    ids = [tokens.encode(text) for text in texts]
    words = [
        Word(" One", 1.0, 1.4, 1.0, ids[0]),
        Word(" two.", 1.4, 2.2, 1.0, ids[1] + ids[2]),
        Word(" Three", 3.1, 4.4, 1.0, ids[3]),
    ]
    ids = (begin, *itertools.chain(*ids), begin + 50)
    whole = replace(SEGMENT, ids=ids, logprobs=(-0.5,) * len(ids), words=tuple(words), end=4.4)
    whole = replace(whole, text=tokens.decode(ids))
    spans = [(1.0, 2.0), (3.4, 4.5)]
    first, second = split_at_pauses(whole, spans, tokens)
    assert (first.text, first.start, first.end) == (" One two.", 1.0, 2.2)
    assert (second.text, second.start, second.end) == (" Three", 3.1, 4.4)
    assert first.ids + second.ids == whole.ids and second.ids[-1] == begin + 50
    assert len(first.logprobs) == len(first.ids) and first.words == tuple(words[:2])
    assert has_inner_pause(whole, spans) and not has_inner_pause(first, spans)
    assert split_at_pauses(whole, [(1.0, 4.5)], tokens) == [whole]


# subtitles

WORDS = (Word(" So", 1.0, 1.2, 1.0, (1,)), Word(" a <b> -->", 3661.5, 3662.0, 0.5, (2,)))
SEGMENT = Segment(
    start=1.0,
    end=3662.0,
    text=" So a <b> -->",
    ids=(1, 2),
    logprobs=(-0.1, -0.2),
    seek=0,
    temperature=0.0,
    avg_logprob=-0.1,
    compression_ratio=1.0,
    no_speech_prob=0.0,
    words=WORDS,
)
FOUND = Transcript(language="en", duration=3663.0, text="So a <b> -->", segments=(SEGMENT,))


def test_subtitles():
    srt = subtitles.render(FOUND, "srt")
    assert srt == "1\n00:00:01,000 --> 01:01:02,000\nSo a <b> ->\n"
    vtt = subtitles.render(FOUND, "vtt")
    assert vtt == "WEBVTT\n\n00:00:01.000 --> 01:01:02.000\nSo a &lt;b&gt; -&gt;\n"
    tsv = subtitles.render(FOUND, "tsv", words=True)
    assert tsv.splitlines() == ["start\tend\ttext", "1000\t1200\tSo", "3661500\t3662000\ta <b> -->"]
    assert subtitles.render(FOUND, "text") == "So a <b> -->\n"
    verbose = subtitles.verbose_json(FOUND)
    assert verbose["language"] == "english" and verbose["words"][0]["word"] == "So"
    assert subtitles.format_timestamp(59.9996) == "00:01:00.000"
    with pytest.raises(ValueError, match="format must be one of"):
        subtitles.render(FOUND, "docx")


# model.bin


def packed(variables, aliases=()):
    def string(text):
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    kinds = {"float32": 0, "int8": 1, "float16": 4}
    data = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        data += string(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        data += struct.pack("<BI", kinds[str(array.dtype)], array.nbytes) + array.tobytes()
    data += struct.pack("<I", len(aliases))
    return data + b"".join(string(a) + string(b) for a, b in aliases)


def test_a_model_file(tmp_path):
    path = tmp_path / "model.bin"
    half = np.arange(6, dtype=np.float16).reshape(2, 3)
    narrow = np.array([[127, -64], [1, 0]], np.int8)
    scale = np.array([127.0, 2.0], np.float32)
    variables = {"a": half, "b/weight": narrow, "b/weight_scale": scale}
    path.write_bytes(packed(variables, [("c", "a")]))
    spec, arrays = ctranslate2.read(path)
    assert spec == "WhisperSpec" and set(arrays) == {"a", "b/weight", "c"}
    np.testing.assert_array_equal(arrays["c"], half)
    np.testing.assert_allclose(arrays["b/weight"], [[1, -64 / 127], [0.5, 0]])


def test_a_damaged_model_file(tmp_path):
    path, whole = tmp_path / "model.bin", packed({"a": np.zeros((2, 3), np.float32)}, [("c", "a")])
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated|empty"):
            ctranslate2.read(path)
    huge = whole.replace(struct.pack("<II", 2, 3), struct.pack("<II", 2**31, 2**31))
    for data, message in ((huge, "has 24 bytes"), (b"\x07" + whole[1:], "version 7")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            ctranslate2.read(path)
