"""POST /v1/images/*, over a real socket: a tiny network of random weights, and the real encoder."""

import asyncio
import base64
import io
import json
import os
import struct
import threading
import time
import zlib
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image

import diffusion
from diffusion import SamplerOptions, edit, image_io, sample
from serve import settings
from serve.api.app import create_app
from serve.api.base64_chunks import CHUNK, to_base64
from serve.api.responses import ImageEvent, Images
from serve.api.routes import images
from serve.api.settings import ServerSettings
from serve.exceptions import NotFound
from serve.models import catalogue, download, resolve
from serve.models.images import MAX_WAITING, ImageRequest, InitImage, load_image_model
from serve.models.registry import Registry
from serve.models.spec import LoadOptions
from tests.diffusion.conftest import save_tiny
from tests.naming import names, naming
from tests.serve import scripted
from tests.serve.old_client import OldClient, install
from transformer.engine import Busy, Device, WorkQueue

pytestmark = pytest.mark.heavy

SIZE = 16  # pixels of what the tiny model draws


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def encoder(model_file):
    return model_file("all-minilm-l6-v2")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def painting_address(folder, home):
    place = download.resolve_model(
        f"tiny={folder}", catalogue.load(), settings.data_folder(), notify=print
    )
    offer = resolve.describe(
        place, LoadOptions(cache_budget=2**20, dtype="float32", home=home, notify=print)
    )
    assert offer.kind == "images"
    names = {"dall-e-2": "tiny", "gpt-image-1": "tiny"}
    registry = Registry([scripted.model(), offer], names)
    with scripted.serve_app(create_app(ServerSettings(home=home), registry)) as address:
        yield address


@pytest.fixture(scope="module")
def client(painting_address):
    with OpenAI(base_url=f"{painting_address}/v1", api_key="any", max_retries=0) as client:
        yield client


def generate(client, prompt="a red apple", **how):
    own = {name: how.pop(name) for name in ("seed",) if name in how}
    return client.images.generate(prompt=prompt, quality="low", extra_body=own, **how)


def pixels(data):
    """Of a picture's bytes, or of their base64, [Y, X, 3 or 4]."""
    data = base64.b64decode(data) if isinstance(data, str) else data
    return np.asarray(Image.open(io.BytesIO(data)))


def png(array):
    return image_io.encode(array, "png")


