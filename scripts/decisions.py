"""Measure the accuracy and the calibration of decisions: `python scripts/decisions.py --help`.

The examples in `decisions.jsonl` are written for this: sentiment, topic, facts in a passage, and
ratings, with the right answers. Half of them (`fit`) fit the temperature, the other half (`test`)
is measured. Three ways answer the same questions on a running server: /v1/decisions, a generated
answer in which the first label is looked up, and the label whose embedding is nearest. Prints the
tables of docs/guides/decisions.md and draws its reliability diagrams.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from openai import OpenAI

from transformer import scoring

Example = dict[str, Any]
TASKS = ("sentiment", "topic", "facts", "rating")
MODELS = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct")


def labels_of(question: dict[str, Any]) -> list[str | bool]:
    """Return the possible answers of a question."""
    if question["type"] == "predicate":
        return [True, False]
    options = question.get("choices") or question["levels"]
    return [option.get("value", option.get("label")) for option in options]


def decide(client: OpenAI, model: str, example: Example, calibration: str) -> np.ndarray:
    """Return the log-probabilities of the labels at temperature 1, [N]."""
    answer: Any = client.decisions.create(
        model=model,
        input=example["input"],
        questions=[example["question"]],
        extra_body={"calibration": calibration, "temperature": 1},
    ).answers[0]
    if answer.type == "predicate":
        return np.log([answer.probability, 1 - answer.probability])
    return np.log([entry.probability for entry in answer.probabilities])


def generate(client: OpenAI, model: str, example: Example) -> str | bool | None:
    """Return the label that a generated answer has first; None if it has none."""
    labels = labels_of(example["question"])
    names = ["yes" if v is True else "no" if v is False else str(v) for v in labels]
    instructions = example["question"]["instructions"]
    if example["question"]["type"] == "predicate":
        instructions = f"According to the text, is the following true? {instructions}"
    options = f"Answer with one of: {', '.join(names)}."
    prompt = f"Text: {example['input']}\n\n{instructions}\n{options}"
    message = {"role": "user", "content": prompt}
    answer = client.chat.completions.create(
        model=model,
        messages=[message],  # pyright: ignore[reportArgumentType]
        temperature=0,
        max_tokens=16,
    )
    text = (answer.choices[0].message.content or "").lower()
    found = [(text.find(name.lower()), i) for i, name in enumerate(names) if name.lower() in text]
    return labels[min(found)[1]] if found else None


def nearest(client: OpenAI, example: Example) -> str | bool:
    """Return the label whose embedding is nearest to that of the input."""
    question = example["question"]
    labels = labels_of(question)
    statement = question["instructions"]
    texts = [statement, f"It is not true: {statement}"]
    if question["type"] != "predicate":
        texts = [f"{statement} {label}" for label in labels]
    answer = client.embeddings.create(model="all-minilm-l6-v2", input=[example["input"], *texts])
    own, *others = (np.array(item.embedding) for item in answer.data)
    return labels[int(np.argmax([own @ other for other in others]))]


def accuracies(examples: list[Example], answers: Sequence[str | bool | None]) -> str:
    """Return the cells of a table: the accuracy of each task, and of all."""
    right = np.array(
        [answer == example["answer"] for example, answer in zip(examples, answers, strict=True)]
    )
    tasks = np.array([example["question"]["name"] for example in examples])
    cells = [f"{right[tasks == task].mean():.2f}" for task in TASKS]
    return " | ".join([*cells, f"{right.mean():.2f}"])


def draw(panels: dict[str, dict[str, list[scoring.Bin]]], path: Path) -> None:
    """Draw one reliability diagram per model and setting: accuracy by confidence."""
    import matplotlib.pyplot as plt

    columns = len(next(iter(panels.values())))
    figure, axes = plt.subplots(
        len(panels), columns, figsize=(3 * columns, 3 * len(panels)), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for row, (model, settings) in zip(axes, panels.items(), strict=True):
        for axis, (name, bins) in zip(row, settings.items(), strict=True):
            axis.plot([0, 1], [0, 1], color="gray", linewidth=1)
            sizes = [12 * bin.count for bin in bins]
            axis.scatter([b.confidence for b in bins], [b.accuracy for b in bins], sizes, alpha=0.6)
            error = scoring.expected_calibration_error(bins)
            axis.set_title(f"{name}: ECE {error:.2f}", fontsize=9)
        row[0].set_ylabel(f"{model}\naccuracy", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("confidence", fontsize=8)
    figure.savefig(path, dpi=80)


def measure(client: OpenAI, model: str, examples: list[Example]) -> dict[str, list[scoring.Bin]]:
    """Print the rows of a model, and return the bins of its reliability diagrams."""

    def index(example: Example) -> int:
        return labels_of(example["question"]).index(example["answer"])

    calibration = [example for example in examples if example["split"] == "calibration"]
    test = [example for example in examples if example["split"] == "test"]
    logprobs = [decide(client, model, example, "contextual") for example in calibration]
    temperature = scoring.fit_temperature(logprobs, [index(example) for example in calibration])
    raw = [decide(client, model, example, "none") for example in test]
    contextual = [decide(client, model, example, "contextual") for example in test]
    scaled = [scoring.log_softmax(row, temperature) for row in contextual]
    settings = {"likelihood": raw, "contextual": contextual, "with temperature": scaled}
    bins = {}
    for name, rows in settings.items():
        confidences = [float(np.exp(row.max())) for row in rows]
        correct = [int(row.argmax()) == index(e) for row, e in zip(rows, test, strict=True)]
        bins[name] = scoring.reliability(confidences, correct)
        answers = [
            labels_of(e["question"])[row.argmax()] for row, e in zip(rows, test, strict=True)
        ]
        error = scoring.expected_calibration_error(bins[name])
        print(f"| `{model}` | {name} | {accuracies(test, answers)} | {error:.2f} |", flush=True)
    answers = [generate(client, model, example) for example in test]
    missing = sum(answer is None for answer in answers)
    print(f"| `{model}` | generated answer | {accuracies(test, answers)} | |")
    print(f"{model}: temperature {temperature:.2f}; {missing} of {len(test)} without a label")
    return bins


def main() -> None:
    """Measure the models of a running server."""
    parser = argparse.ArgumentParser(description="Measure decisions on a running server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="the server")
    parser.add_argument("--models", nargs="+", default=MODELS, help="ids of decoders")
    parser.add_argument("--picture", type=Path, help="the PNG file for reliability diagrams")
    options = parser.parse_args()
    text = Path(__file__).with_suffix(".jsonl").read_text("utf-8")
    examples = [json.loads(line) for line in text.splitlines()]
    client = OpenAI(base_url=options.url, api_key="any", timeout=600)
    print(f"| model | answered by | {' | '.join(TASKS)} | all | ECE |\n|{'---|' * 8}")
    test = [example for example in examples if example["split"] == "test"]
    answers = [nearest(client, example) for example in test]
    print(f"| `all-minilm-l6-v2` | nearest label | {accuracies(test, answers)} | |", flush=True)
    panels = {model: measure(client, model, examples) for model in options.models}
    if options.picture:
        draw(panels, options.picture)


if __name__ == "__main__":
    main()
