"""The interactive conversation (REPL) of `pellucid chat` at a terminal.

Lines that begin with a slash are commands; all other lines are messages. Ctrl-C stops an answer and
keeps its text so far; Ctrl-D exits.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from serve.cli import console, local_completion
from serve.exceptions import Failure

if TYPE_CHECKING:
    from serve.models.decoder import DecoderModel

HELP = """\
/help                show this list
/system TEXT         set the system message; without TEXT, remove it
/clear               clear the conversation, keep the system message
/undo                remove the last question and its answer
/retry               answer the last question again
/set NAME VALUE      set temperature, top_p, top_k, min_p, repetition_penalty,
                     max_tokens, seed or stop; without VALUE, reset it
/stats               show or hide statistics after each answer
/bye                 exit (as does Ctrl-D)
Begin and end a message of several lines with \"\"\". Ctrl-C stops an answer."""

_NUMBERS = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "typical_p": float,
    "repetition_penalty": float,
    "max_tokens": int,
    "seed": int,
}


@dataclass
class Conversation:
    """The state of an interactive conversation.

    Attributes:
        default: the options that /set without a value restores.
        system: the system message.
        stats: whether to print statistics after each answer.
        turns: the questions and their answers.
        options: the options of the next answer.
    """

    default: local_completion.Options
    system: str | None = None
    stats: bool = False
    turns: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.options = replace(self.default, sampling=dict(self.default.sampling))

    def messages(self, question: str) -> list[local_completion.Message]:
        """Return the messages of the conversation with one more question."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for user, assistant in self.turns:
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": assistant})
        return [*messages, {"role": "user", "content": question}]

    def set(self, name: str, value: str) -> str:
        """Set an option, or reset it if `value` is empty; return a line to print."""
        if name == "stop":
            self.options.stop = (value,) if value else self.default.stop
            return f"stop is {', '.join(map(repr, self.options.stop)) or 'nothing'}"
        if name not in _NUMBERS:
            return f"{name!r} is not an option; use one of {', '.join(_NUMBERS)}, stop"
        try:
            number = _NUMBERS[name](value) if value else None
        except ValueError:
            return f"{name} needs a number, got {value!r}"
        if name in ("max_tokens", "seed"):
            setattr(self.options, name, getattr(self.default, name) if number is None else number)
            current = getattr(self.options, name)
            return f"{name} is {'the default' if current is None else current}"
        if number is None:
            self.options.sampling.pop(name, None)
            if name in self.default.sampling:
                self.options.sampling[name] = self.default.sampling[name]
        else:
            self.options.sampling[name] = number
        return f"{name} is {self.options.sampling.get(name, 'the default')}"


def run(
    model: "DecoderModel",
    conversation: Conversation,
    *,
    read: Callable[[str], str],
    stats_line: Callable[[local_completion.LocalCompletion], str],
) -> None:
    """Read messages and answer them until the user exits.

    Args:
        model: the model that answers.
        conversation: the conversation to continue.
        read: prints a prompt and returns a line, like `input`; raises EOFError at the end.
        stats_line: returns the line of statistics of an answer.
    """
    console.info(f"{model.id}: /help lists the commands, /bye exits")
    while True:
        try:
            line = _read_multiline(read(">>> "), read)
        except EOFError:
            console.info("")
            return
        except KeyboardInterrupt:
            console.info("\nuse /bye or Ctrl-D to exit")
            continue
        except UnicodeDecodeError:
            console.info("the line is not UTF-8; enter it again")
            continue
        if not line.strip():
            continue
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if not command.startswith("/"):
            _ask(model, conversation, line, stats_line)
        elif command in ("/bye", "/exit"):
            return
        elif command in ("/help", "/?"):
            console.info(HELP)
        elif command == "/system":
            conversation.system = argument or None
            console.info(
                "the system message is set" if argument else "the system message is removed"
            )
        elif command == "/clear":
            conversation.turns.clear()
            console.info("the conversation is cleared")
        elif command in ("/undo", "/retry"):
            if not conversation.turns:
                console.info("the conversation is empty")
                continue
            question, _ = conversation.turns.pop()
            if command == "/retry":
                _ask(model, conversation, question, stats_line)
            else:
                console.info(f"removed: {console.escape_control(question[:60])}")
        elif command == "/set":
            name, _, value = argument.partition(" ")
            console.info(conversation.set(name, value.strip()))
        elif command == "/stats":
            conversation.stats = not conversation.stats
            console.info(f"statistics are {'on' if conversation.stats else 'off'}")
        else:
            console.info(
                f"{command} is not a command; /help lists the commands "
                "(to send the line as a message, begin it with a space)"
            )


def _read_multiline(line: str, read: Callable[[str], str]) -> str:
    if not line.startswith('"""'):
        return line
    line = line[3:]
    while not line.endswith('"""'):
        line += "\n" + read("... ")
    return line[:-3]


def _ask(
    model: "DecoderModel",
    conversation: Conversation,
    question: str,
    stats_line: Callable[[local_completion.LocalCompletion], str],
) -> None:
    """Answer a question, and add question and answer to the conversation unless that fails."""
    try:
        prompt = local_completion.chat_prompt(model, conversation.messages(question))
        reply = local_completion.LocalCompletion(model, prompt, conversation.options, is_chat=True)
        with contextlib.suppress(KeyboardInterrupt):
            for text in reply:
                console.write(text, end="")
        console.write("")
    except Failure as error:
        console.error(str(error))
        return
    conversation.turns.append((question, reply.text))
    line = stats_line(reply)
    if conversation.stats:
        console.info(line)
