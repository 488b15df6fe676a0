"""What happens between a file and a model that answers: formats, memory, gaps, fingerprints."""

import hashlib
import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bpe
from serve.models import catalogue, dtypes, fingerprint, json_cache, memory, resolve
from serve.models.compilation_cache import enable_compilation_cache
from serve.models.decoder import known_ids, load_decoder, mask_unused_ids
from serve.models.spec import LoadOptions, ModelFiles
from tests.naming import names, naming
from tests.serve import tiny
from transformer import cache, checkpoint
from transformer.config import Config
from transformer.decoder import init
from transformer.engine import Device, Done, Engine, SequenceRequest, Token
from transformer.engine import runner as runner_module
from transformer.engine.runner import CHUNK_SIZE, NUM_SLOTS, Runner
from transformer.engine.scheduler import Scheduler
from transformer.sampling import SamplingParams

pytestmark = pytest.mark.heavy

CHAT = "smollm2-135m-instruct"
GIGA = 2**30


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Kept where they always are, not in the folder of a test that loads first."""
    enable_compilation_cache()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PELLUCID_HOME", str(tmp_path))
    return tmp_path


def free(monkeypatch, gigabytes):
    monkeypatch.setattr(memory, "available", lambda: int(gigabytes * GIGA))


def test_what_is_available_is_less_than_the_machine_has():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < memory.available() <= total


def test_the_estimate_is_near_what_loading_takes(model_file):
    path = model_file(CHAT)
    cfg = checkpoint.read_config(path)
    params, loaded, _ = checkpoint.load(path, dtype="int8")
    assert loaded == cfg
    taken = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert 0.8 * taken < dtypes.weight_bytes(cfg, "int8") < 1.2 * taken


def test_only_what_fits_is_tried(monkeypatch):
    cfg = Config.debug(num_layers=2, vocab_size=2**20, d_model=256)  # 256 M weights and some
    free(monkeypatch, 20)
    assert dtypes.fitting_dtypes("m", cfg, GIGA) == dtypes.DTYPES
    free(monkeypatch, 2)
    assert dtypes.fitting_dtypes("m", cfg, GIGA) == ("int8", "bfloat16")
    free(monkeypatch, 1.7)
    assert dtypes.fitting_dtypes("m", cfg, GIGA) == ("int8",)
    with pytest.raises(MemoryError, match=naming("m", "float32", "1.3 GB") + r"(?=.*\b2\.\d GB)"):
        dtypes.fitting_dtypes("m", cfg, GIGA, ("float32",))
    free(monkeypatch, 1.5)
    with pytest.raises(MemoryError, match=naming("m", "int8", "1.5 GB")):
        dtypes.fitting_dtypes("m", cfg, GIGA)


def test_a_model_that_fits_nowhere_is_refused_before_it_is_read(home, model_file, monkeypatch):
    path = model_file(CHAT)
    free(monkeypatch, 0.5)
    monkeypatch.setattr(checkpoint, "load", lambda *args, **more: pytest.fail("weights were read"))
    for dtype in ("auto", "float32"):
        with pytest.raises(MemoryError, match=naming("0.5 GB")):
            load_decoder(CHAT, path, owned_by="me", cache_budget=GIGA // 4, dtype=dtype)


def damaged_tensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def damaged_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for x in %}")


def damaged_vocabulary(folder: Path) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["byte_fallback"] = True
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def too_large_vocabulary(folder: Path) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 999, "content": "<far>"})
    (folder / "tokenizer.json").write_text(json.dumps(spec))


@pytest.mark.parametrize(
    ("damage", "facts"),
    [
        (damaged_tensors, ["model.norm.weight"]),
        (damaged_template, ["template"]),
        (damaged_vocabulary, ["SentencePiece"]),
        (too_large_vocabulary, [999, tiny.CFG.vocab_size]),
    ],
)
def test_damaged_model_of_the_user_is_refused_when_described(home, tmp_path, damage, facts):
    """A server listened, and each request to the model was a 503."""
    path = tiny.model(tmp_path / "m")
    damage(path)
    options = LoadOptions(cache_budget=2**20, dtype="float32", home=home, notify=print)
    with pytest.raises(ValueError, match=naming(*facts)):
        resolve.describe(ModelFiles("m", path, "me"), options)


def test_header_is_read_once_a_load(home, tmp_path, monkeypatch):
    """It was read twice, which takes 0.15 s of each start with a vocabulary in a GGUF file."""
    path, read = tiny.model(tmp_path), []

    def counting(*args, **more):
        read.append(args)
        return original(*args, **more)

    original = checkpoint.safetensors.read
    monkeypatch.setattr(checkpoint.safetensors, "read", counting)
    served = load_decoder("tiny", path, owned_by="me", cache_budget=2**20, dtype="float32")
    served.close(5.0)
    assert len(read) == 1


def test_the_only_format_that_fits_needs_no_measuring(home, model_file, monkeypatch):
    path, said = model_file(CHAT), []
    free(monkeypatch, 0.75)
    cfg = checkpoint.read_config(path)
    chosen = dtypes.choose_dtype(CHAT, path, cfg, "fp", GIGA // 4, said.append)
    assert chosen == "int8"
    assert [line.split()[1] for line in said[:2]] == ["bfloat16", "float32"]
    assert names(said[2], "int8")
    assert not (home / "formats.json").exists(), "with more memory, another answer might come out"


def test_what_is_measured_is_remembered(home, tmp_path):
    """By a process of its own: what measuring had touched stayed in the server's memory."""
    path, said = tiny.model(tmp_path), []
    cfg = checkpoint.read_config(path)
    chosen = dtypes.choose_dtype("tiny", path, cfg, "fp", 2**20, said.append)
    assert [line.split()[0] for line in said[1:4]] == ["float32", "bfloat16", "int8"]
    ratio = re.compile(r"\bx\d\.\d{3}\b")  # of perplexities
    assert all(map(ratio.search, said[1:4])) and names(said[4], chosen)
    assert json_cache.read(home / "formats.json") == {"fp int8 bfloat16 float32": chosen}
    said.clear()
    assert dtypes.choose_dtype("tiny", path, cfg, "fp", 2**20, said.append) == chosen and not said
    # Where it is known which are good enough, no weights are read to find out.
    good = ("bfloat16", "float32")
    chosen = dtypes.choose_dtype("tiny", path, cfg, "fp", 2**20, said.append, good)
    assert chosen in good and not ratio.search("".join(said))
    assert json_cache.read(home / "formats.json")["fp bfloat16 float32"] == chosen


