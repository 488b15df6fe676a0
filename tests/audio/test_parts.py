"""Parts of `audio` without weights: tokenizer, constraints, DTW, VAD, subtitles, model.bin."""

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
from audio.tokenizer import load as load_tokenizer
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
def tokenizer(model_file):
    return load_tokenizer(model_file("whisper-base"), 51865)


# tokenizer


def test_special_tokens_have_whisper_ids(tokenizer):
    assert tokenizer.is_multilingual and len(tokenizer.languages) == 99
    assert (tokenizer.eot, tokenizer.sot, tokenizer.timestamp_begin) == (50257, 50258, 50364)
    assert tokenizer.language_id("en") == 50259 and tokenizer.language_id("German") == 50261
    sot_sequence = tokenizer.sot_sequence("fr", "translate", timestamps=False)
    assert sot_sequence == (50258, 50265, 50358, 50363)
    with pytest.raises(ValueError, match=naming("language", "'klingon'")):
        tokenizer.language_id("klingon")


def test_suppress_tokens_equal_those_of_the_model_config(model_file):
    import json

    for id, size in (("whisper-base", 51865), ("whisper-tiny.en", 51864)):
        folder = model_file(id)
        listed = json.loads((folder / "config.json").read_text())["suppress_ids"]
        assert set(load_tokenizer(folder, size).suppress_tokens) == set(listed)


def test_split_words_keeps_ids_and_separates_punctuation(tokenizer):
    text = " Don't 12:30, café 😀!"
    words = tokenizer.split_words(tokenizer.encode(text), "en")
    assert [word for word, _ in words] == [" Don't", " 12", ":30", ",", " café", " 😀", "!"]
    assert [id for _, ids in words for id in ids] == list(tokenizer.encode(text))
    assert [word for word, _ in tokenizer.split_words(tokenizer.encode("日本語"), "ja")] == [
        "日本",
        "語",
    ]


def test_tokenizer_that_does_not_fit_vocab_size_is_refused(model_file):
    with pytest.raises(ValueError, match=naming(51864, 50363)):
        load_tokenizer(model_file("whisper-base"), 51864)


# constraints


def next_logprobs(tokenizer, ids, boost=None):
    """Return constrained log-probabilities after `ids`; logits are 0, except those in `boost`."""
    logits = np.zeros((1, 51865), np.float32)
    for id, value in (boost or {}).items():
        logits[0, id] = value
    is_first = not ids
    suppressed = decode._suppress_mask(tokenizer, DecodingOptions(), 51865, is_first)
    begin = tokenizer.timestamp_begin
    ranges = (
        (begin, begin, begin + 51) if is_first else decode._allowed_ranges(ids, tokenizer, 51865)
    )
    return np.asarray(
        decode._constrained_logprobs(
            logits, suppressed, np.array([ranges], np.int32), np.int32(begin), True
        )
    )[0]


def test_first_token_is_a_timestamp_in_the_first_second(tokenizer):
    allowed = np.flatnonzero(np.isfinite(next_logprobs(tokenizer, [])))
    assert allowed.tolist() == list(range(50364, 50364 + 51))


def test_timestamps_come_in_pairs_and_never_decrease(tokenizer):
    begin, word = tokenizer.timestamp_begin, tokenizer.encode(" hello")[0]
    after_start = np.isfinite(next_logprobs(tokenizer, [begin + 5], boost={word: 20}))
    assert after_start[word] and not after_start[begin:].any()
    after_word = np.isfinite(next_logprobs(tokenizer, [begin + 5, word], boost={word: 20}))
    assert after_word[word] and after_word[tokenizer.eot]
    assert not after_word[begin : begin + 6].any() and after_word[begin + 6 :].all()
    after_end = np.isfinite(
        next_logprobs(tokenizer, [begin + 5, word, begin + 9], boost={tokenizer.eot: 20})
    )
    assert after_end[tokenizer.eot] and not after_end[word]
    assert not after_end[begin : begin + 9].any() and after_end[begin + 9 :].all()
    after_pair = np.isfinite(
        next_logprobs(tokenizer, [begin, word, begin + 9, begin + 9], boost={word: 20})
    )
    assert after_pair[word] and not after_pair[begin:].any()


