"""Sampling defaults of a request: from the request, the catalogue, the model, and OpenAI."""

import dataclasses
import json

import gguf
import httpx
import pytest
from typer.testing import CliRunner

import transformer.sampling
from serve.api.settings import ServerSettings
from serve.cli import local_completion, models, serve
from serve.models import adapters, catalogue, decoder, fingerprint, generation_config
from serve.models.spec import ModelFiles
from tests.naming import names
from tests.serve import scripted, tiny
from transformer.sampling import SamplingParams

pytestmark = pytest.mark.heavy

OWN = {"temperature": 0.5, "top_p": 0.75, "top_k": 7, "min_p": 0.125, "repetition_penalty": 1.5}
OWN |= {"presence_penalty": 0.25, "frequency_penalty": -0.5, "typical_p": 0.875}
WITHOUT_PENALTIES = OWN | {
    name: generation_config.OPENAI_DEFAULTS[name] for name in generation_config.PENALTIES
}


def read_folder_defaults(folder, content, row=()):
    """Return the defaults of a folder with this generation_config.json, and the log lines."""
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "generation_config.json").write_text(text)
    lines = []
    return generation_config.read_defaults(dict(row), folder, lines.append), lines


# --- the files of a model -------------------------------------------------------------------------


def test_generation_config_do_sample_is_ignored(tmp_path):
    """As in vLLM, do_sample=false does not set the temperature to 0."""
    assert generation_config.read_defaults({}, tmp_path, pytest.fail) == {}
    for do_sample in (True, False, None):
        assert read_folder_defaults(tmp_path, {**OWN, "do_sample": do_sample}) == (OWN, [])


def test_catalogue_overrides_generation_config_by_key(tmp_path):
    row = {"temperature": 0.25, "repetition_penalty": 1.0}
    expected = {**OWN, **row}
    del expected["repetition_penalty"]  # equal to OpenAI's default
    assert read_folder_defaults(tmp_path, OWN, row) == (expected, [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("temperature", "0.5"),
        ("temperature", True),
        ("temperature", [0.5]),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("top_p", 1.5),
        ("top_k", 2.5),
        ("top_k", "all"),
        ("top_k", 2**31),
        ("min_p", -1),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
    ],
    ids=str,
)
def test_generation_config_invalid_value_is_reported_and_ignored(tmp_path, name, value):
    defaults, lines = read_folder_defaults(tmp_path, {**OWN, name: value})
    assert defaults == {key: OWN[key] for key in OWN if key != name}
    assert len(lines) == 1 and "generation_config.json" in lines[0] and name in lines[0]


def test_generation_config_null_and_neutral_values_are_no_defaults(tmp_path):
    assert read_folder_defaults(tmp_path, {"temperature": None, "top_p": 1, "top_k": 0}) == ({}, [])
    assert read_folder_defaults(tmp_path, {"top_k": 40.0}) == ({"top_k": 40}, [])
    defaults, _ = read_folder_defaults(tmp_path, {"top_k": -1})
    assert generation_config.resolve_params({}, defaults)["top_k"] == 0


@pytest.mark.parametrize("value", [2**31 - 1, 12_345_678, 40.0])
def test_generation_config_large_top_k_is_exact_integer(tmp_path, value):
    """Regression: top_k was rounded to seven digits, beyond int32, so each request failed."""
    defaults, _ = read_folder_defaults(tmp_path, {"top_k": value})
    assert defaults == {"top_k": value} and isinstance(defaults["top_k"], int)
    settings = [SamplingParams(**generation_config.resolve_params({}, defaults))]
    assert transformer.sampling.batch_sampling_params(settings, [0], [0], [0]).top_k.tolist() == [
        value
    ]


def test_generation_config_unsupported_keys_are_reported(tmp_path):
    content = {"_from_model_config": True, "bos_token_id": 1, "transformers_version": "5"}
    assert read_folder_defaults(tmp_path, content) == ({}, [])
    defaults, lines = read_folder_defaults(
        tmp_path, content | {"num_beams": 4, "max_new_tokens": 64}
    )
    assert defaults == {} and len(lines) == 1 and names(lines[0], "max_new_tokens", "num_beams")


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"'])
def test_generation_config_damaged_file_is_logged_and_ignored(tmp_path, caplog, content):
    assert read_folder_defaults(tmp_path, content) == ({}, [])
    assert str(tmp_path / "generation_config.json") in caplog.text