@pytest.mark.slow
@pytest.mark.parametrize("id", [CHAT, "qwen2.5-coder-0.5b-instruct"])
def test_the_catalogue_knows_which_formats_are_good(model_file, id):
    found = {format: dtypes.perplexity(model_file(id), format) for format in dtypes.DTYPES}
    limit = found["float32"] * dtypes.MAX_PERPLEXITY_RATIO
    good = tuple(format for format, perplexity in found.items() if perplexity <= limit)
    assert catalogue.load().models[id].dtypes == good


def test_the_fastest_format_that_agrees_is_taken_and_remembered(home):
    """Speech was bfloat16 everywhere, also on processors that multiply it slowly."""
    results = {"float32": (3.0, 0.0), "bfloat16": (2.0, 0.001), "int8": (1.0, 0.1)}
    asked = []

    def measure(format):
        asked.append(format)
        seconds, apart = results[format]
        return seconds, np.full((2, 3), apart)

    def distance(a, b):
        return float(np.abs(a - b).max())

    def fastest(name):
        return dtypes.fastest_dtype(
            "m", name, tuple(results), measure, distance, 0.01, asked.append
        )

    assert fastest("fp") == "bfloat16"
    assert set(results) <= set(asked)
    asked.clear()
    assert fastest("fp") == "bfloat16" and not asked
    results["float32"] = (1.5, 0.0)
    assert fastest("of another machine") == "float32"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_whose_reference_values_are_not_finite_is_refused(home, value):
    """NaN is at no distance from itself, so no format was left to choose from."""
    measured, lines = [], []

    def measure(format):
        measured.append(format)
        return 1.0, np.full((2, 3), value, np.float32)

    def distance(a, b):
        with np.errstate(invalid="ignore"):  # inf - inf
            return float(np.abs(a - b).max())

    with pytest.raises(ValueError, match=naming("m", "float32")):
        dtypes.fastest_dtype(
            "m", "fp", ("float32", "bfloat16"), measure, distance, 1.0, lines.append
        )
    assert measured == ["float32"], "nothing is compared with it"


def test_what_cannot_be_measured_says_so(home, tmp_path):
    path = tiny.model(tmp_path)
    cfg = checkpoint.read_config(path)
    (path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="safetensors"):
        dtypes.choose_dtype("tiny", path, cfg, "fp", 2**20, lambda line: None)


def test_how_much_memory_is_counted(home, monkeypatch):
    """The smallest format was counted, and the widest one loaded."""
    cfg = Config.debug(num_layers=2, vocab_size=2**20, d_model=256)
    need = {format: dtypes.weight_bytes(cfg, format) for format in dtypes.DTYPES}
    assert dtypes.expected_dtype(cfg, "fp", 0) == "float32", "not measured yet: the most it may be"
    assert dtypes.expected_dtype(cfg, "fp", 0, ("int8", "bfloat16")) == "bfloat16"
    assert dtypes.expected_dtype(cfg, "fp", 1, memory_limit=need["bfloat16"] + 1) == "bfloat16"
    assert dtypes.expected_dtype(cfg, "fp", 1, memory_limit=need["bfloat16"]) == "int8"
    assert dtypes.expected_dtype(cfg, "fp", 1, memory_limit=1) == "int8", "and will be refused"
    json_cache.add(home / "formats.json", "fp int8 bfloat16", "int8")
    assert dtypes.expected_dtype(cfg, "fp", 0) == "int8", "the widest did not fit, it was said"
    json_cache.add(home / "formats.json", "fp int8 bfloat16 float32", "bfloat16")
    assert dtypes.expected_dtype(cfg, "fp", 0) == "bfloat16"
    free(monkeypatch, 20)
    assert dtypes.fitting_dtypes("m", cfg, 0, memory_limit=need["bfloat16"]) == ("int8", "bfloat16")


