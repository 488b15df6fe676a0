"""Fine-tuned models: on disk, served without a restart, and with shared weights."""

import jax
import jax.numpy as jnp
import pytest

from serve.exceptions import CannotLoad, UnknownModel
from serve.models import adapters, decoder, fingerprint, resolve
from serve.models.compilation_cache import enable_compilation_cache
from serve.models.decoder import load_decoder
from serve.models.registry import Registry
from serve.models.spec import LoadOptions, ModelFiles, ModelSpec
from tests.naming import names, naming
from tests.serve import tiny
from transformer import lora
from transformer.engine import Done, SequenceRequest, Token
from transformer.sampling import SamplingParams

pytestmark = pytest.mark.heavy

BUDGET = 2 * 2**20
FT = "ft:tiny:pellucid:mine:abc123"


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Compile programs for batches of up to 2 sequences only, to save time."""
    enable_compilation_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "MAX_BATCH_SIZE", 2)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Return the folder of an adapter with large random weights."""
    adapter = lora.init(jax.random.key(1), tiny.CFG, rank=4, alpha=64)
    noise = jax.random.key(2)
    noisy = jax.tree.map(lambda leaf: leaf + jax.random.normal(noise, leaf.shape), adapter)
    folder = tmp_path_factory.mktemp("adapter")
    lora.save(folder, noisy, tiny.CFG)
    return folder


def metadata(weights, id=FT, of="tiny", **changes):
    fields = {"base": of, "path": str(weights), "created": 5, "job": "ftjob-1", "step": 3}
    return adapters.AdapterMetadata(
        id=id, weights=fingerprint.hash_weights(weights), **{**fields, **changes}
    )


def registry(home, base):
    files = ModelFiles("tiny", base, "me")
    spec = resolve.describe(
        files,
        LoadOptions(cache_budget=BUDGET, dtype="float32", home=home, notify=lambda line: None),
    )
    return Registry([spec], {}, adapter_specs=resolve.AdapterSpecs(home, BUDGET, {"tiny": base}))


def load(models, id):
    return models.load(models.resolve(id).id)


def generate(model, prompt="hello"):
    ids = model.tokenizer.encoding.encode(prompt)
    request = SequenceRequest(
        prompt=tuple(ids), max_tokens=12, sampling_params=SamplingParams(temperature=0.0)
    )
    events = list(model.engine.generate(request))
    assert isinstance(events[-1], Done)
    return [event.id for event in events if isinstance(event, Token)]


def test_saved_adapter_is_served_at_once_with_shared_weights(tmp_path, base, adapter):
    models = registry(tmp_path, base)
    assert [model.id for model in models.list_models()] == ["tiny"]
    before = generate(load(models, "tiny"))
    adapters.save(tmp_path, metadata(base), adapter)
    assert [model.id for model in models.list_models()] == ["tiny", FT]
    assert models.resolve(FT).owned_by == "local" and models.resolve(FT).created == 5
    tuned = load(models, FT)
    assert generate(tuned) != before and generate(load(models, "tiny")) == before
    tuned_layer, base_layer = (load(models, id).runner._params.layers[0].q for id in (FT, "tiny"))
    assert (
        tuned_layer.weight is base_layer.weight
        and tuned_layer.lora is not None
        and base_layer.lora is None
    )
    assert tuned.memory < load(models, "tiny").memory
    assert tuned.fingerprint != load(models, "tiny").fingerprint
    assert models.spec(FT).base == "tiny" and models.spec("tiny").path == base
    models.close()


def test_adapter_generates_same_tokens_as_merged_model(tmp_path, base, adapter):
    adapters.save(tmp_path, metadata(base), adapter)
    models = registry(tmp_path, base)
    tuned = load(models, FT)
    params, cfg, _ = tiny.checkpoint.load(base)
    merged = tmp_path / "merged"
    tiny.model(merged)
    tiny.checkpoint.save(merged, lora.merge(params, lora.load(adapter, cfg)), cfg)
    merged_model = load_decoder(
        "merged", merged, owned_by="me", cache_budget=BUDGET, dtype="float32", max_batch_size=1
    )
    assert generate(tuned) == generate(merged_model)
    merged_model.close(5.0)
    models.close()


def test_unload_base_of_loaded_adapter_is_refused(tmp_path, base, adapter):
    adapters.save(tmp_path, metadata(base), adapter)
    models = registry(tmp_path, base)
    load(models, FT)
    assert [model.id for model in models.loaded()] == ["tiny", FT], (
        "loading an adapter also loads its base model"
    )
    assert not models.unload("tiny")
    assert models.unload(FT) and models.unload("tiny")


def test_adapter_deleted_or_without_base_is_not_served(tmp_path, base, adapter):
    adapters.save(tmp_path, metadata(base), adapter)
    adapters.save(tmp_path, metadata(base, "ft:other:pellucid::xyz", of="other"), adapter)
    models = registry(tmp_path, base)
    assert [model.id for model in models.list_models()] == ["tiny", FT]
    load(models, FT)
    adapters.hide(tmp_path, FT)  # by another process
    assert [model.id for model in models.list_models()] == ["tiny"]
    with pytest.raises(UnknownModel):
        models.resolve(FT)
    assert [model.id for model in models.loaded()] == ["tiny"]


def test_load_adapter_trained_on_other_weights_raises_cannot_load(tmp_path, base, adapter):
    adapters.save(tmp_path, metadata(tiny.model(tmp_path / "changed", seed=9)), adapter)
    models = registry(tmp_path, base)
    with pytest.raises(CannotLoad, match=naming("tiny", "SHA-256")) as raised:
        load(models, FT)
    assert raised.value.id == FT and not raised.value.is_busy


def test_save_with_failing_copy_leaves_no_adapter(tmp_path, base, adapter, monkeypatch):
    copy = adapters.shutil.copyfile

    def broken(source, target):
        if source.name == lora.WEIGHTS_FILE:
            raise OSError("no space left on device")
        copy(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(adapters.shutil, "copyfile", broken)
        with pytest.raises(OSError, match="no space"):
            adapters.save(tmp_path, metadata(base), adapter)
    assert not adapters.exists(tmp_path, FT) and adapters.folder_names(tmp_path) == frozenset()
    adapters.save(tmp_path, metadata(base), adapter)
    adapters.save(tmp_path, metadata(base, created=99), adapter)
    assert adapters.read_metadata(adapters.adapter_folder(tmp_path, FT)) == metadata(base), (
        "an existing adapter is not overwritten"
    )
    assert [file.name for file in (tmp_path / "made").iterdir()] == list(
        adapters.folder_names(tmp_path)
    )


def test_damaged_adapter_folder_is_skipped_with_one_warning(tmp_path, base, adapter, caplog):
    adapters.save(tmp_path, metadata(base), adapter)
    (tmp_path / "made" / "junk").mkdir()
    models = registry(tmp_path, base)
    for _ in range(3):
        assert [model.id for model in models.list_models()] == ["tiny", FT]
    assert len(caplog.records) == 1 and names(caplog.text, "junk")


def test_adapter_specs_unchanged_folder_returns_same_object(tmp_path, base, adapter):
    adapters.save(tmp_path, metadata(base), adapter)
    specs = resolve.AdapterSpecs(tmp_path, BUDGET, {"tiny": base})
    first = specs()
    assert specs() is first and isinstance(first[FT], ModelSpec)
    assert first[FT].memory() > BUDGET + jnp.float32(0).nbytes
