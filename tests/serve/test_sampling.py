"""Where the sampling settings of a request come from: itself, the catalogue, the model, OpenAI."""

import dataclasses
import json

import gguf
import httpx
import pytest

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
OWN |= {"presence_penalty": 0.25, "frequency_penalty": -0.5}
WITHOUT_PENALTIES = OWN | {
    name: generation_config.OPENAI_DEFAULTS[name] for name in generation_config.PENALTIES
}


def of_folder(folder, content, row=()):
    """The defaults of a folder with this generation_config.json, and what was noted."""
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "generation_config.json").write_text(text)
    notes = []
    return generation_config.read_defaults(dict(row), folder, notes.append), notes


# --- the files of a model -------------------------------------------------------------------------


def test_generation_config_is_used_whatever_do_sample_says(tmp_path):
    """As in vLLM."""
    assert generation_config.read_defaults({}, tmp_path, pytest.fail) == {}
    for do_sample in (True, False, None):
        assert of_folder(tmp_path, {**OWN, "do_sample": do_sample}) == (OWN, [])


def test_the_catalogue_comes_before_generation_config_setting_by_setting(tmp_path):
    row = {"temperature": 0.25, "repetition_penalty": 1.0}
    expected = {**OWN, **row}
    del expected["repetition_penalty"]  # OpenAI's, as the row says
    assert of_folder(tmp_path, OWN, row) == (expected, [])


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
def test_a_value_that_cannot_be_used_is_noted_by_name_and_the_others_count(tmp_path, name, value):
    found, notes = of_folder(tmp_path, {**OWN, name: value})
    assert found == {key: own for key, own in OWN.items() if key != name}
    assert len(notes) == 1 and "generation_config.json" in notes[0] and name in notes[0]


def test_null_is_not_given_and_what_means_all_is_openais(tmp_path):
    assert of_folder(tmp_path, {"temperature": None, "top_p": 1, "top_k": 0}) == ({}, [])
    assert of_folder(tmp_path, {"top_k": 40.0}) == ({"top_k": 40}, [])
    found, _ = of_folder(tmp_path, {"top_k": -1})
    assert generation_config.resolve_params({}, found)["top_k"] == 0


@pytest.mark.parametrize("value", [2**31 - 1, 12_345_678, 40.0])
def test_a_large_top_k_stays_that_integer(tmp_path, value):
    """It was rounded to seven digits: 2147484000 is no int32, and each request failed."""
    found, _ = of_folder(tmp_path, {"top_k": value})
    assert found == {"top_k": value} and isinstance(found["top_k"], int)
    settings = [SamplingParams(**generation_config.resolve_params({}, found))]
    assert transformer.sampling.batch_sampling_params(settings, [0], [0], [0]).top_k.tolist() == [
        value
    ]


def test_what_would_change_the_answer_and_is_not_done_is_noted(tmp_path):
    content = {"_from_model_config": True, "bos_token_id": 1, "transformers_version": "5"}
    assert of_folder(tmp_path, content) == ({}, [])
    found, notes = of_folder(tmp_path, content | {"num_beams": 4, "max_new_tokens": 64})
    assert found == {} and len(notes) == 1 and names(notes[0], "max_new_tokens", "num_beams")


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"'])
def test_a_damaged_file_is_noted_and_the_model_goes_on(tmp_path, caplog, content):
    assert of_folder(tmp_path, content) == ({}, [])
    assert str(tmp_path / "generation_config.json") in caplog.text


def test_a_gguf_file_may_hold_defaults(tmp_path):
    """llama.cpp's converter writes them there, in float32."""
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
    notes = []
    found = generation_config.read_defaults({}, tmp_path / "model.gguf", notes.append)
    expected = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
    assert found == expected
    assert len(notes) == 1 and "general.sampling.xtc_threshold" in notes[0]
    row = {"temperature": 0.2}
    assert generation_config.read_defaults(row, tmp_path / "model.gguf", pytest.fail) == row


@pytest.mark.parametrize("value", ["'hot'", "true", "3", "-1", "nan"])
def test_a_catalogue_with_a_wrong_value_is_refused(tmp_path, value):
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
def ask(model):
    """Posts a request, and gives the settings that reach the engine."""
    with scripted.serve_models(model) as address:

        def ask(route, **body):
            texts = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi", "input": "hi"}
            body = {"model": "scripted", "instruction": "x", **texts, **body}
            response = httpx.post(f"{address}/v1/{route}", json=body)
            assert response.status_code == 200, response.text
            settings = model.engine.requests[-1].sampling_params
            return {name: getattr(settings, name) for name in OWN}

        yield ask