# -- gaps ------------------------------------------------------------------------------------------

GAPS = range(100, 160)


def with_gaps():
    """256 bytes and a special token, whose ids leave out those of `GAPS`."""
    return bpe.Encoding(
        "gaps",
        pattern=r"[\s\S]",
        ranks={bytes([b]): b if b < 100 else b + len(GAPS) for b in range(256)},
        special_tokens={"<|endoftext|>": 400},
    )


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_gap_in_the_vocabulary_is_never_drawn(tie_embeddings):
    cfg = Config.debug(vocab_size=416, tie_embeddings=tie_embeddings)
    encoding = with_gaps()
    known = known_ids(encoding)
    assert not known & set(GAPS) and 400 in known and len(known) == 257
    params = init(jax.random.key(0), cfg)
    drawn = {}
    for name, own in (("with", mask_unused_ids(params, encoding)), ("without", params)):
        device = Device()
        runner = Runner(own, cfg, encoding.n_vocab, 1, jnp.float32)
        engine = Engine(
            runner, Scheduler(NUM_SLOTS, 1, cache.BLOCK_SIZE, CHUNK_SIZE, 9), 64, device
        )
        how = SamplingParams(temperature=5.0, logit_bias={id: 50.0 for id in GAPS})
        # The prompt holds a gap too: its embedding must stay a number.
        request = SequenceRequest(
            prompt=(1, 120), max_tokens=40, sampling_params=how, top_logprobs=20
        )
        *events, end = engine.generate(request)
        assert end == Done("length")
        tokens = [event for event in events if isinstance(event, Token)]
        drawn[name] = {token.id for token in tokens}
        if name == "with":
            assert all(id in known for token in tokens for id, _ in token.top_logprobs)
        device.close()
    assert drawn["with"] <= known
    assert drawn["without"] & set(GAPS), "the test would show nothing"


def test_a_vocabulary_without_gaps_costs_nothing():
    params = init(jax.random.key(0), Config.debug(vocab_size=300))
    whole = bpe.Encoding(
        "whole", pattern=r"[\s\S]", ranks={bytes([b]): b for b in range(256)}, special_tokens={}
    )
    assert mask_unused_ids(params, whole) is params


# -- fingerprints ----------------------------------------------------------------------------------


def test_a_fingerprint_is_of_bytes_not_of_names_and_times(home, tmp_path):
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    one.write_bytes(b"weights")
    two.write_bytes(b"weights")
    os.utime(two, (1, 1))
    assert fingerprint.hash_weights(one) == fingerprint.hash_weights(two)
    two.write_bytes(b"weighty")
    assert fingerprint.hash_weights(one) != fingerprint.hash_weights(two)
    a, b = (
        fingerprint.system_fingerprint(fingerprint.hash_weights(one), name)
        for name in ("int8", "float32")
    )
    assert a != b and a.startswith("fp_") and len(a) == 13


def test_a_folder_is_all_its_files(home, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    before = fingerprint.hash_weights(folder)
    (folder / "config.json").write_text('{"rope_theta": 1}')
    assert fingerprint.hash_weights(folder) != before


def test_a_file_is_hashed_once(home, tmp_path, monkeypatch):
    path = tmp_path / "one.gguf"
    path.write_bytes(b"weights")
    first = fingerprint.hash_weights(path)
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: pytest.fail("read again"))
    assert fingerprint.hash_weights(path) == first


# -- the runner ------------------------------------------------------------------------------------


def test_a_program_from_disk_is_not_called_compiled(monkeypatch):
    """On a slow disk each start said that programs were compiled, and kept for the next."""
    monkeypatch.setattr(runner_module, "SLOW_COMPILE_SECONDS", 0.0)
    cfg, said = Config.debug(num_layers=3), []
    for _ in range(2):
        runner = Runner(init(jax.random.key(0), cfg), cfg, 64, 2, jnp.float32, said.append)
        runner.compile(16)
        jax.clear_caches()  # those in memory
    assert names(said[1], 16, "disk")


def test_larger_steps_come_when_they_are_compiled():
    cfg = Config.debug()
    runner = Runner(init(jax.random.key(0), cfg), cfg, cfg.vocab_size, 2, jnp.float32)
    assert runner.max_batch_size == 2
    runner.compile(8, "read")
    assert runner.max_batch_size == 8
    held = runner.num_bytes
    runner.warm_up()
    assert runner.num_bytes == held > 2 * cache.bytes_per_block(cfg, np.float32)
