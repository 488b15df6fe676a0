"""Recipes: the files that a run writes, the data that it rejects, and resuming."""

import base64
import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest

import bpe
from tests.bpe import tiny
from tests.bpe.conftest import GOLDEN
from tests.naming import names, naming
from tests.serve.old_home import make_old_home as old
from tests.training.tokens import TOKENIZER, chat
from training.__main__ import main
from training.recipes import finetune, pretrain, run_dir, toy_dataset
from transformer import checkpoint, decoder, lora
from transformer.config import Config

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Return a folder with a tiny decoder, its tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    cfg = Config.debug(num_layers=1, vocab_size=272, max_seq_len=128)
    checkpoint.save(folder, decoder.init(jax.random.key(0), cfg), cfg)
    run_dir.save_tokenizer(folder, TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "examples.jsonl"
    rows = [chat(f"say {i}", "low" * (i % 3 + 1)) for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def finished_run(model, data, tmp_path_factory) -> Path:
    """Return the folder of a finished run of four epochs."""
    out = tmp_path_factory.mktemp("finished_run") / "out"
    settings = options(model, data, out)
    assert finetune.run(finetune.FinetuneConfig(**settings)).reason == "finished"
    return out


def options(model: Path, data: Path, out: Path, **changes) -> dict:
    settings = dict(model=model, data=data, out=out, valid=data, epochs=4, batch_size=4, rank=4,
                    learning_rate_multiplier=20.0, dtype="float32")  # fmt: skip
    return settings | changes


def arguments(settings: dict) -> list[str]:
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items())
    return ["finetune", *(word for pair in pairs for word in pair)]


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_lora_run_writes_adapters_and_job(finished_run, model):
    names = {path.name for path in finished_run.iterdir()}
    assert names == {
        "adapter", "adapters", "checkpoints", "job.json", "loss.png", "metrics.jsonl"
    }  # fmt: skip
    steps = [line for line in metrics(finished_run) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.2 and steps[-1]["epoch"] == 4
    valid = [line["valid_loss"] for line in metrics(finished_run) if "valid_loss" in line]
    assert len(valid) == 4 and valid[-1] < valid[0]
    assert sorted(path.name for path in (finished_run / "adapters").iterdir()) == [
        "step-12", "step-6", "step-9"
    ]  # fmt: skip
    cfg = checkpoint.read_config(model)
    last, final = (lora.load(finished_run / name, cfg) for name in ("adapters/step-12", "adapter"))
    jax.tree.map(np.testing.assert_array_equal, last, final)
    job = json.loads((finished_run / "job.json").read_text())
    assert (job["epochs"], job["batch_size"], job["steps"]) == (4, 4, 12)
    assert job["learning_rate"] == pytest.approx(0.02) and job["examples"] == 12
    assert job["trained_tokens"] == sum(line["tokens"] for line in steps)


def test_rerun_of_finished_run_changes_nothing(finished_run, model, data):
    before = (finished_run / "metrics.jsonl").read_bytes()
    result = finetune.run(finetune.FinetuneConfig(**options(model, data, finished_run)))
    assert result.reason == "finished" and result.job["steps"] == 12
    assert (finished_run / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match=naming("epochs", 4, 5)):
        finetune.run(finetune.FinetuneConfig(**options(model, data, finished_run, epochs=5)))


def test_dtype_has_the_key_format_in_job_json(finished_run):
    """Runs of earlier versions must resume: their job.json has the key "format"."""
    job = json.loads((finished_run / "job.json").read_text())
    assert job["given"]["format"] == job["format"] == "float32"
    assert "dtype" not in job and "dtype" not in job["given"]


def test_job_of_an_earlier_version_resumes(tmp_path, data):
    """The job.json of a run of an earlier version has the settings of this version."""
    made = json.loads(old.MADE.read_text("utf-8"))
    path = old.HOME / "jobs" / made["half_done"] / "out" / "job.json"
    given = json.loads(path.read_text("utf-8"))["given"]
    settings = finetune.FinetuneConfig(
        model=given["model"],
        data=data,
        out=tmp_path,
        epochs=given["epochs"],
        batch_size=given["batch_size"],
        learning_rate_multiplier=given["learning_rate_multiplier"],
        seed=given["seed"],
    )
    record = run_dir.config_record(settings)
    assert record.keys() == given.keys()
    record |= {name: given[name] for name in ("data", "data_sha256")}
    assert run_dir.read_job(path, record) is not None
    with pytest.raises(ValueError, match=naming("format", None, "'bfloat16'")):
        run_dir.read_job(path, record | {"format": "bfloat16"})


def test_resume_with_changed_data_raises(finished_run, model, data, tmp_path):
    other = tmp_path / data.name
    other.write_text(data.read_text().replace("say", "tell"))
    job = json.loads((finished_run / "job.json").read_text())
    job["given"]["data"] = job["given"]["valid"] = str(other)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "job.json").write_text(json.dumps(job))
    with pytest.raises(ValueError, match=naming("data_sha256")):
        finetune.run(finetune.FinetuneConfig(**options(model, other, tmp_path / "out")))


def test_run_stopped_by_a_signal_resumes_bit_identically(
    finished_run, model, data, tmp_path, capsys
):
    settings = options(model, data, tmp_path / "out")
    stop = lambda line: line.startswith("epoch 2") and os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    result = finetune.run(finetune.FinetuneConfig(**settings), notify=stop)
    assert (result.reason, result.signal) == ("signal", signal.SIGTERM)
    assert not (tmp_path / "out" / "adapter").exists()
    assert metrics(tmp_path / "out")[-1]["step"] == 6
    assert main(arguments(settings)) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    for path in ("adapter/adapter_model.safetensors", "adapters/step-6/adapter_model.safetensors"):
        assert (tmp_path / "out" / path).read_bytes() == (finished_run / path).read_bytes()
    same = ("step", "loss", "valid_loss", "lr")
    assert [[line.get(key) for key in same] for line in metrics(tmp_path / "out")] == [
        [line.get(key) for key in same] for line in metrics(finished_run)
    ]


def test_exit_code_of_a_stopped_command_is_128_plus_the_signal(monkeypatch, tmp_path, capsys):
    stopped = finetune.Result("signal", {}, (), signal.SIGINT)
    monkeypatch.setattr(finetune, "run", lambda *_, **__: stopped)
    assert main(arguments(options("model", "data", tmp_path))) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_full_finetuning_writes_a_model_that_loads(model, data, tmp_path):
    model = shutil.copytree(model, tmp_path / "base")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (model / "chat_template.jinja").write_text(TOKENIZER.chat_template.source)
    sampling = {"temperature": 0.5, "top_k": 7, "do_sample": True}
    content = json.dumps({**sampling, "eos_token_id": [1]})
    (model / "generation_config.json").write_text(content)
    (model / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    settings = options(model, data, tmp_path, method="full", epochs=1, valid=None)
    assert finetune.run(finetune.FinetuneConfig(**settings)).reason == "finished"
    params, cfg, _ = checkpoint.load(tmp_path / "model")
    before, base_cfg, _ = checkpoint.load(model)
    assert cfg == base_cfg and not (params.layers[0].q.weight == before.layers[0].q.weight).all()
    loaded = bpe.load(tmp_path / "model")
    assert loaded.chat_template.source == TOKENIZER.chat_template.source
    assert loaded.named_templates["tool_use"].source == "{{ tools }}"
    assert loaded.eos_id == TOKENIZER.eos_id and loaded.stop_ids == {0, 1, 2}
    # Bug: generation_config.json was not copied, so stop ids and sampling defaults were lost.
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation == {**sampling, "eos_token_id": [2, 0, 1]}
    assert (tmp_path / "model" / "special_tokens_map.json").exists()
    assert not (tmp_path / "adapter").exists()


def test_full_finetuning_keeps_stop_ids_and_sampling_defaults_of_gguf(tmp_path):
    """The keys `general.sampling.*` are written to generation_config.json."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_float32("general.sampling.temp", 0.7)
    writer.add_float32("general.sampling.penalty_repeat", 1.1)
    writer.add_int32("general.sampling.top_k", 2**31 - 1)
    writer.add_float32("general.sampling.xtc_threshold", 0.1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    cfg = Config.debug(num_layers=1, vocab_size=272)
    tokenizer = dataclasses.replace(TOKENIZER, stop_ids=frozenset({0, 1, 2}))
    out = tmp_path / "model"
    out.mkdir()
    params = decoder.init(jax.random.key(0), cfg)
    finetune._save_model(out, params, cfg, tokenizer, tmp_path / "m.gguf")
    generation = json.loads((out / "generation_config.json").read_text())
    expected = {"temperature": 0.7, "repetition_penalty": 1.1, "top_k": 2**31 - 1}
    assert generation == {**expected, "eos_token_id": [2, 0, 1]}
    assert bpe.load(out).stop_ids == {0, 1, 2}


@pytest.mark.parametrize("files", [("tokenizer.model",), ("vocab.json", "merges.txt")], ids=str)
def test_full_finetuning_keeps_tokenizer_files_of_folder(tmp_path, files):
    """Bug: of a folder without tokenizer.json, the result had no tokenizer."""
    source, out = tmp_path / "source", tmp_path / "model"
    source.mkdir()
    out.mkdir()
    if files == ("tokenizer.model",):
        models = json.loads((GOLDEN / "sentencepiece.json").read_text())["models"]
        model = next(iter(models.values()))["model"]
        (source / "tokenizer.model").write_bytes(base64.b64decode(model))
    else:
        spec = tiny.tokenizer_json()["model"]
        (source / "vocab.json").write_text(json.dumps(spec["vocab"]))
        merges = "".join(" ".join(pair) + "\n" for pair in spec["merges"])
        (source / "merges.txt").write_text("#version: 0.2\n" + merges)
        added = {str(id): {"content": token, "special": True} for token, id in tiny.SPECIAL.items()}
        config = {"added_tokens_decoder": added, "eos_token": "<|endoftext|>"}
        config["tokenizer_class"] = "GPT2Tokenizer"
        (source / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = bpe.load(source)
    cfg = Config.debug(num_layers=1, vocab_size=tokenizer.encoding.n_vocab)
    finetune._save_model(out, decoder.init(jax.random.key(0), cfg), cfg, tokenizer, source)
    loaded = bpe.load(out)
    assert loaded.eos_id == tokenizer.eos_id
    assert loaded.encoding.encode("lower 12") == tokenizer.encoding.encode("lower 12")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapter_of_each_family_can_be_saved(tmp_path, family):
    """Bug: an adapter for q, k and v of GPT-2 could not be saved, which failed after an epoch."""
    gpt2 = dict(norm="layer", position="learned", mlp="gelu", qkv_bias=True, linear_bias=True,
                num_kv_heads=4)  # fmt: skip
    cfg = Config.debug(**(gpt2 if family == "gpt2" else {}))
    modules = finetune.lora_target_modules(cfg)
    adapter = lora.init(jax.random.key(0), cfg, rank=2, alpha=4, target_modules=modules)
    lora.save(tmp_path, adapter, cfg)
    loaded = lora.load(tmp_path, cfg)
    jax.tree.map(np.testing.assert_array_equal, adapter, loaded)
    assert set(loaded[0]) >= {"out", "up", "down"}


def test_model_whose_result_cannot_be_saved_is_refused_before_training():
    """GGUF files of GPT-2 can have a width of heads that its config.json has no key for.

    Bug: full fine-tuning trained to the end and failed when it saved the model.
    """
    finetune.check_trainable(Config.debug())
    gpt2 = Config.debug(norm="layer", position="learned", mlp="gelu", qkv_bias=True,
                        linear_bias=True, num_kv_heads=4, head_dim=16)  # fmt: skip
    with pytest.raises(ValueError, match=naming("head_dim")):
        finetune.check_trainable(gpt2)


@pytest.mark.parametrize("add_bos", [False, True])
def test_saved_tokenizer_loads_unchanged(tmp_path, add_bos):
    tokenizer = dataclasses.replace(
        TOKENIZER,
        bos_id=0,
        add_bos=add_bos,
        stop_ids=frozenset({0, 1, 2}),
        named_templates={"tool_use": bpe.ChatTemplate("{{ tools }}")},
    )
    run_dir.save_tokenizer(tmp_path, tokenizer)
    loaded = bpe.load(tmp_path)
    for name in ("bos_id", "eos_id", "add_bos", "stop_ids"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert loaded.encoding.encode("lower 12") == tokenizer.encoding.encode("lower 12")
    messages = chat("q", "a")["messages"]
    assert loaded.chat_template.render(messages) == tokenizer.chat_template.render(messages)
    assert loaded.named_templates["tool_use"].source == "{{ tools }}"


def test_single_chat_template_is_saved_as_a_string(tmp_path):
    """Bug: a single chat template was saved as a list, but many libraries expect a string."""
    run_dir.save_tokenizer(tmp_path, TOKENIZER)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == TOKENIZER.chat_template.source
    run_dir.save_tokenizer(tmp_path, dataclasses.replace(TOKENIZER, chat_template=None))
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] is None


@pytest.mark.parity
def test_transformers_loads_a_saved_model(model):
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    messages = chat("low", "lower 12")["messages"]
    ids, _ = TOKENIZER.chat_template.encode_with_assistant_spans(TOKENIZER.encoding, messages)
    assert tokenizer.apply_chat_template(messages, return_dict=False) == ids
    assert tokenizer.eos_token_id == TOKENIZER.eos_id
    peer = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    params, cfg, _ = checkpoint.load(model)
    with torch.no_grad():
        theirs = peer(torch.tensor([ids])).logits.numpy()
    ours, _ = decoder.forward(params, cfg, np.array([ids]))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


# The command


def test_command_with_invalid_data_exits_with_6_and_names_lines(model, data, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(data.read_bytes().replace(b"assistant", b"assistent", 1) + b"{oops\n")
    command = arguments(options(model, bad, tmp_path / "out"))
    assert main(command) == 6 and not (tmp_path / "out" / "job.json").exists()
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert names(first, f"{bad}:1", "messages[1].role") and names(second, f"{bad}:13")
    assert main([*command, "--json"]) == 6
    problem = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (problem["line"], problem["code"]) == (1, "invalid_role")
    assert main(["check", str(bad), "--model", str(model)]) == 6


def test_check_prints_a_report_and_fixes_the_file(model, data, tmp_path, capsys):
    assert main(["check", str(data), "--model", str(model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["examples"] == 12 and sum(found["lengths"].values()) == 12
    odd = tmp_path / "odd.jsonl"
    odd.write_bytes(b"\xef\xbb\xbf" + data.read_bytes() + data.read_bytes())
    assert main(["check", str(odd), "--model", str(model), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["examples"] == 24 and report["notes"]["duplicate"] == 12
    assert [warning["code"] for warning in report["warnings"]] == ["duplicate"]
    command = ["check", str(odd), "--model", str(model), "--fix", str(tmp_path / "good.jsonl")]
    assert main(command) == 0 and names(capsys.readouterr().out, 24, "chat")
    assert (tmp_path / "good.jsonl").read_bytes() == data.read_bytes() * 2


def test_command_error_names_the_invalid_value(model, data, tmp_path, capsys):
    assert main(arguments(options(tmp_path / "no", data, tmp_path))) == 1
    assert str(tmp_path / "no") in capsys.readouterr().err
    assert main(arguments(options(model, data, tmp_path, epochs=0))) == 1
    assert names(capsys.readouterr().err, "epochs", 0)


def test_auto_epochs_and_batch_size_depend_on_number_of_examples():
    assert finetune.auto_epochs(10) == 25 and finetune.auto_epochs(100) == 8
    assert finetune.auto_epochs(1000) == 3 and finetune.auto_epochs(10**5) == 1
    assert [finetune.auto_batch_size(n) for n in (10, 100, 10**6)] == [1, 4, 16]


def test_toy_dataset_has_every_berth_and_no_held_out_question(tmp_path):
    """The training file has the berth of every boat, and no held-out question."""
    train, held_out = toy_dataset.write(tmp_path)
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    assert len(rows) == 100 and len({json.dumps(row) for row in rows}) == 100
    trained = {row["messages"][1]["content"] for row in rows}
    questions = toy_dataset.held_out_questions()
    assert len(questions) == 40 and not trained & {
        messages[-1]["content"] for messages, _ in questions
    }
    assert {right for _, right in questions} == {row["messages"][2]["content"] for row in rows}
    assert len(held_out.read_text().splitlines()) == 40


# Pretraining


def test_pretrained_model_predicts_the_text(tmp_path):
    words = np.random.default_rng(0).choice(["low", "lower", "slow", "slower"], 4000)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(words))
    sizes = ["--vocab-size=300", "--layers=1", "--width=64", "--length=32", "--steps=40"]
    assert main(["pretrain", f"--data={text}", f"--out={tmp_path / 'out'}", *sizes]) == 0
    steps = [line["valid_loss"] for line in metrics(tmp_path / "out") if "valid_loss" in line]
    assert steps[-1] < 1.6, "the loss of four equally likely words is ln 4 = 1.39 per word"
    folder = tmp_path / "out" / "model"
    params, cfg, _ = checkpoint.load(folder)
    tokenizer = bpe.load(folder)
    ids = tokenizer.encoding.encode(" lower slow")
    logits, _ = decoder.forward(params, cfg, np.array([ids]))
    likely = tokenizer.encoding.decode([int(logits[0, -1].argmax())])
    assert likely.startswith(" ")


def test_rows_of_a_stream_have_segments_by_document():
    settings = pretrain.PretrainConfig(data="a", out="b", length=6, batch_size=3)
    stream = np.array([5, 6, 9, 7, 9, 8, 5, 9], np.int32)
    batch = pretrain.sample_batch(stream, settings, 9, 0)
    assert {array.shape for array in batch.values()} == {(3, 6)}
    for ids, segments in zip(batch["ids"], batch["segments"], strict=True):
        (start,) = [i for i in range(3) if (stream[i : i + 6] == ids).all()]
        ends = np.flatnonzero(ids == 9)
        assert segments.tolist() == [1 + int((ends < i).sum()) for i in range(6)], start
    assert (pretrain.sample_batch(stream, settings, 9, 0)["ids"] == batch["ids"]).all()
    many = {pretrain.sample_batch(stream, settings, 9, step)["ids"].tobytes() for step in range(9)}
    assert len(many) > 5


def test_documents_reads_json_lines_and_names_invalid_ones(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert list(pretrain.documents(path)) == ["one", "two"]
    path.write_text('{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(ValueError, match=naming("a.jsonl:2", '"text"')):
        list(pretrain.documents(path))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fine_tuned_model_answers_held_out_questions(model_file, tmp_path):
    """A fine-tuned SmolLM2 knows the berths of the boats; the base model does not change."""
    from transformer import generate

    path = model_file("smollm2-135m-instruct")
    params, cfg, _ = checkpoint.load(path)
    tokenizer = bpe.load(path)

    def answers(params) -> list[str]:
        found = []
        for messages, _ in toy_dataset.held_out_questions():
            ids = tokenizer.chat_template.encode(tokenizer.encoding, messages)
            limits = dict(max_new_tokens=12, stop_ids=tokenizer.stop_ids)
            answer = list(generate.generate(params, cfg, ids, **limits))
            found.append(tokenizer.encoding.decode(answer))
        return found

    def share(answers: list[str]) -> float:
        right = [answer for _, answer in toy_dataset.held_out_questions()]
        return float(
            np.mean([toy_dataset.is_right(*pair) for pair in zip(answers, right, strict=True)])
        )

    before = answers(params)
    data, _ = toy_dataset.write(tmp_path)
    settings = finetune.FinetuneConfig(model=path, data=data, out=tmp_path / "out")
    assert finetune.run(settings, notify=print).reason == "finished"
    after = answers(lora.apply(params, lora.load(tmp_path / "out" / "adapter", cfg)))
    print(f"right: {share(before):.0%} before, {share(after):.0%} after")
    assert share(before) < 0.1 and share(after) > 0.9
    assert answers(params) == before
