"""Training files: invalid lines are reported, and unambiguous problems are fixed."""

import json
import tracemalloc
from pathlib import Path

import pytest

from tests.naming import names, naming
from tests.training.tokens import TOKENIZER, chat
from training import check, examples, fixes

ROWS = [chat(f"q{i}", f"a{i}") for i in range(12)]
LINES = [json.dumps(row).encode() for row in ROWS]
GOOD = b"\n".join(LINES) + b"\n"


def checked(tmp_path: Path, content: bytes, **options) -> check.Report:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    return check.check(path, TOKENIZER, **({"max_tokens": 60} | options))


def replaced(number: int, line: bytes) -> bytes:
    """Return the contents of the valid file with line `number` replaced."""
    return b"\n".join([*LINES[: number - 1], line, *LINES[number:]])


def test_valid_file_has_no_problems(tmp_path):
    report = checked(tmp_path, GOOD)
    assert report.ok and not report.problems and report.kind == "chat"
    expected = [examples.encode(row, "chat", TOKENIZER) for row in ROWS]
    assert report.examples == 12 and report.tokens == sum(map(len, expected))
    assert report.target_tokens == sum(int(example.weights.sum()) for example in expected)
    assert report.longest == max(map(len, expected)) and report.lengths.total() == 12
    assert all(report.longest <= upper for upper in report.lengths)
    _, loaded = check.read_examples(tmp_path / "data.jsonl", TOKENIZER, max_tokens=60)
    assert [example.line for example in loaded] == list(range(1, 13))
    assert all((a.ids == b.ids).all() for a, b in zip(loaded, expected, strict=True))


@pytest.mark.parametrize(
    ("content", "line", "code", "facts"),
    [
        (b"", None, "empty_file", []),
        (b"\n\n", None, "empty_file", []),
        (LINES[0], None, "invalid_n_examples", [1, 10]),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" * 99, 3, "binary", []),
        (b"\xff\xfe" + GOOD.decode().encode("utf-16-le"), 1, "utf16", ["UTF-16"]),
        (GOOD.replace(b"\n", b"\r"), 1, "carriage_return_only", []),
        (json.dumps(ROWS).encode(), 1, "json_array", ['"["']),
        (json.dumps(ROWS, indent=2).encode(), 1, "json_array", ['"["']),
        (json.dumps(ROWS[0], indent=2).encode(), 1, "invalid_json", ["Example 1"]),
        (replaced(7, '{"a": "caf\u00e9"}'.encode("latin-1")), 7, "not_utf8", ["0xe9"]),
        (replaced(5, b"{oops"), 5, "invalid_json", ["Example 5"]),
        (replaced(5, b'"text"'), 5, "not_an_object", ["Example 5"]),
        (
            replaced(4, b'{"prompt": "a", "completion": "b"}'),
            4,
            "missing_key",
            ["Example 4", '"messages"'],
        ),
        (
            replaced(9, LINES[8].replace(b"assistant", b"bot")),
            9,
            "invalid_role",
            ["Example 9", "message 2", "'bot'"],
        ),
        (replaced(2, json.dumps(chat("q" * 99, "a")).encode()), 2, "too_long", [60]),
        (
            b'{"input": {}, "preferred_output": [], "non_preferred_output": []}\n' * 10,
            1,
            "unknown_format",
            ["dpo"],
        ),
        (b'{"text": "a"}\n' * 10, 1, "unknown_format", ["prompt", "completion", "chat"]),
    ],
)
def test_invalid_file_reports_line_and_code_of_its_problem(tmp_path, content, line, code, facts):
    report = checked(tmp_path, content)
    assert not report.ok
    problem = report.problems[0]
    assert (problem.line, problem.code) == (line, code) and names(problem.message, *facts)
    error = report.error()
    assert error["param"] == "training_file" and problem.message in error["message"]
    assert error["code"] in ("invalid_training_file", "invalid_n_examples")


