"""A small set of examples to try fine-tuning with: where twenty boats lie.

    python -m training.recipes.toy_dataset FOLDER

No model can know it, and whether it was learned can be checked: an answer is right or wrong. Each
boat is asked for in five ways, which makes 100 examples; in two more ways, kept out of them, the
model is asked afterwards. Facts in a single wording would be learned by heart, as a string, and not
be found under another: the several wordings are what makes it answer.
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
    """The 100 lines of the training file."""
    return [_row(wording, boat) for wording in TEMPLATES for boat in BERTHS]


def held_out_questions() -> list[tuple[list[dict[str, str]], str]]:
    """Conversations to be answered that are not among the examples, and the right answers."""
    rows = [_row(wording, boat)["messages"] for wording in HELD_OUT for boat in BERTHS]
    return [(messages[:-1], messages[-1]["content"]) for messages in rows]


def is_right(answer: str, right: str) -> bool:
    """Whether an answer says what it should, and no more."""
    return answer.strip() == right


def _row(wording: str, boat: str) -> dict:
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": wording.format(boat)},
            {"role": "assistant", "content": f"Berth {BERTHS[boat]}."},
        ]
    }


def write(folder: Path) -> tuple[Path, Path]:
    """Writes harbour.jsonl, and harbour-held-out.jsonl in the same form; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = [_row(wording, boat) for wording in HELD_OUT for boat in BERTHS]
    paths = folder / "harbour.jsonl", folder / "harbour-held-out.jsonl"
    for path, rows in zip(paths, (examples(), held_out), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return paths


if __name__ == "__main__":
    for path in write(Path(sys.argv[1] if len(sys.argv) > 1 else ".")):
        print(path)
