"""Loading models: dtypes, memory, gaps in the vocabulary, fingerprints, and the runner."""

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
    """Use the usual compilation cache, not that of the first test's folder."""
    enable_compilation_cache()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PELLUCID_HOME", str(tmp_path))
    return tmp_path


def set_available_memory(monkeypatch, gigabytes):
    monkeypatch.setattr(memory, "available", lambda: int(gigabytes * GIGA))


def test_available_memory_is_at_most_physical_memory():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < memory.available() <= total


def test_weight_bytes_is_close_to_loaded_size(model_file):
    path = model_file(CHAT)
    cfg = checkpoint.read_config(path)
    params, loaded, _ = checkpoint.load(path, dtype="int8")
    assert loaded == cfg
    loaded_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert 0.8 * loaded_bytes < dtypes.weight_bytes(cfg, "int8") < 1.2 * loaded_bytes


def test_fitting_dtypes_depend_on_available_memory(monkeypatch):
    cfg = Config.debug(num_layers=2, vocab_size=2**20, d_model=256)  # 256 M weights and some
    set_available_memory(monkeypatch, 20)
    assert dtypes.fitting_dtypes("m", cfg, GIGA) == dtypes.AUTO_DTYPES
    set_available_memory(monkeypatch, 2)
    assert dtypes.fitting_dtypes("m", cfg, GIGA) == ("int8", "bfloat16")
    set_available_memory(monkeypatch, 1.7)
    assert dtypes.fitting_dtypes("m", cfg, GIGA) == ("int8",)
    with pytest.raises(MemoryError, match=naming("m", "float32", "1.3 GB") + r"(?=.*\b2\.\d GB)"):
        dtypes.fitting_dtypes("m", cfg, GIGA, ("float32",))
    set_available_memory(monkeypatch, 1.5)
    with pytest.raises(MemoryError, match=naming("m", "int8", "1.5 GB")):
        dtypes.fitting_dtypes("m", cfg, GIGA)


def test_load_model_too_large_raises_memory_error_before_reading(home, model_file, monkeypatch):
    path = model_file(CHAT)
    set_available_memory(monkeypatch, 0.5)
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
    spec["model"]["vocab"]["far"] = 999
    (folder / "tokenizer.json").write_text(json.dumps(spec))


@pytest.mark.parametrize(
    ("damage", "facts"),
    [
        (damaged_tensors, ["model.norm.weight"]),
        (damaged_template, ["template"]),
        (damaged_vocabulary, ["pre_tokenizer"]),
        (too_large_vocabulary, [999, tiny.CFG.vocab_size]),
    ],
)
def test_describe_damaged_local_model_raises_value_error(home, tmp_path, damage, facts):
    """Regression: the server started with the damaged model, and each request returned 503."""
    path = tiny.model(tmp_path / "m")
    damage(path)
    options = LoadOptions(cache_budget=2**20, dtype="float32", home=home, notify=print)
    with pytest.raises(ValueError, match=naming(*facts)):
        resolve.describe(ModelFiles("m", path, "me"), options)


def test_load_reads_weights_file_header_once(home, tmp_path, monkeypatch):
    """Regression: the header was read twice, which cost 0.15 s per start for a GGUF vocabulary."""
    path, reads = tiny.model(tmp_path), []

    def counting(*args, **more):
        reads.append(args)
        return original(*args, **more)

    original = checkpoint.safetensors.read
    monkeypatch.setattr(checkpoint.safetensors, "read", counting)
    served = load_decoder("tiny", path, owned_by="me", cache_budget=2**20, dtype="float32")
    served.close(5.0)
    assert len(reads) == 1