def test_gguf_sampling_metadata_gives_defaults(tmp_path):
    """llama.cpp's converter writes sampling defaults into the metadata, as float32."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for key, value in {
        "temp": 0.7,
        "top_p": 0.8,
        "penalty_repeat": 1.1,
        "xtc_threshold": 0.1,
    }.items():
        writer.add_float32(f"general.sampling.{key}", value)
    writer.add_int32("general.sampling.top_k", 20)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    lines = []
    defaults = generation_config.read_defaults({}, tmp_path / "model.gguf", lines.append)
    expected = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
    assert defaults == expected
    assert len(lines) == 1 and "general.sampling.xtc_threshold" in lines[0]
    row = {"temperature": 0.2}
    assert generation_config.read_defaults(row, tmp_path / "model.gguf", pytest.fail) == row


@pytest.mark.parametrize("value", ["'hot'", "true", "3", "-1", "nan"])
def test_catalogue_invalid_sampling_raises_catalogue_error(tmp_path, value):
    text = catalogue.BUILT_IN.read_text().partition("sampling = {")[0]
    text = "[models.mine]" + text.rpartition('[models."smollm2-135m-instruct"]')[2]
    (tmp_path / "models.toml").write_text(f"{text}sampling = {{ temperature = {value} }}\n")
    with pytest.raises(catalogue.CatalogueError, match="sampling.temperature"):
        catalogue.load(tmp_path)


# --- a request ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return dataclasses.replace(scripted.model(), default_sampling=OWN)


@pytest.fixture(scope="module")
def send(model):
    """Return a function that posts a request and returns the parameters that reach the engine."""
    with scripted.serve_models(model) as address:

        def send(route, **body):
            texts = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi", "input": "hi"}
            body = {"model": "scripted", "instruction": "x", **texts, **body}
            response = httpx.post(f"{address}/v1/{route}", json=body)
            assert response.status_code == 200, response.text
            settings = model.engine.requests[-1].sampling_params
            return {name: getattr(settings, name) for name in OWN}

        yield send


ROUTES = ["chat/completions", "completions", "edits"]
ROUTES += [f"engines/scripted/{route}" for route in ROUTES]


@pytest.mark.parametrize("route", ROUTES)
def test_request_without_parameter_uses_model_default(send, route):
    assert send(route) == OWN
    assert send(route, **dict.fromkeys(OWN)) == OWN  # null means unset
    assert send(route, temperature=1) == OWN | {"temperature": 1}
    assert send(route, **generation_config.OPENAI_DEFAULTS) == generation_config.OPENAI_DEFAULTS
    assert send(route, top_k=-1)["top_k"] == 0


@pytest.mark.parametrize("route", ROUTES)
def test_request_at_temperature_0_has_no_default_penalties(send, route):
    assert send(route, temperature=0) == WITHOUT_PENALTIES | {"temperature": 0}
    overrides = {"temperature": 0, "repetition_penalty": 1.25}
    assert send(route, **overrides) == WITHOUT_PENALTIES | overrides


@pytest.mark.parametrize(
    "options",
    [{"echo": True, "logprobs": 0}, {"echo": True, "logprobs": 2}, {"best_of": 2}],
    ids=str,
)
def test_request_with_best_of_or_scoring_has_no_default_penalties(send, options):
    assert send("completions", **options) == WITHOUT_PENALTIES
    overrides = {"frequency_penalty": 1.0}
    assert send("completions", **options, **overrides) == WITHOUT_PENALTIES | overrides
    assert send("completions", echo=True) == send("completions", logprobs=2) == OWN


def test_default_temperature_0_has_no_default_penalties():
    defaults = OWN | {"temperature": 0}
    assert generation_config.resolve_params({}, defaults) == WITHOUT_PENALTIES | {"temperature": 0}
    assert generation_config.resolve_params({"temperature": 0.5}, defaults) == OWN


def test_local_completion_uses_model_defaults():
    model = dataclasses.replace(scripted.model(), default_sampling=OWN)

    def settings(**overrides):
        request = local_completion.LocalCompletion(
            model, [1], local_completion.Options(sampling=overrides)
        )._request
        return {name: getattr(request.sampling_params, name) for name in OWN}

    assert settings() == OWN
    assert settings(temperature=1.0, top_k=0) == OWN | {"temperature": 1.0, "top_k": 0}
    assert settings(temperature=0) == WITHOUT_PENALTIES | {"temperature": 0}


# --- output of defaults ---------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["model", "openai"])
def test_server_shows_defaults_of_specs_and_loaded_models(tmp_path, source):
    """The spec and the loaded model show the same defaults, also of a fine-tuned model."""
    folder = tiny.model(tmp_path / "tiny")
    read_folder_defaults(folder, OWN)
    name = "ft:tiny:pellucid:mine:abc123"
    model_entry = adapters.AdapterMetadata(
        name, "tiny", "", fingerprint.hash_weights(folder), created=5, job="j", step=3
    )
    (tmp_path / "adapter").mkdir()
    adapters.save(tmp_path, model_entry, tmp_path / "adapter")
    expected = generation_config.resolve_params({}, OWN if source == "model" else {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "MAX_BATCH_SIZE", 2)
        files = [ModelFiles("tiny", folder, "me")]
        settings = ServerSettings(home=tmp_path, cache_budget=2**20)
        with serve._open_registry(
            files,
            settings,
            "float32",
            catalogue.load(tmp_path),
            serve_pulled=False,
            sampling_defaults=source,
        ) as registry:
            from serve.api.routes.models import model_to_api

            assert [
                model_to_api(model_entry)["sampling"] for model_entry in registry.list_models()
            ] == [expected] * 2
            (loaded,) = registry.loaded()
            assert generation_config.resolve_params({}, loaded.default_sampling) == expected


def test_models_route_shows_defaults(model):
    with scripted.serve_models(model) as address:
        model_entry = httpx.get(f"{address}/v1/models/gpt-4").json()
    assert model_entry["sampling"] == OWN


def test_models_command_shows_catalogue_defaults(tmp_path, monkeypatch):
    monkeypatch.setenv("PELLUCID_HOME", str(tmp_path))
    pellucid = CliRunner()
    printed = json.loads(pellucid.invoke(models.app, ["--json"]).stdout)["models"]
    entries = {model_entry["id"]: model_entry for model_entry in printed}
    chat = entries["smollm2-135m-instruct"]["sampling"]
    assert chat == generation_config.resolve_params({}, {"temperature": 0.2, "top_p": 0.9})
    assert entries["all-minilm-l6-v2"]["sampling"] is None
    assert names(pellucid.invoke(models.app).stdout, "temperature 0.2", "top_p 0.9")
