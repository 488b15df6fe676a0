"""The conversation of `pellucid chat` at a terminal.

Lines that begin with a slash are commands, and no other words are: anything can be said. Ctrl-C
stops an answer and keeps what came of it; Ctrl-D leaves.
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
/help                this list
/system TEXT         set the system message; without TEXT, remove it
/clear               forget the conversation, keep the system message
/undo                take back the last question and its answer
/retry               answer the last question again
/set NAME VALUE      temperature, top_p, top_k, min_p, repetition_penalty,
                     max_tokens, seed or stop; without VALUE, back to the default
/stats               show or hide the figures after each answer
/bye                 leave (as does Ctrl-D)
Begin and end with \"\"\" to say several lines. Ctrl-C stops an answer."""

_NUMBERS = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "max_tokens": int,
    "seed": int,
}


@dataclass
class Conversation:
    """What was said, and how to answer. Every slash command is a method on it or a field of it.

    `default` is what /set goes back to.
    """

    default: local_completion.Options
    system: str | None = None
    stats: bool = False
    turns: list[tuple[str, str]] = field(default_factory=list)  # question, answer

    def __post_init__(self) -> None:
        self.options = replace(self.default, sampling=dict(self.default.sampling))

    def messages(self, question: str) -> list[local_completion.Message]:
        """The conversation so far with one more question."""
        said = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answered in self.turns:
            said.append({"role": "user", "content": asked})
            said.append({"role": "assistant", "content": answered})
        return [*said, {"role": "user", "content": question}]

    def set(self, name: str, value: str) -> str:
        """Carries out /set, and says what holds now."""
        if name == "stop":
            self.options.stop = (value,) if value else self.default.stop
            return f"stop is {', '.join(map(repr, self.options.stop)) or 'nothing'}"
        if name not in _NUMBERS:
            return f"{name!r} cannot be set: use one of {', '.join(_NUMBERS)}, stop"
        try:
            number = _NUMBERS[name](value) if value else None
        except ValueError:
            return f"{name} is {value!r}: use a number"
        if name in ("max_tokens", "seed"):
            setattr(self.options, name, getattr(self.default, name) if number is None else number)
            return f"{name} is {getattr(self.options, name)}"
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
    """Reads and answers until the user leaves.

    Args:
        model: Who answers.
        conversation: Where to begin.
        read: Shows a prompt and returns a line, like `input`; raises EOFError at the end.
        figures: The line of figures after an answer.
    """
    console.info(f"{model.id}: /help lists the commands, /bye leaves")
    while True:
        try:
            line = _read_multiline(read(">>> "), read)
        except EOFError:
            console.info("")
            return
        except KeyboardInterrupt:
            console.info("\n/bye or Ctrl-D leaves")
            continue
        except UnicodeDecodeError:
            console.info("that was not UTF-8")
            continue
        if not line.strip():
            continue
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if not word.startswith("/"):
            _ask(model, conversation, line, stats_line)
        elif word in ("/bye", "/exit"):
            return
        elif word in ("/help", "/?"):
            console.info(HELP)
        elif word == "/system":
            conversation.system = rest or None
            console.info("the system message is set" if rest else "there is no system message")
        elif word == "/clear":
            conversation.turns.clear()
            console.info("the conversation is forgotten")
        elif word in ("/undo", "/retry"):
            if not conversation.turns:
                console.info("nothing was said yet")
                continue
            question, _ = conversation.turns.pop()
            if word == "/retry":
                _ask(model, conversation, question, stats_line)
            else:
                console.info(f"taken back: {console.escape_control(question[:60])}")
        elif word == "/set":
            name, _, value = rest.partition(" ")
            console.info(conversation.set(name, value.strip()))
        elif word == "/stats":
            conversation.stats = not conversation.stats
            console.info(f"figures are {'shown' if conversation.stats else 'hidden'}")
        else:
            console.info(f"{word} is no command: /help lists them (begin with a space to say it)")


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
    figures: Callable[[local_completion.LocalCompletion], str],
) -> None:
    """Answers one question and adds it to the conversation; a failure leaves that as it was."""
    try:
        prompt = local_completion.chat_prompt(model, conversation.messages(question))
        reply = local_completion.LocalCompletion(model, prompt, conversation.options)
        with contextlib.suppress(KeyboardInterrupt):
            for text in reply:
                console.write(text, end="")
        console.write("")
    except Failure as error:
        console.error(str(error))
        return
    conversation.turns.append((question, reply.text))
    line = figures(reply)
    if conversation.stats:
        console.info(line)
