"""Write harmony.json: what openai-harmony renders and parses, for `tests/serve/test_harmony.py`.

Run in an environment with openai-harmony 0.0.8 (Apache-2.0), from the root of the repository:

    TIKTOKEN_ENCODINGS_BASE=FOLDER python -m tests.golden.harmony.make_harmony

FOLDER has o200k_base.tiktoken, the text of `bpe.save.tiktoken_lines` for that encoding. Beside this
file, `gpt-oss.jinja` is the chat template of openai/gpt-oss-120b (Apache-2.0).
"""

import json
import random
from pathlib import Path

from openai_harmony import (
    Author,
    Conversation,
    DeveloperContent,
    HarmonyEncodingName,
    Message,
    ReasoningEffort,
    Role,
    StreamableParser,
    SystemContent,
    ToolDescription,
    load_harmony_encoding,
)

DATE = "2026-01-02"
ENCODING = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
ADD = {
    "name": "add",
    "description": "Add two numbers.",
    "parameters": {
        "type": "object",
        "properties": {
            "a": {"type": "number", "description": "The first."},
            "b": {"type": "number"},
            "unit": {"type": "string", "enum": ["m", "km"]},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["a"],
    },
}
NOW = {"name": "now", "description": "Tell the time."}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}}
USER = {"role": "user", "content": "3 + 4? ö😀"}
CHATS = {
    "user": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "turns": [USER, {"role": "assistant", "content": "7."}, {"role": "user", "content": "And 5?"}],
    "call": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    "result": [
        USER,
        {"role": "assistant", "reasoning_content": "A sum.", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "7 ö"},
    ],
}


def rendered(chat: list[dict], tools: list[dict]) -> str:
    """Return the prompt of a conversation, rendered by openai-harmony."""
    channels = ["analysis", "commentary", "final"]
    system = SystemContent.new().with_reasoning_effort(ReasoningEffort.MEDIUM)
    system = system.with_conversation_start_date(DATE).with_required_channels(channels)
    developer = DeveloperContent.new()
    messages = [Message.from_role_and_content(Role.SYSTEM, system)]
    if chat[0]["role"] == "system":
        developer = developer.with_instructions(chat[0]["content"])
    if tools:
        described = [
            ToolDescription.new(t["name"], t["description"], parameters=t.get("parameters"))
            for t in tools
        ]
        developer = developer.with_function_tools(described)
    if tools or chat[0]["role"] == "system":
        messages.append(Message.from_role_and_content(Role.DEVELOPER, developer))
    for message in chat:
        text = message["content"]
        match message["role"]:
            case "user":
                messages.append(Message.from_role_and_content(Role.USER, text))
            case "tool":
                tool = Author.new(Role.TOOL, "functions.add")
                result = Message.from_author_and_content(tool, json.dumps(text, ensure_ascii=False))
                messages.append(result.with_recipient("assistant").with_channel("commentary"))
            case "assistant":
                say = lambda text: Message.from_role_and_content(Role.ASSISTANT, text)  # noqa: E731
                if message.get("reasoning_content"):
                    messages.append(say(message["reasoning_content"]).with_channel("analysis"))
                if text is not None:
                    messages.append(say(text).with_channel("final"))
                for call in message.get("tool_calls", ()):
                    called = say(call["function"]["arguments"]).with_channel("commentary")
                    called = called.with_recipient(f"functions.{call['function']['name']}")
                    messages.append(called.with_content_type("json"))
    ids = ENCODING.render_conversation_for_completion(
        Conversation.from_messages(messages), Role.ASSISTANT
    )
    return ENCODING.decode_utf8(ids)


def answer(rng: random.Random) -> str:
    """Return a random answer of a model, after `<|start|>assistant`."""
    texts = ["Hm.", "", "Two\nlines ", "ö😀 <b>", "to=functions.add", "a <| b", '{"a": 1}']
    kinds = rng.choices(["analysis", "commentary"], k=rng.randrange(3))
    parts = [f"<|channel|>{kind}<|message|>{rng.choice(texts)}<|end|>" for kind in kinds]
    name = rng.choice(["functions.add", "functions.now", "functions.other", "python"])
    arguments = rng.choice(["{}", '{"a": 3}', '{"a": {"b": ["}", "\\"ö😀"]}}'])
    last = [
        f"<|channel|>commentary to={name} <|constrain|>json<|message|>{arguments}<|call|>",
        f"<|channel|>analysis to={name} code<|message|>{arguments}<|call|>",
        f" to={name}<|channel|>commentary json<|message|>{arguments}<|call|>",
        f"<|channel|>final<|message|>{rng.choice(texts)}<|return|>",
    ]
    return "<|start|>assistant".join([*parts, rng.choice(last)])


def parsed(text: str) -> list[list[str | None]]:
    """Return (channel, recipient, text) of each message of an answer, by openai-harmony."""
    parser = StreamableParser(ENCODING, Role.ASSISTANT)
    for id in ENCODING.encode(text, allowed_special="all"):
        parser.process(id)
    parser.process_eos()
    return [[m.channel, m.recipient, "".join(c.text for c in m.content)] for m in parser.messages]


def main() -> None:
    rng = random.Random(0)
    prompts = [
        {"messages": chat, "tools": tools, "text": rendered(chat, tools)}
        for chat in CHATS.values()
        for tools in ([], [ADD, NOW])
    ]
    texts = dict.fromkeys(answer(rng) for _ in range(50))
    texts |= dict.fromkeys(
        text[: -len("}<|call|>")] for text in [*texts] if text.endswith("}<|call|>")
    )
    answers = [{"text": text, "messages": parsed(text)} for text in texts]
    content = {
        "made with": "openai-harmony 0.0.8",
        "date": DATE,
        "prompts": prompts,
        "answers": answers,
    }
    path = Path(__file__).with_name("harmony.json")
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
