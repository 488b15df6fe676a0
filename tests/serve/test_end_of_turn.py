"""A model with two end tokens stops at either on every route, without text for it."""

import json

import httpx
import jax
import pytest

from serve.models import adapters, decoder, fingerprint
from serve.models.compilation_cache import enable_compilation_cache
from tests.serve import tiny
from transformer import lora

FINE_TUNED = "ft:tiny:pellucid:mine:abc123"
EXTRA_EOS_ID = 259  # declared in generation_config.json alone
ENDS = (tiny.SPECIAL.index("<|im_end|>") + 256, EXTRA_EOS_ID)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tiny.model(tmp_path_factory.mktemp("tiny"))
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 259, "content": "<turn_over>"})
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ENDS)}))
    home = tmp_path_factory.mktemp("home")
    adapter = tmp_path_factory.mktemp("adapter")
    lora.save(adapter, lora.init(jax.random.key(1), tiny.CFG, rank=2, alpha=4), tiny.CFG)
    weights = fingerprint.hash_weights(folder)
    metadata = adapters.AdapterMetadata(
        FINE_TUNED, "tiny", str(folder), weights, created=5, job="ftjob-1", step=3
    )
    adapters.save(home, metadata, adapter)
    enable_compilation_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "MAX_BATCH_SIZE", 2)
        with tiny.serving(home, folder) as address:
            yield address


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("model", ["tiny", FINE_TUNED])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_each_end_token_ends_response_without_text(address, route, stream, model, end):
    """Regression: only the tokenizer's eos ended a response, not `<turn_over>`."""
    body = {"model": model, "stream": stream, "max_tokens": 3, "logit_bias": {str(end): 100}}
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    body |= chat if route == "chat/completions" else {"prompt": "hi"}
    response = httpx.post(f"{address}/v1/{route}", json=body, timeout=60)
    assert response.status_code == 200, response.text
    if not stream:
        choices = [response.json()["choices"][0]]
    else:
        events = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
        choices = [json.loads(event)["choices"][0] for event in events]
    assert choices[-1]["finish_reason"] == "stop"
    deltas = [choice.get("message") or choice.get("delta") or choice for choice in choices]
    assert "".join(part.get("content") or part.get("text") or "" for part in deltas) == ""
