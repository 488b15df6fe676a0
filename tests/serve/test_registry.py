"""The catalogue, the aliases, the models being served, and the settings of a server."""

import asyncio
import threading
import weakref
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
        assert model.folder or model.size == sum(file.size for file in model.files)
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
        ("[models]\nmine = 1", ["models.mine", 1]),
        (MODEL.replace("decoder", "oracle"), ["models.mine.kind", "'oracle'"]),
        (
            MODEL.replace("context = 2", 'context = 2\nformats = ["int4"]'),
            ["models.mine.formats", "'int4'"],
        ),
        (MODEL.replace("context", "contexts"), ["models.mine.context"]),
        (MODEL.replace("context = 2", 'context = "2"'), ["models.mine.context", "'2'", "int"]),
        (MODEL.replace("mine.gguf", "../mine"), ["name", "'../mine'"]),
        (MODEL.replace("0" * 64, "0" * 63), ["sha256", repr("0" * 63)]),
        (MODEL.replace("[models.mine]", '[models."../mine"]'), ["models.../mine"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, facts: list) -> None:
    with pytest.raises(catalogue.CatalogueError, match=naming("models.toml", *facts)):
        catalogue.load(written(tmp_path, text))


class Served(SimpleNamespace):
    __hash__ = object.__hash__


def served(id: str, memory: int = 0) -> Any:
    return Served(id=id, memory=memory, is_idle=True)


def test_registry_finds_by_id_then_by_alias() -> None:
    one, two = served("one"), served("org/two")
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


def test_registry_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match=naming("models")):
        Registry([], {})
    with pytest.raises(ValueError, match=naming("models", "one, one")):
        Registry([served("one"), served("one")], {})
    with pytest.raises(ValueError, match=naming("one")):
        Registry([served("one")], {}).remove("one")


class Shelf:
    """Models that note when they are loaded; `hold` keeps the next load from ending."""

    def __init__(self, **megabytes: int) -> None:
        self.log: list[str] = []
        self.stamp = 0  # of the files
        self.hold = threading.Event()
        self.hold.set()
        self.offers = [self.offer(id, size) for id, size in megabytes.items()]

    def offer(self, id: str, size: int) -> ModelSpec:
        def load() -> Any:
            assert self.hold.wait(10)
            self.log.append(id)
            if id == "broken":
                raise ValueError("half of it is missing")
            return served(id, size * 2**20)

        return ModelSpec(
            id=id,
            created=1,
            owned_by="me",
            memory=lambda: size * 2**20,
            load=load,
            stamp=lambda: self.stamp,
        )


def test_a_model_is_loaded_when_it_is_asked_for_and_once() -> None:
    shelf = Shelf(one=1, two=1)
    registry = Registry(shelf.offers, {"gpt-4": "two"})
    assert registry.list_models() == shelf.offers and registry.loaded() == []

    async def main() -> None:
        found = await asyncio.gather(*(registry.get(name) for name in ("two", "gpt-4", "two")))
        assert [model.id for model in found] == ["two"] * 3 and found[0] is found[2]
        with pytest.raises(UnknownModel):
            await registry.get("three")

    asyncio.run(main())
    assert shelf.log == ["two"]
    assert [card.id for card in registry.list_models()] == ["one", "two"]
    assert registry.loaded() == [registry.resolve("gpt-4")]


def test_who_was_not_asked_the_longest_makes_room() -> None:
    shelf = Shelf(a=4, b=4, c=4)
    registry = Registry(shelf.offers, {}, memory_limit=10 * 2**20)

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
    assert shelf.log == ["a", "b", "c", "b"]


def test_what_is_let_go_is_freed() -> None:
    shelf = Shelf(a=4, b=4)
    registry = Registry(shelf.offers, {}, memory_limit=6 * 2**20)
    asyncio.run(registry.get("a"))
    gone = weakref.ref(registry.loaded()[0])
    asyncio.run(registry.get("b"))
    assert gone() is None


def test_what_is_too_large_or_broken_says_so_and_does_no_harm() -> None:
    shelf = Shelf(small=1, large=9, broken=1)
    registry = Registry(shelf.offers, {}, memory_limit=4 * 2**20)

    async def main() -> None:
        small = await registry.get("small")
        with pytest.raises(CannotLoad, match=naming("9 MB", "4 MB")) as raised:
            await registry.get("large")
        assert not raised.value.is_busy
        assert registry.loaded() == [small], "nobody has to go for what can never fit"
        with pytest.raises(CannotLoad, match="half of it is missing"):
            await registry.get("broken")
        assert (await registry.get("small")).id == small.id

    asyncio.run(main())


