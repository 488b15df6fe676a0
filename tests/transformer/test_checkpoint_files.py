"""Checkpoints of several files, in 8-bit floats, and in every quantization that `gguf` reads."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from safetensors.numpy import load_file, save_file

from tests.naming import naming
from tests.transformer.conftest import GOLDEN
from transformer import checkpoint
from transformer.checkpoint import gguf as reader
from transformer.checkpoint.safetensors import conversion_command

RNG = np.random.default_rng(5)
DTYPES = {"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2}


def assert_same(first, second) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)


# --- split GGUF files -------------------------------------------------------------------------


def split(name: str, folder: Path, tensors_per_file: int = 9) -> list[Path]:
    """Write a golden GGUF file as a split model of several files, with the package `gguf`."""
    source = gguf.GGUFReader(GOLDEN / "gguf" / f"{name}.gguf")
    kind = source.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(folder / f"{name}.gguf", kind, split_max_tensors=tensors_per_file)
    for key, field in source.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            if len(field.data):
                writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob(f"{name}-*.gguf"))


@pytest.mark.parametrize("name", ["llama-q4_k", "gemma3"])
def test_split_gguf_loads_like_single_file(tmp_path, name):
    files = split(name, tmp_path)
    assert len(files) > 1 and reader.split_files(files[1]) == files
    params, cfg, _ = checkpoint.load(files[0])
    whole, same_cfg, _ = checkpoint.load(GOLDEN / "gguf" / f"{name}.gguf")
    assert cfg == same_cfg
    assert_same(params, whole)


def test_split_gguf_with_wrong_parts_raises_with_file_and_field(tmp_path):
    first, second, *rest = split("llama-q4_k", tmp_path)
    with pytest.raises(ValueError, match=naming(second, "split.no", first.name)):
        checkpoint.load(second)
    content = second.read_bytes()
    second.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=naming(second)):
        checkpoint.load(first)
    shutil.copy(first, second)
    with pytest.raises(ValueError, match=naming(second, "split.no")):
        checkpoint.load(first)
    (tmp_path / "other").mkdir()
    other = split("gemma3", tmp_path / "other", 1000 if rest else 9)
    shutil.copy(other[-1], second)
    with pytest.raises(ValueError, match=naming(second)):
        checkpoint.load(first)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=naming(second.name)):
        checkpoint.load(first)
    second.write_bytes(content)
    renamed = first.rename(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=naming(renamed, "split.count")):
        checkpoint.load(renamed)


# --- every type of gguf -----------------------------------------------------------------------

QUANTIZED = sorted(gguf.quants._type_traits, key=lambda kind: kind.name)


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, *QUANTIZED], ids=lambda kind: kind.name)
def test_every_gguf_type_is_dequantized_row_by_row(tmp_path, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    columns = max(512, block)
    raw = np.where(RNG.random((5, columns // block * size)) < 0.5, 0x2E, 0x2D).astype(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.add_tensor("vector", raw[0], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, tensors = reader.read(tmp_path / "m.gguf")
    expected = gguf.quants.dequantize(raw, kind).astype(np.float32)
    assert tensors["x"].shape == (5, columns) and tensors["x"].dtype == kind.name
    np.testing.assert_array_equal(tensors["x"].read(0, 5), expected)
    np.testing.assert_array_equal(tensors["x"].read(1, 3), expected[1:3])
    np.testing.assert_array_equal(tensors["vector"].read(0, columns), expected[0])


@pytest.mark.parametrize(
    "kind", sorted({*Q} - {Q.F32, Q.F16, *QUANTIZED}), ids=lambda kind: kind.name
)
def test_other_gguf_types_are_refused_with_the_tensor(tmp_path, kind):
    """Bug: the message had neither the file nor the tensor, and came only after the header."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", np.zeros((2, size), np.uint8), raw_shape=(2, size), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=naming(tmp_path / "m.gguf", "'x'", kind.name)):
        reader.read(tmp_path / "m.gguf")


# --- shards of safetensors --------------------------------------------------------------------


def shards(folder: Path) -> tuple[Path, Path]:
    """Write the golden Llama in two shards, and return their paths."""
    shutil.copy(GOLDEN / "llama" / "config.json", folder)
    tensors = load_file(GOLDEN / "llama" / "model.safetensors")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: names[i % 2] for i, name in enumerate(tensors)}
    for file in names:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder / names[0], folder / names[1]


