"""Conversations at a terminal and single completions, with a model that echoes its prompt."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from serve.cli import local_completion, repl
from serve.exceptions import DoesNotFit, Failure, WrongUsage
from serve.models.decoder import DecoderModel
from tests.naming import names, naming
from tests.serve import scripted
from transformer.engine import Done, Failed, SequenceRequest, Token


class Echo:
    """An engine that generates the last user message in capitals, and records its requests."""

    def __init__(self) -> None:
        self.requests: list[SequenceRequest] = []
        self.closed = 0

    def generate(self, request: SequenceRequest) -> Iterator[Token | Done | Failed]:
        self.requests.append(request)
        text = scripted.encoding.decode(request.prompt).split("user\n")[-1].split("<|im_end|>")[0]
        try:
            for count, id in enumerate(scripted.encoding.encode_ordinary(text.upper())):
                if count == request.max_tokens:
                    yield Done("length")
                    return
                yield Token(id, None, ())
                if text == "fail":
                    yield Failed("the numbers went bad")
                    return
                if text == "interrupt" and count == 2:
                    raise KeyboardInterrupt
            yield Done("stop")
        finally:
            self.closed += 1


@pytest.fixture
def model() -> DecoderModel:
    return replace(scripted.model(), engine=Echo())  # type: ignore[arg-type]


def reply(
    model: DecoderModel, question: str, **options: object
) -> local_completion.LocalCompletion:
    prompt = local_completion.chat_prompt(model, [{"role": "user", "content": question}])
    return local_completion.LocalCompletion(model, prompt, local_completion.Options(**options))  # type: ignore[arg-type]


def test_completion_counts_tokens_and_finishes(model: DecoderModel) -> None:
    answer = reply(model, "wörld 😀")
    assert "".join(answer) == answer.text == "WÖRLD 😀"
    assert (answer.completion_tokens, answer.finish_reason) == (11, "stop")
    assert answer.first_token_seconds is not None and answer.tokens_per_second


def test_completion_yields_whole_characters(model: DecoderModel) -> None:
    assert [*reply(model, "ö😀")] == ["Ö", "😀"]
    assert [*reply(model, "ö😀", max_tokens=4)] == ["Ö", "�"]


def test_stop_string_ends_the_completion_and_the_request(model: DecoderModel) -> None:
    answer = reply(model, "one two three", stop=("TWO",))
    assert "".join(answer) == "ONE "
    assert answer.finish_reason == "stop"
    assert model.engine.closed == 1  # type: ignore[attr-defined]


def test_completion_beyond_the_context_is_rejected(model: DecoderModel) -> None:
    with pytest.raises(DoesNotFit, match=naming(scripted.CONTEXT)):
        reply(model, "x" * scripted.CONTEXT)
    with pytest.raises(DoesNotFit):
        reply(model, "x" * 100, max_tokens=500)
    used = reply(model, "x" * 100)
    assert [*used]
    request = model.engine.requests[-1]  # type: ignore[attr-defined]
    assert request.max_tokens == scripted.CONTEXT - used.prompt_tokens


def test_engine_failure_raises_failure_with_its_reason(model: DecoderModel) -> None:
    with pytest.raises(Failure, match="the numbers went bad"):
        [*reply(model, "fail")]
    with pytest.raises(WrongUsage, match=naming("`pellucid complete`")):
        local_completion.chat_prompt(scripted.model(template=None), [])
    with pytest.raises(WrongUsage, match="temperature"):
        reply(model, "x", sampling={"temperature": -1.0})


def converse(model: DecoderModel, *lines: str) -> repl.Conversation:
    """Run a conversation of these lines, then Ctrl-D."""
    remaining = iter(lines)

    def read(prompt: str) -> str:
        line = next(remaining, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    conversation = repl.Conversation(
        default=local_completion.Options(sampling={"temperature": 0.2})
    )
    repl.run(model, conversation, read=read, stats_line=lambda reply: f"[{reply.finish_reason}]")
    return conversation


def test_conversation_sends_system_message_and_earlier_turns(
    model: DecoderModel, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = converse(model, "/system Be brief.", "one", "", "^C", "two")
    assert conversation.turns == [("one", "ONE"), ("two", "TWO")]
    prompt = scripted.encoding.decode(model.engine.requests[-1].prompt)  # type: ignore[attr-defined]
    assert prompt.index("Be brief.") < prompt.index("ONE") < prompt.index("two")
    captured = capsys.readouterr()
    assert captured.out == "ONE\nTWO\n"
    assert names(captured.err, "/bye", "Ctrl-D")


def test_undo_retry_and_clear_change_the_turns_of_conversation(model: DecoderModel) -> None:
    assert converse(model, "/undo", "one", "two", "/undo").turns == [("one", "ONE")]
    assert converse(model, "one", "/retry").turns == [("one", "ONE")]
    conversation = converse(model, "/system x", "one", "/clear")
    assert (conversation.turns, conversation.system) == ([], "x")
    assert converse(model, "/bye", "one").turns == []


def test_ctrl_c_in_conversation_keeps_the_text_so_far(
    model: DecoderModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert converse(model, "interrupt", "go on").turns == [("interrupt", "INT"), ("go on", "GO ON")]
    assert capsys.readouterr().out == "INT\nGO ON\n"


def test_failure_leaves_the_conversation_unchanged(
    model: DecoderModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert converse(model, "one", "fail", "x" * 600).turns == [("one", "ONE")]
    errors = capsys.readouterr().err
    assert names(errors, "the numbers went bad", scripted.CONTEXT)


def test_set_changes_and_resets_options(
    model: DecoderModel, capsys: pytest.CaptureFixture[str]
) -> None:
    options = converse(model, "/set temperature 0", "/set max_tokens 2", "/set seed 7").options
    assert (options.sampling, options.max_tokens, options.seed) == ({"temperature": 0.0}, 2, 7)
    options = converse(model, "/set temperature 0", "/set temperature", "/set stop").options
    assert (options.sampling, options.stop) == ({"temperature": 0.2}, ())
    # Regression: a reset seed was "None".
    converse(model, "/set seed 3", "/set seed", "/set max_tokens")
    assert "None" not in capsys.readouterr().err
    converse(model, "/set warmth 3", "/set top_k x")
    errors = capsys.readouterr().err
    assert names(errors, "'warmth'", "temperature") and names(errors, "top_k", "'x'")


def test_option_out_of_range_fails_when_it_is_used(
    model: DecoderModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert converse(model, "/set temperature -1", "one").turns == []
    assert "temperature" in capsys.readouterr().err


def test_only_lines_with_a_slash_are_commands(
    model: DecoderModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert converse(model, "bye", " /help").turns == [("bye", "BYE"), (" /help", " /HELP")]
    assert converse(model, "/dance").turns == []
    assert names(capsys.readouterr().err, "/dance")


def test_triple_quotes_enclose_several_lines(model: DecoderModel) -> None:
    assert converse(model, '"""one', "two", 'three"""').turns[0][0] == "one\ntwo\nthree"
    assert converse(model, '"""one"""').turns[0][0] == "one"


def test_stats_toggles_the_statistics(
    model: DecoderModel, capsys: pytest.CaptureFixture[str]
) -> None:
    converse(model, "one", "/stats", "two", "/stats", "three")
    assert capsys.readouterr().err.count("[stop]") == 1
