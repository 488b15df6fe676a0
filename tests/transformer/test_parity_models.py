"""Parity tests of the pulled models with transformers: all logits, and `generate`.

The golden files have only 256 columns of the logits.
"""

import numpy as np
import pytest

from tests.transformer.conftest import GOLDEN
from tests.transformer.test_models import MODELS, prompts_of
from transformer import checkpoint, decoder, generate

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=MODELS)
def both(request, model_file):
    """Return (our model, the model of transformers, prompts) for one GGUF file."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = model_file(request.param)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    params, cfg, _ = checkpoint.load(path)
    golden = dict(np.load(GOLDEN / f"{request.param}.npz"))
    return (params, cfg), theirs, prompts_of(golden)


def test_all_logits_match_transformers(both):
    import torch

    (params, cfg), theirs, prompts = both
    for prompt in prompts:
        logits, _ = decoder.forward(params, cfg, prompt[None])
        with torch.inference_mode():
            expected = theirs(torch.tensor(prompt[None].astype(np.int64))).logits.numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)


def test_greedy_generation_matches_transformers(both):
    import torch

    (params, cfg), theirs, prompts = both
    for prompt in prompts:
        ours = list(generate.generate(params, cfg, prompt.tolist(), max_new_tokens=64))
        ids = torch.tensor(prompt[None].astype(np.int64))
        expected, kv_cache = [], None
        with torch.inference_mode():
            for _ in range(64):
                step = theirs(ids, past_key_values=kv_cache, use_cache=True)
                kv_cache, ids = step.past_key_values, step.logits[:, -1:].argmax(-1)
                expected.append(ids.item())
        assert ours == expected
