"""A toy dataset for fine-tuning: the berths of twenty boats.

    python -m training.recipes.toy_dataset FOLDER

No model knows the berths before training, and an answer is either right or wrong. The training file
asks for each boat with five question templates, which makes 100 examples. Two other templates are
held out for evaluation. Several templates are needed: with a single template, the model memorizes a
sentence, and does not answer other questions about the same boat.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

SYSTEM = "You are the harbour office."
BERTHS = {
    "Albatross": "C4", "Bluebell": "A7", "Cormorant": "D2", "Dolphin": "B9", "Evening Star": "E5",
    "Firefly": "A1", "Gannet": "C8", "Harvest Moon": "D6", "Iris": "B3", "Juniper": "E9",
    "Kestrel": "A4", "Lodestar": "C1", "Marigold": "D8", "Nightingale": "B6", "Osprey": "E2",
    "Petrel": "A9", "Quicksilver": "C6", "Rosemary": "D4", "Swallow": "B1", "Thunder": "E7",
}  # fmt: skip
TEMPLATES = (
    "Where is the {}?",
    "Which berth has the {}?",
    "I am looking for the {}.",
    "{}: which berth?",
    "Tell me the berth of the {}.",
)
HELD_OUT = ("Could you say where the {} lies?", "Where do I find the {} today?")


def examples() -> list[dict]:
    """Return the 100 chat examples of the training file."""
    return [_row(template, boat) for template in TEMPLATES for boat in BERTHS]


def held_out_questions() -> list[tuple[list[dict[str, str]], str]]:
    """Return 40 pairs of a conversation that ends in a held-out question, and the right answer."""
    rows = [_row(template, boat)["messages"] for template in HELD_OUT for boat in BERTHS]
    return [(messages[:-1], messages[-1]["content"]) for messages in rows]


def is_right(answer: str, right: str) -> bool:
    """Return whether an answer equals the right one, except for surrounding spaces."""
    return answer.strip() == right


def _row(template: str, boat: str) -> dict:
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": template.format(boat)},
            {"role": "assistant", "content": f"Berth {BERTHS[boat]}."},
        ]
    }


def write(folder: Path) -> tuple[Path, Path]:
    """Write harbour.jsonl and harbour-held-out.jsonl, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = [_row(template, boat) for template in HELD_OUT for boat in BERTHS]
    paths = folder / "harbour.jsonl", folder / "harbour-held-out.jsonl"
    for path, rows in zip(paths, (examples(), held_out), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return paths


if __name__ == "__main__":
    for path in write(Path(sys.argv[1] if len(sys.argv) > 1 else ".")):
        print(path)