def test_timestamps_likelier_than_any_text_token_suppress_text(tokenizer):
    begin, word = tokenizer.timestamp_begin, tokenizer.encode(" hello")[0]
    ids = [begin, word]
    # 1500 timestamps with odds 1 compared with one word with odds e^7 = 1097, then e^8 = 2981.
    assert not np.isfinite(next_logprobs(tokenizer, ids, boost={word: 7}))[:begin].any()
    assert np.isfinite(next_logprobs(tokenizer, ids, boost={word: 8}))[word]


def test_sampling_follows_probabilities_and_constraints():
    logits = np.tile(np.log(np.float32([0.1, 0.2, 0.3, 0.4, 1.0])), (4000, 1))
    suppressed = np.array([True, False, False, False, False])
    ranges = np.tile(np.int32([0, 4, 4]), (4000, 1))  # the last id is a timestamp, and not allowed
    keys = jax.random.split(jax.random.key(0), 4000)
    constraints = (suppressed, ranges, np.int32(4), True)
    ids, logprobs = decode._sample_ids(logits, *constraints, keys, np.int32(3), np.float32(0.5))
    squares = np.square([0, 2, 3, 4, 0]) / 29  # temperature 0.5 squares the odds
    np.testing.assert_allclose(np.bincount(ids, minlength=5) / 4000, squares, atol=0.03)
    np.testing.assert_allclose(np.exp(logprobs), np.array([0, 2, 3, 4, 0])[ids] / 9, rtol=1e-5)
    top, _ = decode._greedy_ids(
        np.zeros((1, 5), np.float32), suppressed, ranges[:1], np.int32(4), True
    )
    assert top.tolist() == [1]  # the first of equal maxima


def test_blank_is_suppressed_at_the_first_token_only(tokenizer):
    first = replace(DecodingOptions(), timestamps=False)
    blank = tokenizer.encode(" ")[0]
    assert decode._suppress_mask(tokenizer, first, 51865, True)[[blank, tokenizer.eot]].all()
    assert not decode._suppress_mask(tokenizer, first, 51865, False)[[blank, tokenizer.eot]].any()
    unrestricted = replace(first, suppress_non_speech=False, suppress_blank=False)
    assert not decode._suppress_mask(tokenizer, unrestricted, 51865, True).any()


def test_prompt_tokens_are_previous_text_sot_and_prefix(tokenizer):
    from audio.config import Config

    cfg = Config.of_size("base")
    options = DecodingOptions(prompt=tuple(range(300)), hotwords="Pellucid", prefix="Well,")
    prompt = decode._prompt_tokens(tokenizer, cfg, options)
    hotwords, prefix = tokenizer.encode(" Pellucid"), tokenizer.encode(" Well,")
    assert prompt[0] == tokenizer.sot_prev
    assert prompt[1 : 1 + len(hotwords)] == hotwords
    sot = prompt.index(tokenizer.sot)
    assert sot == 224 and prompt[sot - 1] == 299  # the end of the previous text is used
    assert prompt[-len(prefix) :] == prefix


@pytest.mark.parametrize(
    "fields", [{"temperature": 3}, {"beam_size": 0}, {"best_of": 2}, {"patience": 0}]
)
def test_decoding_options_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        DecodingOptions(**fields)


def make_result(ids=(), logprobs=(), **fields):
    defaults = dict(
        text="", avg_logprob=-0.1, no_speech_prob=0.0, temperature=0.0, compression_ratio=1.0
    )
    return DecodingResult(ids=tuple(ids), logprobs=tuple(logprobs), **(defaults | fields))


def test_fallback_depends_on_all_three_thresholds():
    fallback = TemperatureFallback()
    assert not fallback.needs_fallback(make_result())
    assert fallback.needs_fallback(make_result(compression_ratio=3.0))
    assert fallback.needs_fallback(make_result(avg_logprob=-2.0))
    assert not fallback.needs_fallback(make_result(avg_logprob=-2.0, no_speech_prob=0.9))
    assert fallback.is_silence(make_result(avg_logprob=-2.0, no_speech_prob=0.9))
    assert not fallback.is_silence(make_result(no_speech_prob=0.9))
    # Repetitive text in a window of little speech is a hallucination.
    repetitive = make_result(compression_ratio=3.0, no_speech_prob=0.9)
    assert fallback.is_silence(repetitive) and not fallback.needs_fallback(repetitive)
    assert not fallback.is_silence(make_result(compression_ratio=3.0, no_speech_prob=0.3))


