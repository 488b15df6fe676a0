"""Make tiny GGUF files with llama.cpp, and the results of transformers and llama.cpp for them.

    python make_gguf.py

It needs torch, transformers, accelerate and llama-cpp-python. It writes to the folder gguf/:

    llama-FORMAT.gguf   one Llama, quantized by llama.cpp to each tensor type of published files
    FAMILY.gguf         one decoder of each other family in F16, with the names and the keys that
                        llama.cpp's converter gives them
    golden.npz          for each file NAME: NAME.ids [T], NAME.logits [T, V] by transformers,
                        float32, on the dequantized weights, and NAME.top [T], the most likely
                        token by llama.cpp; versions

llama.cpp rounds the inputs of its products. The ids are therefore drawn again until the margin of
the most likely token at every position exceeds the rounding error.
"""

import ctypes
import itertools
import platform
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
import transformers
from make_tiny import SIZES, random_model

HERE = Path(__file__).parent / "gguf"
FORMATS = {
    "f16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q6_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "q5_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "q4_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}
# Rows of 256, a whole block of the K types. llama.cpp uses another type for rows of 32, and for
# those of 896 in published Qwen files.
WIDE = SIZES | dict(
    vocab_size=48, hidden_size=256, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip
LINEAR = dict(
    full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
    sliding_attention=dict(rope_type="default", rope_theta=1e4),
)
FAMILIES = {
    "gpt2": transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama3": transformers.LlamaConfig(
        **SIZES | dict(max_position_embeddings=16384), rope_parameters=LLAMA3
    ),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=True),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES | dict(num_hidden_layers=7, num_key_value_heads=1),
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=5,
        rope_parameters=LINEAR,
    ),
}


def write(path: Path, model, dtype) -> None:
    """Write a model as llama.cpp's converter does."""
    config, kind = model.config, model.config.model_type
    arch = {"gemma3_text": "gemma3"}.get(kind, kind)
    writer = gguf.GGUFWriter(path, arch)
    is_gpt2, num_layers = kind == "gpt2", config.num_hidden_layers
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(4 * config.n_embd if is_gpt2 else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if is_gpt2:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        rope = config.rope_parameters.get("full_attention", config.rope_parameters)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        if kind == "llama":
            writer.add_rope_dimension_count(head_dim)
        if kind == "gemma3_text":
            writer.add_sliding_window(config.sliding_window)
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "llama3":
            scaled = model.model.rotary_emb.original_inv_freq.numpy()
            plain = rope["rope_theta"] ** -(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
            writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))

    names = gguf.get_tensor_name_map(model_arch(arch), num_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if is_gpt2 and ".c_" in name and array.ndim == 2:
            array = array.T
        if kind == "gemma3_text" and name.endswith("norm.weight"):
            array = array + np.float32(1)
        heads = {"q_proj": config.num_attention_heads, "k_proj": None}.get(name.split(".")[-2], 0)
        if kind == "llama" and heads != 0:
            heads = heads or config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        is_wide = array.ndim == 1 or "wpe" in name
        writer.add_tensor(
            names.get_name(name, (".weight", ".bias")),
            array.astype(np.float32 if is_wide else dtype),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def model_arch(arch: str) -> gguf.MODEL_ARCH:
    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)


def quantize(source: Path, path: Path, ftype: int) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, 1
    if llama_cpp.llama_model_quantize(bytes(source), bytes(path), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not make {path}")


def by_llama_cpp(model, ids: list[int], vocab_size: int) -> np.ndarray:
    """Return the logits of llama.cpp at each position, [T, V]."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = 64
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, id in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = id, i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, True
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit("llama.cpp could not read the ids")
    rows = [
        np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (vocab_size,)).copy()
        for i in range(len(ids))
    ]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return np.stack(rows)


def open_with_transformers(path: Path, config):
    """Load the model; keys that transformers does not read from GGUF are taken from `config`."""
    keys = {
        "gpt2": ("n_positions", "vocab_size"),
        "qwen3": ("head_dim",),
        "gemma3_text": ("query_pre_attn_scalar", "rope_parameters"),
    }.get(config.model_type, ("rope_parameters",))
    changes = {key: getattr(config, key) for key in keys}
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        attn_implementation="eager",
        **changes,
    ).eval()


@torch.inference_mode()
def compare(name: str, path: Path, config) -> dict[str, np.ndarray]:
    """Return ids and the results of both implementations."""
    reference = open_with_transformers(path, config)
    llama_model = llama_cpp.llama_model_load_from_file(
        bytes(path), llama_cpp.llama_model_default_params()
    )
    for seed in itertools.count():
        ids = np.random.default_rng(seed).integers(0, config.vocab_size, 16).tolist()
        logits = reference(torch.tensor([ids])).logits[0].numpy()
        other = by_llama_cpp(llama_model, ids, config.vocab_size)
        error = np.abs(logits - other).max()
        second, best = np.sort(logits, -1)[:, -2:].T
        if (best - second).min() > 2 * error:
            break
    print(f"{name}: seed {seed}, largest difference {error:.3f} of {np.abs(logits).max():.1f}")
    llama_cpp.llama_model_free(llama_model)
    return {
        f"{name}.ids": np.array(ids, np.int32),
        f"{name}.logits": logits,
        f"{name}.top": other.argmax(-1).astype(np.int32),
    }


def main() -> None:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        temp_dir, files = Path(folder), {}
        wide = transformers.LlamaConfig(**WIDE, head_dim=16)
        write(temp_dir / "wide.gguf", random_model(wide), np.float32)
        for name, ftype in FORMATS.items():
            quantize(temp_dir / "wide.gguf", temp_dir / f"llama-{name}.gguf", ftype)
            files[f"llama-{name}"] = wide
        for name, config in FAMILIES.items():
            write(temp_dir / f"{name}.gguf", random_model(config), np.float16)
            files[name] = config
        for name, config in files.items():
            results |= compare(name, temp_dir / f"{name}.gguf", config)
        shutil.rmtree(HERE, ignore_errors=True)
        HERE.mkdir()
        for name in files:
            shutil.copy(temp_dir / f"{name}.gguf", HERE)
        np.savez_compressed(HERE / "golden.npz", **results, versions=versions())


def versions() -> str:
    """Return the versions of the software that made the files."""
    names = ("gguf", "llama-cpp-python", "numpy", "torch", "transformers")
    return ", ".join(
        [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)]
    )


if __name__ == "__main__":
    main()
