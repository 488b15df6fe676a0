"""Test POST /v1/embeddings and `pellucid embed` with all-MiniLM-L6-v2 over a socket."""

import asyncio
import base64
import json
import subprocess
import sys

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI

import bpe
from serve.api.app import create_app
from serve.api.settings import ServerSettings
from serve.exceptions import WrongUsage
from serve.models import resolve
from serve.models.encoder import load_embedding_model
from serve.models.registry import Registry
from serve.models.spec import LoadOptions, ModelFiles
from tests.naming import names, naming
from tests.serve import scripted
from tests.serve.old_client import OldClient, install

pytestmark = pytest.mark.heavy

MODEL = "all-minilm-l6-v2"
ALIASES = {
    "text-embedding-3-small": MODEL,
    "text-embedding-ada-002": MODEL,
    "my-vectors": MODEL,
    "gpt-4": "scripted",
}


@pytest.fixture(scope="module")
def folder(model_file):
    return model_file(MODEL)


@pytest.fixture(scope="module")
def embedding_address(folder, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    files = ModelFiles(MODEL, folder, "sentence-transformers")
    spec = resolve.describe(
        files, LoadOptions(cache_budget=2**20, dtype="float32", home=home, notify=print)
    )
    assert spec.kind == "encoder"
    registry = Registry([scripted.model(), spec], ALIASES)
    with scripted.serve_app(create_app(ServerSettings(home=home), registry)) as address:
        yield address


@pytest.fixture(scope="module")
def client(embedding_address):
    with OpenAI(base_url=f"{embedding_address}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def words(folder):
    return bpe.load_wordpiece(folder)


def post(address, **body):
    return httpx.post(f"{address}/v1/embeddings", json={"model": MODEL} | body, timeout=60)


def vectors(answer):
    return np.array([item.embedding for item in answer.data], np.float32)


def test_client_gets_unit_vectors_in_order(client):
    texts = ["A cat sits on the mat.", "Stocks fell sharply today.", "A kitten rests on a rug."]
    answer = client.embeddings.create(model=MODEL, input=texts)
    result = vectors(answer)
    assert result.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), 1, atol=1e-5)
    assert result[0] @ result[2] > result[0] @ result[1] + 0.3
    assert answer.model == MODEL
    assert [item.index for item in answer.data] == [0, 1, 2]
    for text, vector in zip(texts, result, strict=True):
        alone = vectors(client.embeddings.create(model=MODEL, input=text))
        np.testing.assert_allclose(alone[0], vector, atol=1e-5)


def test_client_of_2023_gets_vectors(embedding_address, client):
    old = OldClient(install(), embedding_address)
    answer = old.run(
        f"answer = openai.Embedding.create(model={MODEL!r}, input=['one', 'two', 'three'])"
    )
    result = np.array([item["embedding"] for item in answer["data"]], np.float32)
    expected = vectors(client.embeddings.create(model=MODEL, input=["one", "two", "three"]))
    np.testing.assert_array_equal(result, expected)


def test_float_response_matches_schema(embedding_address):
    strict = OpenAI(
        base_url=f"{embedding_address}/v1", api_key="any", _strict_response_validation=True
    )
    with strict:  # the schema does not allow base64, not even in OpenAI's own responses
        strict.embeddings.create(model=MODEL, input=["a", "b"], encoding_format="float")