def test_fallback_returns_the_likeliest_attempt():
    """Bug: the last attempt was returned; a German clip became nonsense, log-probability -2.97."""
    fallback, likely = TemperatureFallback(), make_result(avg_logprob=-1.1, temperature=0.2)
    guess = make_result(avg_logprob=-2.9, temperature=1.0)
    assert fallback.best([make_result(avg_logprob=-1.4), likely, guess]) is likely
    repetitive = make_result(avg_logprob=-0.2, compression_ratio=3.0)
    assert fallback.best([repetitive, likely, guess]) is likely
    assert fallback.best([repetitive, replace(repetitive, avg_logprob=-0.1)]).avg_logprob == -0.1
    good = make_result(avg_logprob=-0.9, temperature=0.4)
    assert fallback.best([repetitive, likely, good]) is good


def test_adjacent_timestamps_split_the_tokens(tokenizer):
    begin = tokenizer.timestamp_begin
    ids = (begin, 5, 6, begin + 10, begin + 12, 7, begin + 20)
    parts = split_at_timestamps(make_result(ids, [0.0] * 7), tokenizer)
    assert [part[0] for part in parts] == [ids[:4], ids[4:]]
    assert split_at_timestamps(make_result(), tokenizer) == []


# timing


def test_next_window_begins_at_unfinished_segment_or_undecoded_speech(tokenizer):
    def token_slice(*ids):
        return ids, (0.0,) * len(ids)

    def timestamp(seconds):
        return tokenizer.timestamp_begin + round(seconds / TIME_PRECISION)

    first, closed, open_slice = (
        token_slice(timestamp(0), 7, timestamp(2)),
        token_slice(timestamp(2), 8, timestamp(4)),
        token_slice(timestamp(2), 8),
    )
    speech = [(0.0, 4.0), (10.0, 13.0)]

    def following(slices, spans=()):
        return next_window(slices, 0, 1000, spans, tokenizer)

    assert following([first, closed]) == ([first, closed], 1000, False)
    assert following([first, closed], speech[:1]) == ([first, closed], 1000, False)
    # Speech after the end timestamp counts only within the window of 10 s.
    assert following([first, closed], [(0.0, 4.0), (7.0, 9.0)]) == ([first, closed], 400, False)
    assert following([first, closed], speech) == ([first, closed], 1000, False)
    assert following([first, open_slice]) == ([first], 200, True)  # begins with the open slice
    assert following([open_slice]) == ([open_slice], 1000, True)
    assert following([]) == ([], 1000, True)


def test_dtw_finds_the_cheapest_path():
    rng = np.random.default_rng(0)
    for _ in range(20):
        cost = rng.normal(size=(3, 4))
        rows, columns = timing.dtw(cost)
        steps = set(zip(np.diff(rows).tolist(), np.diff(columns).tolist(), strict=True))
        assert (rows[0], columns[0], rows[-1], columns[-1]) == (0, 0, 2, 3)
        assert steps <= {(0, 1), (1, 0), (1, 1)}
        assert cost[rows, columns].sum() == pytest.approx(cheapest(cost, 2, 3))


def cheapest(cost, i, j):
    """Return the cost of the cheapest path by exhaustive search."""
    if i == j == 0:
        return cost[0, 0]
    sources = [(i - 1, j), (i, j - 1), (i - 1, j - 1)]
    return cost[i, j] + min(cheapest(cost, a, b) for a, b in sources if a >= 0 and b >= 0)


def test_median_filter_equals_numpy_median():
    x = np.random.default_rng(0).normal(size=(2, 20))
    padded = np.pad(x, [(0, 0), (3, 3)], mode="reflect")
    expected = [np.median(padded[:, i : i + 7], axis=-1) for i in range(20)]
    np.testing.assert_allclose(timing.median_filter(x), np.transpose(expected))
    short = x[:, :3]
    assert timing.median_filter(short) is short


def test_punctuation_joins_its_word():
    texts = [" Well", ",", ' "', "yes", '."']
    words = [Word(text, i, i + 1.0, 1.0, (i,)) for i, text in enumerate(texts)]
    ((segment_words, _),) = timing.assign_words(words, [(0.0, 5.0)], [5], last_end=0.0)
    assert [word.text for word in segment_words] == [" Well,", ' "yes', '."']
    assert [word.ids for word in segment_words] == [(0, 1), (2, 3), (4,)]


# voice activity


