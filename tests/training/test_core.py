"""The trainer: comparison with torch, exact sums, checkpoints, and resuming."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.naming import naming
from training import State, TrainConfig, metrics, optim, state, step, train, tree_io
from training import checkpoint as checkpoints
from training.loss import chunked_cross_entropy
from training.recipes.decoder import DecoderTask, LoraTask, cast_params, next_token_loss
from transformer import checkpoint, decoder
from transformer import config as decoders
from transformer.kernels import exact
from transformer.layers import quantize

pytestmark = pytest.mark.heavy

GOLDEN = Path(__file__).parent.parent / "golden"
CFG = decoders.Config.debug(vocab_size=64, num_layers=1)


def batch_of(ids, weights=None, segments=None) -> dict[str, np.ndarray]:
    ids = np.asarray(ids, np.int32)
    ones = np.ones(ids.shape)
    return {
        "ids": ids,
        "weights": np.asarray(ones if weights is None else weights, np.float32),
        "segments": np.asarray(ones if segments is None else segments, np.int32),
    }


def make_batch(number: int, rows: int = 4, length: int = 24) -> dict[str, np.ndarray]:
    """Return the batch of step `number`: ids that rise by 1 or 2, weights, segments, padding."""
    rng = np.random.default_rng([7, number])
    ids = np.cumsum(rng.integers(1, 3, (rows, length)), axis=1) % CFG.vocab_size
    segments = np.repeat([[1] * 10 + [2] * 11 + [0] * 3], rows, axis=0)
    return batch_of(ids, rng.random(ids.shape) > 0.3, segments)


class BigramTask:
    """A bigram model, which can fit the ids of `make_batch` and compiles fast."""

    def init(self, key):
        keys = jax.random.split(key, 3)
        shapes = {"embed": (64, 16), "mix": (24, 16), "head": (64, 24)}
        weights = {
            name: 0.2 * jax.random.normal(k, shape)
            for (name, shape), k in zip(shapes.items(), keys, strict=True)
        }
        return weights | {"scale": jnp.ones(24)}

    def loss(self, weights, frozen, batch, key):
        ids, segments = batch["ids"], batch["segments"]
        x = jnp.tanh(weights["embed"][ids[:, :-1]] @ weights["mix"].T) * weights["scale"]
        counts = batch["weights"][:, 1:] * (segments[:, 1:] == segments[:, :-1])
        counts = (counts * (segments[:, 1:] > 0)).ravel()
        loss, right = chunked_cross_entropy(
            x.reshape(-1, 24), weights["head"], ids[:, 1:].ravel(), counts, chunk=32
        )
        return loss, counts.sum(), {"correct": right, "tokens": (segments > 0).sum()}


def same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def close(found, expected, tolerance: float) -> None:
    """Assert that the leaves of two pytrees agree, relative to the largest value of each leaf.

    The scale is at least a thousandth of the largest value of all leaves, because values that are
    zero except for rounding (such as gradients of a key bias) have no digits to compare.
    """
    names = tree_io.to_named(expected)
    floor = 1e-3 * max(np.abs(leaf).max() for leaf in names.values())
    for name, leaf in tree_io.to_named(found).items():
        scale = max(np.abs(names[name]).max(), floor)
        np.testing.assert_allclose(leaf, names[name], rtol=0, atol=tolerance * scale, err_msg=name)


# --- against torch --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_gradients_equal_those_of_transformers(family):
    params, cfg, _ = checkpoint.load(GOLDEN / "transformer" / family)
    expected, _, _ = checkpoint.load(GOLDEN / "training" / family)
    golden = np.load(GOLDEN / "training" / family / "batch.npz")
    batch = batch_of(golden["ids"], golden["weights"])

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return next_token_loss(params, cfg, batch, "float32")[0]

    found, gradients = loss(params)
    np.testing.assert_allclose(found, golden["loss"], rtol=1e-5)
    close(gradients, expected, 1e-4)


def test_twenty_steps_equal_those_of_torch(tmp_path):
    """The loss curve depends on warm-up, cosine decay, clipping, AdamW and weight decay."""
    params, cfg, _ = checkpoint.load(GOLDEN / "transformer" / "llama")
    expected, _, _ = checkpoint.load(GOLDEN / "training" / "curve")
    golden = np.load(GOLDEN / "training" / "curve" / "curve.npz")
    config = TrainConfig(
        steps=20, learning_rate=3e-3, warmup_steps=4, final_fraction=0.1, weight_decay=0.1,
        b2=0.95, clip_norm=1.0, save_every=100,
    )  # fmt: skip
    outcome = train(
        DecoderTask(cfg=cfg, init_params=params),
        None,
        lambda number: batch_of(golden["ids"][number], golden["weights"][number]),
        config,
        tmp_path,
    )
    lines = metrics.read(tmp_path / "metrics.jsonl")
    for name, key in (("loss", "losses"), ("grad_norm", "norms"), ("lr", "rates")):
        np.testing.assert_allclose([line[name] for line in lines], golden[key], rtol=1e-4)
    close(outcome.state.weights, expected, 1e-4)


# --- the loss and its gradient --------------------------------------------------------------------


def test_gradients_equal_finite_differences():
    """Finite differences are those of a float64 decoder in NumPy, along random directions."""
    params, batch = decoder.init(jax.random.key(0), CFG), batch_of(make_batch(0, 2, 6)["ids"])
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def loss(params) -> float:
        total = 0.0
        for length in range(1, 6):
            logits = exact.decoder(params, CFG, batch["ids"][:, :length])  # of the last position
            likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            total -= likely[np.arange(2), batch["ids"][:, length]].sum()
        return total

    gradient = jax.grad(lambda p: next_token_loss(p, CFG, batch, "float32")[0])(params)
    rng = np.random.default_rng(0)
    for _ in range(3):
        direction = jax.tree.map(lambda x: rng.normal(size=x.shape), wide)
        plus, minus = (
            loss(jax.tree.map(lambda x, d, t=t: x + t * d, wide, direction)) for t in (1e-5, -1e-5)
        )
        products = jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)
        slope = sum(jax.tree.leaves(products))
        np.testing.assert_allclose(slope, (plus - minus) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_of_bfloat16_products_are_close(remat):
    params, batch = decoder.init(jax.random.key(0), CFG), make_batch(0)

    def gradient(dtype, remat):
        return jax.jit(
            jax.grad(lambda p: next_token_loss(p, CFG, batch, dtype, remat=remat)[0])
        )(params)  # fmt: skip

    exact = gradient("float32", False)
    close(gradient("bfloat16", remat), exact, 0.03)
    close(gradient("float32", remat), exact, 1e-5)


def test_packed_texts_have_the_loss_of_separate_texts():
    """Loss and gradient of packed texts equal the sums over separate texts."""
    params, rng = decoder.init(jax.random.key(0), CFG), np.random.default_rng(0)
    texts = [rng.integers(0, 64, n) for n in (7, 1, 12)]
    row = np.concatenate([*texts, np.zeros(4, int)])
    packed = batch_of([row], segments=[[1] * 7 + [2] + [3] * 12 + [0] * 4])

    @jax.jit
    def evaluate(batch):
        loss = lambda p: next_token_loss(p, CFG, batch, "float32")[:2]  # noqa: E731
        (total, weight), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return total, weight, gradient

    separate = [evaluate(batch_of([text])) for text in texts]
    total = jax.tree.map(lambda *leaves: sum(leaves), *separate)
    found = evaluate(packed)
    assert found[1] == total[1] == 6 + 0 + 11
    np.testing.assert_allclose(found[0], total[0], rtol=1e-6)
    close(found[2], total[2], 1e-5)


@pytest.mark.slow
def test_lora_step_computes_no_gradient_of_frozen_weights():
    """The gradient of all weights would need as many FLOPs as the forward pass."""
    cfg = decoders.Config.debug(d_model=128, d_ff=512, num_layers=3, vocab_size=64)
    params, batch = decoder.init(jax.random.key(0), cfg), make_batch(0)
    config = TrainConfig(steps=10, learning_rate=1e-3)

    def flops(task, frozen) -> float:
        start = jax.eval_shape(lambda: state.init(task, config))
        take = step.make_train_step(task, config)
        return take.lower(start, frozen, batch).compile().cost_analysis()["flops"]

    adapter, full = flops(LoraTask(cfg=cfg, rank=2), params), flops(DecoderTask(cfg=cfg), None)
    hidden = jax.jit(lambda p: decoder.hidden_states(p, cfg, batch["ids"], batch["segments"]))
    forward = hidden.lower(params).compile().cost_analysis()["flops"]
    assert adapter < 2.5 * forward
    assert full > 2.8 * forward


@pytest.mark.slow
def test_remat_needs_less_memory():
    """`jax.checkpoint` would save no memory on a CPU, where XLA removes its barriers."""
    cfg = decoders.Config.debug(num_layers=8, d_model=64, d_ff=256)
    config, batch = TrainConfig(steps=10, learning_rate=1e-3), make_batch(0, rows=8, length=24)

    def need(remat: bool) -> int:
        task = DecoderTask(cfg=cfg, remat=remat)
        start = jax.eval_shape(lambda: state.init(task, config))
        compiled = step.make_train_step(task, config).lower(start, None, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert need(True) < 0.7 * need(False)


def test_int8_weights_are_rejected():
    params = decoder.init(jax.random.key(0), CFG)
    layers = tuple(layer.replace(q=quantize(layer.q)) for layer in params.layers)
    with pytest.raises(ValueError, match=naming("int8")):
        cast_params(params.replace(layers=layers), "float32")


# --- a step ---------------------------------------------------------------------------------------


def test_step_in_micro_batches_equals_step_with_whole_batch():
    """The micro-batches have different numbers of targets, so the mean of means would differ."""
    batch = make_batch(0)
    batch["weights"][0] = 0  # the first micro-batch has fewer targets
    task = BigramTask()
    whole, parts = (TrainConfig(steps=5, learning_rate=1e-2, micro_batches=n) for n in (1, 4))
    found = []
    for config in (whole, parts):
        after, sums = step.make_train_step(task, config)(state.init(task, config), None, batch)
        found.append((after.optimizer, {k: sums[k] for k in ("loss", "weight", "correct")}))
    close(found[1], found[0], 1e-5)
    with pytest.raises(ValueError, match=naming("micro_batches", 4, 3)):
        config = TrainConfig(steps=5, learning_rate=1e-2, micro_batches=3)
        step.make_train_step(task, config)(state.init(task, config), None, batch)


def test_batch_with_zero_loss_weights_changes_no_model_weights():
    task, config = BigramTask(), TrainConfig(steps=5, learning_rate=1e-2)
    before, batch = task.init(jax.random.key(0)), make_batch(0)
    batch["weights"][:] = 0
    after, sums = step.make_train_step(task, config)(state.init(task, config), None, batch)
    assert float(sums["grad_norm"]) == 0
    assert same(after.weights, before)


def test_ema_decay_grows_in_the_first_steps():
    task = BigramTask()
    config = TrainConfig(steps=5, learning_rate=1e-2, average_decay=0.99)
    take, now = step.make_train_step(task, config), state.init(task, config)
    mean = np.asarray(now.average["embed"])
    for number in range(3):
        now, _ = take(now, None, make_batch(number))
        decay = min(0.99, (1 + number) / (10 + number))
        mean = decay * mean + (1 - decay) * np.asarray(now.weights["embed"])
        np.testing.assert_allclose(now.average["embed"], mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_reduces_the_loss(optimizer, tmp_path):
    config = TrainConfig(steps=60, learning_rate=2e-2, optimizer=optimizer, weight_decay=0.1)
    train(BigramTask(), None, make_batch, config, tmp_path)
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert lines[0]["loss"] > 4 and lines[-1]["loss"] < 3


def test_muon_orthogonalizes_hidden_matrices_only():
    task = BigramTask()
    config = TrainConfig(steps=9, learning_rate=1e-2, optimizer="muon", schedule="constant")
    before = jax.device_get(task.init(jax.random.key(0)))
    after, _ = step.make_train_step(task, config)(state.init(task, config), None, make_batch(0))
    change = np.asarray(after.weights["mix"] - before["mix"])
    values = np.linalg.svd(change, compute_uv=False)
    assert values.min() > 0.4 * values.max()
    size = 0.2 * 1e-2  # root mean square, equal to that of AdamW
    np.testing.assert_allclose(np.sqrt((change**2).mean()), size, rtol=0.35)
    table = np.abs(after.weights["embed"] - before["embed"])
    np.testing.assert_allclose(table.max(), 1e-2, rtol=1e-2)  # first step of AdamW


def test_learning_rate_schedule_has_warmup_and_decay():
    def rates(**more):
        config = TrainConfig(
            steps=10, learning_rate=1.0, warmup_steps=4, final_fraction=0.2, **more
        )
        return [float(optim.schedule(config)(number)) for number in range(11)]

    rise = [0.2, 0.4, 0.6, 0.8, 1.0]
    for name, last in (("cosine", 0.2), ("linear", 0.2), ("constant", 1.0)):
        found = rates(schedule=name)
        np.testing.assert_allclose(found[:5], rise, rtol=1e-6)
        np.testing.assert_allclose(found[10], last, rtol=1e-6)
    np.testing.assert_allclose(rates(schedule="linear")[7], 0.6, rtol=1e-6)
    np.testing.assert_allclose(rates(schedule="cosine")[7], 0.6, rtol=1e-6)


def test_decay_mask_selects_matrices():
    params = decoder.init(jax.random.key(0), CFG)
    mask = optim.decay_mask(params)
    assert mask.layers[0].q.weight and mask.embed.weight
    assert not mask.layers[0].attn_norm.scale and not mask.final_norm.scale


@pytest.mark.parametrize(
    "change, facts",
    [
        (dict(steps=0), ["steps", 0]),
        (dict(learning_rate=0.0), ["learning_rate", 0.0]),
        (dict(learning_rate=float("nan")), ["learning_rate", "nan"]),
        (dict(warmup_steps=10), ["warmup_steps", "steps", 10]),
        (dict(optimizer="sgd"), ["optimizer", "'adamw'", "'sgd'"]),
        (dict(b2=1.0), ["b2", 1.0]),
        (dict(final_fraction=2), ["final_fraction", 1.0, 2]),
        (dict(patience=2), ["patience", "validate_every"]),
        (dict(micro_batches=True), ["micro_batches", True]),
    ],
)
def test_train_config_out_of_range_is_rejected(change, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        TrainConfig(**(dict(steps=10, learning_rate=1e-3) | change))


# --- the loop -------------------------------------------------------------------------------------

SMALL = TrainConfig(steps=14, learning_rate=1e-2, average_decay=0.9, save_every=3, micro_batches=2,
               validate_every=5, steps_per_epoch=7, clip_norm=0.5)  # fmt: skip


def run(folder: Path, config: TrainConfig = SMALL, **more):
    return train(
        BigramTask(),
        None,
        make_batch,
        config,
        folder,
        validation_batches=[make_batch(1000)],
        **more,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the run folder and the last state of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder).state


def untimed_metrics(folder: Path) -> list[dict]:
    """Return the metrics records of a run without the fields that depend on the clock."""
    clock = ("tokens_per_second", "seconds", "time")
    lines = metrics.read(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def test_training_run_writes_checkpoints_and_metrics(whole):
    folder, last = whole
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoints", "loss.png", "metrics.jsonl"]
    assert checkpoints.saved_steps(folder / "checkpoints") == [12, 14]
    lines = metrics.read(folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 15))
    assert set(steps[0]) == {
        "step", "epoch", "loss", "accuracy", "lr", "grad_norm", "tokens", "tokens_per_second",
        "seconds", "time",
    }  # fmt: skip
    assert steps[6]["epoch"] == 1.0 and steps[0]["tokens"] == 4 * 21
    assert 0 <= steps[-1]["accuracy"] <= 1
    checks = [line for line in lines if "valid_loss" in line]
    assert [line["step"] for line in checks] == [5, 10, 14]
    assert set(checks[0]) == {"step", "valid_loss", "valid_accuracy", "time"}
    loss, weight, _ = BigramTask().loss(last.average, None, make_batch(1000), None)
    np.testing.assert_allclose(checks[-1]["valid_loss"], loss / weight, rtol=1e-5)


def test_rerun_of_finished_run_changes_nothing(whole):
    folder, last = whole
    before = (folder / "metrics.jsonl").read_bytes()
    outcome = run(folder)
    assert outcome.reason == "finished" and same(outcome.state, last)
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", [4, 9])
def test_run_stopped_by_a_signal_resumes_bit_identically(whole, tmp_path, number):
    def on_step(now: State, line: dict) -> None:
        if int(now.step) == number:
            signal.raise_signal(signal.SIGTERM)  # at once, unlike `os.kill`

    handler = signal.getsignal(signal.SIGTERM)
    outcome = run(tmp_path, on_step=on_step)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (outcome.reason, outcome.signal) == ("signal", signal.SIGTERM)
    assert checkpoints.saved_steps(tmp_path / "checkpoints")[-1] == number
    steps = []
    outcome = run(tmp_path, on_step=lambda now, line: steps.append(line["step"]))
    assert steps == list(range(number + 1, 15))
    assert same(outcome.state, whole[1])
    assert untimed_metrics(tmp_path) == untimed_metrics(whole[0])


def test_run_killed_at_random_resumes_bit_identically(whole, tmp_path):
    """The process is killed three times, with SIGKILL at a random time."""
    code = (
        "import sys, time; from pathlib import Path; from tests.training import test_core\n"
        "test_core.run(Path(sys.argv[1]), on_step=lambda now, line: time.sleep(0.05))"
    )
    rng, kills = np.random.default_rng(0), 0
    root = Path(__file__).parent.parent.parent
    while True:
        process = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=root)
        if kills < 3:
            lines = tmp_path / "metrics.jsonl"
            began = lines.stat().st_mtime_ns if lines.exists() else 0
            while process.poll() is None and (
                not lines.exists() or lines.stat().st_mtime_ns == began
            ):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            process.kill()
            kills += 1
        if process.wait() == 0:
            break
    assert kills == 3
    outcome = run(tmp_path)
    assert outcome.reason == "finished" and same(outcome.state, whole[1])
    assert untimed_metrics(tmp_path) == untimed_metrics(whole[0])
    assert checkpoints.saved_steps(tmp_path / "checkpoints") == [12, 14]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_patience_stops_a_run_without_improvement(tmp_path):
    config = TrainConfig(steps=50, learning_rate=1e-9, validate_every=2, patience=3, save_every=100)
    batch = make_batch(0)
    outcome = train(BigramTask(), None, make_batch, config, tmp_path, validation_batches=[batch])
    assert outcome.reason == "stopped early"
    assert int(outcome.state.step) < 50
    again = train(BigramTask(), None, make_batch, config, tmp_path, validation_batches=[batch])
    assert again.reason == "stopped early" and same(again.state, outcome.state)


def test_loss_of_nan_raises_and_keeps_earlier_checkpoints(tmp_path):
    class Broken:
        def init(self, key):
            return {"w": jnp.ones((2,))}

        def loss(self, weights, frozen, batch, key):
            scale = jnp.where(batch["x"][0] >= 2, jnp.nan, 1.0)
            return (weights["w"] ** 2).sum() * scale, jnp.float32(1), {}

    config = TrainConfig(steps=9, learning_rate=1e-3, save_every=1)
    with pytest.raises(FloatingPointError, match=naming("step 3", "loss", "nan")):
        train(Broken(), None, lambda n: {"x": np.full(1, n)}, config, tmp_path)
    assert checkpoints.saved_steps(tmp_path / "checkpoints") == [1, 2]
    assert [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2]


def test_loss_keys_differ_between_steps_and_micro_batches(tmp_path):
    """Random numbers in a loss differ between steps and micro-batches, and are equal in a rerun."""

    class Noise:
        def init(self, key):
            return {"w": jnp.zeros(())}

        def loss(self, weights, frozen, batch, key):
            n = jax.random.uniform(key)
            return weights["w"] * 0 + n, jnp.float32(1), {"squares": n * n}

    config = TrainConfig(steps=3, learning_rate=1e-3, micro_batches=2)
    lines = []
    for name in ("a", "b"):
        train(Noise(), None, lambda n: {"x": np.zeros(2)}, config, tmp_path / name)
        lines.append([x["loss"] for x in metrics.read(tmp_path / name / "metrics.jsonl")])
        for line in metrics.read(tmp_path / name / "metrics.jsonl"):
            assert line["squares"] - line["loss"] ** 2 > 1e-6  # the two micro-batches differ
    assert lines[0] == lines[1] and len(set(lines[0])) == 3


# --- checkpoints ----------------------------------------------------------------------------------


def test_checkpoint_is_safetensors_and_json(whole):
    from safetensors.numpy import load_file

    folder, last = whole
    path = folder / "checkpoints" / "step-000014"
    assert sorted(p.name for p in path.iterdir()) == ["checkpoint.json", "state.safetensors"]
    arrays = load_file(path / "state.safetensors")
    np.testing.assert_array_equal(arrays["weights.mix"], last.weights["mix"])
    assert arrays["average.embed"].dtype == np.float32
    assert {name.split(".")[0] for name in arrays} == {"step", "weights", "optimizer", "average"}
    assert json.loads((path / "checkpoint.json").read_text())["config"]["learning_rate"] == 1e-2


@pytest.fixture
def saved(tmp_path):
    """Return the folder of a checkpoint of an initial state, and the state."""
    now = state.init(BigramTask(), SMALL)
    checkpoints.save(tmp_path, now, SMALL, {"best": 1.5, "since": 2})
    return tmp_path, now


def test_checkpoint_load_returns_the_saved_state(saved):
    folder, now = saved
    found, progress = checkpoints.load(folder, now, SMALL)
    assert same(found, now) and progress == {"best": 1.5, "since": 2}
    assert jax.tree.structure(found) == jax.tree.structure(now)


def test_save_removes_old_checkpoints(saved):
    folder, now = saved
    for number in (3, 6, 9):
        checkpoints.save(folder, now.replace(step=jnp.int32(number)), SMALL, {})
    assert checkpoints.saved_steps(folder) == [6, 9]


def test_save_removes_incomplete_checkpoints(saved):
    folder, now = saved
    (folder / ".step-000003").mkdir()
    (folder / ".step-000003" / "state.safetensors").write_bytes(b"half")
    assert checkpoints.load(folder, now, SMALL)[0].step == 0
    checkpoints.save(folder, now.replace(step=jnp.int32(3)), SMALL, {})
    assert sorted(p.name for p in folder.iterdir()) == ["step-000000", "step-000003"]


def test_checkpoint_load_with_other_settings_raises(saved):
    folder, now = saved
    with pytest.raises(ValueError, match=naming("learning_rate", 0.01, 0.02)):
        checkpoints.load(folder, now, replace(SMALL, learning_rate=0.02))
    checkpoints.load(folder, now, replace(SMALL, save_every=7, keep=5))


@pytest.mark.parametrize(
    "change, facts",
    [
        (lambda a: a.pop("weights.embed"), ["'weights.embed'"]),
        (lambda a: a.update(more=np.ones(2)), ["'more'"]),
        (
            lambda a: a.update({"weights.embed": np.ones((64, 15), np.float32)}),
            ["'weights.embed'", "float32 (64, 16)", "float32 (64, 15)"],
        ),
        (
            lambda a: a.update({"step": np.array(1, np.float32)}),
            ["'step'", "int32 ()", "float32 ()"],
        ),
    ],
)
def test_checkpoint_load_with_wrong_tensor_raises_and_names_it(saved, change, facts):
    from safetensors.numpy import load_file, save_file

    folder, now = saved
    path = folder / "step-000000" / "state.safetensors"
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)
    with pytest.raises(ValueError, match=naming(path, *facts)):
        checkpoints.load(folder, now, SMALL)


@pytest.mark.parametrize(
    "name, content, facts",
    [
        ("state.safetensors", b"\x80\x04pickle", []),
        ("checkpoint.json", b"{", []),
        ("checkpoint.json", b'{"format": 1}', ["config", "format", "progress", "step"]),
    ],
)
def test_checkpoint_load_of_damaged_file_raises_and_names_it(saved, name, content, facts):
    folder, now = saved
    (folder / "step-000000" / name).write_bytes(content)
    with pytest.raises(ValueError, match=naming(name, *facts)):
        checkpoints.load(folder, now, SMALL)


def test_checkpoint_load_with_unknown_setting_raises_and_names_it(saved):
    folder, now = saved
    path = folder / "step-000000" / "checkpoint.json"
    rest = json.loads(path.read_text())
    rest["config"]["momentum"] = 0.9
    path.write_text(json.dumps(rest))
    with pytest.raises(ValueError, match=naming("'momentum'")):
        checkpoints.load(folder, now, SMALL)