def test_base64_equals_float(embedding_address):
    floats = post(embedding_address, input="hello").json()
    packed = post(embedding_address, input="hello", encoding_format="base64").json()
    assert floats["usage"] == packed["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    text = packed["data"][0]["embedding"]
    np.testing.assert_array_equal(
        np.frombuffer(base64.b64decode(text), "<f4"),
        np.array(floats["data"][0]["embedding"], np.float32),
    )


def test_repeated_request_returns_bitwise_identical_vectors(embedding_address):
    first = post(embedding_address, input=["one", "two words"]).content
    assert post(embedding_address, input=["one", "two words"]).content == first


def test_token_ids_with_or_without_special_tokens_are_equal(client, words):
    texts = ["Hamburgers and pears.", "naïve"]
    expected = vectors(client.embeddings.create(model=MODEL, input=texts))
    framed = [words.encode(text) for text in texts]
    bare = [words.encode(text, add_special_tokens=False) for text in texts]
    for ids in (framed, bare):
        answer = client.embeddings.create(model=MODEL, input=ids)
        np.testing.assert_array_equal(vectors(answer), expected)
        assert answer.usage.total_tokens == sum(map(len, framed))
    one = client.embeddings.create(model=MODEL, input=bare[0])
    np.testing.assert_allclose(vectors(one)[0], expected[0], atol=1e-5)


@pytest.mark.parametrize("alias", ["text-embedding-3-small", "text-embedding-ada-002"])
def test_token_ids_sent_to_openai_alias_are_translated(client, alias):
    text = "Hamburgers and pears."
    expected = vectors(client.embeddings.create(model=alias, input=[text]))
    ids = bpe.get_encoding("cl100k_base").encode(text)
    answer = client.embeddings.create(model=alias, input=[ids])
    np.testing.assert_array_equal(vectors(answer), expected)
    assert answer.model == MODEL


def test_token_ids_sent_to_other_alias_are_not_translated(client, words):
    expected = vectors(client.embeddings.create(model=MODEL, input="pears"))
    same = client.embeddings.create(model="my-vectors", input=words.encode("pears"))
    np.testing.assert_array_equal(vectors(same), expected)


def test_invalid_token_id_sent_to_alias_is_refused(client):
    with pytest.raises(openai.BadRequestError, match=naming("cl100k_base")) as caught:
        client.embeddings.create(model="text-embedding-3-small", input=[[10], [10**6]])
    assert (caught.value.param, caught.value.code) == ("input[1]", "invalid_value")


def test_vectors_of_fewer_dimensions_are_truncated_and_normalized(client):
    whole = vectors(client.embeddings.create(model=MODEL, input="hello"))[0]
    few = vectors(client.embeddings.create(model=MODEL, input="hello", dimensions=64))[0]
    np.testing.assert_allclose(few, whole[:64] / np.linalg.norm(whole[:64]), atol=1e-6)
    assert np.linalg.norm(few) == pytest.approx(1, abs=1e-5)


def test_long_input_is_refused_unless_truncated(embedding_address, words):
    long = "word " * 300
    answer = post(embedding_address, input=["short", long])
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["param"], error["code"]) == ("input[1]", "context_length_exceeded")

    cut = post(embedding_address, input=long, truncate=True).json()
    same = post(embedding_address, input="word " * 254).json()
    assert cut == same and cut["usage"]["total_tokens"] == 256
    assert post(embedding_address, input=long, truncate_prompt_tokens=-1).json() == cut
    ten = post(embedding_address, input=long, truncate_prompt_tokens=10).json()
    assert ten == post(embedding_address, input="word " * 8).json()
    ids = [words.vocab["word"]] * 300
    assert post(embedding_address, input=ids, truncate=True).json() == cut
    assert post(embedding_address, input=ids, long_text_mode="truncate").json() == cut


def test_long_text_with_mode_mean_averages_chunks(embedding_address, words):
    """As in OpenAI's cookbook, the mean is weighted by the chunks' token counts and normalized."""
    parts = ["the cat sat on a mat. " * 40, "stocks fell on monday. " * 50, "snow in may. " * 9]
    ids = [words.encode(part)[1:-1] for part in parts]
    ids = [ids[0][:254], (ids[1] * 2)[:254], ids[2]]  # the chunks: at most 254 tokens each
    assert list(map(len, ids[:2])) == [254, 254]
    whole = [id for part in ids for id in part]
    answer = post(embedding_address, input=["short", whole], long_text_mode="mean")
    assert answer.status_code == 400, "an input list has either texts or token ids"
    short = words.encode("short")
    answer = post(embedding_address, input=[short, whole], long_text_mode="mean").json()
    alone = post(embedding_address, input=[short, *ids]).json()
    result, single = (
        np.array([item["embedding"] for item in one["data"]]) for one in (answer, alone)
    )
    expected = np.array([254, 254, len(ids[2])]) @ single[1:]
    np.testing.assert_allclose(result[1], expected / np.linalg.norm(expected), atol=1e-5)
    np.testing.assert_allclose(result[0], single[0], atol=1e-5)
    count = len(short) + 254 + 254 + len(ids[2]) + 3 * 2
    assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count} == alone["usage"]
    few = post(embedding_address, input=[whole], long_text_mode="mean", dimensions=64).json()
    vector = np.array(few["data"][0]["embedding"])
    assert len(vector) == 64 and np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(vector * np.linalg.norm(result[1][:64]), result[1][:64], atol=1e-5)


