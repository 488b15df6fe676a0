"""The command `python -m bpe`."""

import io
import json
import os
import re
import subprocess
import sys

import pytest

import bpe
from bpe.__main__ import format_colored, format_plain, main
from bpe.pretokenize import PATTERNS
from tests.bpe import tiny
from tests.naming import names


@pytest.fixture
def vocab(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tiny.tokenizer_json()))
    return str(path)


@pytest.fixture
def run(capsysbinary, monkeypatch):
    """Return a function that runs a command; its result is (status, stdout, stderr)."""

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        status = main(list(arguments))
        out, err = capsysbinary.readouterr()
        return status, out.decode(), err.decode()

    return run


# show


def test_show_in_pipe_prints_one_line_per_token(run, vocab):
    status, out, _ = run("--vocab", vocab, "low lower\n<|im_end|>")
    lines = [line.split("\t") for line in out.splitlines()]
    assert status == 0
    assert [text for _, text in lines] == ["'low'", "' lower'", "'\\n'", "'<|im_end|>'"]
    assert lines[-1][0] == "2"
    assert run("show", "--vocab", vocab, "low lower\n<|im_end|>") == (0, out, "")


def test_text_from_argument_file_or_stdin_is_encoded(run, vocab, tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("low", encoding="utf-8")
    two.write_text(" lower", encoding="utf-8")
    expected = run("encode", "--vocab", vocab, "low lower")
    assert run("encode", "--vocab", vocab, stdin="low lower") == expected
    assert run("encode", "--vocab", vocab, "-f", str(one), "-f", str(two)) == expected
    assert run("encode", "--vocab", vocab, "low", "-f", str(two)) == expected
    two.write_bytes(b"\xff")
    status, out, err = run("encode", "--vocab", vocab, "-f", str(two))
    assert status == 1 and not out and names(err, two, "UTF-8")


def test_colors_depend_on_terminal_and_no_color(run, vocab, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[30;48;5;" in run("--vocab", vocab, "low lower")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run("--vocab", vocab, "low lower")[1]


def test_control_and_partial_characters_are_escaped():
    output = format_colored([1, 2, 3], [b"\x1b[2J", b"a\nb", b"\xf0\x9f"])
    assert "\x1b[2J" not in output
    assert "\\x1b[2J" in output and "\\xf0\\x9f" in output and "\\n" in output
    assert format_plain([7], [b"\xf0\x9f"]) == "7\tb'\\xf0\\x9f'"


# encode and decode


def test_encode_then_decode_returns_the_text(run, vocab):
    text = "low 🙂 lower\n<|im_end|>"
    _, out, _ = run("encode", "--vocab", vocab, text)
    assert list(map(int, out.split())) == tiny.encoding().encode(text, allowed_special="all")
    _, as_json, _ = run("encode", "--vocab", vocab, "--json", text)
    assert json.loads(as_json) == {"ids": list(map(int, out.split()))}
    assert run("decode", "--vocab", vocab, *out.split()) == (0, text, "")
    assert run("decode", "--vocab", vocab, stdin=out) == (0, text, "")
    assert run("decode", "--vocab", vocab, stdin=str(json.loads(as_json)["ids"])) == (0, text, "")


def test_decode_of_partial_character_writes_bytes(vocab, capsysbinary):
    id = tiny.encoding().encode("🙂")[0]
    assert main(["decode", "--vocab", vocab, str(id)]) == 0
    assert capsysbinary.readouterr().out == b"\xf0\x9f"


@pytest.mark.parametrize(
    ("ids", "facts"),
    [(["1", "x"], ["'x'"]), (["99999"], [99999]), (["-1"], ["-1", 0])],
)
def test_decode_of_invalid_ids_fails(run, vocab, ids, facts):
    status, out, err = run("decode", "--vocab", vocab, *ids)
    assert status == 1 and not out and names(err, *facts)


@pytest.mark.parametrize("command", ["show", "encode", "count", "compare", "explain"])
def test_argument_that_is_not_utf8_fails(run, vocab, command):
    """Bug: bytes that are not UTF-8 arrive as lone surrogates and caused a traceback."""
    status, out, err = run(command, "--vocab", vocab, "low \udcff")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert names(err, "python -m bpe", "UTF-8", "character 4", r"'\udcff'")


# count, compare and explain


def test_count_prints_units_and_units_per_token(run, vocab):
    status, out, _ = run("count", "--vocab", vocab, "low lower low 12")
    assert status == 0
    assert [line.split() for line in out.splitlines()] == [
        ["5", "tokens"],
        ["16", "characters", "3.20", "per", "token"],
        ["4", "words", "0.80", "per", "token"],
        ["16", "bytes", "3.20", "per", "token"],
    ]
    _, out, _ = run("count", "--vocab", vocab, "--json", "low lower low 12")
    assert json.loads(out) == {
        "tokens": 5, "characters": 16, "words": 4, "bytes": 16,
        "characters_per_token": 3.2, "words_per_token": 0.8,
    }  # fmt: skip


def test_compare_prints_each_vocabulary(run, vocab, tmp_path):
    other = tmp_path / "other.json"
    text = "low lower"
    assert run("train", "-q", "--vocab-size", "257", "-o", str(other), vocab)[0] == 0
    status, out, _ = run("compare", "--vocab", vocab, "--vocab", str(other), text)
    assert status == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [[vocab, "2"], [str(other), "9"]]
    _, out, _ = run("compare", "--vocab", vocab, "--vocab", str(other), "--json", text)
    assert [measures["tokens"] for measures in json.loads(out).values()] == [2, 9]


def test_explain_prints_merges(run, vocab):
    status, out, _ = run("explain", "--vocab", vocab, "lower")
    assert status == 0 and "l───o───w   e───r     er = e + r" in out


def test_gguf_without_package_names_it(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF")
    status, out, err = run("--vocab", str(path), "x")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert str(path) in err and "pip install gguf" in err


# train


def test_train_writes_files_and_prints_paths(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("low lower lowest slow slower\n" * 3, encoding="utf-8")
    as_json, ranks = tmp_path / "mine.json", tmp_path / "mine.tiktoken"
    status, out, err = run(
        "train", str(text), "-o", str(as_json), "-o", str(ranks), "--vocab-size", "265",
        "--pattern", "cl100k", "--special", "<a>", "--special", "<b>",
    )  # fmt: skip
    assert status == 0 and out.splitlines() == [str(as_json), str(ranks)]
    assert names(err, 265) and "\r" not in err, "progress is shown on a terminal only"
    encoding = bpe.load(as_json).encoding
    assert encoding.n_vocab == 265 and encoding.special_tokens == {"<a>": 263, "<b>": 264}
    assert encoding.decode_tokens_bytes(encoding.encode("1234")) == [b"1", b"2", b"3", b"4"]
    assert encoding.patterns[0].startswith("'(?i:[sdmt]"), "the requested pattern"
    assert len(ranks.read_text().splitlines()) == 263
    assert run("train", "-q", str(text), "-o", str(as_json))[1:] == (f"{as_json}\n", "")


def test_train_on_terminal_shows_progress(run, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{i:x}" for i in range(50_000)), encoding="utf-8")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    _, _, err = run("train", str(text), "-o", str(tmp_path / "x.json"), "--vocab-size", "900")
    assert re.search(r"\r\x1b\[K.*\b256\b.*\b643\b", err)
    _, _, err = run("train", "-q", str(text), "-o", str(tmp_path / "x.json"))
    assert err == ""


def test_train_with_invalid_arguments_fails_before_training(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"fine\nnot \xe4\n")
    status, out, err = run("train", str(text), "-o", str(tmp_path / "x.bin"))
    assert status == 1 and names(err, "x.bin", ".tiktoken", ".json")
    status, out, err = run("train", str(text), "-o", str(tmp_path / "x.json"))
    assert status == 1 and names(err, text, "line 2", "UTF-8", "0xe4")
    status, out, err = run("train", str(tmp_path / "no.txt"), "-o", str(tmp_path / "x.json"))
    assert status == 1 and str(tmp_path / "no.txt") in err
    assert not (tmp_path / "x.json").exists()


def test_misspelled_pattern_suggests_names(run, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "x.json"
    text.write_text("ab ab", encoding="utf-8")
    train = lambda pattern: run("train", "-q", str(text), "-o", str(out), "--pattern", pattern)  # noqa: E731
    status, _, err = train("gtp2")
    assert status == 1 and names(err, "--pattern", "gtp2", "gpt2")
    assert not names(err, "cl100k"), "only the close match is listed"
    status, _, err = train("nonsense")
    assert status == 1 and names(err, "--pattern", "nonsense", *PATTERNS)
    assert not out.exists()
    assert train(r"\w+|\W+")[0] == train("(?:ab)")[0] == 0


# The program


def test_missing_vocabulary_fails_on_stderr(run, tmp_path):
    status, out, err = run("--vocab", str(tmp_path / "no.gguf"), "x")
    assert status == 1 and out == "" and str(tmp_path / "no.gguf") in err
    status, out, err = run("--vocab", "gpt-nonsense", "x")
    assert status == 1 and names(err, "--vocab", "gpt-nonsense", "o200k_base")


def test_vocab_by_encoding_or_model_name_is_loaded(run):
    ids = run("encode", "--vocab", "cl100k_base", "hello world")[1]
    assert ids == "15339 1917\n"
    assert run("encode", "--vocab", "gpt-4", "hello world")[1] == ids
    assert run("encode", "hello world")[1] == "24912 2375\n", "the default is o200k_base"
    lines = run("compare", "hello world")[1].splitlines()[1:]
    assert [line.split()[0] for line in lines] == bpe.list_encoding_names()


def test_missing_option_exits_with_2(run):
    with pytest.raises(SystemExit) as error:
        run("train", "file.txt")
    assert error.value.code == 2


def test_program_with_closed_pipe_exits_silently(vocab):
    command = [sys.executable, "-m", "bpe", "--vocab", vocab]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run([*command, "low é"], env=environment, capture_output=True, check=True)
    assert result.stdout.splitlines()[0].endswith(b"'low'") and b"\\xc3" in result.stdout
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        process.stdin.write(b"x " * 100_000)
        process.stdin.close()
        assert process.stderr.read() == b""
