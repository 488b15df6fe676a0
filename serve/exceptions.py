"""What can go wrong in a command, each with the exit code a script can rely on.

0 it worked, 1 the request failed, 2 wrong usage, 3 model or file not found, 4 source unreachable or
checksum wrong, 5 does not fit (context, disk), 6 a check failed, 130 interrupted. A message says
what would work.
"""


class Failure(Exception):
    """The request failed."""

    exit_code = 1


class WrongUsage(Failure):
    """The command was given something it cannot take."""

    exit_code = 2


class NotFound(Failure):
    """There is no such model or file."""

    exit_code = 3


class Unreachable(Failure):
    """A source did not give what was asked of it."""

    exit_code = 4


class Corrupt(Failure):
    """Bytes are not those that were promised."""

    exit_code = 4


class DoesNotFit(Failure):
    """Too much for the model's context or for the disk."""

    exit_code = 5


class CheckFailed(Failure):
    """Something was looked at, and is not in order."""

    exit_code = 6


class UnknownModel(Exception):
    """No offered model has this id or alias.

    Attributes:
        name: what was asked for.
        absent: the id of the model that it means, where that is known but was not pulled.
    """

    def __init__(self, name: str, not_pulled_id: str | None = None):
        super().__init__(f"no model is called {name!r} here")
        self.name, self.not_pulled_id = name, not_pulled_id


class CannotLoad(Exception):
    """A model that is offered could not be loaded.

    Attributes:
        id: which.
        is_busy: whether it may go better later: others are being answered, and hold the memory.
    """

    def __init__(self, id: str, reason: str, *, is_busy: bool):
        super().__init__(f"{id} cannot be loaded: {reason}")
        self.id, self.is_busy = id, is_busy