def test_vector_of_short_text_is_equal_in_every_long_text_mode(embedding_address):
    whole = post(embedding_address, input=["hello", "two words"]).json()
    for mode in ("mean", "truncate", None):
        same = post(embedding_address, input=["hello", "two words"], long_text_mode=mode).json()
        assert same == whole


def test_max_embedding_tokens_extends_context(folder, tmp_path):
    """all-MiniLM has 512 position embeddings, of which it uses 256 by default."""
    files = ModelFiles(MODEL, folder, "sentence-transformers")
    options = dict(cache_budget=2**20, dtype="float32", home=tmp_path, notify=print)
    spec = resolve.describe(files, LoadOptions(max_embedding_tokens=512, **options))
    with scripted.serve_app(
        create_app(ServerSettings(home=tmp_path), Registry([spec], {}))
    ) as address:
        long = post(address, input="word " * 510).json()
        assert long["usage"]["total_tokens"] == 512
        error = post(address, input="word " * 511).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
        cut = post(address, input="word " * 511, truncate_prompt_tokens=512).json()
        assert cut == long
    for wrong in (0, 2, 513):
        with pytest.raises(WrongUsage, match=naming("--max-embedding-tokens", 3, 512, wrong)):
            resolve.describe(files, LoadOptions(max_embedding_tokens=wrong, **options))


@pytest.mark.parity
def test_texts_of_512_tokens_equal_sentence_transformers(folder):
    from sentence_transformers import SentenceTransformer

    texts = ["the cat sat on a mat, and " * 70, "word " * 600, "short"]
    peer = SentenceTransformer(str(folder), device="cpu")
    peer.max_seq_length = 512
    served = load_embedding_model(MODEL, folder, owned_by="me", dtype="float32", max_tokens=512)
    ids = [served.tokenizer.encode(text, max_length=512) for text in texts]
    assert len(ids[1]) == 512
    result = asyncio.run(served.embed(ids))
    assert (result * peer.encode(texts, normalize_embeddings=True)).sum(1).min() > 0.99999


@pytest.mark.parametrize(
    ("body", "param", "code", "facts"),
    [
        ({"input": ""}, "input", "empty_string", []),
        ({"input": ["a", ""]}, "input[1]", "empty_string", []),
        ({"input": []}, "input", "empty_array", []),
        ({"input": [[]]}, "input[0]", "empty_array", []),
        ({"input": 3}, "input", "invalid_type", []),
        ({"input": None}, "input", "missing_required_parameter", []),
        ({"input": ["a", 1]}, "input[1]", "invalid_type", []),
        ({"input": ["a"] * 2049}, "input", "array_above_max_length", [2048, 2049]),
        ({"input": [30522]}, "input[0]", "invalid_value", [30522, 30521]),
        ({"input": [[1], [2, -1]]}, "input[1][1]", "invalid_value", ["-1"]),
        ({"input": "a", "dimensions": 0}, "dimensions", "integer_below_min_value", []),
        ({"input": "a", "dimensions": 385}, "dimensions", "integer_above_max_value", [384, 385]),
        (
            {"input": "a", "encoding_format": "hex"},
            "encoding_format",
            "invalid_value",
            ["'hex'", "'float'", "'base64'"],
        ),
        ({"input": "a", "long_text_mode": "max"}, "long_text_mode", "invalid_value", ["'max'"]),
        (
            {"input": "a", "long_text_mode": "mean", "truncate": True},
            "long_text_mode",
            "invalid_value",
            ["'mean'", "'truncate'"],
        ),
        (
            {"input": "a", "long_text_mode": "mean", "truncate_prompt_tokens": 9},
            "long_text_mode",
            "invalid_value",
            ["'mean'", "'truncate_prompt_tokens'"],
        ),
        (
            {"input": "word " * 300_001, "long_text_mode": "mean"},
            "input",
            "max_tokens_per_request",
            [300_000],
        ),
        (
            {"input": "a", "truncate_prompt_tokens": 2},
            "truncate_prompt_tokens",
            "invalid_value",
            [2, 3, 256],
        ),
        (
            {"input": "a", "truncate_prompt_tokens": 257},
            "truncate_prompt_tokens",
            "invalid_value",
            [257, 256],
        ),
        ({"input": ["word " * 250] * 1200}, "input", "max_tokens_per_request", [300_000]),
    ],
)
def test_invalid_requests_name_the_field(embedding_address, body, param, code, facts):
    answer = post(embedding_address, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error
    assert names(error["message"], *facts)


def test_model_of_another_task_returns_404(client):
    both = naming("`scripted`", f"`{MODEL}`")  # the requested model, and a model for this route
    with pytest.raises(openai.NotFoundError, match=both):
        client.embeddings.create(model="gpt-4", input="x")
    with pytest.raises(openai.NotFoundError, match=both):
        client.completions.create(model=MODEL, prompt="x")
    with pytest.raises(openai.NotFoundError, match=both):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.NotFoundError, match=naming("`text-embedding-4`")) as caught:
        client.embeddings.create(model="text-embedding-4", input="x")
    assert caught.value.code == "model_not_found"


