"""POST /v1/moderations with the real model, and the moderation of chats."""

import dataclasses
import json
import shutil
from typing import cast

import numpy as np
import openai
import pytest
from safetensors.numpy import save_file

from serve.api.headers import NOT_ASSESSED
from serve.api.routes.moderations import CATEGORIES as API_CATEGORIES
from serve.models import moderation
from serve.models.catalogue import PACKAGES
from serve.models.encoder import EmbeddingModel
from tests.serve import scripted
from tests.serve.conftest import client as open_client
from tests.waiting import wait_until
from training.recipes.moderation import (
    CATEGORIES,
    MIN_POSITIVES,
    MIN_PRECISION,
    MIN_RECALL,
    NEVER_ASSESSED,
    embed,
    is_held_out,
    read_sentences,
    sigmoid,
    train,
)
from transformer.checkpoint.safetensors import read_tensors

pytestmark = pytest.mark.heavy
WEIGHTS = PACKAGES / "training/weights/minilm-moderation"
INSULT = "You are a worthless idiot and everybody hates you."
HARMLESS = "How do I bake bread without yeast?"


@pytest.fixture(scope="module")
def model(model_file):
    return moderation.load_moderation_model(
        "moderator", WEIGHTS, model_file("all-minilm-l6-v2"), owned_by="test", dtype="float32"
    )


@pytest.fixture(scope="module")
def client(model):
    with (
        scripted.serve_models(scripted.model(), model) as url,
        open_client(url, strict=True) as client,
    ):
        yield client


def ask(client, **fields):
    return client.moderations.create(model="moderator", **fields)


def test_insult_is_flagged_and_question_is_not(client):
    insult, question = ask(client, input=[INSULT, HARMLESS]).results
    assert insult.flagged and insult.categories.harassment
    assert not question.flagged and question.category_scores.harassment < 0.5


def test_all_categories_are_present_and_the_not_assessed_ones_named(client, model):
    reply = client.moderations.with_raw_response.create(model="moderator", input=INSULT)
    result = reply.http_response.json()["results"][0]
    for field in ("categories", "category_scores", "category_applied_input_types"):
        assert set(result[field]) == set(API_CATEGORIES)
    unassessed = reply.headers[NOT_ASSESSED].split(", ")
    assert unassessed == [name for name in API_CATEGORIES if name not in model.thresholds]
    for name in unassessed:
        assert result["categories"][name] is False and result["category_scores"][name] == 0
        assert result["category_applied_input_types"][name] == []


def test_categories_about_minors_and_self_harm_are_never_assessed(model):
    assert not set(NEVER_ASSESSED) & set(model.thresholds)
    assert {"sexual/minors", "self-harm/instructions"} <= set(NEVER_ASSESSED)
    assert API_CATEGORIES == CATEGORIES


def test_parts_are_one_input(client):
    parts = [{"type": "text", "text": text} for text in (HARMLESS, INSULT)]
    assert [result.flagged for result in ask(client, input=parts).results] == [True]


def test_end_of_a_long_text_counts(client):
    (result,) = ask(client, input=f"{HARMLESS} " * 200 + INSULT).results
    assert result.flagged


