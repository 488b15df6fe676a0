"""From file to changed behaviour on real weights: the promise of fine-tuning, as a client has it.

A hundred chats about where twenty boats lie, which no model can know; asked afterwards in words
that were not among them. Figures are printed: `pytest -m slow -s` shows them.
"""

import os
import statistics
import subprocess
import sys
import time

import pytest
from openai import OpenAI

from serve import settings
from tests.waiting import wait_until
from training.recipes import toy_dataset

pytestmark = pytest.mark.heavy

BASE = "smollm2-135m-instruct"
OTHER = "Write one sentence about the sea."


@pytest.fixture
def openai(model_file, tmp_path):
    """The official client at `pellucid serve`, with a data folder of its own."""
    home = tmp_path / "home"
    home.mkdir()
    here = settings.data_folder()
    for name in ("models", "compiled"):  # neither is written to by what is tested
        if (here / name).exists():
            (home / name).symlink_to(here / name)
    model_file(BASE)
    command = [sys.executable, "-m", "serve", "serve", "--port", "0", "--model", BASE]
    command += ["--dtype", "int8", "--json"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PELLUCID_HOME": str(home)},
        stdout=subprocess.PIPE,
        text=True,
    )
    address = process.stdout.readline().split('"url": "')[1].split('"')[0]
    with OpenAI(
        base_url=f"{address}/v1", api_key="any", _strict_response_validation=True
    ) as client:
        yield client
    process.terminate()
    assert process.wait(300) in (0, 130)  # what is being compiled is finished first


def said(openai, model, messages, **options):
    answer = openai.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=16, **options
    )
    return answer.choices[0].message.content


def share(openai, model):
    """Of held-out questions, how many are answered right."""
    asked = toy_dataset.held_out_questions()
    return sum(toy_dataset.is_right(said(openai, model, q), right) for q, right in asked) / len(
        asked
    )


def first_token(openai, text):
    """Seconds to the first word of a short chat."""
    began = time.perf_counter()
    with openai.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": text}], max_tokens=8, stream=True
    ) as stream:
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                return time.perf_counter() - began
    raise AssertionError("it said nothing")


@pytest.mark.slow  # ten minutes of training
@pytest.mark.timeout(1800)
def test_a_hundred_examples_change_what_it_answers(openai, tmp_path):
    path, held_out = toy_dataset.write(tmp_path)
    assert len(path.read_bytes().splitlines()) == 100
    before = share(openai, BASE)
    kept = [said(openai, BASE, [{"role": "user", "content": OTHER}]), said(openai, BASE, QUESTION)]
    idle = statistics.median(first_token(openai, f"Count to {n}.") for n in range(3, 8))

    job = openai.fine_tuning.jobs.create(
        model=BASE,
        training_file=openai.files.create(file=path, purpose="fine-tune").id,
        suffix="harbour",
        seed=1,
    )
    retrieve = openai.fine_tuning.jobs.retrieve
    wait_until(lambda: retrieve(job.id).status == "running", 120)
    began, busy = time.time(), []
    while (status := retrieve(job.id).status) == "running":
        busy.append(first_token(openai, f"Say a word about the number {len(busy)}."))
        time.sleep(5)
    minutes = (time.time() - began) / 60
    job = retrieve(job.id)
    assert status == "succeeded", job.error
    after = share(openai, job.fine_tuned_model)
    print(
        f"\nright answers {before:.0%} -> {after:.0%}; {minutes:.1f} min of training; first token "
        f"{idle:.2f} s idle; while it trained, median {statistics.median(busy):.2f} s, worst "
        f"{max(busy):.2f} s of {len(busy)}"
    )
    assert before < 0.1 and after > 0.9
    again = [said(openai, BASE, [{"role": "user", "content": OTHER}]), said(openai, BASE, QUESTION)]
    assert again == kept, "the base model answers as before"
    assert max(busy) < 3
    assert job.fine_tuned_model in [model.id for model in openai.models.list()]
    assert openai.models.delete(job.fine_tuned_model).deleted


QUESTION = toy_dataset.held_out_questions()[0][0]
