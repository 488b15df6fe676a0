"""Measure the accuracy of chat models on 21 small edits with known answers.

The first edit is OpenAI's example for the endpoint. Each edit uses the prompt and the sampling
defaults of /v1/edits, once for each seed in `SEEDS`. An answer counts as correct if it equals one
of the known answers, except for white space.
Usage: python -m tests.bench.bench_edits [--json] [ID...]
"""

import json
import sys

from serve import settings
from serve.api.routes.legacy.edits import edit_messages
from serve.models import catalogue, download, generation_config
from serve.models.decoder import load_decoder
from transformer.engine import SequenceRequest, Token
from transformer.sampling import SamplingParams

SEEDS = range(4)
CASES = [  # instruction, text, correct answers
    ("Fix the spelling mistakes", "What day of the wek is it?", ["What day of the week is it?"]),
    (
        "Fix the spelling mistakes",
        "I recieved your mesage yesterday.",
        ["I received your message yesterday."],
    ),
    ("Fix the spelling mistakes", "Thier house is beatiful.", ["Their house is beautiful."]),
    ("Fix the grammar", "She go to school every day.", ["She goes to school every day."]),
    (
        "Fix the grammar",
        "He dont like apples.",
        ["He doesn't like apples.", "He does not like apples."],
    ),
    (
        "Fix the grammar",
        "They was very tired after the trip.",
        ["They were very tired after the trip."],
    ),
    ("Add capital letters and punctuation", "where are you from", ["Where are you from?"]),
    ("Make it upper case", "hello world", ["HELLO WORLD"]),
    ("Make it lower case", "GOOD MORNING", ["good morning"]),
    ("Replace the word cat with dog", "The cat is black.", ["The dog is black."]),
    ("Change the city to London", "I live in Paris.", ["I live in London."]),
    ("Change Monday to Friday", "The meeting is on Monday.", ["The meeting is on Friday."]),
    ("Change it to the past tense", "I walk to the park.", ["I walked to the park."]),
    ("Change it to the third person, about her", "I am happy.", ["She is happy."]),
    ("Make it a question", "It is a good book.", ["Is it a good book?"]),
    (
        "Make it negative",
        "I like this film.",
        ["I don't like this film.", "I do not like this film."],
    ),
    ("Translate to French", "Good morning", ["Bonjour", "Bonjour."]),
    ("Put commas between the words", "one two three", ["one, two, three"]),
    ("Remove the repeated word", "The the dog ran away.", ["The dog ran away."]),
    ("Write the number as a word", "I have 3 cats.", ["I have three cats."]),
    ("Fix the bug", "def add(a, b):\n    return a - b", ["def add(a, b):\n    return a + b"]),
]


def main(ids: list[str], as_json: bool) -> None:
    models, home = catalogue.load().models, settings.data_folder()
    for id in ids or [id for id, model in models.items() if "chat" in model.serves]:
        path = download.find_path(models[id], home)
        if path is None:
            sys.exit(f"{id} is not pulled; run: pellucid pull {id}")
        model = load_decoder(
            id,
            path,
            owned_by="bench",
            cache_budget=64 * 2**20,
            max_batch_size=1,
            accepted_dtypes=models[id].dtypes,
            default_sampling=models[id].sampling,
        )
        try:
            answers = [[edit_text(model, *case[:2], seed) for seed in SEEDS] for case in CASES]
        finally:
            model.engine.close(drain=False)
        correct = [
            [answer.split() in [expected.split() for expected in case[2]] for answer in tries]
            for tries, case in zip(answers, CASES, strict=True)
        ]
        by_seed = [sum(column) for column in zip(*correct, strict=True)]
        if as_json:
            print(json.dumps({"model": id, "right": by_seed, "of": len(CASES)}))
            continue
        print(f"\n{id} ({model.dtype}), seeds {[*SEEDS]}: {by_seed} of {len(CASES)}")
        for case, tries, marks in zip(CASES, answers, correct, strict=True):
            wrong = [
                answer for answer, is_correct in zip(tries, marks, strict=True) if not is_correct
            ]
            print(
                f"  {sum(marks)}/{len(SEEDS)}  {case[0]}: {case[1]!r}" + f" -> {wrong}" * any(wrong)
            )


def edit_text(model, instruction: str, text: str, seed: int) -> str:
    """Return the text that a model returns for an edit."""
    encoding = model.tokenizer.encoding
    prompt = model.tokenizer.chat_template.encode(encoding, edit_messages(instruction, text))
    request = SequenceRequest(
        prompt=tuple(prompt),
        max_tokens=60,
        sampling_params=SamplingParams(
            seed=seed, **generation_config.resolve_params({}, model.default_sampling)
        ),
        stop_ids=model.tokenizer.stop_ids,
    )
    events = model.engine.generate(request)
    return encoding.decode([event.id for event in events if isinstance(event, Token)])


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--json"]
    main(arguments, "--json" in sys.argv)