def speechlike(seconds, seed=0):
    """Return noise that is modulated like four syllables per second."""
    t = np.arange(int(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).normal(size=len(t))
    return (0.1 * noise * np.clip(np.sin(2 * np.pi * 4 * t), 0, 1)).astype(np.float32)


def quiet(seconds, level=1e-4, seed=1):
    return np.random.default_rng(seed).normal(0, level, int(seconds * RATE)).astype(np.float32)


@pytest.mark.parametrize("level", [0.0, 1e-4, 2e-3])
def test_two_stretches_of_speech_give_two_spans(level):
    sound = np.concatenate([quiet(2), speechlike(3), quiet(2), speechlike(4), quiet(1)])
    sound = sound + quiet(12, level, 2)
    spans = vad.speech_spans(sound)
    assert len(spans) == 2
    np.testing.assert_allclose(spans, [(2, 5), (7, 11)], atol=0.1)


@pytest.mark.parametrize("level", [0.0, 1e-5, 1e-3, 0.1, 0.5])
def test_constant_noise_has_no_speech_spans(level):
    assert vad.speech_spans(quiet(20, level)) == []


@pytest.mark.parametrize("kind", [white, pink, hum])
@pytest.mark.parametrize("decibels", [-50, -15])
def test_burst_of_constant_noise_has_no_speech_spans(kind, decibels):
    rng = np.random.default_rng(0)
    sound = quiet(12)
    sound[4 * RATE : 8 * RATE] += kind(rng, 4 * RATE) * 10 ** (decibels / 20)
    assert vad.speech_spans(sound) == []


@pytest.mark.parametrize("kind", [white, pink, hum])
def test_speech_5_db_above_noise_is_found(kind, clip):
    sound = np.concatenate([quiet(3), clip("austen-0890"), quiet(3)])
    power = np.mean(clip("austen-0890") ** 2)
    noise = kind(np.random.default_rng(0), len(sound)) * np.sqrt(power / 10 ** (5 / 10))
    duration = sum(end - start for start, end in vad.speech_spans(sound + noise))
    assert 4.3 < duration < 5.5  # of 5.0 seconds


def test_retained_frames_shorten_pauses_and_spans_are_remapped():
    spans = [(5.0, 6.0), (6.8, 8.0), (20.0, 21.5)]
    frames = vad.retained_frames(spans, 3000)
    assert len(frames) == (9.5 - 3.5 + 23 - 18.5) * 100
    assert vad.remap_spans(spans, frames) == [(1.5, 2.5), (3.3, 4.5), (7.5, 9.0)]
    assert frames[[0, 599, 600]].tolist() == [350, 949, 1850]
    assert vad.remap_spans(spans, np.arange(3000)) == spans
    assert vad.retained_frames([], 3000).size == 0


def test_times_in_a_pause_snap_to_speech():
    spans = [(1.0, 2.0), (4.0, 5.0)]
    for times, expected in (
        ((1.2, 1.8), (1.2, 1.8)),
        ((0.2, 3.0), (1.0, 2.0)),
        ((2.5, 6.0), (4.0, 5.0)),
        ((1.9, 4.5), (4.0, 4.5)),  # just before a pause counts as within it
        ((1.2, 4.1), (1.2, 2.0)),
        ((2.5, 3.5), (2.5, 3.5)),  # no speech: unchanged
    ):
        assert vad.snap_to_speech(*times, spans) == expected
    assert vad.snap_to_speech(1.0, 2.0, []) == (1.0, 2.0)


def test_windows_are_split_in_pauses():
    sound = np.concatenate([speechlike(50), quiet(2), speechlike(10), quiet(1), speechlike(5)])
    spans, levels = vad.speech_spans(sound), vad.loudness(sound)
    windows = vad.split_into_windows(levels, spans)
    assert all(end - start <= 30 for start, end in windows)
    assert windows[0][0] == 0 and windows[-1][1] == len(levels) / 100
    assert all(a == b for (_, a), (b, _) in itertools.pairwise(windows))
    assert 50 < windows[1][1] < 52 and len(windows) == 3
    assert vad.split_into_windows(levels, []) == []


def test_window_ends_in_the_last_pause_that_fits():
    spans = [(0.0, 10.0), (11.0, 20.0), (22.0, 29.5), (31.0, 80.0)]
    assert window_length(0, 9000, 3000, spans) == 2100  # a window of 30.25 s would be too long
    assert window_length(3100, 9000, 3000, spans) == 3000  # no pause: a full window
    assert window_length(7000, 9000, 3000, spans) == 2000  # the rest of the region
    assert window_length(0, 9000, 3000, ()) == 3000


# segments at pauses


def test_segment_with_an_inner_pause_is_split(tokenizer):
    begin = tokenizer.timestamp_begin
    texts = [" One", " two", ".", " Three"]
    ids = [tokenizer.encode(text) for text in texts]
    words = [
        Word(" One", 1.0, 1.4, 1.0, ids[0]),
        Word(" two.", 1.4, 2.2, 1.0, ids[1] + ids[2]),
        Word(" Three", 3.1, 4.4, 1.0, ids[3]),
    ]
    ids = (begin, *itertools.chain(*ids), begin + 50)
    whole = replace(SEGMENT, ids=ids, logprobs=(-0.5,) * len(ids), words=tuple(words), end=4.4)
    whole = replace(whole, text=tokenizer.decode(ids))
    spans = [(1.0, 2.0), (3.4, 4.5)]
    first, second = split_at_pauses(whole, spans, tokenizer)
    assert (first.text, first.start, first.end) == (" One two.", 1.0, 2.2)
    assert (second.text, second.start, second.end) == (" Three", 3.1, 4.4)
    assert first.ids + second.ids == whole.ids and second.ids[-1] == begin + 50
    assert len(first.logprobs) == len(first.ids) and first.words == tuple(words[:2])
    assert has_inner_pause(whole, spans) and not has_inner_pause(first, spans)
    assert split_at_pauses(whole, [(1.0, 4.5)], tokenizer) == [whole]


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
TRANSCRIPT = Transcript(language="en", duration=3663.0, text="So a <b> -->", segments=(SEGMENT,))


def test_render_writes_every_format():
    srt = subtitles.render(TRANSCRIPT, "srt")
    assert srt == "1\n00:00:01,000 --> 01:01:02,000\nSo a <b> ->\n"
    vtt = subtitles.render(TRANSCRIPT, "vtt")
    assert vtt == "WEBVTT\n\n00:00:01.000 --> 01:01:02.000\nSo a &lt;b&gt; -&gt;\n"
    tsv = subtitles.render(TRANSCRIPT, "tsv", words=True)
    assert tsv.splitlines() == ["start\tend\ttext", "1000\t1200\tSo", "3661500\t3662000\ta <b> -->"]
    assert subtitles.render(TRANSCRIPT, "text") == "So a <b> -->\n"
    verbose = subtitles.verbose_json(TRANSCRIPT)
    assert verbose["language"] == "english" and verbose["words"][0]["word"] == "So"
    assert subtitles.format_timestamp(59.9996) == "00:01:00.000"
    with pytest.raises(ValueError, match="format must be one of"):
        subtitles.render(TRANSCRIPT, "docx")


# model.bin


def pack_model(variables, aliases=()):
    def string(text):
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    kinds = {"float32": 0, "int8": 1, "float16": 4}
    data = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        data += string(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        data += struct.pack("<BI", kinds[str(array.dtype)], array.nbytes) + array.tobytes()
    data += struct.pack("<I", len(aliases))
    return data + b"".join(string(a) + string(b) for a, b in aliases)


def test_ctranslate2_model_bin_is_read_and_dequantized(tmp_path):
    path = tmp_path / "model.bin"
    half = np.arange(6, dtype=np.float16).reshape(2, 3)
    narrow = np.array([[127, -64], [1, 0]], np.int8)
    scale = np.array([127.0, 2.0], np.float32)
    variables = {"a": half, "b/weight": narrow, "b/weight_scale": scale}
    path.write_bytes(pack_model(variables, [("c", "a")]))
    spec, arrays = ctranslate2.read(path)
    assert spec == "WhisperSpec" and set(arrays) == {"a", "b/weight", "c"}
    np.testing.assert_array_equal(arrays["c"], half)
    np.testing.assert_allclose(arrays["b/weight"], [[1, -64 / 127], [0.5, 0]])


def test_damaged_ctranslate2_model_bin_is_refused(tmp_path):
    path, valid = (
        tmp_path / "model.bin",
        pack_model({"a": np.zeros((2, 3), np.float32)}, [("c", "a")]),
    )
    for size in range(len(valid)):
        path.write_bytes(valid[:size])
        with pytest.raises(ValueError, match="truncated|empty"):
            ctranslate2.read(path)
    huge = valid.replace(struct.pack("<II", 2, 3), struct.pack("<II", 2**31, 2**31))
    for data, message in ((huge, "got 24"), (b"\x07" + valid[1:], "got 7")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            ctranslate2.read(path)