def upload(side=24, seed=0):
    """A smooth opaque picture: uint8 [Y, X, 3]."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((side, side)))


def holed(array):
    """The same with a transparent right half: uint8 [Y, X, 4]."""
    alpha = np.full((*array.shape[:2], 1), 255, np.uint8)
    alpha[:, array.shape[1] // 2 :] = 0
    return np.concatenate([array, alpha], -1)


# --- generations ------------------------------------------------------------------------------


def test_urls_lead_to_pictures_without_a_key(client, home):
    answer = generate(client, n=2)
    assert abs(answer.created - time.time()) < 60 and len(answer.data) == 2
    assert answer.usage.input_tokens == answer.usage.total_tokens == 5
    seen = []
    for image in answer.data:
        assert image.b64_json is None
        found = httpx.get(image.url)
        assert found.status_code == 200 and found.headers["content-type"] == "image/png"
        assert found.headers["x-content-type-options"] == "nosniff"
        assert found.headers["content-security-policy"] == "sandbox"
        assert found.headers["content-disposition"].startswith("attachment")
        assert httpx.head(image.url).status_code == 200
        seen.append(pixels(found.content))
        assert seen[-1].shape == (SIZE, SIZE, 3)
    assert (seen[0] != seen[1]).any()


def test_urls_expire_after_an_hour(client, home, painting_address):
    url = generate(client).data[0].url
    name = url.rsplit("/", 1)[1]
    assert len(name) >= 28 and (home / "pictures" / name).stat().st_mode & 0o77 == 0
    os.utime(home / "pictures" / name, (0, time.time() - 3595))
    assert httpx.get(url).status_code == 200
    os.utime(home / "pictures" / name, (0, time.time() - 3601))
    gone = httpx.get(url)
    assert gone.status_code == 404 and gone.json()["error"]["code"] == "not_found"
    kept = home / "pictures" / "mine.png"  # somebody else's file, which is not ours to remove
    kept.write_bytes(b"mine")
    os.utime(kept, (0, 0))
    for other in ("img-x.png", "..%2Fstore.db", "%2e%2e%2fstore.db"):
        assert httpx.get(f"{painting_address}/images/{other}").status_code == 404, other
    create_app(ServerSettings(home=home), Registry([scripted.model()], {}))  # the next start
    assert not (home / "pictures" / name).exists() and kept.exists()


def test_what_has_expired_leaves_the_disk(client, home, monkeypatch):
    monkeypatch.setattr(images, "LIFETIME_SECONDS", -1)
    left = set((home / "pictures").iterdir())
    assert len(generate(client, n=2).data) == 2
    until = time.monotonic() + 10
    while set((home / "pictures").iterdir()) != left and time.monotonic() < until:
        time.sleep(0.01)
    assert set((home / "pictures").iterdir()) == left


def test_pictures_need_no_key_where_the_rest_does(folder, tmp_path):
    with scripted.serve_models(scripted.model(), home=tmp_path, api_keys=("secret",)) as address:
        name = "img-" + "a" * 24 + ".webp"
        (tmp_path / "pictures" / name).write_bytes(b"drawn")
        found = httpx.get(f"{address}/images/{name}")
        assert found.content == b"drawn" and found.headers["content-type"] == "image/webp"
        assert httpx.get(f"{address}/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("size", "side"), [("auto", 16), ("64x64", 64), ("256x256", 256), ("1024x1024", 1024)]
)
def test_sizes_and_formats(client, size, side):
    for format in ("png", "jpeg", "webp")[: 3 if side == 64 else 1]:
        how = {"response_format": "b64_json", "output_format": format}
        answer = generate(client, size=size, **how)
        data = base64.b64decode(answer.data[0].b64_json)
        assert Image.open(io.BytesIO(data)).format.lower() == format
        assert pixels(data).shape == (side, side, 3) and answer.output_format == format


def test_whoever_writes_for_newer_models_gets_base64(client):
    assert generate(client, model="gpt-image-1").data[0].b64_json
    assert generate(client, model="dall-e-2").data[0].url
    assert generate(client, model="gpt-image-1", response_format="url").data[0].url


def test_answers_pass_the_clients_own_checks(painting_address):
    with OpenAI(
        base_url=f"{painting_address}/v1", api_key="any", _strict_response_validation=True
    ) as strict:
        answer = generate(strict, size="64x64", background="opaque", moderation="low", user="ann")
        assert (answer.background, answer.quality, answer.output_format) == ("opaque", "low", "png")
        events = list(generate(strict, size="1024x1024", stream=True, partial_images=1))
        assert [event.type for event in events] == [
            "image_generation.partial_image",
            "image_generation.completed",
        ]


def test_the_same_seed_gives_the_same_bytes_under_load(client, folder, encoder):
    how = {"seed": 7, "n": 2, "response_format": "b64_json"}
    quiet = [image.b64_json for image in generate(client, **how).data]

    async def together():
        address = {"base_url": client.base_url, "api_key": "any", "timeout": 60}
        async with openai.AsyncOpenAI(**address) as many:
            asked = [many.images.generate(prompt=f"a cat {i}", quality="low") for i in range(6)]
            mine = many.images.generate(
                prompt="a red apple", quality="low", n=2, response_format="b64_json",
                extra_body={"seed": 7},
            )  # fmt: skip
            return (await asyncio.gather(*asked, mine))[-1]

    assert [image.b64_json for image in asyncio.run(together()).data] == quiet
    painter = diffusion.load(folder, encoder)
    keys = sample.image_keys(7, 2)
    *_, (drawn, _) = painter.steps(["a red apple"] * 2, keys, SamplerOptions(steps=10))
    own = painter.postprocess(drawn)
    np.testing.assert_array_equal([pixels(data) for data in quiet], own)
    other = generate(client, **how | {"seed": 8}).data[0]
    assert other.b64_json != quiet[0]


def test_a_stream_shows_steps_of_the_denoiser(client, folder, encoder, painting_address):
    events = list(generate(client, stream=True, partial_images=3, seed=3))
    assert [event.type.rsplit(".")[-1] for event in events] == ["partial_image"] * 3 + ["completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    assert events[-1].usage.input_tokens == 5 and events[-1].size == "16x16"
    painter = diffusion.load(folder, encoder)
    steps = list(painter.steps(["a red apple"], sample.image_keys(3, 1), SamplerOptions(steps=10)))
    expected = [steps[1][1], steps[4][1], steps[7][1], steps[-1][0]]
    for event, step in zip(events, expected, strict=True):
        np.testing.assert_array_equal(pixels(event.b64_json), painter.postprocess(step)[0])
    assert all(a.b64_json != b.b64_json for a, b in pairwise(events))


def test_events_are_named_and_as_described(painting_address):
    body = {"prompt": "x", "n": 2, "stream": True, "partial_images": 1, "quality": "low"}
    text = httpx.post(f"{painting_address}/v1/images/generations", json=body, timeout=60).text
    events = [event.split("\n") for event in text.strip().split("\n\n")]
    assert len(events) == 4
    found = []
    for name, data in events:
        event = ImageEvent.model_validate_json(data.removeprefix("data: "), strict=True)
        assert name == f"event: {event.type}"
        found.append((event.type.split(".")[1], event.index))
    assert sorted(found) == [(k, i) for k in ("completed", "partial_image") for i in (0, 1)]


def test_the_description(painting_address):
    paths = httpx.get(f"{painting_address}/openapi.json").json()["paths"]
    taken = {
        route: set(paths[f"/v1/images/{route}"]["post"]["requestBody"]["content"])
        for route in ("generations", "edits", "variations")
    }
    assert taken == {
        "generations": {"application/json"},
        "edits": {"application/json", "multipart/form-data"},
        "variations": {"multipart/form-data"},
    }
    body = {"prompt": "x", "quality": "low", "n": 1}
    for format in ("url", "b64_json"):
        answer = httpx.post(
            f"{painting_address}/v1/images/generations", json=body | {"response_format": format}
        )
        Images.model_validate_json(answer.content, strict=True)
    kinds = {
        model["id"]: model["kind"]
        for model in httpx.get(f"{painting_address}/v1/models").json()["data"]
    }
    assert kinds["tiny"] == "images"


# --- edits and variations ---------------------------------------------------------------------


def change(client, image, **how):
    return client.images.edit(image=image, prompt="a cat", quality="low", **how)


def test_what_the_mask_keeps_comes_back_bit_by_bit(client):
    image = upload()
    answer = change(client, png(image), mask=png(holed(image)), response_format="b64_json")
    changed = pixels(answer.data[0].b64_json)
    assert changed.shape == image.shape
    np.testing.assert_array_equal(changed[:, :12], image[:, :12])
    assert (changed[:, 12:] != image[:, 12:]).mean() > 0.5


def test_transparency_of_the_picture_is_a_mask_too(client):
    image = upload(30)[:20]  # not square
    answer = change(client, [png(holed(image))], response_format="b64_json")  # sent as image[]
    changed = pixels(answer.data[0].b64_json)
    assert changed.shape == image.shape
    np.testing.assert_array_equal(changed[:, :15], image[:, :15])
    assert (changed[:, 15:] != image[:, 15:]).any()


def test_what_was_transparent_outside_the_mask_stays_so(client):
    image = holed(upload())
    mask = image[:, ::-1]  # transparent on the left
    for format, kind, background in (("png", "RGBA", "transparent"), ("jpeg", "RGB", "opaque")):
        how = {"response_format": "b64_json", "output_format": format}
        answer = change(client, png(image), mask=png(mask), **how)
        found = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
        assert (found.mode, answer.background) == (kind, background)
    kept = change(client, png(image), mask=png(mask), response_format="b64_json")
    changed = pixels(kept.data[0].b64_json)
    np.testing.assert_array_equal(changed[:, 12:], image[:, 12:])
    assert (changed[:, :12, 3] == 255).all()


def test_another_size_and_a_photograph(client):
    image = upload(32)
    photo = image_io.encode(image, "jpeg")
    answer = change(
        client, photo, mask=png(holed(image)), size="256x256", response_format="b64_json"
    )
    assert pixels(answer.data[0].b64_json).shape == (256, 256, 3)


def test_edits_in_json(client, painting_address):
    image = upload()
    file = client.files.create(file=("a.png", png(image)), purpose="vision")
    mask = "data:image/png;base64," + base64.b64encode(png(holed(image))).decode()
    body = {"prompt": "a cat", "quality": "low", "response_format": "b64_json"}
    for reference in ({"file_id": file.id}, {"image_url": mask}):
        answer = httpx.post(
            f"{painting_address}/v1/images/edits",
            json=body | {"images": [reference], "mask": {"image_url": mask}},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        changed = pixels(answer.json()["data"][0]["b64_json"])
        np.testing.assert_array_equal(changed[:, :12, :3], image[:, :12])


def test_a_streamed_edit(client):
    image = upload()
    events = list(change(client, png(holed(image)), stream=True, partial_images=2))
    kinds = ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert [event.type for event in events] == kinds
    for event in events:
        np.testing.assert_array_equal(pixels(event.b64_json)[:, :12], image[:, :12])


def test_variations_differ_the_less_the_weaker(client):
    image, far = upload(SIZE).astype(int), []
    for strength in (0.02, 0.9):
        answer = client.images.create_variation(
            image=png(upload(SIZE)), response_format="b64_json", n=1,
            extra_body={"strength": strength, "seed": 1, "quality": "low"},
        )  # fmt: skip
        far.append(np.abs(pixels(answer.data[0].b64_json).astype(int) - image).mean())
    assert 0 < far[0] < far[1]


def blank(*names):
    """Fields of a form that were left empty, as a page or a program sends them."""
    return {name: "" if number % 2 else " " for number, name in enumerate(names)}


OPTIONAL = (
    *("n", "size", "response_format", "output_format", "output_compression", "background", "user"),
    *("quality", "seed", "stream", "partial_images", "mask", "model", "input_fidelity"),
)


def test_empty_fields_are_not_given(painting_address):
    """`n=`, `seed=` and the like were 400s; browsers send all fields of a form."""
    url = f"{painting_address}/v1/images"
    files = {"image": ("a.png", GOOD), "mask": ("", b"")}
    fields = blank(*OPTIONAL) | {"prompt": "a cat"}
    answer = httpx.post(f"{url}/edits", data=fields, files=files, timeout=120)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["data"]) == 1 and answer.json()["data"][0]["url"]
    fields = blank(*OPTIONAL, "prompt", "strength") | {"n": ["2", ""], "quality": "low"}
    answer = httpx.post(f"{url}/variations", data=fields, files={"image": GOOD}, timeout=120)
    assert answer.status_code == 200 and len(answer.json()["data"]) == 2, answer.text


def with_alpha(image):
    return np.concatenate([image, np.full((*image.shape[:2], 1), 255, np.uint8)], -1)


@pytest.mark.parametrize("picture_of", [np.asarray, with_alpha], ids=["no alpha", "opaque alpha"])
def test_an_opaque_picture_is_redrawn_whole_under_a_newer_name(client, picture_of):
    """It was a 400, and code for gpt-image-1 sends no masks."""
    image = picture_of(upload(40)[:30])
    how = {"model": "gpt-image-1", "response_format": "b64_json"}
    found = change(client, png(image), extra_body={"seed": 3}, **how)
    changed = pixels(found.data[0].b64_json)
    assert changed.shape == (30, 40, 3) and (changed != image[..., :3]).mean() > 0.5
    other = client.images.edit(
        image=png(image), prompt="a red apple", quality="low", extra_body={"seed": 3}, **how
    )
    assert other.data[0].b64_json != found.data[0].b64_json, "the prompt counts"
    far = pixels(change(client, png(255 - image[..., :3]), extra_body={"seed": 3}, **how)
                 .data[0].b64_json)  # fmt: skip
    assert (far != changed).any(), "so does the picture"
    for name in ("dall-e-2", "tiny"):
        with pytest.raises(openai.BadRequestError) as caught:
            change(client, png(image), model=name)
        assert caught.value.body["param"] == "image"


def test_the_mask_wins_over_the_pictures_transparency(client):
    image = upload()
    clear = holed(image)[:, ::-1]  # transparent on the left
    how = {"model": "gpt-image-1", "response_format": "b64_json"}
    found = pixels(change(client, png(clear), mask=png(holed(image)), **how).data[0].b64_json)
    np.testing.assert_array_equal(found[:, :12], clear[:, :12])
    assert (found[:, 12:, 3] == 255).all()


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_compression_changes_the_size(client, format):
    """It was taken and changed nothing."""
    sizes = []
    for quality in (0, 50, 100):
        answer = client.images.generate(
            prompt="a cat", quality="low", size="256x256", response_format="b64_json",
            output_format=format, output_compression=quality, extra_body={"seed": 1},
        )  # fmt: skip
        sizes.append(len(answer.data[0].b64_json))
    assert sizes[0] < sizes[1] < sizes[2]


def test_base64_in_pieces_is_base64():
    for size in (0, 1, 3 * CHUNK, 3 * CHUNK + 1, 7 * CHUNK):
        data = np.random.default_rng(size).bytes(size)
        pieces = to_base64(data)
        assert b"".join(pieces) == base64.b64encode(data)
        assert all(len(piece) <= 4 * CHUNK for piece in pieces)


def in_json(data):
    return {"image_url": "data:image/png;base64," + base64.b64encode(data).decode()}


def test_a_slow_picture_holds_nobody_up(painting_address, client):
    """It is decoded beside the event loop: others are answered long before it is done."""
    generate(client)  # the model is loaded
    image, file = upload(2048).copy(), io.BytesIO()
    image[:, :512] = np.random.default_rng(0).integers(0, 256, (2048, 512, 3), np.uint8)
    Image.fromarray(image).save(file, "JPEG", progressive=True)
    photo = file.getvalue()
    last = photo[photo.rindex(b"\xff\xda") : -2]
    slow = photo[:-2] + last * (image_io.MAX_SCANS - photo.count(b"\xff\xda")) + photo[-2:]
    body = {"prompt": "a cat", "images": [in_json(slow)], "mask": in_json(GOOD)}
    answers, waits = [], []

    def ask():
        answers.append(httpx.post(f"{painting_address}/v1/images/edits", json=body, timeout=300))

    thread = threading.Thread(target=ask)
    started = time.monotonic()
    thread.start()
    while thread.is_alive():
        began = time.monotonic()
        assert httpx.get(f"{painting_address}/health").status_code == 200
        waits.append(time.monotonic() - began)
    seconds = time.monotonic() - started
    assert answers[0].json()["error"]["param"] == "mask", "it was read, and is of another size"
    assert max(waits) < seconds / 2, (max(waits), seconds)


@pytest.mark.parametrize("stream", [False, True])
def test_large_answers_are_sent_in_pieces(folder, home, stream):
    """Ten edits of 2,048 pixels in base64 were one JSON text, made on the event loop in seconds."""
    place = download.resolve_model(
        f"tiny={folder}", catalogue.load(), settings.data_folder(), notify=print
    )
    offer = resolve.describe(
        place, LoadOptions(cache_budget=2**20, dtype="float32", home=home, notify=print)
    )
    app = create_app(ServerSettings(home=home), Registry([offer], {}))
    sizes = []

    async def watched(scope, receive, send):
        async def send_and_note(message):
            sizes.append(len(message.get("body", b"")))
            await send(message)

        await app(scope, receive, send_and_note)

    image = np.random.default_rng(0).integers(0, 256, (480, 480, 3), np.uint8)
    body = {"prompt": "a cat", "quality": "low", "response_format": "b64_json", "n": 10}
    body |= {"images": [in_json(png(holed(image)))], "stream": stream, "partial_images": 0}
    with scripted.serve_app(watched) as address:
        answer = httpx.post(f"{address}/v1/images/edits", json=body, timeout=300)
    assert answer.status_code == 200
    if stream:
        lines = [line for line in answer.text.splitlines() if line.startswith("data: ")]
        found = [json.loads(line.removeprefix("data: ")) for line in lines]
    else:
        found = answer.json()["data"]
    assert len(found) == 10 and len(answer.content) > 5 * 2**20
    for one in found:
        np.testing.assert_array_equal(pixels(one["b64_json"])[:, :240], image[:, :240])
    assert max(sizes) <= 4 * CHUNK


# --- what cannot be answered ------------------------------------------------------------------


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side):
    """A PNG of some kilobytes that would unfold to gigabytes."""
    head = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**6)))


GOOD = png(holed(upload()))
MISSING = "missing_required_parameter"


@pytest.mark.parametrize(
    ("files", "param", "code", "facts"),
    [
        ({}, "image", MISSING, []),
        ({"image": b""}, "image", "invalid_image", ["empty"]),
        ({"image": b"I am no picture"}, "image", "invalid_image", ["PNG", "JPEG", "WebP", "GIF"]),
        ({"image": b"%PDF-1.4 " + bytes(100)}, "image", "invalid_image", ["PNG"]),
        ({"image": GOOD[: len(GOOD) // 2]}, "image", "invalid_image", ["damaged"]),
        ({"image": bomb(3_000)}, "image", "invalid_image", ["3000 x 3000"]),
        (
            {"image": png(holed(upload(2)).repeat(2_500, 1))},
            "image",
            "invalid_image",
            ["5000 x 2"],
        ),
        ({"image": png(upload())}, "image", "invalid_image", ["transparent", "mask"]),
        (
            {"image": png(upload()), "mask": png(upload())},
            "mask",
            "invalid_image",
            ["transparent"],
        ),
        ({"image": GOOD, "mask": png(holed(upload(20)))}, "mask", "invalid_image", ["20 x 20"]),
        ({"image": GOOD, "mask": b"no"}, "mask", "invalid_image", ["PNG"]),
        ({"image": GOOD, "mask": bomb(50_000)}, "mask", "invalid_image", [50_000 * 50_000]),
        (
            {"image": png(holed(upload(30)[:20])), "size": "256x256"},
            "image",
            "invalid_image",
            ["30 x 20", "256x256"],
        ),
        ({"image": GOOD, "prompt": ""}, "prompt", MISSING, []),
        ({"image": GOOD, "prompt": " \n"}, "prompt", MISSING, []),
        ({"image": "a text"}, "image", "invalid_type", ["file"]),
        ({"image": GOOD, "mask": "a text"}, "mask", "invalid_type", ["file"]),
        (
            {"image": GOOD, "output_compression": "101"},
            "output_compression",
            "integer_above_max_value",
            [100, 101],
        ),
        (
            {"image": GOOD, "output_compression": "-1"},
            "output_compression",
            "integer_below_min_value",
            [0, "-1"],
        ),
        (
            {"image": GOOD, "output_compression": "50.5"},
            "output_compression",
            "invalid_value",
            ["integer"],
        ),
        (
            {"image": GOOD, "output_compression": "50"},
            "output_compression",
            "invalid_value",
            ["PNG", "'jpeg'", "'webp'"],
        ),
        ({"image": GOOD, "prompt": None}, "prompt", MISSING, []),
        ({"image": GOOD, "n": "11"}, "n", "integer_above_max_value", [10, 11]),
        ({"image": GOOD, "n": "many"}, "n", "invalid_value", ["integer"]),
        ({"image": GOOD, "size": "1536x1024"}, "size", "invalid_value", ["'1536x1024'"]),
        ({"image": GOOD, "response_format": "gif"}, "response_format", "invalid_value", ["'url'"]),
        ({"image": GOOD, "background": "transparent"}, "background", "unsupported_value", []),
        ({"image": GOOD, "stream": "maybe"}, "stream", "invalid_value", ["boolean"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_edits_that_cannot_be_answered(painting_address, files, param, code, facts):
    fields = {"prompt": "x", "quality": "low"} | {
        name: value for name, value in files.items() if not isinstance(value, bytes)
    }
    sent = {name: (name, value) for name, value in files.items() if isinstance(value, bytes)}
    sent = sent or {"other": ("other", b"x")}
    fields = {name: value for name, value in fields.items() if value is not None}
    answer = httpx.post(f"{painting_address}/v1/images/edits", data=fields, files=sent, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error
    assert names(error["message"], *facts) and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "param", "code", "facts"),
    [
        ({}, "prompt", MISSING, []),
        ({"prompt": ""}, "prompt", "empty_string", []),
        ({"prompt": "x" * 32_001}, "prompt", "string_above_max_length", [32_000, 32_001]),
        ({"prompt": 3}, "prompt", "invalid_type", []),
        ({"n": 0}, "n", "integer_below_min_value", [1, 0]),
        ({"n": 11}, "n", "integer_above_max_value", [10, 11]),
        ({"n": "2"}, "n", "invalid_type", []),
        ({"size": "7x7"}, "size", "invalid_value", ["'7x7'", "'16x16'"]),
        ({"size": "1792x1024"}, "size", "invalid_value", ["'1792x1024'"]),
        ({"size": "99999999999999x1"}, "size", "invalid_value", ["'99999999999999x1'"]),
        ({"output_format": "gif"}, "output_format", "invalid_value", ["'gif'", "'png'"]),
        ({"partial_images": 4}, "partial_images", "integer_above_max_value", [3, 4]),
        ({"seed": -1}, "seed", "integer_below_min_value", [0, "-1"]),
        ({"quality": "best"}, "quality", "invalid_value", ["'best'"]),
        ({"background": "transparent"}, "background", "unsupported_value", []),
        (
            {"output_compression": 101, "output_format": "jpeg"},
            "output_compression",
            "integer_above_max_value",
            [100, 101],
        ),
        (
            {"output_compression": 50.5, "output_format": "jpeg"},
            "output_compression",
            "invalid_type",
            [],
        ),
        (
            {"output_compression": "50", "output_format": "jpeg"},
            "output_compression",
            "invalid_type",
            [],
        ),
        ({"output_compression": 99}, "output_compression", "invalid_value", ["PNG", "'jpeg'"]),
    ],
)
def test_generations_that_cannot_be_answered(painting_address, body, param, code, facts):
    body = ({"prompt": "x"} if param != "prompt" else {}) | body
    answer = httpx.post(f"{painting_address}/v1/images/generations", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error
    assert names(error["message"], *facts)


def reference(**fields):
    return {"prompt": "x", "images": [fields]}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (reference(), 400, "images[0]"),
        (reference(image_url="http://169.254.169.254/latest"), 400, "images[0].image_url"),
        (reference(image_url="data:image/png;base64,????"), 400, "images[0].image_url"),
        (reference(image_url="data:image/png;base64,é"), 400, "images[0].image_url"),
        (reference(image_url="data:image/png,abc"), 400, "images[0].image_url"),
        (reference(image_url="data:image/png;base64,"), 400, "image"),
        (reference(file_id="file-none"), 404, "images[0].file_id"),
        (reference(file_id="a", image_url="b"), 400, "images[0]"),
        ({"prompt": "x", "images": []}, 400, "images"),
        ({"prompt": "x", "images": [{"file_id": "a"}] * 2}, 400, "images"),
        ({"prompt": "x", "images": [{"file_id": "a"}] * 17}, 400, "images"),
    ],
)
def test_json_edits_that_cannot_be_answered(painting_address, body, status, param):
    answer = httpx.post(f"{painting_address}/v1/images/edits", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_variations_have_a_least_strength(painting_address):
    """One that numbers cannot tell from none ended in a 500: its noise did not fall."""
    answer = httpx.post(
        f"{painting_address}/v1/images/variations",
        data={"strength": "1e-20", "quality": "low"},
        files={"image": png(upload())},
        timeout=60,
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "strength"), error


def test_other_requests_that_cannot_be_answered(painting_address, tmp_path):
    url = f"{painting_address}/v1/images"
    answer = httpx.post(f"{url}/generations", json={"prompt": "x", "model": "scripted"})
    assert answer.status_code == 404 and names(answer.json()["error"]["message"], "`tiny`")
    files = [("image[]", ("a", GOOD)), ("image[]", ("b", GOOD))]
    answer = httpx.post(f"{url}/edits", data={"prompt": "x"}, files=files)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "image"
    answer = httpx.post(f"{url}/variations", content=b"abc", headers={"content-type": "text/plain"})
    assert answer.status_code == 400
    form = b'--x\r\nContent-Disposition: form-data; name="n"\r\n\r\n1\r\n--x--\r\n'
    for charset in ("undefined", "idna"):  # no codecs for a form, but Python has them
        kind = f"multipart/form-data; boundary=x; charset={charset}"
        answer = httpx.post(f"{url}/variations", content=form, headers={"content-type": kind})
        assert answer.status_code == 400, answer.text
    answer = httpx.post(f"{url}/variations", content=bytes(41 * 2**20))
    assert answer.status_code == 413
    with scripted.serve_models(scripted.model(), home=tmp_path) as address:
        answer = httpx.post(f"{address}/v1/images/generations", json={"prompt": "x"})
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


# --- the client of 2023 -----------------------------------------------------------------------


def test_the_client_of_2023(painting_address, tmp_path):
    old = OldClient(install(), painting_address)
    image = upload()
    (tmp_path / "image.png").write_bytes(png(image))
    (tmp_path / "mask.png").write_bytes(png(holed(image)))
    found = old.run(
        f"image, mask = {str(tmp_path / 'image.png')!r}, {str(tmp_path / 'mask.png')!r}\n"
        "ask = {'response_format': 'b64_json', 'size': '256x256', 'n': 1}\n"
        "made = openai.Image.create(prompt='a cat', **ask)\n"
        "edit = openai.Image.create_edit(image=open(image, 'rb'), mask=open(mask, 'rb'),"
        " prompt='a cat', **ask)\n"
        "vary = openai.Image.create_variation(image=open(image, 'rb'), **ask)\n"
        "pictures = [one.data[0].b64_json for one in (made, edit, vary)]\n"
        "url = openai.Image.create(prompt='a cat').data[0].url\n"
        "try:\n    openai.Image.create_edit(image=open(image, 'rb'), prompt='x')\n"
        "except openai.error.InvalidRequestError as error:\n"
        "    wrong = [error.param, error.code]\n"
        "answer = [pictures, url, wrong]"
    )
    pictures, url, wrong = found
    assert [pixels(data).shape for data in pictures] == [(256, 256, 3)] * 3
    assert pixels(httpx.get(url).content).shape == (SIZE, SIZE, 3)
    assert wrong == ["image", "invalid_image"], "it has no hole, and there is no mask"
    said = old.command("api", "image.create", "-p", "a cat", "-n", "1", "--size", "64x64")
    assert httpx.get(json.loads(said)["data"][0]["url"]).status_code == 200


# --- whose turn it is -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def painter(folder, encoder):
    """A model with a device of its own, whose pieces can be counted."""
    model = load_image_model("tiny", folder, encoder, owned_by="me")
    model.work_queue = WorkQueue(Device())
    return model


async def all_of(model, order):
    return [drawn async for drawn in model.draw(order)]


def order(count=1, **how):
    return ImageRequest(
        **{"prompt": "a cat", "count": count, "plan": SamplerOptions(steps=6), **how}
    )


def test_requests_are_drawn_side_by_side(painter):
    async def main():
        painter.compile(8, order())
        before = painter.lane._device.pieces
        found = await asyncio.gather(*[all_of(painter, order()) for _ in range(10)])
        assert all(len(pictures) == 1 for pictures in found)
        # Batches of 8 and of 2: a piece a step and one to finish, of which the very last may not be
        # counted yet.
        assert painter.lane._device.pieces - before in (13, 14)

    asyncio.run(main())


def test_a_small_order_does_not_wait_for_all_of_a_large_one(painter):
    ended = []

    async def draw(name, wanted):
        async for _ in painter.draw(wanted):
            ended.append(name)

    async def main():
        busy = [draw("busy", order(seed=seed)) for seed in (1, 2)]
        await asyncio.gather(*busy, draw("large", order(10)), draw("small", order()))

    asyncio.run(main())
    assert ended.index("small") < len(ended) - 2  # in the batch of the large one's first ones


def test_others_have_their_turn_between_two_steps(painter):
    other, turns = WorkQueue(painter.lane._device), []

    async def main():
        drawing = asyncio.create_task(all_of(painter, order(plan=SamplerOptions(steps=40))))
        await asyncio.sleep(0)
        while not drawing.done():
            await other.run(lambda: time.sleep(0.001))
            turns.append(len(painter.lane))

    asyncio.run(main())
    assert len(turns) >= 20


def test_who_leaves_stops_the_work(painter):
    async def main():
        wanted = order(2, plan=SamplerOptions(steps=1000), shown=3)
        before = painter.lane._device.pieces
        async with aclosing(painter.draw(wanted)) as drawn:
            first = asyncio.create_task(anext(drawn))
            waits = asyncio.create_task(all_of(painter, order(plan=SamplerOptions(steps=1000))))
            later = asyncio.create_task(all_of(painter, order(plan=SamplerOptions(steps=999))))
            await asyncio.sleep(0.2)
            for task in (first, waits, later):
                task.cancel()
            await asyncio.gather(first, waits, later, return_exceptions=True)
        while not painter.is_idle:
            await asyncio.sleep(0.01)
        assert painter.lane._device.pieces - before < 500

    asyncio.run(main())


def test_a_client_that_disconnects_frees_its_place(painting_address, client):
    """A request's work ends with its connection: the next one is not behind a thousand others."""
    body = {"prompt": "x", "n": 10, "quality": "high", "seed": 1}
    for _ in range(6):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{painting_address}/v1/images/generations", json=body, timeout=0.05)
    assert generate(client).data[0].url