def test_score_does_not_depend_on_other_inputs(client):
    (alone,) = ask(client, input=INSULT).results
    together = ask(client, input=[HARMLESS, INSULT, HARMLESS]).results[1]
    assert together.category_scores.harassment == pytest.approx(
        alone.category_scores.harassment, abs=1e-5
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [1, 2]}, "input"),
        ({"input": ["x"] * 10_000}, "input"),
        ({"input": "word " * 400_000}, "input"),
        ({"input": [{"type": "image_url", "image_url": {"url": "data:,"}}]}, "input[0].type"),
        ({"input": [{"type": "sound"}]}, "input[0].type"),
        ({}, "input"),
    ],
)
def test_bad_input_is_refused_by_name(client, body, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.post("/moderations", body={"model": "moderator"} | body, cast_to=object)
    assert error.value.param == param


def test_chat_model_is_refused(client):
    with pytest.raises(openai.NotFoundError):
        client.moderations.create(model="scripted", input="x")


@pytest.mark.parametrize("stream", [False, True])
def test_chat_has_the_moderation_of_messages_and_answers(client, stream):
    request = {
        "model": "scripted",
        "messages": [{"role": "user", "content": INSULT}],
        "max_tokens": 3,
        "n": 2,
        "moderation": {"model": "moderator", "policy": {"input": {"mode": "score"}}},
    }
    if stream:
        *chunks, last = client.chat.completions.create(**request, stream=True)
        assert last.choices == [] and all(chunk.moderation is None for chunk in chunks)
    else:
        last = client.chat.completions.create(**request)
    assert [result.flagged for result in last.moderation.input.results] == [True]
    assert len(last.moderation.output.results) == 2
    assert last.moderation.input.results[0].model == "moderator"


@pytest.mark.parametrize(
    ("settings", "status", "param"),
    [
        ({"model": "nobody"}, 404, "moderation.model"),
        ({"model": "scripted"}, 404, "moderation.model"),
        ({"model": "moderator", "policy": {"output": {"mode": "block"}}}, 400, None),
        ({}, 400, "moderation.model"),
    ],
)
def test_chat_with_bad_moderation_is_refused(client, settings, status, param):
    body = {"model": "scripted", "messages": [{"role": "user", "content": "x"}]}
    with pytest.raises(openai.APIStatusError) as error:
        client.post("/chat/completions", body=body | {"moderation": settings}, cast_to=object)
    assert error.value.status_code == status
    assert error.value.param == (param or "moderation.policy.output.mode")


@pytest.mark.slow  # embeds a thousand sentences
def test_recipe_gives_the_weights_of_the_repository(model_file):
    data = read_sentences()
    vectors = embed(model_file("all-minilm-l6-v2"), data.texts)
    tensors, config = train(vectors, data)
    assert config == moderation.read_config(WEIGHTS)
    for name, tensor in read_tensors(WEIGHTS / "model.safetensors").items():
        np.testing.assert_allclose(tensors[name], tensor.read(0, tensor.shape[0]), atol=2e-2)


def test_card_states_results_of_held_out_sentences():
    data, held_out = read_sentences(), is_held_out(read_sentences())
    assert not set(data.groups[held_out]) & set(data.groups[~held_out])
    rows = moderation.read_config(WEIGHTS)["categories"]
    for name, row in rows.items():
        assert row["positives"] == data.labels[held_out, CATEGORIES.index(name)].sum()
        is_good = row["precision"] >= MIN_PRECISION and row["recall"] >= MIN_RECALL
        assert row["is_assessed"] == (is_good and row["positives"] >= MIN_POSITIVES)


def test_sigmoid_of_large_values_does_not_overflow():
    np.testing.assert_allclose(sigmoid(np.array([-1000.0, 0.0, 1000.0])), [0, 0.5, 1])


@pytest.mark.parametrize("route", ["chat", "responses"])
def test_stream_with_moderation_has_the_header(client, route):
    text = {"input": INSULT} if route == "responses" else {"messages": [user(INSULT)]}
    resource = client.responses if route == "responses" else client.chat.completions
    fields = {"model": "scripted", "moderation": {"model": "moderator"}, "stream": True}
    reply = resource.with_raw_response.create(**fields, **text)
    assert "sexual/minors" in reply.headers[NOT_ASSESSED].split(", ")


def test_stored_stream_keeps_its_moderation_and_usage(client):
    *_, moderated, last = client.chat.completions.create(
        model="scripted",
        messages=[user(INSULT)],
        moderation={"model": "moderator"},
        stream=True,
        stream_options={"include_usage": True},
        store=True,
    )
    stored = client.chat.completions.retrieve(last.id)
    assert stored.moderation is not None and stored.usage == last.usage
    assert stored.moderation.to_dict() == moderated.moderation.to_dict()


def test_moderation_that_fails_does_not_lose_the_answer(model):
    class Damaged:
        def __getattr__(self, name):
            return getattr(model.encoder, name)

        async def embed(self, batch):
            raise FloatingPointError("a vector is NaN")

    damaged = dataclasses.replace(model, encoder=cast(EmbeddingModel, Damaged()))
    with (
        scripted.serve_models(scripted.model(), damaged) as url,
        open_client(url, strict=True) as client,
    ):
        answer = client.chat.completions.create(
            model="scripted", messages=[user(INSULT)], moderation={"model": "moderator"}
        )
    assert answer.choices[0].message.content
    assert answer.moderation.output.type == "error"


def test_weights_that_are_not_finite_are_refused(model_file, tmp_path):
    folder = shutil.copytree(WEIGHTS, tmp_path / "weights")
    tensors = read_tensors(folder / "model.safetensors")
    weight = tensors["weight"].read(0, tensors["weight"].shape[0])
    bias = tensors["bias"].read(0, tensors["bias"].shape[0]) * np.nan
    save_file({"weight": weight, "bias": bias}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        moderation.load_moderation_model(
            "moderator", folder, model_file("all-minilm-l6-v2"), owned_by="test", dtype="float32"
        )


def test_response_has_the_moderation_of_input_and_output(client):
    moderation = {"model": "moderator"}
    response = client.responses.create(model="scripted", input=INSULT, moderation=moderation)
    assert response.moderation.input.type == "moderation_result"
    assert response.moderation.input.flagged and response.moderation.input.model == "moderator"
    assert not response.moderation.output.flagged
    assert client.responses.retrieve(response.id).moderation == response.moderation
    # The messages before are part of the input.
    following = client.responses.create(
        model="scripted", input=HARMLESS, previous_response_id=response.id, moderation=moderation
    )
    assert following.moderation.input.flagged


def test_streamed_response_has_moderation_in_its_last_event(client):
    *events, last = client.responses.create(
        model="scripted", input=INSULT, moderation={"model": "moderator"}, stream=True
    )
    assert events[0].response.moderation is None and last.response.moderation.input.flagged
    again = client.responses.retrieve(last.response.id, stream=True)
    assert [event.to_dict() for event in again] == [e.to_dict() for e in [*events, last]]


@pytest.mark.parametrize(
    ("settings", "status", "param"),
    [
        ({"model": "scripted"}, 404, "moderation.model"),
        ({"model": "moderator", "policy": {"input": {"mode": "block"}}}, 400, "input.mode"),
    ],
)
def test_response_with_bad_moderation_is_refused(client, settings, status, param):
    body = {"model": "scripted", "input": "x", "moderation": settings}
    with pytest.raises(openai.APIStatusError) as error:
        client.post("/responses", body=body, cast_to=object)
    assert error.value.status_code == status and error.value.param.endswith(param)


@pytest.mark.parametrize(
    ("body", "status"), [({"model": "moderator"}, "completed"), ({}, "failed")]
)
def test_batch_of_moderations_is_answered_or_names_the_model(client, body, status):
    line = {"custom_id": "1", "method": "POST", "url": "/v1/moderations"}
    data = json.dumps(line | {"body": {"input": INSULT, **body}}).encode()
    file = client.files.create(file=("lines.jsonl", data), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/moderations", completion_window="24h"
    )
    wait_until(lambda: client.batches.retrieve(batch.id).status in ("completed", "failed"))
    batch = client.batches.retrieve(batch.id)
    assert batch.status == status
    if status == "failed":  # the default model is not on this server
        assert [error.code for error in batch.errors.data] == ["model_not_found"]
    else:
        answer = json.loads(client.files.content(batch.output_file_id).text)
        assert answer["response"]["body"]["results"][0]["flagged"]


def user(text):
    return {"role": "user", "content": text}