def test_a_damaged_model_is_not_read_again_until_its_files_change() -> None:
    """Each request read half a gigabyte to find the same damage again, while others waited."""
    shelf = Shelf(broken=1, fine=1)
    registry = Registry(shelf.offers, {})

    async def main() -> None:
        for stamp, reads in ((0, 1), (0, 1), (1, 2), (1, 2)):
            shelf.stamp = stamp
            with pytest.raises(CannotLoad, match="half of it is missing"):
                await registry.get("broken")
            assert shelf.log == ["broken"] * reads
        assert (await registry.get("fine")).id == "fine"

    asyncio.run(main())


def test_loads_that_wait_leave_the_threads_of_others_alone() -> None:
    """They took the threads that requests are prepared on: with many, nobody was answered."""
    shelf = Shelf(**{f"m{i}": 1 for i in range(40)})
    shelf.hold.clear()
    registry = Registry(shelf.offers, {})

    async def main() -> None:
        loading = [asyncio.create_task(registry.get(f"m{i}")) for i in range(40)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "prepared"), 5) == "prepared"
        shelf.hold.set()
        assert len(await asyncio.gather(*loading)) == 40

    asyncio.run(main())


def test_what_could_be_pulled_is_known_by_its_names() -> None:
    registry = Registry([served("one")], {"gpt-5": "two", "gpt-6": "three"}, not_pulled={"two"})
    for name in ("two", "gpt-5"):
        with pytest.raises(UnknownModel) as raised:
            registry.resolve(name)
        assert (raised.value.name, raised.value.not_pulled_id) == (name, "two")
    with pytest.raises(UnknownModel) as raised:
        registry.resolve("gpt-6")
    assert raised.value.not_pulled_id is None


def test_a_model_that_is_removed_while_it_loads_does_not_stay() -> None:
    """It stayed where nothing could find it, and every later load stumbled over it."""
    shelf = Shelf(one=3, two=3)
    shelf.hold.clear()
    registry = Registry(shelf.offers, {}, memory_limit=4 * 2**20)

    async def main() -> None:
        loading = asyncio.create_task(registry.get("one"))
        await asyncio.sleep(0.05)
        registry.remove("one")
        shelf.hold.set()
        with pytest.raises(UnknownModel):
            await loading
        assert (await registry.get("two")).id == "two"
        assert [model.id for model in registry.loaded()] == ["two"]

    asyncio.run(main())


def test_who_leaves_while_a_model_loads_does_not_stop_it_for_others() -> None:
    shelf = Shelf(one=1)
    shelf.hold.clear()
    registry = Registry(shelf.offers, {})

    async def main() -> None:
        hasty, patient = (asyncio.create_task(registry.get("one")) for _ in range(2))
        await asyncio.sleep(0.01)
        hasty.cancel()
        await asyncio.sleep(0)
        shelf.hold.set()
        assert (await patient).id == "one"

    asyncio.run(main())
    assert shelf.log == ["one"]


def test_a_removed_model_is_unknown() -> None:
    registry = Registry([served("one"), served("two")], {"gpt-4": "two"})
    registry.remove("two")
    for name in ("two", "gpt-4"):
        with pytest.raises(UnknownModel):
            registry.resolve(name)
    assert not registry.unload("one"), "it came loaded: nobody could load it again"


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "127.0.0.1.nip.io"]
)
def test_beyond_loopback_a_key_is_needed(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ValueError, match=naming(host, "--api-key")):
        ServerSettings(host=host)
    assert ServerSettings(host=host, api_keys=("secret",)).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert ServerSettings(host=host).api_keys == ()
    assert allowed_hosts(host) == ()


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=naming("port", 70000)):
        ServerSettings(port=70000)
    with pytest.raises(ValueError, match=naming("api_keys")):
        ServerSettings(host="0.0.0.0", api_keys=("",))
    with pytest.raises(ValueError, match=naming("cache_budget", 0)):
        ServerSettings(cache_budget=0)


def test_a_server_may_be_called_by_the_address_it_is_bound_to() -> None:
    assert allowed_hosts("192.168.1.5") == ("192.168.1.5",)
    assert allowed_hosts("0.0.0.0") == ("*",)