def test_shard_of_another_model_raises_with_file_and_tensor(tmp_path):
    first, second = shards(tmp_path)
    tensors = load_file(second)
    name = next(name for name in tensors if tensors[name].ndim == 2)
    save_file({n: t for n, t in tensors.items() if n != name}, second)
    with pytest.raises(ValueError, match=naming(second, repr(name))):
        checkpoint.load(tmp_path)
    save_file(tensors | {name: tensors[name][:, :-1].copy()}, second)
    with pytest.raises(ValueError, match=naming(second, name)):
        checkpoint.load(tmp_path)
    save_file(tensors | {"model.layers.0.extra.weight": tensors[name]}, second)
    with pytest.raises(ValueError, match=naming(second, "model.layers.0.extra.weight")):
        checkpoint.load(tmp_path)
    save_file(tensors | load_file(first), second)
    with pytest.raises(ValueError, match=naming(second)):
        checkpoint.load(tmp_path)


# In a process of its own: memory that earlier tests have freed would be used again uncounted. The
# anonymous pages are what a process has beyond the files that it maps.
MEASURE = """
import json, sys, threading
from pathlib import Path
import jax
from transformer import checkpoint

def allocated():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, allocated() - before)

path, small, dtype = sys.argv[1:]
checkpoint.load(Path(small), dtype=dtype)  # imports, and compiles
done, before, peak = threading.Event(), allocated(), 0
thread = threading.Thread(target=watch)
thread.start()
params, _, _ = checkpoint.load(Path(path), dtype=dtype)
jax.block_until_ready(params)
done.set()
thread.join()
sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
print(json.dumps([max(peak, allocated() - before), sum(sizes), max(sizes)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("num_shards", [0, 3])
def test_peak_memory_of_load_is_model_and_largest_tensor(model_file, tmp_path, dtype, num_shards):
    """Loading GGUF or shards must not need a second copy of the model, or of a whole file."""
    path = model_file("smollm2-135m-instruct")
    if num_shards:
        params, cfg, _ = checkpoint.load(path)
        checkpoint.save(tmp_path, params, cfg)
        del params
        tensors = load_file(tmp_path / "model.safetensors")
        names = [f"model-{i}.safetensors" for i in range(num_shards)]
        weight_map = {name: names[i % num_shards] for i, name in enumerate(tensors)}
        for file in names:
            save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, tmp_path / file)
        index = {"weight_map": weight_map}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        (tmp_path / "model.safetensors").unlink()
        del tensors
        path = tmp_path
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, path, GOLDEN / "llama", dtype],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    peak, model, largest = json.loads(done.stdout)
    print(f"{peak / 1e6:.0f} MB for a model of {model / 1e6:.0f} MB, "
          f"largest tensor {largest / 1e6:.0f} MB")  # fmt: skip
    slabs = 8 * 4 * 2**20  # float32 copies of the rows that are converted and rotated at a time
    assert peak < model + largest + slabs


# --- 8-bit floats -----------------------------------------------------------------------------


def fp8_folder(
    folder: Path, dtype, layout: str, quantization: dict, block: int = 16, leave_out: str = ""
) -> dict:
    """Write the golden Llama with FP8 projections, and return the dequantized weights by name.

    The tensor `leave_out` is not written.
    """
    config = json.loads((GOLDEN / "llama" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    stored, expected = {}, {}
    for name, array in load_file(GOLDEN / "llama" / "model.safetensors").items():
        stored[name] = expected[name] = array
        if "_proj" not in name or layout == "cast":
            if "_proj" in name:
                stored[name] = array.astype(dtype)
                expected[name] = stored[name].astype(np.float32)
            continue
        rows, columns = array.shape
        grid = {"tensor": (1, 1), "row": (rows, 1)}.get(
            layout, (-(-rows // block), -(-columns // block))
        )
        factors = (RNG.random(grid) + 0.5).astype(np.float32)
        steps = (rows, columns) if layout == "tensor" else (1, columns)
        steps = (block, block) if layout == "block" else steps
        full = np.kron(factors, np.ones(steps, np.float32))[:rows, :columns]
        stored[name] = (array / full).astype(dtype)
        expected[name] = stored[name].astype(np.float32) * full
        suffix = "_scale" if quantization.get("quant_method") != "fp8" else "_scale_inv"
        stored[name + suffix] = factors.reshape(()) if layout == "tensor" else factors
    stored.pop(leave_out, None)
    write_safetensors(folder / "model.safetensors", stored)
    return expected


def write_safetensors(path: Path, tensors: dict) -> None:
    """Write tensors in float32 or 8-bit floats; `safetensors.numpy` cannot write the latter."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()} | {np.dtype("f4"): "F32"}
    header, data = {}, b""
    for name, array in tensors.items():
        end = len(data) + array.nbytes
        header[name] = {"dtype": names[array.dtype], "shape": array.shape,
                        "data_offsets": [len(data), end]}  # fmt: skip
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