def test_report_error_has_the_wording_of_openai(tmp_path):
    error = checked(tmp_path, replaced(9, LINES[8].replace(b'"role": "user", ', b""))).error()
    assert error["message"] == (  # the words of OpenAI's API
        "The job failed due to an invalid training file. Invalid file format. "
        'Example 9, message 1 is missing key "role".'
    )
    error = checked(tmp_path, b"\n".join([b"{"] * 12)).error("validation_file")
    assert error["code"] == "invalid_validation_file" and names(error["message"], 11)


def test_example_rejected_by_the_template_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(TOKENIZER.chat_template, "source", "{{ raise_exception('no') }}")
    TOKENIZER.chat_template.__dict__.pop("_template", None)
    try:
        report = checked(tmp_path, GOOD)
        assert report.counts == {"refused_by_template": 12} and report.problems[2].line == 3
    finally:
        TOKENIZER.chat_template.__dict__.pop("_template", None)


def test_file_too_large_is_not_read(tmp_path):
    path = tmp_path / "huge.jsonl"
    with open(path, "wb") as file:
        file.truncate(300_000_000)
    tracemalloc.start()
    report = check.check(path, TOKENIZER, max_tokens=60)
    assert report.problems[0].code == "file_too_large"
    assert names(report.problems[0].message, "286 MB", "256 MB")
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@pytest.mark.slow  # writes and checks a large file
@pytest.mark.heavy
def test_check_of_many_invalid_lines_uses_bounded_memory(tmp_path):
    """The first hundred problems are listed, and all are counted."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"messages": 1}\n' * 100_000)
    tracemalloc.start()
    report = check.check(path, TOKENIZER, max_tokens=60)
    assert report.counts == {"invalid_type": 100_000} and len(report.problems) == check.MAX_LISTED
    assert tracemalloc.get_traced_memory()[1] < 500_000
    tracemalloc.stop()


def test_harmless_irregularities_are_counted_as_notes(tmp_path):
    report = checked(tmp_path, b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\r\n")
    assert report.ok and report.examples == 12 and not report.warnings
    assert report.notes == {"byte_order_mark": 1, "carriage_return": 13, "blank_line": 1}


def test_duplicate_examples_are_accepted_with_a_warning(tmp_path):
    """Bug: duplicates were refused. OpenAI's API accepts them, as a way to weight an example."""
    spaced = LINES[4].replace(b": ", b" :  ")  # the same JSON with other white space
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + b"\n".join([LINES[4], LINES[0], spaced]))
    report, loaded = check.read_examples(path, TOKENIZER, max_tokens=60)
    assert report.ok and not report.problems and report.examples == len(loaded) == 15
    assert (loaded[12].ids == loaded[14].ids).all() and (loaded[12].ids == loaded[4].ids).all()
    assert report.notes == {"duplicate": 3}
    (warning,) = report.warnings
    assert (warning.code, warning.line) == ("duplicate", 13)
    assert check.report_lines(report)[-1] == f"warning: {warning.message}"
    assert check.summary(report)["warnings"][0]["line"] == 13


def test_minimum_number_of_examples_counts_duplicates(tmp_path):
    assert checked(tmp_path, b"\n".join(LINES[:1] * 10)).ok
    assert not checked(tmp_path, b"\n".join(LINES[:1] * 9)).ok, "the minimum is ten"


def test_repeated_invalid_line_is_not_a_duplicate(tmp_path):
    long = json.dumps(chat("q" * 99, "a")).encode()
    report = checked(tmp_path, b"\n".join([*LINES, long, long, b"{}", b"{}"]))
    assert not report.warnings and report.counts["too_long"] == 2


def test_validation_file_needs_one_example(tmp_path):
    assert checked(tmp_path, LINES[0], minimum=1).ok