def test_embeddings_under_engines_path_are_counted_in_metrics(embedding_address):
    answer = httpx.post(
        f"{embedding_address}/v1/engines/{MODEL}/embeddings", json={"input": "hello"}, timeout=60
    )
    assert answer.json() == post(embedding_address, input="hello").json()
    page = httpx.get(f"{embedding_address}/metrics").text
    assert f'pellucid_prompt_tokens_total{{model="{MODEL}"}}' in page


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "serve", "embed", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def test_embed_command_prints_vectors_as_lines_or_json(embedding_address, tmp_path):
    expected = post(embedding_address, input=["hello", "two words"]).json()
    process = run(
        "hello", "two words", "--dtype", "float32", "--json", "-o", str(tmp_path / "v.npy")
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    matrix = np.load(tmp_path / "v.npy")
    for index in range(2):
        numbers = expected["data"][index].pop("embedding")
        np.testing.assert_allclose(result["data"][index].pop("embedding"), numbers, atol=1e-6)
        np.testing.assert_allclose(matrix[index], numbers, atol=1e-6)
    assert result == expected

    lines = run("--dtype", "float32", input="hello\ntwo words\n").stdout.splitlines()
    got = np.array([[float(x) for x in line.split()] for line in lines])
    np.testing.assert_allclose(got, matrix, atol=1e-6)


def test_embed_command_embeds_long_texts(embedding_address):
    long = "word " * 300
    expected = post(embedding_address, input=long, long_text_mode="mean").json()
    result = json.loads(
        run(long, "--dtype", "float32", "--json", "--long-text-mode", "mean").stdout
    )
    assert result["usage"] == expected["usage"]
    vector, other = (np.array(one["data"][0]["embedding"]) for one in (result, expected))
    np.testing.assert_allclose(vector, other, atol=1e-6)
    whole = run(long, "--dtype", "float32", "--json", "--max-embedding-tokens", "512").stdout
    assert json.loads(whole)["usage"]["total_tokens"] == 302


def test_embed_command_with_invalid_arguments_exits_with_error_code(tmp_path):
    process = run("word " * 300)
    assert process.returncode == 5 and names(process.stderr, "text 1", 302, "all-minilm-l6-v2", 256)
    process = run("word " * 300, "--truncate", "--long-text-mode", "mean")
    assert process.returncode == 2 and names(process.stderr, "--truncate", "--long-text-mode")
    process = run("x", "--max-embedding-tokens", "513")
    assert process.returncode == 2 and names(process.stderr, "--max-embedding-tokens", 3, 512, 513)
    process = run("x", "-o", "v.txt")
    assert process.returncode == 2 and names(process.stderr, "v.txt", ".npy")
    process = run(stdin=subprocess.DEVNULL)
    assert (process.returncode, process.stdout) == (2, "") and names(process.stderr, "text")
    process = run("x", "-m", "smollm2-135m-instruct")
    assert process.returncode == 2
    assert names(process.stderr, "smollm2-135m-instruct", "all-minilm-l6-v2")
