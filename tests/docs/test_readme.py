"""Every command and code block of the README, run as a reader would."""

import json
import os
import signal
import subprocess

import pytest
from openai import OpenAI

from serve import settings
from tests.docs.blocks import ROOT, Session, blocks, commands, quick
from tests.serve import processes

BLOCKS = blocks(ROOT / "README.md")
INSTALL = BLOCKS[0]
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def home(model_file) -> str:
    model_file("smollm2-135m-instruct")
    return str(settings.data_folder())


@pytest.fixture(scope="module")
def server(home):
    with processes.serving(PELLUCID_HOME=home) as server:
        yield server


@pytest.fixture
def session(home, server, model_file, tmp_path) -> Session:
    session = Session(tmp_path, server.url, processes.environment(PELLUCID_HOME=home))
    (tmp_path / MODEL).symlink_to(model_file("smollm2-135m-instruct"))
    return session


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_readme_blocks_without_chat_command_print_the_output_shown(session):
    session.run(quick(BLOCKS[1:], r"pellucid chat"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_readme_blocks_print_the_output_shown(session):
    session.run(BLOCKS[1:])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_readme_install_commands_serve_a_chat(tmp_path, home):
    clone, make = commands(INSTALL)
    assert make.text == "make serve"
    subprocess.run(clone.text.replace("URL", str(ROOT)), shell=True, cwd=tmp_path, check=True)
    process = subprocess.Popen(
        ["make", "serve", "ARGS=--port 0 --json"],
        cwd=tmp_path / "pellucid",
        env=os.environ | {"PELLUCID_HOME": home},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        url = next(json.loads(line)["url"] for line in process.stdout if line.startswith("{"))
        client = OpenAI(base_url=f"{url}/v1", api_key="any")
        answer = client.chat.completions.create(
            model="gpt-4o-mini", messages=[{"role": "user", "content": "Hi"}], max_tokens=4
        )
        assert answer.choices[0].message.content
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(processes.TIMEOUT)
        process.stdout.close()