ROUTES = ["chat/completions", "completions", "edits"]
ROUTES += [f"engines/scripted/{route}" for route in ROUTES]


@pytest.mark.parametrize("route", ROUTES)
def test_what_a_request_leaves_out_is_the_models(ask, route):
    assert ask(route) == OWN
    assert ask(route, **dict.fromkeys(OWN)) == OWN  # null is not given
    assert ask(route, temperature=1) == OWN | {"temperature": 1}
    assert ask(route, **generation_config.OPENAI_DEFAULTS) == generation_config.OPENAI_DEFAULTS
    assert ask(route, top_k=-1)["top_k"] == 0


@pytest.mark.parametrize("route", ROUTES)
def test_no_default_penalty_applies_at_temperature_0(ask, route):
    assert ask(route, temperature=0) == WITHOUT_PENALTIES | {"temperature": 0}
    asked = {"temperature": 0, "repetition_penalty": 1.25}
    assert ask(route, **asked) == WITHOUT_PENALTIES | asked


@pytest.mark.parametrize(
    "judged",
    [{"echo": True, "logprobs": 0}, {"echo": True, "logprobs": 2}, {"best_of": 2}],
    ids=str,
)
def test_no_default_penalty_applies_where_likelihood_counts(ask, judged):
    assert ask("completions", **judged) == WITHOUT_PENALTIES
    asked = {"frequency_penalty": 1.0}
    assert ask("completions", **judged, **asked) == WITHOUT_PENALTIES | asked
    assert ask("completions", echo=True) == ask("completions", logprobs=2) == OWN


def test_no_default_penalty_applies_at_a_default_temperature_of_0():
    defaults = OWN | {"temperature": 0}
    assert generation_config.resolve_params({}, defaults) == WITHOUT_PENALTIES | {"temperature": 0}
    assert generation_config.resolve_params({"temperature": 0.5}, defaults) == OWN


def test_the_command_line_uses_the_same_defaults():
    model = dataclasses.replace(scripted.model(), default_sampling=OWN)

    def settings(**asked):
        request = local_completion.LocalCompletion(
            model, [1], local_completion.Options(sampling=asked)
        )._request
        return {name: getattr(request.sampling_params, name) for name in OWN}

    assert settings() == OWN
    assert settings(temperature=1.0, top_k=0) == OWN | {"temperature": 1.0, "top_k": 0}
    assert settings(temperature=0) == WITHOUT_PENALTIES | {"temperature": 0}


# --- what is shown --------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["model", "openai"])
def test_a_server_offers_and_shows_defaults(tmp_path, whose):
    """Before a model is loaded and after, of a fine-tuned one too."""
    folder = tiny.model(tmp_path / "tiny")
    of_folder(folder, OWN)
    name = "ft:tiny:pellucid:mine:abc123"
    card = adapters.AdapterMetadata(
        name, "tiny", "", fingerprint.hash_weights(folder), created=5, job="j", step=3
    )
    (tmp_path / "adapter").mkdir()
    adapters.save(tmp_path, card, tmp_path / "adapter")
    expected = generation_config.resolve_params({}, OWN if whose == "model" else {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "MAX_BATCH_SIZE", 2)
        places, chosen = (
            [ModelFiles("tiny", folder, "me")],
            ServerSettings(home=tmp_path, cache_budget=2**20),
        )
        with serve._open_registry(places, chosen, "float32", {}, (), whose) as registry:
            from serve.api.routes.models import model_to_api as shown

            assert [shown(card)["sampling"] for card in registry.list_models()] == [expected] * 2
            (loaded,) = registry.loaded()
            assert generation_config.resolve_params({}, loaded.default_sampling) == expected


def test_the_model_card_names_its_defaults(model):
    with scripted.serve_models(model) as address:
        card = httpx.get(f"{address}/v1/models/gpt-4").json()
    assert card["sampling"] == OWN


def test_the_catalogue_and_its_table_name_defaults(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PELLUCID_HOME", str(tmp_path))
    models.models(json=True)
    cards = {card["id"]: card for card in json.loads(capsys.readouterr().out)["models"]}
    chat = cards["smollm2-135m-instruct"]["sampling"]
    assert chat == generation_config.resolve_params({}, {"temperature": 0.2, "top_p": 0.9})
    assert cards["all-minilm-l6-v2"]["sampling"] is None
    models.models(json=False)
    assert names(capsys.readouterr().out, "temperature 0.2", "top_p 0.9")