# Fixes


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"\xef\xbb\xbf" + GOOD, "byte order mark"),
        (GOOD.replace(b"\n", b"\r\n"), 12),
        (GOOD.replace(b"\n", b"\r"), "carriage returns"),
        (b"\r".join(LINES[:2]) + b"\n" + b"\n".join(LINES[2:]), "carriage returns"),
        (GOOD + b"\n\n", 2),
        (json.dumps(ROWS, indent=1).encode(), "array"),
        (b"\xff\xfe" + GOOD.decode().encode("utf-16-le"), "UTF-8"),
    ],
)
def test_unambiguous_problem_is_fixed(tmp_path, content, fact):
    report = checked(tmp_path, content)
    (fix,) = available = fixes.available_fixes(report)
    assert names(fix, fact)
    target = tmp_path / "fixed.jsonl"
    assert fixes.fix_file(report.path, target, TOKENIZER, max_tokens=60) == available
    after = check.check(target, TOKENIZER, max_tokens=60)
    assert after.ok and not after.notes and after.examples == 12
    assert [json.loads(line) for line in target.read_bytes().splitlines()] == ROWS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "fixed.jsonl"]


def test_fix_keeps_duplicate_examples(tmp_path):
    """Bug: duplicates were removed, so that the example lost the weight of its copies."""
    report = checked(tmp_path, GOOD + LINES[0] + b"\n\n" + LINES[3])
    target = tmp_path / "fixed.jsonl"
    (fix,) = fixes.fix_file(report.path, target, TOKENIZER, max_tokens=60)
    assert names(fix, 1) and report.notes["blank_line"] == 1
    rows = [json.loads(line) for line in target.read_bytes().splitlines()]
    assert rows == [*ROWS, ROWS[0], ROWS[3]]


def test_example_too_long_is_truncated_or_removed(tmp_path):
    long = chat("q", "a", "q", "b", "q" * 60, "c")
    report = checked(tmp_path, GOOD + json.dumps(long).encode() + b"\n"
                     + json.dumps(chat("q" * 99, "a")).encode(), max_tokens=70)  # fmt: skip
    assert [problem.line for problem in report.problems] == [13, 14]
    (fix,) = available = fixes.available_fixes(report)
    assert names(fix, 2)
    assert fixes.fix_file(report.path, report.path, TOKENIZER, max_tokens=70) == available
    rows = [json.loads(line) for line in report.path.read_bytes().splitlines()]
    assert rows == [*ROWS, {"messages": long["messages"][:4]}]


def test_ambiguous_problem_is_not_fixed(tmp_path):
    bad = [b"{oops", LINES[0].replace(b"user", b"usr"), '{"prompt": "é"}'.encode("latin-1")]
    report = checked(tmp_path, b"\n".join([*LINES, *bad]))
    assert fixes.available_fixes(report) == []
    assert fixes.fix_file(report.path, tmp_path / "b", TOKENIZER, max_tokens=60) == []
    assert not (tmp_path / "b").exists(), "without a fix no file is written"
    report.path.write_bytes(b"\n".join([*LINES, b"", *bad]))
    (fix,) = fixes.fix_file(report.path, tmp_path / "b", TOKENIZER, max_tokens=60)
    assert names(fix, 1)
    assert (tmp_path / "b").read_bytes().splitlines() == [*LINES, *bad]


def test_fix_of_damaged_json_array_raises_and_leaves_no_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(json.dumps(ROWS).encode()[:-1])
    with pytest.raises(ValueError, match=naming(path, "array")):
        fixes.fix_file(path, tmp_path / "b", TOKENIZER, max_tokens=60)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_message_of_a_problem_is_short_valid_utf8(tmp_path):
    """Bug: with a lone surrogate in a key, every response with the job was an error 500."""
    bad = [b'{"messages": [], "\\ud800": 1}', json.dumps({"messages": [], "k" * 10**6: 1}).encode()]
    report = checked(tmp_path, b"\n".join([*LINES, *bad]))
    assert not report.ok
    for problem in report.problems:
        assert len(problem.message.encode("utf-8")) < 2000
    assert any("\\ud800" in problem.message for problem in report.problems)
