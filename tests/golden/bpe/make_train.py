"""Create train.json with Hugging Face's tokenizers: the merges that its BpeTrainer learns.

    python make_train.py

The training text is the passage of the benchmarks and the texts of make_bpe.py, enough for several
hundred merges. Many of the last merges are ties.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.golden.bpe.make_bpe import TEXTS  # noqa: E402


def main() -> None:
    passage = (ROOT / "tests/bench/passage.txt").read_text(encoding="utf-8")
    texts = [passage, *TEXTS]
    golden = {"texts": texts, "merges": {}}
    for min_frequency in (1, 3):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=900,
            min_frequency=min_frequency,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(texts, trainer)
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        golden["merges"][min_frequency] = [" ".join(pair) for pair in merges]
    (HERE / "train.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
