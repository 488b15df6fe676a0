"""The command `python -m bpe`."""

import json

import pytest

from bpe.__main__ import coloured, main, plain
from tests.bpe import tiny


@pytest.fixture
def vocab(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tiny.tokenizer_json()))
    return str(path)


def test_in_a_pipe_it_is_one_line_a_token(vocab, capsys):
    assert main(["--vocab", vocab, "low lower\n<|im_end|>"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [text for _, text in lines] == ["'low'", "' lower'", "'\\n'", "'<|im_end|>'"]
    assert lines[-1][0] == "2"


def test_it_reads_standard_input(vocab, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("low"))
    assert main(["--vocab", vocab]) == 0
    assert "'low'" in capsys.readouterr().out


def test_a_missing_vocabulary_is_an_error_on_stderr(tmp_path, capsys):
    assert main(["--vocab", str(tmp_path / "no.gguf"), "x"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "no.gguf: no such file" in err


def test_colours(vocab, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(["--vocab", vocab, "low lower"])
    assert "\x1b[30;48;5;" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    main(["--vocab", vocab, "low lower"])
    assert "\x1b" not in capsys.readouterr().out


def test_pieces_that_move_the_cursor_or_are_half_a_character_are_escaped():
    shown = coloured([1, 2, 3], [b"\x1b[2J", b"a\nb", b"\xf0\x9f"])
    assert "\x1b[2J" not in shown
    assert "\\x1b[2J" in shown and "\\xf0\\x9f" in shown and "\\n" in shown
    assert plain([7], [b"\xf0\x9f"]) == "7\tb'\\xf0\\x9f'"
