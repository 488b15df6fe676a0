"""Test /v1/images/* over a socket, with a tiny network of random weights and the real encoder."""

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

SIZE = 16  # side of the tiny model's images, in pixels


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
def image_address(folder, home):
    files = download.resolve_model(
        f"tiny={folder}", catalogue.load(), settings.data_folder(), notify=print
    )
    spec = resolve.describe(
        files, LoadOptions(cache_budget=2**20, dtype="float32", home=home, notify=print)
    )
    assert spec.kind == "images"
    names = {"dall-e-2": "tiny", "gpt-image-1": "tiny"}
    registry = Registry([scripted.model(), spec], names)
    with scripted.serve_app(create_app(ServerSettings(home=home), registry)) as address:
        yield address


@pytest.fixture(scope="module")
def client(image_address):
    with OpenAI(base_url=f"{image_address}/v1", api_key="any", max_retries=0) as client:
        yield client


def generate(client, prompt="a red apple", **options):
    extra_body = {name: options.pop(name) for name in ("seed",) if name in options}
    return client.images.generate(prompt=prompt, quality="low", extra_body=extra_body, **options)


def pixels(data):
    """Decode an image from bytes or base64 to [Y, X, 3 or 4]."""
    data = base64.b64decode(data) if isinstance(data, str) else data
    return np.asarray(Image.open(io.BytesIO(data)))


def png(array):
    return image_io.encode(array, "png")


