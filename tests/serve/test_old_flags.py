"""Flags under their earlier names: each does what the new flag does, and help does not show it."""

import argparse
import importlib
from typing import Any

import pytest
import typer.main

from serve.cli import old_flags
from serve.cli.main import app

# Arguments that each command needs, and a value for each flag that takes one.
PELLUCID = {
    ("bench",): [],
    ("image",): ["a cat"],
    ("transcribe",): ["a.ogg"],
    ("tokenize",): ["text"],
    ("finetune", "check"): ["a.jsonl"],
}
VALUES = {"--try": "norm=fused", "--rule": "heun", "--batch": "2", "--beams": "3", "--mend": "b"}


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> dict[str, Any]:
    """Return the parameters that a `pellucid` command is called with."""
    root: Any = typer.main.get_command(app)
    command, parameters = root, {}
    for name in old_flags.command_of(args):
        command = command.commands[name]
    monkeypatch.setattr(command, "callback", lambda **values: parameters.update(values))
    root.main(list(args), prog_name="pellucid", standalone_mode=False)
    assert parameters, "the command is not called"
    return parameters


def words(flag: str, value: str | None) -> list[str]:
    return [flag] if value is None else [flag, value]


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [(name, *pair) for name, flags in old_flags.OLD_FLAGS.items() for pair in flags.items()],
)
def test_old_pellucid_flag_does_what_the_new_one_does(command, old, new, monkeypatch, capsys):
    args, value = [*command, *PELLUCID[command]], VALUES.get(old)
    expected = run(monkeypatch, *args, *words(new, value))
    assert capsys.readouterr().err == ""
    assert run(monkeypatch, *args, *words(old, value)) == expected != run(monkeypatch, *args)
    assert capsys.readouterr().err == f"{old} is now {new}\n"
    if value is not None:
        assert run(monkeypatch, *args, f"{old}={value}") == expected
        assert capsys.readouterr().err == f"{old} is now {new}\n"


@pytest.mark.parametrize("command", old_flags.OLD_FLAGS)
def test_help_of_pellucid_shows_new_flags_only(command, capsys):
    typer.main.get_command(app).main([*command, "--help"], "pellucid", standalone_mode=False)
    shown = capsys.readouterr().out.replace("\n", " ").split()
    for old, new in old_flags.OLD_FLAGS[command].items():
        assert new in shown and old not in shown


def test_old_names_after_two_dashes_or_as_values_are_not_renamed(monkeypatch, capsys):
    parameters = run(monkeypatch, "transcribe", "--prompt", "--words", "--", "--batch")
    assert parameters["prompt"] == "--words" and not parameters["word_timestamps"]
    assert [str(file) for file in parameters["files"]] == ["--batch"]
    assert capsys.readouterr().err == ""


def test_old_name_of_another_command_is_unknown(monkeypatch):
    args, used = old_flags.rename(["chat", "--words", "--mend", "x"])
    assert args == ["chat", "--words", "--mend", "x"] and used == {}


# The programs of the packages: module, arguments, then pairs of the old and the new flag.
PROGRAMS: list[tuple[str, list[str], list[tuple[list[str], list[str]]]]] = [
    (
        "audio.__main__",
        ["--model", "m", "a.ogg"],
        [(["--words"], ["--word-timestamps"]), (["--batch", "2"], ["--batch-size", "2"])],
    ),
    (
        "bpe.__main__",
        ["train", "a.txt", "-o", "v.json"],
        [
            (
                ["--special", "<a>", "--special", "<b>"],
                ["--special-token", "<a>", "--special-token", "<b>"],
            )
        ],
    ),
    (
        "diffusion.__main__",
        ["--encoder", "e", "--out", "o.png", "a cat"],
        [(["--rule", "heun"], ["--sampler", "heun"]), (["--strip"], ["--trajectory"])],
    ),
    (
        "transformer.bench.__main__",
        [],
        [
            (["--forms"], ["--all-impls"]),
            (["--try", "a=b", "--try", "c=d"], ["--impl", "a=b", "--impl", "c=d"]),
            (["--where"], ["--profile"]),
        ],
    ),
    ("training.__main__", ["check", "a", "--model", "m"], [(["--mend", "b"], ["--fix", "b"])]),
    (
        "training.__main__",
        ["finetune", "--model", "m", "--data", "d", "--out", "o"],
        [(["--format", "bfloat16"], ["--dtype", "bfloat16"])],
    ),
    (
        "training.recipes.emoji",
        ["denoiser", "--encoder", "e", "--out", "o"],
        [(["--pack", "p", "--start", "s"], ["--dataset", "p", "--init-from", "s"])],
    ),
    (
        "training.recipes.emoji",
        ["upscaler", "--out", "o"],
        [(["--pack", "p"], ["--dataset", "p"])],
    ),
    (
        "training.recipes.emoji_measures",
        ["numbers", "--model", "m", "--encoder", "e", "--out", "o"],
        [(["--pack", "p", "--tower", "t"], ["--dataset", "p", "--judge", "t"])],
    ),
    (
        "training.recipes.emoji_measures",
        ["sheet", "--model", "m", "--encoder", "e", "--out", "o"],
        [(["--ending", ", flat"], ["--prompt-suffix", ", flat"])],
    ),
    (
        "training.recipes.clip_judge",
        ["--packages", "p", "--out", "o"],
        [(["--pack", "p"], ["--dataset", "p"])],
    ),
]


class Parsed(Exception):
    """Raised in place of running a program; its argument holds the parsed arguments."""


@pytest.mark.heavy  # imports every package
@pytest.mark.parametrize(
    ("module", "args", "old", "new"),
    [(module, args, *pair) for module, args, pairs in PROGRAMS for pair in pairs],
)
def test_old_flag_of_a_package_does_what_the_new_one_does(module, args, old, new, monkeypatch):
    main, parse_args = importlib.import_module(module).main, argparse.ArgumentParser.parse_args

    def parse_only(self, *arguments):
        raise Parsed(vars(parse_args(self, *arguments)))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    namespaces = []
    for flags in (old, new):
        with pytest.raises(Parsed) as parsed:
            main([*args, *flags])
        namespaces.append(parsed.value.args[0])
    assert namespaces[0] == namespaces[1]


@pytest.mark.heavy  # imports every package
@pytest.mark.parametrize(("module", "args", "pairs"), PROGRAMS)
def test_help_of_a_package_shows_new_flags_only(module, args, pairs, capsys):
    command = args[:1] if args and not args[0].startswith("-") else []
    with pytest.raises(SystemExit):
        importlib.import_module(module).main([*command, "--help"])
    shown = capsys.readouterr().out.replace("[", " ").replace("]", " ").split()
    for old, new in pairs:
        for flag in (word for word in new if word.startswith("--")):
            assert flag in shown
        for flag in (word for word in old if word.startswith("--")):
            assert flag not in shown
