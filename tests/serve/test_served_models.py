"""Real models that come and go: loaded when asked for, freed when another needs the memory."""

import asyncio

import psutil
import pytest

from serve.api.settings import ServerSettings
from serve.cli import serve
from serve.models import decoder, resolve
from serve.models.registry import Registry
from serve.models.spec import LoadOptions, ModelFiles
from tests.serve import tiny
from transformer.engine import Done, SequenceRequest, Token
from transformer.sampling import SamplingParams

pytestmark = pytest.mark.heavy

CHAT = "smollm2-135m-instruct"
ASKED = SequenceRequest(
    prompt=(1, 2, 3), max_tokens=4, sampling_params=SamplingParams(temperature=0)
)


def offered(path, id, tmp_path):
    return resolve.describe(
        ModelFiles(id, path, "me"),
        LoadOptions(cache_budget=64 * 2**20, dtype="int8", home=tmp_path, notify=lambda line: None),
    )


def test_an_offer_says_what_a_model_is_without_loading_it(model_file, tmp_path):
    card = offered(model_file(CHAT), "mine", tmp_path)
    assert (card.id, card.owned_by) == ("mine", "me")
    assert card.created == int(model_file(CHAT).stat().st_mtime)
    assert 200 * 2**20 < card.memory() < 300 * 2**20


def test_a_damaged_file_is_known_before_a_server_listens(tmp_path):
    (tmp_path / "half.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(ValueError, match="half.gguf"):
        offered(tmp_path / "half.gguf", "mine", tmp_path)


def test_what_programs_are_compiled_for_does_not_depend_on_the_other_models(tmp_path, monkeypatch):
    """Pulling a model halved the caches of the others: all was compiled again at the next start."""
    monkeypatch.setattr(decoder, "MAX_BATCH_SIZE", 2)
    chosen = ServerSettings(home=tmp_path, cache_budget=2**20)
    places = [ModelFiles(id, tiny.model(tmp_path / id), "me") for id in ("one", "two", "three")]
    blocks = []
    for some in (places[:1], places):
        with serve._open_registry(some, chosen, "float32", {}, ()) as registry:
            blocks.append(registry.loaded()[0].engine.stats().blocks)
    assert blocks[0] == blocks[1] > 1


@pytest.mark.slow
def test_models_that_take_turns_in_memory_leave_nothing_behind(model_file, tmp_path):
    path = model_file(CHAT)
    registry = Registry([offered(path, id, tmp_path) for id in "ab"], {}, memory_limit=400 * 2**20)
    answers, resident = [], []

    async def main():
        for id in "abababababab":
            model = await registry.get(id)
            events = list(model.engine.generate(ASKED))
            assert events[-1] == Done("length")
            answers.append([event for event in events if isinstance(event, Token)])
            assert registry.loaded() == [model]
            del model
            await asyncio.sleep(1)  # what is being compiled ahead goes when it is through
            resident.append(psutil.Process().memory_info().rss)

    asyncio.run(main())
    registry.close()
    assert all(answer == answers[0] for answer in answers)
    assert max(resident[6:]) - max(resident[2:6]) < 100 * 2**20, [r // 2**20 for r in resident]
