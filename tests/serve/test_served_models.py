"""Real models: loaded at the first request, and freed when another needs the memory."""

import asyncio
import contextlib
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from serve.api.app import create_app
from serve.api.settings import ServerSettings
from serve.cli import serve
from serve.models import catalogue, decoder, disk, resolve
from serve.models.registry import Registry
from serve.models.spec import LoadOptions, ModelFiles
from tests.serve import scripted, tiny, tiny_encoders, tiny_gguf
from transformer.engine import Done, SequenceRequest, Token
from transformer.sampling import SamplingParams

pytestmark = pytest.mark.heavy

CHAT = "smollm2-135m-instruct"
REQUEST = SequenceRequest(
    prompt=(1, 2, 3), max_tokens=4, sampling_params=SamplingParams(temperature=0)
)


def describe(path, id, tmp_path):
    return resolve.describe(
        ModelFiles(id, path, "me"),
        LoadOptions(cache_budget=64 * 2**20, dtype="int8", home=tmp_path, notify=lambda line: None),
    )


def test_describe_real_model_estimates_memory_without_loading(model_file, tmp_path):
    spec = describe(model_file(CHAT), "mine", tmp_path)
    assert (spec.id, spec.owned_by) == ("mine", "me")
    assert spec.created == int(model_file(CHAT).stat().st_mtime)
    assert 200 * 2**20 < spec.memory() < 300 * 2**20


def test_describe_damaged_file_raises_value_error(tmp_path):
    (tmp_path / "half.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(ValueError, match="half.gguf"):
        describe(tmp_path / "half.gguf", "mine", tmp_path)


def test_pulled_model_is_described_off_the_event_loop(tmp_path, monkeypatch):
    """Regression: the first request after a pull read headers on the event loop."""
    tiny_gguf.write_catalogue(tmp_path)
    was_on_loop = []

    def recorded(*arguments):
        was_on_loop.append(asyncio._get_running_loop() is not None)
        return describe_files(*arguments)

    describe_files = resolve.describe
    monkeypatch.setattr(resolve, "describe", recorded)
    options = LoadOptions(cache_budget=2**20, dtype="float32", home=tmp_path, notify=print)
    pulled_specs = resolve.PulledSpecs(catalogue.load(tmp_path), options, {})
    registry = Registry([scripted.model()], {}, pulled_specs=pulled_specs)
    app = create_app(ServerSettings(home=tmp_path), registry)
    with scripted.serve_app(app) as address, contextlib.closing(app.state.job_runner):
        assert httpx.get(f"{address}/v1/models/tiny").json()["id"] == "tiny"
        disk.mark_changed(tmp_path)
        assert len(httpx.get(f"{address}/v1/models").json()["data"]) == 2
    assert was_on_loop and not any(was_on_loop)


def write_record(home: Path, folder: Path, **fields: Any) -> None:
    """Write a record of a hub model whose files are in a folder outside the cache."""
    (home / "hub").mkdir(exist_ok=True)
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    record = {
        "name": "hf:me/model", "id": "me/model", "commit": "0" * 40, "folder": str(folder),
        "main": "", "files": dict.fromkeys(names, ""), "size": 1, "pulled_at": 1.0, **fields,
    }  # fmt: skip
    digest = hashlib.sha256(record["name"].encode()).hexdigest()[:16]
    (home / "hub" / f"hf-{digest}.json").write_text(json.dumps(record))
    disk.mark_changed(home)


def test_pulled_encoder_that_the_options_do_not_suit_is_skipped(tmp_path, caplog):
    """Regression: each request failed if --max-embedding-tokens was too much for one encoder."""
    folder = tiny_encoders.copied("mean", tmp_path / "mean")
    write_record(tmp_path, folder)
    options = LoadOptions(
        cache_budget=2**20, dtype="float32", home=tmp_path, notify=print, max_embedding_tokens=9999
    )
    pulled_specs = resolve.PulledSpecs(catalogue.load(tmp_path), options, {})
    assert pulled_specs() == {} and "me/model" in caplog.text
    assert resolve.PulledSpecs(
        catalogue.load(tmp_path), replace(options, max_embedding_tokens=None), {}
    )().keys() == {"me/model"}


def test_older_record_of_an_id_is_skipped_and_logged(tmp_path, caplog):
    """Regression: of two quantizations with one id, the server dropped one in silence."""
    for name, pulled_at in (("old", 1.0), ("new", 2.0)):
        (tmp_path / name).mkdir()
        tiny_gguf.write_gguf(tmp_path / name / "m.gguf")
        write_record(
            tmp_path, tmp_path / name, name=f"hf:me/model:{name}", main="m.gguf",
            pulled_at=pulled_at,
        )  # fmt: skip
    options = LoadOptions(cache_budget=2**20, dtype="float32", home=tmp_path, notify=print)
    paths: dict[str, Path] = {}
    assert resolve.PulledSpecs(catalogue.load(tmp_path), options, paths)().keys() == {"me/model"}
    assert paths == {"me/model": tmp_path / "new" / "m.gguf"}
    assert str(tmp_path / "old") in caplog.text


def test_kv_cache_size_of_a_model_does_not_depend_on_number_of_models(tmp_path, monkeypatch):
    """Regression: pulling a model halved the KV caches of the other models."""
    monkeypatch.setattr(decoder, "MAX_BATCH_SIZE", 2)
    settings = ServerSettings(home=tmp_path, cache_budget=2**20)
    files = [ModelFiles(id, tiny.model(tmp_path / id), "me") for id in ("one", "two", "three")]
    blocks = []
    for served_files in (files[:1], files):
        with serve._open_registry(
            served_files, settings, "float32", catalogue.load(), serve_pulled=False
        ) as registry:
            blocks.append(registry.loaded()[0].engine.stats().blocks)
    assert blocks[0] == blocks[1] > 1


@pytest.mark.slow
def test_models_that_alternate_in_memory_do_not_leak(model_file, tmp_path):
    path = model_file(CHAT)
    registry = Registry([describe(path, id, tmp_path) for id in "ab"], {}, memory_limit=400 * 2**20)
    answers, resident = [], []

    async def main():
        for id in "abababababab":
            model = await registry.get(id)
            events = list(model.engine.generate(REQUEST))
            assert events[-1] == Done("length")
            answers.append([event for event in events if isinstance(event, Token)])
            assert registry.loaded() == [model]
            del model
            await asyncio.sleep(1)  # background compilation holds the model until it ends
            resident.append(psutil.Process().memory_info().rss)

    asyncio.run(main())
    registry.close()
    assert all(answer == answers[0] for answer in answers)
    assert max(resident[6:]) - max(resident[2:6]) < 100 * 2**20, [r // 2**20 for r in resident]
