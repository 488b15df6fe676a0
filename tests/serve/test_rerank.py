"""Test /v1/rerank and /v1/score with tiny models over a socket."""

import json
import shutil

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bpe
from serve.api import responses
from serve.api.app import create_app
from serve.api.settings import ServerSettings
from serve.models import resolve
from serve.models.registry import Registry
from serve.models.reranker import load_rerank_model, relevance
from serve.models.spec import LoadOptions, ModelFiles
from tests.naming import names
from tests.serve import scripted, tiny_encoders
from transformer import encoder
from transformer.checkpoint import bert

pytestmark = pytest.mark.heavy

QUERY = "the capital of france ?"
DOCUMENTS = ["paris", "paris is the capital", "zebra"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    embedder = tiny_encoders.copied("nomic", folder / "embedder")
    (embedder / "config_sentence_transformers.json").write_text(
        json.dumps(
            {
                "prompts": {"query": "q ", "document": "d ", "other": ""},
                "default_prompt_name": "other",
            }
        )
    )
    return {"cross": tiny_encoders.copied("cross-bert", folder / "cross"), "embedder": embedder}


def specs(folders, home, *names):
    options = LoadOptions(cache_budget=2**20, dtype="float32", home=home, notify=print)
    return [resolve.describe(ModelFiles(name, folders[name], "me"), options) for name in names]


@pytest.fixture(scope="module")
def address(folders, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    models = [scripted.model(), *specs(folders, home, "embedder", "cross")]
    assert [model.kind for model in models] == ["decoder", "encoder", "reranker"]
    registry = Registry(models, {"rerank-v3.5": "cross", "gpt-4": "scripted"})
    with scripted.serve_app(create_app(ServerSettings(home=home), registry)) as address:
        yield address


def post(address, path="/v1/rerank", **body):
    """Post a request; check that the response has the schema of /openapi.json."""
    answer = httpx.post(f"{address}{path}", json=body, timeout=60)
    model = responses.Scores if path.endswith("score") else responses.Rerank
    if answer.is_error:
        responses.Error.model_validate_json(answer.content, strict=True)
    elif not path.endswith("embeddings"):
        model.model_validate_json(answer.content, strict=True)
    return answer


@pytest.fixture(scope="module")
def expected(folders):
    """Return the scores of the query and the documents, computed without the server."""
    params, cfg = bert.load(folders["cross"])
    tokenizer = bpe.load_encoder_tokenizer(folders["cross"])
    pairs = [tokenizer.encode_pair(QUERY, text) for text in DOCUMENTS]
    logits = encoder.score_all(params, cfg, pairs)[:, 0]
    return 1 / (1 + np.exp(-logits)), sum(len(ids) for ids, _ in pairs)


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_rerank_sorts_documents_by_relevance(address, expected, path):
    scores, num_tokens = expected
    answer = post(address, path, query=QUERY, documents=DOCUMENTS, model="rerank-v3.5").json()
    assert (answer["model"], answer["method"]) == ("cross", "cross_encoder")
    order = [result["index"] for result in answer["results"]]
    assert order == np.argsort(-scores).tolist()
    for result in answer["results"]:
        assert result["relevance_score"] == pytest.approx(scores[result["index"]], abs=1e-5)
        assert result["document"] == {"text": DOCUMENTS[result["index"]]}
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def test_cross_encoder_spec_before_loading_has_context(folders, tmp_path):
    """Regression: /v1/models showed no context of a cross-encoder before the first request."""
    (spec,) = specs(folders, tmp_path, "cross")
    assert spec.context == bert.read_config(folders["cross"]).max_tokens


def test_rerank_top_n_returns_best_documents_and_accepts_objects(address):
    plain = post(address, query=QUERY, documents=DOCUMENTS).json()  # the reranker is the default
    objects = [{"text": text, "id": 3} for text in DOCUMENTS]
    answer = post(address, query=QUERY, documents=objects, top_n=2, return_documents=False).json()
    best = [{**result} for result in plain["results"][:2]]
    for result in best:
        del result["document"]
    assert answer["results"] == best
    whole = post(address, query=QUERY, documents=DOCUMENTS, top_n=9).json()
    assert whole["results"] == plain["results"]


def test_rerank_with_embedding_model_returns_cosines_and_method(address, folders):
    def vectors(texts, name):
        body = {"model": "embedder", "input": texts, "prompt_name": name}
        data = post(address, "/v1/embeddings", **body).json()["data"]
        return np.array([item["embedding"] for item in data])

    cosines = vectors(DOCUMENTS, "document") @ vectors([QUERY], "query")[0]
    answer = post(address, query=QUERY, documents=DOCUMENTS, model="embedder").json()
    assert (answer["model"], answer["method"]) == ("embedder", "embeddings")
    for result in answer["results"]:
        assert result["relevance_score"] == pytest.approx(cosines[result["index"]], abs=1e-5)
    scores = post(address, "/v1/score", model="embedder", text_1=QUERY, text_2=DOCUMENTS).json()
    assert [item["score"] for item in scores["data"]] == pytest.approx(cosines, abs=1e-5)
    assert scores["method"] == "embeddings"


def test_rerank_without_cross_encoder_uses_embedding_model(folders, tmp_path):
    registry = Registry(specs(folders, tmp_path, "embedder"), {})
    with scripted.serve_app(create_app(ServerSettings(home=tmp_path), registry)) as address:
        answer = post(address, query=QUERY, documents=DOCUMENTS).json()
    assert (answer["model"], answer["method"]) == ("embedder", "embeddings")


def test_model_with_nan_weights_returns_500(folders, tmp_path):
    """Bug: scores and vectors were NaN, with status 200."""
    damaged = {name: tmp_path / name for name in folders}
    for name, folder in damaged.items():
        shutil.copytree(folders[name], folder)
        tensors = load_file(folder / "model.safetensors")
        norm = next(key for key in tensors if "norm" in key.lower())
        tensors[norm] = np.full_like(tensors[norm], np.nan)
        save_file(tensors, folder / "model.safetensors")
    registry = Registry(specs(damaged, tmp_path, *damaged), {})
    with scripted.serve_app(create_app(ServerSettings(home=tmp_path), registry)) as address:
        for answer in (
            post(address, model="cross", query=QUERY, documents=DOCUMENTS),
            post(address, "/v1/embeddings", model="embedder", input=QUERY),
        ):
            error = answer.json()["error"]
            assert (answer.status_code, error["type"]) == (500, "server_error")
            assert names(error["message"], "NaN")


def test_rerank_without_reranker_or_encoder_returns_404(tmp_path):
    registry = Registry([scripted.model()], {})
    with scripted.serve_app(create_app(ServerSettings(home=tmp_path), registry)) as address:
        for fields in ({}, {"model": "scripted"}):
            answer = post(address, query="a", documents=["b"], **fields)
            assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")


def test_score_returns_relevance_of_each_pair(address, expected):
    scores, num_tokens = expected
    answer = post(address, "/v1/score", model="cross", text_1=QUERY, text_2=DOCUMENTS).json()
    assert [item["score"] for item in answer["data"]] == pytest.approx(scores, abs=1e-5)
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    assert answer["usage"]["total_tokens"] == num_tokens and answer["object"] == "list"
    each = post(address, "/score", queries=[QUERY] * 3, documents=DOCUMENTS).json()
    assert each["data"] == answer["data"]
    one = post(address, "/v1/score", text_1=QUERY, text_2=DOCUMENTS[0]).json()["data"]
    assert one == [{"index": 0, "object": "score", "score": pytest.approx(scores[0], abs=1e-5)}]


def test_long_pair_is_refused_unless_truncated(address):
    long = "a " * 60
    answer = post(address, query=QUERY, documents=["paris", long])
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (
        400,
        "documents[1]",
        "context_length_exceeded",
    )
    assert "40" in error["message"]
    error = post(address, query=long, documents=["paris"]).json()["error"]
    assert (error["param"], error["code"]) == ("query", "context_length_exceeded")
    error = post(address, "/v1/score", text_1=["a", "b"], text_2=["b", long]).json()["error"]
    assert error["param"] == "text_2[1]"

    cut = post(address, query=QUERY, documents=["paris", long], truncate=True).json()
    assert (
        post(address, query=QUERY, documents=["paris", long], truncate_prompt_tokens=-1).json()[
            "results"
        ]
        == cut["results"]
    )
    documents = ["paris", "a " * 5]
    short = post(address, query=QUERY, documents=documents).json()["results"]
    capped = post(address, query=QUERY, documents=["paris", long], max_tokens_per_doc=5).json()
    keys = ("index", "relevance_score")
    assert [[r[k] for k in keys] for r in capped["results"]] == [
        [r[k] for k in keys] for r in short
    ]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"query": "", "documents": ["a"]}, "query", "empty_string"),
        ({"documents": ["a"]}, "query", "missing_required_parameter"),
        ({"query": "a"}, "documents", "missing_required_parameter"),
        ({"query": "a", "documents": []}, "documents", "empty_array"),
        ({"query": "a", "documents": ["b", ""]}, "documents[1]", "empty_string"),
        ({"query": "a", "documents": ["b", 3]}, "documents[1]", "invalid_type"),
        (
            {"query": "a", "documents": [{"title": "x"}]},
            "documents[0].text",
            "missing_required_parameter",
        ),
        ({"query": "a", "documents": ["b"] * 2049}, "documents", "array_above_max_length"),
        ({"query": "a", "documents": ["b"], "top_n": -1}, "top_n", "integer_below_min_value"),
        (
            {"query": "a", "documents": ["b"], "truncate_prompt_tokens": 41},
            "truncate_prompt_tokens",
            "invalid_value",
        ),
    ],
)
def test_invalid_rerank_request_names_the_field(address, body, param, code):
    answer = post(address, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "text_1", "missing_required_parameter"),
        ({"text_1": "a"}, "text_2", "missing_required_parameter"),
        ({"queries": "a"}, "documents", "missing_required_parameter"),
        (
            {"text_1": "a", "text_2": "b", "queries": "c", "documents": "d"},
            "text_1",
            "invalid_value",
        ),
        ({"text_1": ["a", "b"], "text_2": ["c"]}, "text_2", "invalid_value"),
        ({"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_2", "invalid_value"),
        ({"text_1": [], "text_2": "a"}, "text_1", "empty_array"),
        ({"text_1": "a", "text_2": {"x": 1}}, "text_2", "invalid_type"),
    ],
)
def test_invalid_score_request_names_the_field(address, body, param, code):
    answer = post(address, "/v1/score", **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error


def test_rerank_with_unknown_model_or_wrong_kind_returns_404(address):
    for name in ("nothing", "scripted", "gpt-4"):
        answer = post(address, query="a", documents=["b"], model=name)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (
            404,
            "model",
            "model_not_found",
        )
    answer = post(address, "/v1/embeddings", model="cross", input="a")
    assert answer.status_code == 404


def test_models_list_contains_reranker(address):
    entries = httpx.get(f"{address}/v1/models").json()["data"]
    assert {entry["id"]: entry["kind"] for entry in entries}["cross"] == "reranker"


def test_relevance_of_two_labels_is_probability_of_second():
    logits = np.array([[0.0, 0.0], [1.0, 3.0], [800.0, -800.0]], np.float32)
    np.testing.assert_allclose(relevance(logits, "sigmoid"), [0.5, 0.880797, 0.0], atol=1e-6)
    np.testing.assert_allclose(relevance(logits[:, :1], "identity"), logits[:, 0])


def test_activation_of_files_is_used_and_unsupported_config_raises_value_error(tmp_path):
    identity = "torch.nn.modules.linear.Identity"
    for number, change in enumerate(
        (
            {"sentence_transformers": {"activation_fn": identity}},
            {"sbert_ce_default_activation_function": identity},
        )
    ):
        folder = tiny_encoders.copied("cross-bert", tmp_path / str(number), **change)
        model = load_rerank_model("x", folder, owned_by="me", dtype="float32")
        assert model.activation == "identity"
    unknown = {"sentence_transformers": {"activation_fn": "my.Activation"}}
    folders = {
        "unknown": tiny_encoders.copied("cross-bert", tmp_path / "unknown", **unknown),
        "labels": tiny_encoders.copied("cross-roberta", tmp_path / "labels"),
    }
    for name, word in (("unknown", "my.Activation"), ("labels", "num_labels")):
        with pytest.raises(ValueError, match=word):
            specs(folders, tmp_path, name)
