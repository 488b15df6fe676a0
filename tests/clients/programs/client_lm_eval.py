"""lm-evaluation-harness with chat completions, on a task of its own questions.

https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/API_guide.md
"""

import json

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

QUESTIONS = {"Which city is the capital of France?": "Paris", "What is 2 + 2? Use digits.": "4"}


@pytest.fixture
def task(tmp_path):
    """Return the configuration of a task: the answer has to be in the response."""
    file = tmp_path / "questions.jsonl"
    rows = [{"question": question, "answer": answer} for question, answer in QUESTIONS.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(file)},
            "cache_dir": str(tmp_path / "datasets"),
        },
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "process_results": lambda doc, results: {"right": doc["answer"] in results[0]},
        "metric_list": [{"metric": "right", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False},
    }


@pytest.mark.parametrize("num_concurrent", [1, 2])
def test_chat_task_is_evaluated(base_url, model, task, num_concurrent, judge):
    results = simple_evaluate(
        model="local-chat-completions",
        model_args={
            "model": model,
            "base_url": f"{base_url}/chat/completions",
            "num_concurrent": num_concurrent,
            "max_retries": 1,
        },
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),  # do not read all tasks: minutes
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    samples = {sample["doc"]["question"]: sample for sample in results["samples"]["questions"]}
    assert samples.keys() == QUESTIONS.keys()
    assert all(sample["filtered_resps"][0] for sample in samples.values())
    judge(lambda question: samples[question]["right"], [*QUESTIONS])
