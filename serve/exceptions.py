"""The exceptions of commands, with their exit codes, and those of the registry.

Exit codes: 0 success, 1 failure, 2 wrong usage, 3 model or file not found or not usable, 4 download
failed or wrong checksum, 5 does not fit (context, memory, disk), 6 a check failed, 130 interrupted.
A message says what is wrong and what to do.
"""


class Failure(Exception):
    """The base class of the errors that end a command."""

    exit_code = 1


class WrongUsage(Failure):
    """An argument of a command is invalid."""

    exit_code = 2


class NotFound(Failure):
    """A model or file does not exist."""

    exit_code = 3


class Unreachable(Failure):
    """A server could not be reached, or does not have the requested file."""

    exit_code = 4


class Corrupt(Failure):
    """Bytes do not match the expected size or checksum, or a file is damaged."""

    exit_code = 4


class Forbidden(Failure):
    """A download server requires other credentials."""

    exit_code = 4


class RateLimited(Unreachable):
    """A download server refuses requests for a while, because there were too many."""


class Unusable(Failure):
    """The files of a model are damaged, or of a kind that is not supported."""

    exit_code = 3


class DoesNotFit(Failure):
    """The input exceeds the model's context, or a model or file exceeds the memory or the disk."""

    exit_code = 5


class CheckFailed(Failure):
    """A check of data or files, such as `pellucid finetune check`, found problems."""

    exit_code = 6


class UnknownModel(Exception):
    """No served model has this id or alias.

    Attributes:
        name: the requested name.
        not_pulled_id: the id of the catalogue model that the name stands for, if it is not pulled.
    """

    def __init__(self, name: str, not_pulled_id: str | None = None):
        super().__init__(f"no model has the id or alias {name!r}")
        self.name, self.not_pulled_id = name, not_pulled_id


class CannotLoad(Exception):
    """A served model could not be loaded.

    Attributes:
        id: the id of the model.
        reason: why.
        is_busy: whether a later attempt may succeed, because models that serve requests now use
            the memory.
    """

    def __init__(self, id: str, reason: str, *, is_busy: bool):
        super().__init__(f"{id} cannot be loaded: {reason}")
        self.id, self.reason, self.is_busy = id, reason, is_busy
