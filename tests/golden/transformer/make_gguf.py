"""Makes tiny GGUF files with llama.cpp, and what transformers and llama.cpp compute with them.

    python make_gguf.py

It needs torch, transformers, accelerate and llama-cpp-python. In the folder gguf/ it writes:

    llama-FORMAT.gguf   one Llama, quantised by llama.cpp to each format that published files have
    FAMILY.gguf         one decoder of each other family in F16, with the names and the keys that
                        llama.cpp's converter gives them
    golden.npz          for each file NAME: NAME.ids [T], NAME.logits [T, V] by transformers,
                        float32, on the dequantised weights, and NAME.top [T], the likeliest token
                        by llama.cpp; versions

llama.cpp rounds what enters its products, so the ids are drawn until the likeliest token of every
position is likelier than the next by more than that shows.
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
# Rows of 256, a whole block of the K formats; rows of 32 get another format from llama.cpp, as do
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
    """Writes a model as llama.cpp's converter does."""
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
            turned = model.model.rotary_emb.original_inv_freq.numpy()
            plain = rope["rope_theta"] ** -(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
            writer.add_tensor("rope_freqs.weight", (plain / turned).astype(np.float32))

    names = gguf.get_tensor_name_map(writer_arch(arch), num_layers)
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


def writer_arch(arch: str) -> gguf.MODEL_ARCH:
    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)


def quantise(source: Path, path: Path, ftype: int) -> None:
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.nthread = ftype, 1
    if llama_cpp.llama_model_quantize(bytes(source), bytes(path), ctypes.byref(how)):
        raise SystemExit(f"llama.cpp could not make {path}")


def by_llama_cpp(model, ids: list[int], vocab_size: int) -> np.ndarray:
    """Logits of each position, [T, V]."""
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = 64
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, settings)
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
    """The model; what transformers does not read in GGUF files is taken from `config`."""
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
    """Ids, and what both make of them."""
    reference = open_with_transformers(path, config)
    peer = llama_cpp.llama_model_load_from_file(bytes(path), llama_cpp.llama_model_default_params())
    for seed in itertools.count():
        ids = np.random.default_rng(seed).integers(0, config.vocab_size, 16).tolist()
        logits = reference(torch.tensor([ids])).logits[0].numpy()
        other = by_llama_cpp(peer, ids, config.vocab_size)
        error = np.abs(logits - other).max()
        second, best = np.sort(logits, -1)[:, -2:].T
        if (best - second).min() > 2 * error:
            break
    print(f"{name}: seed {seed}, largest difference {error:.3f} of {np.abs(logits).max():.1f}")
    llama_cpp.llama_model_free(peer)
    return {
        f"{name}.ids": np.array(ids, np.int32),
        f"{name}.logits": logits,
        f"{name}.top": other.argmax(-1).astype(np.int32),
    }


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        made, files = Path(folder), {}
        wide = transformers.LlamaConfig(**WIDE, head_dim=16)
        write(made / "wide.gguf", random_model(wide), np.float32)
        for name, ftype in FORMATS.items():
            quantise(made / "wide.gguf", made / f"llama-{name}.gguf", ftype)
            files[f"llama-{name}"] = wide
        for name, config in FAMILIES.items():
            write(made / f"{name}.gguf", random_model(config), np.float16)
            files[name] = config
        for name, config in files.items():
            found |= compare(name, made / f"{name}.gguf", config)
        shutil.rmtree(HERE, ignore_errors=True)
        HERE.mkdir()
        for name in files:
            shutil.copy(made / f"{name}.gguf", HERE)
        np.savez_compressed(HERE / "golden.npz", **found, versions=versions())


def versions() -> str:
    """What made the files."""
    names = ("gguf", "llama-cpp-python", "numpy", "torch", "transformers")
    return ", ".join(
        [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)]
    )


if __name__ == "__main__":
    main()
