"""Pull a model of the hub by name, serve it, and chat with OpenAI's client, as a new user does.

The models are tiny and random, but their repositories have the files of real publishers.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from openai import OpenAI
from safetensors.numpy import load_file, save_file

from tests import hub_server
from tests.serve import processes, tiny, tiny_gguf

pytestmark = pytest.mark.slow

CARD = b"---\nlicense: mit\npipeline_tag: text-generation\n---\n# Tiny\n"


def llama_safetensors(folder: Path) -> None:
    """Write two shards with an index, and files that a pull skips: a pickle and an ONNX copy."""
    tiny.model(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"ONNX")


def qwen2_gguf(folder: Path) -> None:
    """Write two GGUF files; a pull chooses the more precise one."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_gguf.write_gguf(folder / "tiny-qwen2-f16.gguf", "qwen2")
    tiny_gguf.write_gguf(folder / "tiny-qwen2-q8_0.gguf", "qwen2")


def sentencepiece_gguf(folder: Path) -> None:
    """Write a GGUF file with a vocabulary in Llama 2's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_gguf.write_gguf(folder / "tiny-llama-2.Q8_0.gguf", tokenizer="llama")


@pytest.mark.parametrize(
    ("publish", "repository", "files"),
    [
        (llama_safetensors, "people/Tiny-Llama-Instruct", 7),
        (qwen2_gguf, "people/Tiny-Qwen2-GGUF", 1),
        (sentencepiece_gguf, "people/Tiny-Llama-2-GGUF", 1),
    ],
)
def test_model_pulled_from_hub_is_served_and_chats(
    tmp_path: Path, publish: Callable[[Path], None], repository: str, files: int
) -> None:
    publish(tmp_path / "published")
    (tmp_path / "published" / "README.md").write_bytes(CARD)
    with hub_server.serve_hub() as hub:
        hub.publish(repository, tmp_path / "published")
        variables = hub_server.variables(hub, tmp_path / "hf")
        variables["PELLUCID_HOME"] = str(tmp_path / "home")
        path = processes.run("pull", f"hf:{repository}", **variables).strip()
        assert len(hub.sent) == files and Path(path).exists()
        report = json.loads(processes.run("models", "check", path, "--json", **variables))
        assert report["template"] == "yes"
    # The hub has stopped: the pulled model is served without it.
    arguments = ("-m", f"hf:{repository}", "--dtype", "float32", "--cache-mb", "4")
    with (
        processes.serving(*arguments, **variables) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == [repository]
        assert client.models.retrieve(repository).id == repository
        answer = client.chat.completions.create(
            model=repository, messages=[{"role": "user", "content": "hi"}], max_tokens=4
        )
        assert answer.model == repository
        assert answer.usage and answer.usage.completion_tokens >= 1
        chunks = list(
            client.chat.completions.create(
                model=repository,
                messages=[{"role": "user", "content": "hi"}],
                max_tokens=4,
                stream=True,
            )
        )
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
    chat = processes.run("chat", "hi", "-m", repository, "--max-tokens", "2", "--json", **variables)
    assert json.loads(chat)["model"] == repository