LAYOUTS = {
    "block": {"quant_method": "fp8", "weight_block_size": [16, 16]},
    "tensor": {"quant_method": "fp8"},
    "row": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "cast": None,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_checkpoint_loads_as_dequantized_weights(tmp_path, layout, dtype):
    quantization = LAYOUTS[layout]
    expected = fp8_folder(tmp_path, DTYPES[dtype], layout, quantization or {})
    params, cfg, _ = checkpoint.load(tmp_path)
    (tmp_path / "plain").mkdir()
    shutil.copy(GOLDEN / "llama" / "config.json", tmp_path / "plain")
    save_file(expected, tmp_path / "plain" / "model.safetensors")
    plain, plain_cfg, _ = checkpoint.load(tmp_path / "plain")
    assert cfg == plain_cfg
    assert_same(params, plain)


def test_fp8_scale_of_a_wrong_shape_raises(tmp_path):
    fp8_folder(tmp_path, jnp.float8_e4m3fn, "block", LAYOUTS["block"])
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [8, 16]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=naming(tmp_path / "model.safetensors", "weight_scale_inv")
    ):
        checkpoint.load(tmp_path)
    config["quantization_config"]["weight_block_size"] = "large"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=naming("weight_block_size", "'large'")):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("layout", ["block", "tensor", "row"])
def test_fp8_weight_without_a_scale_raises(tmp_path, layout):
    """Regression: an FP8 weight whose scale is missing was loaded without it, with wrong values."""
    suffix = "_scale" if layout == "row" else "_scale_inv"
    scale = f"model.layers.0.mlp.down_proj.weight{suffix}"
    fp8_folder(tmp_path, jnp.float8_e4m3fn, layout, LAYOUTS[layout], leave_out=scale)
    with pytest.raises(ValueError, match=naming(scale, "F8_E4M3")):
        checkpoint.load(tmp_path)


def test_unsupported_quantization_is_rejected_with_key(tmp_path):
    fp8_folder(tmp_path, jnp.float8_e4m3fn, "cast", {"quant_method": "aqlm"})
    with pytest.raises(ValueError, match=naming("quantization_config", "aqlm")):
        checkpoint.load(tmp_path)


# --- pickles ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["consolidated.00.pth", "tokenizer.bin"], "consolidated*.pth"),
        (["pytorch_model.bin", "training_args.bin"], "pytorch_model*.bin"),
        (["optimizer.pt", "weights[1].pt"], "optimizer.pt"),
    ],
)
def test_conversion_command_globs_the_files_with_weights(tmp_path, names, expected):
    """Regression: the command read `*.bin`: also training_args.bin, and no consolidated.00.pth."""
    shutil.copy(GOLDEN / "llama" / "config.json", tmp_path)
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/{expected}")):
        checkpoint.load(tmp_path)


def test_conversion_command_without_weights_stops(tmp_path):
    """Regression: the command wrote a model.safetensors without tensors if no file matched."""
    command = shlex.split(conversion_command(tmp_path))
    result = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True)
    assert result.returncode == 1 and "pytorch_model*.bin" in result.stderr
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parity
def test_conversion_command_stops_at_parts_of_tensors(tmp_path):
    """Meta's shards have the same names: the last one overwrote the others."""
    import torch

    for i in (0, 1):
        torch.save({"tok_embeddings.weight": torch.zeros(2)}, tmp_path / f"consolidated.0{i}.pth")
    command = shlex.split(conversion_command(tmp_path, ["consolidated.00.pth"]))
    result = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True)
    assert result.returncode == 1
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parity
def test_conversion_command_converts_a_pickle(tmp_path):
    import torch

    shutil.copy(GOLDEN / "llama" / "config.json", tmp_path)
    tensors = load_file(GOLDEN / "llama" / "model.safetensors")
    halves = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    for i, half in enumerate(halves):
        state = {name: torch.from_numpy(array.copy()) for name, array in half.items()}
        torch.save(state, tmp_path / f"pytorch_model-0000{i + 1}-of-00002.bin")
    torch.save({"optimizer": 1}, tmp_path / "training_args.bin")
    command = shlex.split(conversion_command(tmp_path, [p.name for p in tmp_path.glob("*.bin")]))
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert_same(checkpoint.load(tmp_path)[0], checkpoint.load(GOLDEN / "llama")[0])
