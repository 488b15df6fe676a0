"""Fine-tuning of tiny models of several families, whose results are served and give answers."""

import dataclasses

import pytest
from openai import OpenAI

from serve.jobs import runner
from serve.models import decoder
from tests.serve import tiny
from tests.waiting import wait_until
from training.recipes import finetune

pytestmark = [pytest.mark.heavy, pytest.mark.slow]

EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
CONFIGS = {
    "gemma2": dict(
        norm="unit_rms",
        mlp="geglu",
        post_norms=True,
        scale_embeddings=True,
        query_scalar=10,
        attn_logit_softcap=50.0,
        final_logit_softcap=30.0,
        windows=(64, None),
    ),
    "mixtral": EXPERTS,
    "gpt_oss": dict(
        qkv_bias=True,
        linear_bias=True,
        attention_sinks=True,
        mlp="swiglu_oai",
        swiglu_limit=7.0,
        windows=(64, None),
        **EXPERTS,
    ),
}


@pytest.fixture(autouse=True)
def fast_jobs(monkeypatch):
    monkeypatch.setattr(decoder, "MAX_BATCH_SIZE", 2)
    monkeypatch.setattr(runner, "NICENESS", 1)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.1)


def client(address: str) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key="any", _strict_response_validation=True)


def answer(openai: OpenAI, model: str) -> str:
    messages = [{"role": "user", "content": "1?"}]
    response = openai.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=4
    )
    return response.choices[0].message.content


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CONFIGS)
def test_fine_tuned_model_is_served_and_answers(tmp_path, name):
    """A LoRA adapter by a job over HTTP, and all weights by the recipe."""
    cfg = dataclasses.replace(tiny.CFG, **CONFIGS[name])
    base = tiny.model(tmp_path / "base", cfg=cfg)
    assert (base / "config.json").read_text().count(f'"model_type": "{name}"') == 1
    settings = {"n_epochs": 20, "batch_size": 4, "learning_rate_multiplier": 20.0}
    home = tmp_path / "home"
    home.mkdir()
    with tiny.serving(home, base) as address, client(address) as openai:
        jobs = openai.fine_tuning.jobs
        file = openai.files.create(file=("train.jsonl", tiny.examples()), purpose="fine-tune")
        method = {"type": "supervised", "supervised": {"hyperparameters": settings}}
        job = jobs.create(model="tiny", training_file=file.id, seed=7, method=method)
        wait_until(lambda: jobs.retrieve(job.id).finished_at is not None, 400)
        job = jobs.retrieve(job.id)
        assert job.status == "succeeded", job.error
        before = answer(openai, "tiny")
        assert answer(openai, job.fine_tuned_model) == tiny.ANSWER != before

    data = tmp_path / "train.jsonl"
    data.write_bytes(tiny.examples())
    full = finetune.FinetuneConfig(
        model=base,
        data=data,
        out=tmp_path / "full",
        method="full",
        epochs=20,
        batch_size=4,
        learning_rate_multiplier=100.0,
        dtype="float32",
    )
    assert finetune.run(full).reason == "finished"
    home = tmp_path / "other"
    home.mkdir()
    with tiny.serving(home, tmp_path / "full" / "model") as address, client(address) as openai:
        assert answer(openai, "tiny") == tiny.ANSWER
