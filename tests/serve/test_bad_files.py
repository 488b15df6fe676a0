"""Damaged files of a model: an error that names the file and the field, with exit code 3.

A server that loads one while it runs goes on; see test_manage_models.py.
"""

import json
import pickle as pickle_module
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from serve.cli.check_model import check
from serve.exceptions import Unusable
from serve.models.decoder import read_tokenizer
from tests.naming import names, naming
from tests.serve import tiny
from tests.serve.test_cli import run
from tests.transformer.conftest import GOLDEN
from tests.transformer.test_encoder_gguf import write as write_encoder
from transformer import checkpoint

SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], None]


def shard(folder: Path) -> None:
    """Write the weights again in two shards."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: SHARDS[i % 2] for i, name in enumerate(tensors)}
    for file in SHARDS:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def truncated_shard(folder: Path) -> None:
    shard(folder)
    content = (folder / SHARDS[1]).read_bytes()
    (folder / SHARDS[1]).write_bytes(content[:-8])


def shard_of_another_model(folder: Path) -> None:
    shard(folder)
    tensors = load_file(folder / SHARDS[0])
    save_file({n: np.concatenate([t, t]) for n, t in tensors.items()}, folder / SHARDS[0])


def missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / SHARDS[1]).unlink()


def change_tokenizer(folder: Path, change: Callable[[dict], object]) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def two_tokens_with_one_id(folder: Path) -> None:
    change_tokenizer(folder, lambda spec: spec["model"]["vocab"].update(xy=7))


def token_beyond_the_embedding(folder: Path) -> None:
    change_tokenizer(folder, lambda spec: spec["model"]["vocab"].update(far=400))


def unigram_without_unk(folder: Path) -> None:
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}
    pieces = [[character, -1.0] for character in "\u2581abc"]
    model = {"type": "Unigram", "vocab": pieces, "unk_id": None}
    parts = dict(model=model, pre_tokenizer=space, decoder=space, added_tokens=[])
    change_tokenizer(folder, lambda spec: spec.update(parts))


def expert_of_the_wrong_rank(folder: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "mixtral" / file, folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    rows = 300 - config["vocab_size"]  # the tokenizer has 259 tokens
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[table] = np.pad(tensors[table], ((0, rows), (0, 0)))
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}), "utf-8")
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    save_file(tensors | {name: tensors[name].ravel()}, folder / "model.safetensors")


def pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BAD: list[tuple[Damage, tuple[object, ...]]] = [
    (truncated_shard, (SHARDS[1],)),
    (shard_of_another_model, (SHARDS[0],)),
    (missing_shard, (INDEX, f"'{SHARDS[1]}'")),
    (two_tokens_with_one_id, ("tokenizer.json", 7)),
    (token_beyond_the_embedding, (400, tiny.CFG.vocab_size)),
    (unigram_without_unk, ("tokenizer.json", "unk_id")),
    (expert_of_the_wrong_rank, ("model.safetensors",
                                "model.layers.1.block_sparse_moe.experts.2.w2.weight")),
    (pickle, ("pytorch_model.bin", "torch.load")),
]  # fmt: skip
IDS = [damage.__name__ for damage, _ in BAD]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("intact"))


@pytest.mark.parametrize(("damage", "facts"), BAD, ids=IDS)
def test_bad_files_are_refused_with_file_and_field(
    damage: Damage, facts: tuple[object, ...], intact: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(intact, folder)
    damage(folder)
    with pytest.raises(Unusable, match=naming(folder, *facts)) as info:
        check(folder)
    assert info.value.exit_code == 3


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_without_an_embedding_row_are_dropped(
    intact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], special: bool
) -> None:
    """Regression: Gemma 3 1B was refused: the id of <image_soft_token> is the number of rows."""
    folder = tmp_path / f"model-{special}"
    shutil.copytree(intact, folder)
    rows = tiny.CFG.vocab_size
    token = dict(id=rows, content="<far>", special=special, single_word=False, lstrip=False,
                 rstrip=False, normalized=False)  # fmt: skip
    change_tokenizer(folder, lambda spec: spec["added_tokens"].append(token))
    check(folder, json=True)
    (line,) = [line for line in json.loads(capsys.readouterr().out)["ignored"] if "<far>" in line]
    assert names(line, rows)
    encoding = read_tokenizer(folder, checkpoint.read_header(folder)).encoding
    assert encoding.n_vocab <= rows and "<far>" not in encoding.special_tokens
    assert encoding.encode("a<far>", allowed_special="all") == list(b"a<far>")
    assert pickle_module.loads(pickle_module.dumps(encoding)).encode("<far>") == list(b"<far>")


def test_encoder_in_a_gguf_file_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: the command looked for config.json in the file."""
    check(write_encoder(tmp_path / "model.gguf", "mean"), json=True)
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["family"]) == ("encoder", "bert")


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "facts"), BAD, ids=IDS)
def test_server_does_not_start_with_bad_files(
    damage: Damage, facts: tuple[object, ...], intact: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(intact, folder)
    damage(folder)
    done = run("serve", "--port", "0", "-m", f"bad={folder}", PELLUCID_HOME=str(tmp_path))
    assert done.returncode == 3 and names(done.stderr, *facts)