def test_the_queue_has_an_end(painter):
    async def main():
        endless = [order(seed=seed, plan=SamplerOptions(steps=1000)) for seed in (1, 2)]
        tasks = [asyncio.create_task(all_of(painter, wanted)) for wanted in endless]
        await asyncio.sleep(0.1)  # now they are being drawn
        tasks += [asyncio.create_task(all_of(painter, order(10, client="ann"))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Busy) as error:
            await all_of(painter, order(10, client="ann"))
        assert error.value.num_waiting == 30 and error.value.retry_after > 0
        for number in range((MAX_WAITING - 30) // 7):
            wanted = order(7, client=f"client {number}")
            tasks.append(asyncio.create_task(all_of(painter, wanted)))
        await asyncio.sleep(0)
        with pytest.raises(Busy) as error:
            await all_of(painter, order(client="bob"))
        assert error.value.num_waiting is None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())


def test_weak_variations_are_compiled_too(painter):
    """A plan of more steps than a plan may have was made to compile them."""
    source = InitImage(np.zeros((8, 8, 3), np.float32), strength=0.001)
    assert len(asyncio.run(all_of(painter, order(source=source)))) == 1


def test_what_goes_wrong_with_one_batch_goes_wrong_with_no_other(painter):
    async def main():
        wrong = InitImage(np.zeros((3, 3, 3), np.float32))
        with pytest.raises(ValueError, match=naming("pictures", [1, 8, 8, 3], [1, 3, 3, 3])):
            await all_of(painter, order(source=wrong))
        assert len(await all_of(painter, order())) == 1

    asyncio.run(main())


# --- where weights come from ------------------------------------------------------------------


def test_weights_that_are_missing_are_said_to_be(tmp_path):
    known = catalogue.load()
    model = known.models["emoji-64"]
    assert model.folder is not None and model.encoder is known.models["all-minilm-l6-v2"]
    gone = replace(model, folder=tmp_path)
    assert download.find_path(gone, settings.data_folder()) is None
    for look in (download.verify, lambda *where: download.pull(*where, notify=print)):
        with pytest.raises(NotFound, match=naming("emoji-64", tmp_path)):
            look(gone, settings.data_folder())


def test_it_is_offered_only_with_its_encoder(folder, tmp_path):
    """Else a request would wait for a download that nobody has agreed to."""
    model = replace(catalogue.load().models["emoji-64"], folder=folder)
    assert download.find_path(model, tmp_path) is None
    place = download.find_pulled(model, settings.data_folder())
    assert place is not None and place.path == folder
    assert place.encoder == download.find_path(model.encoder, settings.data_folder())
    assert model.size == sum(file.stat().st_size for file in folder.glob("*/*"))


@pytest.mark.slow  # the real weights
def test_emoji_64(home, tmp_path):
    place = download.find_pulled(catalogue.load().models["emoji-64"], settings.data_folder())
    assert place is not None
    offer = resolve.describe(
        place, LoadOptions(cache_budget=2**20, dtype="auto", home=tmp_path, notify=print)
    )
    registry = Registry([offer], catalogue.load().aliases)
    with (
        scripted.serve_app(create_app(ServerSettings(home=tmp_path), registry)) as address,
        OpenAI(base_url=f"{address}/v1", api_key="any") as client,
    ):
        how = {"response_format": "b64_json", "extra_body": {"seed": 0}}
        apple = pixels(client.images.generate(prompt="a red apple", **how).data[0].b64_json)
        assert apple.shape == (64, 64, 3)
        middle = apple[20:44, 20:44].astype(int)
        assert (middle[..., 0] - middle[..., 1:].max(-1) > 30).mean() > 0.5, "it is red"
        assert apple[:4, :4].min() > 230, "on white"
        varied = client.images.create_variation(image=png(apple), n=4, **how).data
        other = pixels(client.images.generate(prompt="a blue car", **how).data[0].b64_json)
        far = np.abs(other.astype(int) - apple).mean()
        for image in varied:
            near = np.abs(pixels(image.b64_json).astype(int) - apple).mean()
            assert 0 < near < far / 2, (near, far)
        began = time.perf_counter()
        client.images.generate(prompt="a red apple")
        print(f"one picture: {time.perf_counter() - began:.2f} s")


def test_strength_and_mask_are_as_the_library_has_them(folder, encoder, client):
    """The API's edit is `diffusion.edit`'s, from the same seed."""
    image = upload()
    own = diffusion.load(folder, encoder)
    hole = holed(image)
    mask = edit.alpha_mask(hole)
    *_, (drawn, _) = edit.steps(
        own, ["a cat"], sample.image_keys(5, 1), SamplerOptions(steps=10),
        images=edit.preprocess_image(image, 8)[None], masks=edit.preprocess_mask(mask, 8)[None],
    )  # fmt: skip
    expected = edit.paste(image, own.postprocess(drawn)[0], mask)
    answer = change(client, png(hole), response_format="b64_json", extra_body={"seed": 5})
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), expected)