def upload(side=24, seed=0):
    """Return a smooth opaque image: uint8 [Y, X, 3]."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((side, side)))


def holed(array):
    """Return the image with a transparent right half: uint8 [Y, X, 4]."""
    alpha = np.full((*array.shape[:2], 1), 255, np.uint8)
    alpha[:, array.shape[1] // 2 :] = 0
    return np.concatenate([array, alpha], -1)


# --- generations ------------------------------------------------------------------------------


def test_image_urls_need_no_key(client, home):
    answer = generate(client, n=2)
    assert abs(answer.created - time.time()) < 60 and len(answer.data) == 2
    assert answer.usage.input_tokens == answer.usage.total_tokens == 5
    arrays = []
    for image in answer.data:
        assert image.b64_json is None
        result = httpx.get(image.url)
        assert result.status_code == 200 and result.headers["content-type"] == "image/png"
        assert result.headers["x-content-type-options"] == "nosniff"
        assert result.headers["content-security-policy"] == "sandbox"
        assert result.headers["content-disposition"].startswith("attachment")
        assert httpx.head(image.url).status_code == 200
        arrays.append(pixels(result.content))
        assert arrays[-1].shape == (SIZE, SIZE, 3)
    assert (arrays[0] != arrays[1]).any()


def test_image_urls_expire_after_an_hour(client, home, image_address):
    url = generate(client).data[0].url
    name = url.rsplit("/", 1)[1]
    assert len(name) >= 28 and (home / "pictures" / name).stat().st_mode & 0o77 == 0
    os.utime(home / "pictures" / name, (0, time.time() - 3595))
    assert httpx.get(url).status_code == 200
    os.utime(home / "pictures" / name, (0, time.time() - 3601))
    missing = httpx.get(url)
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "not_found"
    remaining = home / "pictures" / "mine.png"  # not a file of the server
    remaining.write_bytes(b"mine")
    os.utime(remaining, (0, 0))
    for other in ("img-x.png", "..%2Fstore.db", "%2e%2e%2fstore.db"):
        assert httpx.get(f"{image_address}/images/{other}").status_code == 404, other
    create_app(ServerSettings(home=home), Registry([scripted.model()], {}))  # the next start
    assert not (home / "pictures" / name).exists() and remaining.exists()


def test_expired_images_are_deleted(client, home, monkeypatch):
    monkeypatch.setattr(images, "LIFETIME_SECONDS", -1)
    left = set((home / "pictures").iterdir())
    assert len(generate(client, n=2).data) == 2
    until = time.monotonic() + 10
    while set((home / "pictures").iterdir()) != left and time.monotonic() < until:
        time.sleep(0.01)
    assert set((home / "pictures").iterdir()) == left


def test_image_urls_need_no_key_on_server_with_keys(folder, tmp_path):
    with scripted.serve_models(scripted.model(), home=tmp_path, api_keys=("secret",)) as address:
        name = "img-" + "a" * 24 + ".webp"
        (tmp_path / "pictures" / name).write_bytes(b"drawn")
        result = httpx.get(f"{address}/images/{name}")
        assert result.content == b"drawn" and result.headers["content-type"] == "image/webp"
        assert httpx.get(f"{address}/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("size", "side"), [("auto", 16), ("64x64", 64), ("256x256", 256), ("1024x1024", 1024)]
)
def test_sizes_and_formats_are_as_requested(client, size, side):
    for format in ("png", "jpeg", "webp")[: 3 if side == 64 else 1]:
        options = {"response_format": "b64_json", "output_format": format}
        answer = generate(client, size=size, **options)
        data = base64.b64decode(answer.data[0].b64_json)
        assert Image.open(io.BytesIO(data)).format.lower() == format
        assert pixels(data).shape == (side, side, 3) and answer.output_format == format


def test_gpt_image_name_returns_base64(client):
    assert generate(client, model="gpt-image-1").data[0].b64_json
    assert generate(client, model="dall-e-2").data[0].url
    assert generate(client, model="gpt-image-1", response_format="url").data[0].url


def test_responses_validate_in_client(image_address):
    with OpenAI(
        base_url=f"{image_address}/v1", api_key="any", _strict_response_validation=True
    ) as strict:
        answer = generate(strict, size="64x64", background="opaque", moderation="low", user="ann")
        assert (answer.background, answer.quality, answer.output_format) == ("opaque", "low", "png")
        events = list(generate(strict, size="1024x1024", stream=True, partial_images=1))
        assert [event.type for event in events] == [
            "image_generation.partial_image",
            "image_generation.completed",
        ]


def test_same_seed_under_load_gives_same_bytes(client, folder, encoder):
    options = {"seed": 7, "n": 2, "response_format": "b64_json"}
    quiet = [image.b64_json for image in generate(client, **options).data]

    async def together():
        address = {"base_url": client.base_url, "api_key": "any", "timeout": 60}
        async with openai.AsyncOpenAI(**address) as many:
            requested = [many.images.generate(prompt=f"a cat {i}", quality="low") for i in range(6)]
            mine = many.images.generate(
                prompt="a red apple", quality="low", n=2, response_format="b64_json",
                extra_body={"seed": 7},
            )  # fmt: skip
            return (await asyncio.gather(*requested, mine))[-1]

    assert [image.b64_json for image in asyncio.run(together()).data] == quiet
    pipeline = diffusion.load(folder, encoder)
    keys = sample.image_keys(7, 2)
    *_, (drawn, _) = pipeline.steps(["a red apple"] * 2, keys, SamplerOptions(steps=10))
    expected_pixels = pipeline.postprocess(drawn)
    np.testing.assert_array_equal([pixels(data) for data in quiet], expected_pixels)
    other = generate(client, **options | {"seed": 8}).data[0]
    assert other.b64_json != quiet[0]


def test_stream_sends_partial_images(client, folder, encoder, image_address):
    events = list(generate(client, stream=True, partial_images=3, seed=3))
    assert [event.type.rsplit(".")[-1] for event in events] == ["partial_image"] * 3 + ["completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    assert events[-1].usage.input_tokens == 5 and events[-1].size == "16x16"
    pipeline = diffusion.load(folder, encoder)
    steps = list(pipeline.steps(["a red apple"], sample.image_keys(3, 1), SamplerOptions(steps=10)))
    expected = [steps[1][1], steps[4][1], steps[7][1], steps[-1][0]]
    for event, step in zip(events, expected, strict=True):
        np.testing.assert_array_equal(pixels(event.b64_json), pipeline.postprocess(step)[0])
    assert all(a.b64_json != b.b64_json for a, b in pairwise(events))


def test_stream_events_match_schema(image_address):
    body = {"prompt": "x", "n": 2, "stream": True, "partial_images": 1, "quality": "low"}
    text = httpx.post(f"{image_address}/v1/images/generations", json=body, timeout=60).text
    events = [event.split("\n") for event in text.strip().split("\n\n")]
    assert len(events) == 4
    result = []
    for name, data in events:
        event = ImageEvent.model_validate_json(data.removeprefix("data: "), strict=True)
        assert name == f"event: {event.type}"
        result.append((event.type.split(".")[1], event.index))
    assert sorted(result) == [(k, i) for k in ("completed", "partial_image") for i in (0, 1)]


def test_openapi_describes_image_routes(image_address):
    paths = httpx.get(f"{image_address}/openapi.json").json()["paths"]
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
            f"{image_address}/v1/images/generations", json=body | {"response_format": format}
        )
        Images.model_validate_json(answer.content, strict=True)
    kinds = {
        model["id"]: model["kind"]
        for model in httpx.get(f"{image_address}/v1/models").json()["data"]
    }
    assert kinds["tiny"] == "images"


# --- edits and variations ---------------------------------------------------------------------


def change(client, image, **options):
    return client.images.edit(image=image, prompt="a cat", quality="low", **options)


def test_edit_keeps_unmasked_pixels_exactly(client):
    image = upload()
    answer = change(client, png(image), mask=png(holed(image)), response_format="b64_json")
    changed = pixels(answer.data[0].b64_json)
    assert changed.shape == image.shape
    np.testing.assert_array_equal(changed[:, :12], image[:, :12])
    assert (changed[:, 12:] != image[:, 12:]).mean() > 0.5


def test_edit_without_mask_uses_image_transparency(client):
    image = upload(30)[:20]  # not square
    answer = change(client, [png(holed(image))], response_format="b64_json")  # sent as image[]
    changed = pixels(answer.data[0].b64_json)
    assert changed.shape == image.shape
    np.testing.assert_array_equal(changed[:, :15], image[:, :15])
    assert (changed[:, 15:] != image[:, 15:]).any()


def test_edit_keeps_transparency_outside_mask(client):
    image = holed(upload())
    mask = image[:, ::-1]  # transparent on the left
    for format, kind, background in (("png", "RGBA", "transparent"), ("jpeg", "RGB", "opaque")):
        options = {"response_format": "b64_json", "output_format": format}
        answer = change(client, png(image), mask=png(mask), **options)
        result = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
        assert (result.mode, answer.background) == (kind, background)
    response = change(client, png(image), mask=png(mask), response_format="b64_json")
    changed = pixels(response.data[0].b64_json)
    np.testing.assert_array_equal(changed[:, 12:], image[:, 12:])
    assert (changed[:, :12, 3] == 255).all()


def test_edit_of_large_photograph_keeps_its_size(client):
    image = upload(32)
    photo = image_io.encode(image, "jpeg")
    answer = change(
        client, photo, mask=png(holed(image)), size="256x256", response_format="b64_json"
    )
    assert pixels(answer.data[0].b64_json).shape == (256, 256, 3)


def test_edit_as_json_keeps_unmasked_pixels(client, image_address):
    image = upload()
    file = client.files.create(file=("a.png", png(image)), purpose="vision")
    mask = "data:image/png;base64," + base64.b64encode(png(holed(image))).decode()
    body = {"prompt": "a cat", "quality": "low", "response_format": "b64_json"}
    for reference in ({"file_id": file.id}, {"image_url": mask}):
        answer = httpx.post(
            f"{image_address}/v1/images/edits",
            json=body | {"images": [reference], "mask": {"image_url": mask}},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        changed = pixels(answer.json()["data"][0]["b64_json"])
        np.testing.assert_array_equal(changed[:, :12, :3], image[:, :12])


def test_streamed_edit_sends_partial_and_completed_events(client):
    image = upload()
    events = list(change(client, png(holed(image)), stream=True, partial_images=2))
    kinds = ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert [event.type for event in events] == kinds
    for event in events:
        np.testing.assert_array_equal(pixels(event.b64_json)[:, :12], image[:, :12])


def test_weaker_variation_differs_less(client):
    image, far = upload(SIZE).astype(int), []
    for strength in (0.02, 0.9):
        answer = client.images.create_variation(
            image=png(upload(SIZE)), response_format="b64_json", n=1,
            extra_body={"strength": strength, "seed": 1, "quality": "low"},
        )  # fmt: skip
        far.append(np.abs(pixels(answer.data[0].b64_json).astype(int) - image).mean())
    assert 0 < far[0] < far[1]


def blank(*names):
    """Return a form with empty fields, as pages and programs send it."""
    return {name: "" if number % 2 else " " for number, name in enumerate(names)}


OPTIONAL = (
    *("n", "size", "response_format", "output_format", "output_compression", "background", "user"),
    *("quality", "seed", "stream", "partial_images", "mask", "model", "input_fidelity"),
)


def test_empty_fields_count_as_absent(image_address):
    """Regression: empty fields such as `n=` returned 400; browsers send all fields of a form."""
    url = f"{image_address}/v1/images"
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
def test_opaque_image_with_gpt_image_name_is_redrawn(client, picture_of):
    """Regression: the request was refused with 400, but code for gpt-image-1 sends no masks."""
    image = picture_of(upload(40)[:30])
    options = {"model": "gpt-image-1", "response_format": "b64_json"}
    result = change(client, png(image), extra_body={"seed": 3}, **options)
    changed = pixels(result.data[0].b64_json)
    assert changed.shape == (30, 40, 3) and (changed != image[..., :3]).mean() > 0.5
    other = client.images.edit(
        image=png(image), prompt="a red apple", quality="low", extra_body={"seed": 3}, **options
    )
    assert other.data[0].b64_json != result.data[0].b64_json, "another prompt gives another image"
    far = pixels(change(client, png(255 - image[..., :3]), extra_body={"seed": 3}, **options)
                 .data[0].b64_json)  # fmt: skip
    assert (far != changed).any(), "another input image gives another image"
    for name in ("dall-e-2", "tiny"):
        with pytest.raises(openai.BadRequestError) as caught:
            change(client, png(image), model=name)
        assert caught.value.body["param"] == "image"


def test_mask_overrides_image_transparency(client):
    image = upload()
    clear = holed(image)[:, ::-1]  # transparent on the left
    options = {"model": "gpt-image-1", "response_format": "b64_json"}
    result = pixels(change(client, png(clear), mask=png(holed(image)), **options).data[0].b64_json)
    np.testing.assert_array_equal(result[:, :12], clear[:, :12])
    assert (result[:, 12:, 3] == 255).all()


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_output_compression_changes_file_size(client, format):
    """Regression: the parameter was accepted but had no effect."""
    sizes = []
    for quality in (0, 50, 100):
        answer = client.images.generate(
            prompt="a cat", quality="low", size="256x256", response_format="b64_json",
            output_format=format, output_compression=quality, extra_body={"seed": 1},
        )  # fmt: skip
        sizes.append(len(answer.data[0].b64_json))
    assert sizes[0] < sizes[1] < sizes[2]


def test_base64_in_chunks_equals_base64():
    for size in (0, 1, 3 * CHUNK, 3 * CHUNK + 1, 7 * CHUNK):
        data = np.random.default_rng(size).bytes(size)
        chunks = to_base64(data)
        assert b"".join(chunks) == base64.b64encode(data)
        assert all(len(chunk) <= 4 * CHUNK for chunk in chunks)


def in_json(data):
    return {"image_url": "data:image/png;base64," + base64.b64encode(data).decode()}


def test_slow_image_does_not_block_other_requests(image_address, client):
    """The image is decoded on a worker thread, so the server answers other requests meanwhile."""
    generate(client)  # load the model before the measurement
    image, file = upload(2048).copy(), io.BytesIO()
    image[:, :512] = np.random.default_rng(0).integers(0, 256, (2048, 512, 3), np.uint8)
    Image.fromarray(image).save(file, "JPEG", progressive=True)
    photo = file.getvalue()
    last = photo[photo.rindex(b"\xff\xda") : -2]
    slow = photo[:-2] + last * (image_io.MAX_SCANS - photo.count(b"\xff\xda")) + photo[-2:]
    body = {"prompt": "a cat", "images": [in_json(slow)], "mask": in_json(GOOD)}
    answers, waits = [], []

    def ask():
        answers.append(httpx.post(f"{image_address}/v1/images/edits", json=body, timeout=300))

    thread = threading.Thread(target=ask)
    started = time.monotonic()
    thread.start()
    while thread.is_alive():
        start_time = time.monotonic()
        assert httpx.get(f"{image_address}/health").status_code == 200
        waits.append(time.monotonic() - start_time)
    seconds = time.monotonic() - started
    assert answers[0].json()["error"]["param"] == "mask", (
        "image and mask were decoded, and their sizes differ"
    )
    assert max(waits) < seconds / 2, (max(waits), seconds)


@pytest.mark.parametrize("stream", [False, True])
def test_large_responses_are_sent_in_chunks(folder, home, stream):
    """Regression: encoding ten large edits as one JSON text blocked the event loop for seconds."""
    files = download.resolve_model(
        f"tiny={folder}", catalogue.load(), settings.data_folder(), notify=print
    )
    spec = resolve.describe(
        files, LoadOptions(cache_budget=2**20, dtype="float32", home=home, notify=print)
    )
    app = create_app(ServerSettings(home=home), Registry([spec], {}))
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
        result = [json.loads(line.removeprefix("data: ")) for line in lines]
    else:
        result = answer.json()["data"]
    assert len(result) == 10 and len(answer.content) > 5 * 2**20
    for one in result:
        np.testing.assert_array_equal(pixels(one["b64_json"])[:, :240], image[:, :240])
    assert max(sizes) <= 4 * CHUNK


# --- invalid requests -------------------------------------------------------------------------


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side):
    """Return a PNG of some kilobytes that decodes to gigabytes of pixels."""
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
def test_invalid_edits_are_refused(image_address, files, param, code, facts):
    fields = {"prompt": "x", "quality": "low"} | {
        name: value for name, value in files.items() if not isinstance(value, bytes)
    }
    sent = {name: (name, value) for name, value in files.items() if isinstance(value, bytes)}
    sent = sent or {"other": ("other", b"x")}
    fields = {name: value for name, value in fields.items() if value is not None}
    answer = httpx.post(f"{image_address}/v1/images/edits", data=fields, files=sent, timeout=60)
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
def test_invalid_generations_are_refused(image_address, body, param, code, facts):
    body = ({"prompt": "x"} if param != "prompt" else {}) | body
    answer = httpx.post(f"{image_address}/v1/images/generations", json=body)
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
def test_invalid_json_edits_are_refused(image_address, body, status, param):
    answer = httpx.post(f"{image_address}/v1/images/edits", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_variation_strength_has_minimum(image_address):
    """Regression: a strength close to 0 caused a 500, because its noise levels did not decrease."""
    answer = httpx.post(
        f"{image_address}/v1/images/variations",
        data={"strength": "1e-20", "quality": "low"},
        files={"image": png(upload())},
        timeout=60,
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "strength"), error


def test_invalid_requests_are_refused(image_address, tmp_path):
    url = f"{image_address}/v1/images"
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


def test_client_of_2023_generates_images(image_address, tmp_path):
    old = OldClient(install(), image_address)
    image = upload()
    (tmp_path / "image.png").write_bytes(png(image))
    (tmp_path / "mask.png").write_bytes(png(holed(image)))
    result = old.run(
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
    pictures, url, wrong = result
    assert [pixels(data).shape for data in pictures] == [(256, 256, 3)] * 3
    assert pixels(httpx.get(url).content).shape == (SIZE, SIZE, 3)
    assert wrong == ["image", "invalid_image"], (
        "the image has no transparent pixels, and there is no mask"
    )
    output = old.command("api", "image.create", "-p", "a cat", "-n", "1", "--size", "64x64")
    assert httpx.get(json.loads(output)["data"][0]["url"]).status_code == 200


# --- scheduling -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image_model(folder, encoder):
    """Load an image model with its own device, whose work items are counted."""
    model = load_image_model("tiny", folder, encoder, owned_by="me")
    model.work_queue = WorkQueue(Device())
    return model


async def outputs_of(model, request):
    return [output async for output in model.generate(request)]


def image_request(num_images=1, **options):
    return ImageRequest(
        **{"prompt": "a cat", "num_images": num_images, "plan": SamplerOptions(steps=6), **options}
    )


def test_concurrent_requests_share_batches(image_model):
    async def main():
        image_model.compile(8, image_request())
        before = image_model.work_queue._device.num_items
        results = await asyncio.gather(
            *[outputs_of(image_model, image_request()) for _ in range(10)]
        )
        assert all(len(outputs) == 1 for outputs in results)
        # Batches of 8 and of 2 images: one work item per step and one to finish, of which the last
        # may not be counted yet.
        assert image_model.work_queue._device.num_items - before in (13, 14)

    asyncio.run(main())


def test_small_request_finishes_before_large_one(image_model):
    finished = []

    async def generate_as(name, request):
        async for _ in image_model.generate(request):
            finished.append(name)

    async def main():
        busy = [generate_as("busy", image_request(seed=seed)) for seed in (1, 2)]
        await asyncio.gather(
            *busy, generate_as("large", image_request(10)), generate_as("small", image_request())
        )

    asyncio.run(main())
    assert (
        finished.index("small") < len(finished) - 2
    )  # the small request shares a batch with the first images of the large one


def test_other_device_work_runs_between_denoising_steps(image_model):
    other, turns = WorkQueue(image_model.work_queue._device), []

    async def main():
        drawing = asyncio.create_task(
            outputs_of(image_model, image_request(plan=SamplerOptions(steps=40)))
        )
        await asyncio.sleep(0)
        while not drawing.done():
            await other.run(lambda: time.sleep(0.001))
            turns.append(len(image_model.work_queue))

    asyncio.run(main())
    assert len(turns) >= 20


def test_disconnect_stops_generation(image_model):
    async def main():
        request = image_request(2, plan=SamplerOptions(steps=1000), num_partial_images=3)
        before = image_model.work_queue._device.num_items
        async with aclosing(image_model.generate(request)) as outputs:
            first = asyncio.create_task(anext(outputs))
            waiting = asyncio.create_task(
                outputs_of(image_model, image_request(plan=SamplerOptions(steps=1000)))
            )
            later = asyncio.create_task(
                outputs_of(image_model, image_request(plan=SamplerOptions(steps=999)))
            )
            await asyncio.sleep(0.2)
            for task in (first, waiting, later):
                task.cancel()
            await asyncio.gather(first, waiting, later, return_exceptions=True)
        while not image_model.is_idle:
            await asyncio.sleep(0.01)
        assert image_model.work_queue._device.num_items - before < 500

    asyncio.run(main())


def test_disconnect_removes_request_from_queue(image_address, client):
    """A disconnected request leaves the queue, so that later requests are served."""
    body = {"prompt": "x", "n": 10, "quality": "high", "seed": 1}
    for _ in range(6):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{image_address}/v1/images/generations", json=body, timeout=0.05)
    assert generate(client).data[0].url


def test_full_queue_is_429(image_model):
    async def main():
        endless = [image_request(seed=seed, plan=SamplerOptions(steps=1000)) for seed in (1, 2)]
        tasks = [asyncio.create_task(outputs_of(image_model, request)) for request in endless]
        await asyncio.sleep(0.1)  # now they are running
        tasks += [
            asyncio.create_task(outputs_of(image_model, image_request(10, client="ann")))
            for _ in range(3)
        ]
        await asyncio.sleep(0)
        with pytest.raises(Busy) as error:
            await outputs_of(image_model, image_request(10, client="ann"))
        assert error.value.num_waiting == 30 and error.value.retry_after > 0
        for number in range((MAX_WAITING - 30) // 7):
            request = image_request(7, client=f"client {number}")
            tasks.append(asyncio.create_task(outputs_of(image_model, request)))
        await asyncio.sleep(0)
        with pytest.raises(Busy) as error:
            await outputs_of(image_model, image_request(client="bob"))
        assert error.value.num_waiting is None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())


def test_variation_with_strength_near_0_generates_an_image(image_model):
    """Regression: warming up weak variations used more steps than the maximum and failed."""
    init_image = InitImage(np.zeros((8, 8, 3), np.float32), strength=0.001)
    assert len(asyncio.run(outputs_of(image_model, image_request(init_image=init_image)))) == 1


def test_failing_batch_leaves_other_batches_alone(image_model):
    async def main():
        mismatched = InitImage(np.zeros((3, 3, 3), np.float32))
        with pytest.raises(ValueError, match=naming("images", [1, 8, 8, 3], [1, 3, 3, 3])):
            await outputs_of(image_model, image_request(init_image=mismatched))
        assert len(await outputs_of(image_model, image_request())) == 1

    asyncio.run(main())


# --- model files ------------------------------------------------------------------------------


def test_verify_and_pull_name_folder_without_bundled_weights(tmp_path):
    known = catalogue.load()
    model = known.models["emoji-64"]
    assert model.folder is not None and model.encoder is known.models["all-minilm-l6-v2"]
    missing = replace(model, folder=tmp_path)
    assert download.find_path(missing, settings.data_folder()) is None
    for look in (download.verify, lambda *where: download.pull(*where, notify=print)):
        with pytest.raises(NotFound, match=naming("emoji-64", tmp_path)):
            look(missing, settings.data_folder())


def test_model_without_encoder_is_not_listed(folder, tmp_path):
    """A listed model without its encoder would start a download within a request."""
    model = replace(catalogue.load().models["emoji-64"], folder=folder)
    assert download.find_path(model, tmp_path) is None
    files = download.find_pulled(model, settings.data_folder())
    assert files is not None and files.path == folder
    assert files.encoder == download.find_path(model.encoder, settings.data_folder())
    assert model.size == sum(file.stat().st_size for file in folder.glob("*/*"))


@pytest.mark.slow  # the real weights
def test_emoji_64_generates_a_red_apple_and_its_variations(home, tmp_path):
    files = download.find_pulled(catalogue.load().models["emoji-64"], settings.data_folder())
    assert files is not None
    spec = resolve.describe(
        files, LoadOptions(cache_budget=2**20, dtype="auto", home=tmp_path, notify=print)
    )
    registry = Registry([spec], catalogue.load().aliases)
    with (
        scripted.serve_app(create_app(ServerSettings(home=tmp_path), registry)) as address,
        OpenAI(base_url=f"{address}/v1", api_key="any") as client,
    ):
        options = {"response_format": "b64_json", "extra_body": {"seed": 0}}
        apple = pixels(client.images.generate(prompt="a red apple", **options).data[0].b64_json)
        assert apple.shape == (64, 64, 3)
        middle = apple[20:44, 20:44].astype(int)
        assert (middle[..., 0] - middle[..., 1:].max(-1) > 30).mean() > 0.5, (
            "the middle of the image is red"
        )
        assert apple[:4, :4].min() > 230, "the background is white"
        varied = client.images.create_variation(image=png(apple), n=4, **options).data
        other = pixels(client.images.generate(prompt="a blue car", **options).data[0].b64_json)
        far = np.abs(other.astype(int) - apple).mean()
        for image in varied:
            near = np.abs(pixels(image.b64_json).astype(int) - apple).mean()
            assert 0 < near < far / 2, (near, far)
        start_time = time.perf_counter()
        client.images.generate(prompt="a red apple")
        print(f"one picture: {time.perf_counter() - start_time:.2f} s")


def test_edit_equals_that_of_the_library(folder, encoder, client):
    """An edit over the API equals `diffusion.edit` with the same seed."""
    image = upload()
    pipeline = diffusion.load(folder, encoder)
    hole = holed(image)
    mask = edit.alpha_mask(hole)
    *_, (drawn, _) = edit.steps(
        pipeline, ["a cat"], sample.image_keys(5, 1), SamplerOptions(steps=10),
        images=edit.preprocess_image(image, 8)[None], masks=edit.preprocess_mask(mask, 8)[None],
    )  # fmt: skip
    expected = edit.paste(image, pipeline.postprocess(drawn)[0], mask)
    answer = change(client, png(hole), response_format="b64_json", extra_body={"seed": 5})
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), expected)