def test_choose_dtype_with_one_candidate_does_not_measure(home, model_file, monkeypatch):
    path, lines = model_file(CHAT), []
    set_available_memory(monkeypatch, 0.75)
    cfg = checkpoint.read_config(path)
    chosen = dtypes.choose_dtype(CHAT, path, cfg, "fp", GIGA // 4, lines.append)
    assert chosen == "int8"
    assert [line.split()[1] for line in lines[:2]] == ["bfloat16", "float32"]
    assert names(lines[2], "int8")
    assert not (home / "formats.json").exists(), "a choice forced by memory is not cached"


def test_choose_dtype_is_cached(home, tmp_path):
    """Regression: the server kept the memory that it had used for the measurement."""
    path, lines = tiny.model(tmp_path), []
    cfg = checkpoint.read_config(path)
    chosen = dtypes.choose_dtype("tiny", path, cfg, "fp", 2**20, lines.append)
    assert [line.split()[0] for line in lines[1:4]] == ["float32", "bfloat16", "int8"]
    ratio = re.compile(r"\bx\d\.\d{3}\b")  # of perplexities
    assert all(map(ratio.search, lines[1:4])) and names(lines[4], chosen)
    assert json_cache.read(home / "formats.json") == {"fp int8 bfloat16 float32": chosen}
    lines.clear()
    assert dtypes.choose_dtype("tiny", path, cfg, "fp", 2**20, lines.append) == chosen and not lines
    # With known accurate dtypes, no weights are read.
    accepted = ("bfloat16", "float32")
    chosen = dtypes.choose_dtype("tiny", path, cfg, "fp", 2**20, lines.append, accepted)
    assert chosen in accepted and not ratio.search("".join(lines))
    assert json_cache.read(home / "formats.json")["fp bfloat16 float32"] == chosen


@pytest.mark.slow
@pytest.mark.parametrize("id", [CHAT, "qwen2.5-coder-0.5b-instruct"])
def test_catalogue_dtypes_equal_measured_accurate_dtypes(model_file, id):
    perplexities = {dtype: dtypes.perplexity(model_file(id), dtype) for dtype in dtypes.AUTO_DTYPES}
    limit = perplexities["float32"] * dtypes.MAX_PERPLEXITY_RATIO
    accepted = tuple(dtype for dtype, perplexity in perplexities.items() if perplexity <= limit)
    assert catalogue.load().models[id].dtypes == accepted


def test_fastest_dtype_returns_and_caches_fastest_accurate_dtype(home):
    """Regression: speech models used bfloat16 on every machine, even where bfloat16 is slow."""
    results = {"float32": (3.0, 0.0), "bfloat16": (2.0, 0.001), "int8": (1.0, 0.1)}
    calls = []

    def measure(dtype):
        calls.append(dtype)
        seconds, offset = results[dtype]
        return seconds, np.full((2, 3), offset)

    def distance(a, b):
        return float(np.abs(a - b).max())

    def fastest(name):
        return dtypes.fastest_dtype(
            "m", name, tuple(results), measure, distance, 0.01, calls.append
        )

    assert fastest("fp") == "bfloat16"
    assert set(results) <= set(calls)
    calls.clear()
    assert fastest("fp") == "bfloat16" and not calls
    results["float32"] = (1.5, 0.0)
    assert fastest("of another machine") == "float32"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fastest_dtype_non_finite_reference_raises_value_error(home, value):
    """Regression: NaN differs from itself, so no dtype was accurate, not even float32."""
    measured, lines = [], []

    def measure(dtype):
        measured.append(dtype)
        return 1.0, np.full((2, 3), value, np.float32)

    def distance(a, b):
        with np.errstate(invalid="ignore"):  # inf - inf
            return float(np.abs(a - b).max())

    with pytest.raises(ValueError, match=naming("m", "float32")):
        dtypes.fastest_dtype(
            "m", "fp", ("float32", "bfloat16"), measure, distance, 1.0, lines.append
        )
    assert measured == ["float32"], "other dtypes are not measured"


def test_choose_dtype_damaged_weights_raise_value_error(home, tmp_path):
    path = tiny.model(tmp_path)
    cfg = checkpoint.read_config(path)
    (path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="safetensors"):
        dtypes.choose_dtype("tiny", path, cfg, "fp", 2**20, lambda line: None)


def test_expected_dtype_without_measurement_is_widest_that_fits(home, monkeypatch):
    """Regression: the memory of the narrowest dtype was reserved, but the widest was loaded."""
    cfg = Config.debug(num_layers=2, vocab_size=2**20, d_model=256)
    need = {dtype: dtypes.weight_bytes(cfg, dtype) for dtype in dtypes.AUTO_DTYPES}
    assert dtypes.expected_dtype(cfg, "fp", 0) == "float32", (
        "before the measurement, the widest dtype is expected"
    )
    assert dtypes.expected_dtype(cfg, "fp", 0, ("int8", "bfloat16")) == "bfloat16"
    assert dtypes.expected_dtype(cfg, "fp", 1, memory_limit=need["bfloat16"] + 1) == "bfloat16"
    assert dtypes.expected_dtype(cfg, "fp", 1, memory_limit=need["bfloat16"]) == "int8"
    assert dtypes.expected_dtype(cfg, "fp", 1, memory_limit=1) == "int8", (
        "loading will raise MemoryError"
    )
    json_cache.add(home / "formats.json", "fp int8 bfloat16", "int8")
    assert dtypes.expected_dtype(cfg, "fp", 0) == "int8", (
        "a result measured without float32 is used"
    )
    json_cache.add(home / "formats.json", "fp int8 bfloat16 float32", "bfloat16")
    assert dtypes.expected_dtype(cfg, "fp", 0) == "bfloat16"
    set_available_memory(monkeypatch, 20)
    assert dtypes.fitting_dtypes("m", cfg, 0, memory_limit=need["bfloat16"]) == ("int8", "bfloat16")


# -- gaps in the vocabulary ------------------------------------------------------------------------

GAPS = range(100, 160)


def with_gaps():
    """Return an encoding of 256 bytes and a special token, without the ids in `GAPS`."""
    return bpe.Encoding(
        "gaps",
        pattern=r"[\s\S]",
        ranks={bytes([b]): b if b < 100 else b + len(GAPS) for b in range(256)},
        special_tokens={"<|endoftext|>": 400},
    )


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_vocabulary_gap_is_never_sampled(tie_embeddings):
    cfg = Config.debug(vocab_size=416, tie_embeddings=tie_embeddings)
    encoding = with_gaps()
    known = known_ids(encoding)
    assert not known & set(GAPS) and 400 in known and len(known) == 257
    params = init(jax.random.key(0), cfg)
    sampled_ids = {}
    for name, weights in (("with", mask_unused_ids(params, encoding)), ("without", params)):
        device = Device()
        runner = Runner(weights, cfg, encoding.n_vocab, 1, jnp.float32)
        engine = Engine(
            runner, Scheduler(NUM_SLOTS, 1, cache.BLOCK_SIZE, CHUNK_SIZE, 9), 64, device
        )
        sampling_params = SamplingParams(temperature=5.0, logit_bias={id: 50.0 for id in GAPS})
        # The prompt contains a gap id too: its embedding must be finite.
        request = SequenceRequest(
            prompt=(1, 120), max_tokens=40, sampling_params=sampling_params, top_logprobs=20
        )
        *events, end = engine.generate(request)
        assert end == Done("length")
        tokens = [event for event in events if isinstance(event, Token)]
        sampled_ids[name] = {token.id for token in tokens}
        if name == "with":
            assert all(id in known for token in tokens for id, _ in token.top_logprobs)
        device.close()
    assert sampled_ids["with"] <= known
    assert sampled_ids["without"] & set(GAPS), "without the mask, gap ids are sampled"


def test_mask_unused_ids_without_gaps_returns_same_params():
    params = init(jax.random.key(0), Config.debug(vocab_size=300))
    whole = bpe.Encoding(
        "whole", pattern=r"[\s\S]", ranks={bytes([b]): b for b in range(256)}, special_tokens={}
    )
    assert mask_unused_ids(params, whole) is params


# -- fingerprints ----------------------------------------------------------------------------------


def test_fingerprint_depends_on_bytes_not_on_names_or_times(home, tmp_path):
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


def test_hash_weights_of_folder_covers_all_files(home, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    before = fingerprint.hash_weights(folder)
    (folder / "config.json").write_text('{"rope_theta": 1}')
    assert fingerprint.hash_weights(folder) != before


def test_hash_weights_same_file_is_read_once(home, tmp_path, monkeypatch):
    path = tmp_path / "one.gguf"
    path.write_bytes(b"weights")
    first = fingerprint.hash_weights(path)
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: pytest.fail("read again"))
    assert fingerprint.hash_weights(path) == first


# -- the runner ------------------------------------------------------------------------------------


def test_runner_reports_cached_program_as_loaded_not_compiled(monkeypatch):
    """Regression: on a slow disk each start reported that programs were compiled."""
    monkeypatch.setattr(runner_module, "SLOW_COMPILE_SECONDS", 0.0)
    cfg, lines = Config.debug(num_layers=3), []
    for _ in range(2):
        runner = Runner(init(jax.random.key(0), cfg), cfg, 64, 2, jnp.float32, lines.append)
        runner.compile(16)
        jax.clear_caches()  # drops the compiled programs in memory, but not those on disk
    assert names(lines[1], 16, "disk")


def test_runner_max_batch_size_grows_with_compiled_programs():
    cfg = Config.debug()
    runner = Runner(init(jax.random.key(0), cfg), cfg, cfg.vocab_size, 2, jnp.float32)
    assert runner.max_batch_size == 2
    runner.compile(8, "read")
    assert runner.max_batch_size == 8
    num_bytes = runner.num_bytes
    runner.warm_up()
    assert runner.num_bytes == num_bytes > 2 * cache.bytes_per_block(cfg, np.float32)
