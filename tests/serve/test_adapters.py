"""Models that the user made: on disk, on offer without a restart, on weights that are shared."""

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
    """No more of them than one conversation needs."""
    enable_compilation_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "MAX_BATCH_SIZE", 2)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that changes a lot."""
    fresh = lora.init(jax.random.key(1), tiny.CFG, rank=4, alpha=64)
    noise = jax.random.key(2)
    strong = jax.tree.map(lambda leaf: leaf + jax.random.normal(noise, leaf.shape), fresh)
    folder = tmp_path_factory.mktemp("adapter")
    lora.save(folder, strong, tiny.CFG)
    return folder


def card(weights, id=FT, of="tiny", **changes):
    fields = {"base": of, "path": str(weights), "created": 5, "job": "ftjob-1", "step": 3}
    return adapters.AdapterMetadata(
        id=id, weights=fingerprint.hash_weights(weights), **{**fields, **changes}
    )


def registry(home, base):
    place = ModelFiles("tiny", base, "me")
    offer = resolve.describe(
        place,
        LoadOptions(cache_budget=BUDGET, dtype="float32", home=home, notify=lambda line: None),
    )
    return Registry([offer], {}, adapter_specs=resolve.AdapterSpecs(home, BUDGET, {"tiny": base}))


def load(models, id):
    return models.load(models.resolve(id).id)


def said(model, prompt="hello"):
    ids = model.tokenizer.encoding.encode(prompt)
    request = SequenceRequest(
        prompt=tuple(ids), max_tokens=12, sampling_params=SamplingParams(temperature=0.0)
    )
    events = list(model.engine.generate(request))
    assert isinstance(events[-1], Done)
    return [event.id for event in events if isinstance(event, Token)]


def test_it_is_offered_at_once_and_shares_the_weights(tmp_path, base, adapter):
    models = registry(tmp_path, base)
    assert [card.id for card in models.list_models()] == ["tiny"]
    before = said(load(models, "tiny"))
    adapters.save(tmp_path, card(base), adapter)
    assert [card.id for card in models.list_models()] == ["tiny", FT]
    assert models.resolve(FT).owned_by == "local" and models.resolve(FT).created == 5
    tuned = load(models, FT)
    assert said(tuned) != before and said(load(models, "tiny")) == before
    own, shared = (load(models, id).runner._params.layers[0].q for id in (FT, "tiny"))
    assert own.weight is shared.weight and own.lora is not None and shared.lora is None
    assert tuned.memory < load(models, "tiny").memory
    assert tuned.fingerprint != load(models, "tiny").fingerprint
    assert models.spec(FT).base == "tiny" and models.spec("tiny").path == base
    models.close()


def test_it_answers_as_the_merged_model_does(tmp_path, base, adapter):
    adapters.save(tmp_path, card(base), adapter)
    models = registry(tmp_path, base)
    tuned = load(models, FT)
    params, cfg, _ = tiny.checkpoint.load(base)
    merged = tmp_path / "merged"
    tiny.model(merged)
    tiny.checkpoint.save(merged, lora.merge(params, lora.load(adapter, cfg)), cfg)
    whole = load_decoder(
        "merged", merged, owned_by="me", cache_budget=BUDGET, dtype="float32", max_batch_size=1
    )
    assert said(tuned) == said(whole)
    whole.close(5.0)
    models.close()


def test_a_base_stays_while_a_model_shares_its_weights(tmp_path, base, adapter):
    adapters.save(tmp_path, card(base), adapter)
    models = registry(tmp_path, base)
    load(models, FT)
    assert [model.id for model in models.loaded()] == ["tiny", FT], "its base came along"
    assert not models.unload("tiny")
    assert models.unload(FT) and models.unload("tiny")


def test_what_is_deleted_or_has_no_base_here_is_not_offered(tmp_path, base, adapter):
    adapters.save(tmp_path, card(base), adapter)
    adapters.save(tmp_path, card(base, "ft:other:pellucid::xyz", of="other"), adapter)
    models = registry(tmp_path, base)
    assert [card.id for card in models.list_models()] == ["tiny", FT]
    load(models, FT)
    adapters.hide(tmp_path, FT)  # by another process
    assert [card.id for card in models.list_models()] == ["tiny"]
    with pytest.raises(UnknownModel):
        models.resolve(FT)
    assert [model.id for model in models.loaded()] == ["tiny"]


def test_an_adapter_of_other_weights_is_refused(tmp_path, base, adapter):
    adapters.save(tmp_path, card(tiny.model(tmp_path / "changed", seed=9)), adapter)
    models = registry(tmp_path, base)
    with pytest.raises(CannotLoad, match=naming("tiny", "SHA-256")) as raised:
        load(models, FT)
    assert raised.value.id == FT and not raised.value.is_busy


def test_a_folder_appears_whole_or_not_at_all(tmp_path, base, adapter, monkeypatch):
    copy = adapters.shutil.copyfile

    def broken(source, target):
        if source.name == lora.WEIGHTS_FILE:
            raise OSError("no space left on device")
        copy(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(adapters.shutil, "copyfile", broken)
        with pytest.raises(OSError, match="no space"):
            adapters.save(tmp_path, card(base), adapter)
    assert not adapters.exists(tmp_path, FT) and adapters.folder_names(tmp_path) == frozenset()
    adapters.save(tmp_path, card(base), adapter)
    adapters.save(tmp_path, card(base, created=99), adapter)
    assert adapters.read_metadata(adapters.adapter_folder(tmp_path, FT)) == card(base), (
        "what is there stays"
    )
    assert [file.name for file in (tmp_path / "made").iterdir()] == list(
        adapters.folder_names(tmp_path)
    )


def test_a_damaged_folder_is_passed_over_with_a_word(tmp_path, base, adapter, caplog):
    adapters.save(tmp_path, card(base), adapter)
    (tmp_path / "made" / "junk").mkdir()
    models = registry(tmp_path, base)
    for _ in range(3):
        assert [card.id for card in models.list_models()] == ["tiny", FT]
    assert len(caplog.records) == 1 and names(caplog.text, "junk")


def test_the_shelf_costs_nothing_while_it_stays_as_it_is(tmp_path, base, adapter):
    adapters.save(tmp_path, card(base), adapter)
    shelf = resolve.AdapterSpecs(tmp_path, BUDGET, {"tiny": base})
    first = shelf()
    assert shelf() is first and isinstance(first[FT], ModelSpec)
    assert first[FT].memory() > BUDGET + jnp.float32(0).nbytes
