"""Fine-tuning of SmolLM2 over the API, from a file to changed answers.

The training file has a hundred chats about the berths of twenty boats, which no model knows. The
test asks held-out questions. It prints its measurements: `pytest -m slow -s` shows them.
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
    """Return the official client of a server with its own data folder."""
    home = tmp_path / "home"
    home.mkdir()
    user_home = settings.data_folder()
    for name in ("models", "compiled"):  # the test writes to neither
        if (user_home / name).exists():
            (home / name).symlink_to(user_home / name)
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
    assert process.wait(300) in (0, 130)  # a running compilation is finished first


def answer(openai, model, messages, **options):
    answer = openai.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=16, **options
    )
    return answer.choices[0].message.content


def share_right(openai, model):
    """Return the share of held-out questions with a right answer."""
    questions = toy_dataset.held_out_questions()
    right = [toy_dataset.is_right(answer(openai, model, q), target) for q, target in questions]
    return sum(right) / len(right)


def first_token_seconds(openai, text):
    """Return the seconds to the first token of a short chat."""
    began = time.perf_counter()
    with openai.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": text}], max_tokens=8, stream=True
    ) as stream:
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                return time.perf_counter() - began
    raise AssertionError("the answer is empty")


@pytest.mark.slow  # ten minutes of training
@pytest.mark.timeout(1800)
def test_fine_tuned_smollm2_answers_held_out_questions(openai, tmp_path):
    path, held_out = toy_dataset.write(tmp_path)
    assert len(path.read_bytes().splitlines()) == 100
    before = share_right(openai, BASE)
    expected = [
        answer(openai, BASE, [{"role": "user", "content": OTHER}]),
        answer(openai, BASE, QUESTION),
    ]
    idle = statistics.median(first_token_seconds(openai, f"Count to {n}.") for n in range(3, 8))

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
        busy.append(first_token_seconds(openai, f"Say a word about the number {len(busy)}."))
        time.sleep(5)
    minutes = (time.time() - began) / 60
    job = retrieve(job.id)
    assert status == "succeeded", job.error
    after = share_right(openai, job.fine_tuned_model)
    print(
        f"\nright answers {before:.0%} -> {after:.0%}; {minutes:.1f} min of training; first token "
        f"{idle:.2f} s idle; while it trained, median {statistics.median(busy):.2f} s, worst "
        f"{max(busy):.2f} s of {len(busy)}"
    )
    assert before < 0.1 and after > 0.9
    again = [
        answer(openai, BASE, [{"role": "user", "content": OTHER}]),
        answer(openai, BASE, QUESTION),
    ]
    assert again == expected, "fine-tuning does not change the base model"
    assert max(busy) < 3
    assert job.fine_tuned_model in [model.id for model in openai.models.list()]
    assert openai.models.delete(job.fine_tuned_model).deleted


QUESTION = toy_dataset.held_out_questions()[0][0]
