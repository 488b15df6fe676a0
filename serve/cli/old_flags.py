"""Earlier names of flags, which are accepted for one release and not shown in help.

`OLD_FLAGS` lists them by command. The root command calls `rename` on its arguments before it
parses them.
"""

from collections.abc import Collection, Sequence

OLD_FLAGS: dict[tuple[str, ...], dict[str, str]] = {
    ("bench",): {"--forms": "--all-impls", "--try": "--impl", "--where": "--profile"},
    ("image",): {"--rule": "--sampler", "--strip": "--trajectory"},
    ("transcribe",): {
        "--words": "--word-timestamps",
        "--batch": "--batch-size",
        "--beams": "--beam-size",
    },
    ("tokenize",): {"--special": "--parse-special"},
    ("finetune", "check"): {"--mend": "--fix"},
}


def command_of(args: Sequence[str]) -> tuple[str, ...]:
    """Return the command of `OLD_FLAGS` that the arguments run, or () for any other command."""
    return next((name for name in OLD_FLAGS if tuple(args[: len(name)]) == name), ())


def rename(
    args: Sequence[str], takes_value: Collection[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Replace old flags by new ones.

    Arguments after `--` and the values of other options stay as they are.

    Args:
        args: the arguments of the root command, the name of the command first.
        takes_value: the options of the command that take the next argument as their value.

    Returns:
        The new arguments, and the replaced flags as a map from the old name to the new one.
    """
    new_names = OLD_FLAGS.get(command_of(args), {})
    renamed: list[str] = []
    used: dict[str, str] = {}
    is_value = False
    for number, arg in enumerate(args):
        if arg == "--" and not is_value:
            return [*renamed, *args[number:]], used
        name, equals, value = arg.partition("=")
        if name in new_names and not is_value:
            used[name] = new_names[name]
            arg = new_names[name] + equals + value
        renamed.append(arg)
        is_value = not is_value and arg in takes_value
    return renamed, used
