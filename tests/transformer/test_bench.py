"""The benchmarks: arithmetic, measurement of real functions, command line."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.naming import names, naming
from transformer import bench, encoder, kernels
from transformer.bench import BenchPlan, Case, Contender, Peaks, Result, decoder_cases, profile
from transformer.bench.measure import argument_sets
from transformer.config import Config
from transformer.kernels import exact
from transformer.weights import Linear

pytestmark = pytest.mark.heavy

PEAKS = Peaks(10e9, {"float32": 100e9, "bfloat16": 200e9, "int8": 400e9}, 1e-6)
TINY = decoder_cases.Sizes(
    Config.debug(max_seq_len=1024), 100, encoder.Config.debug(max_seq_len=256)
)
RESULT = Result(
    case="norm 1x8",
    form="chosen",
    dtype="float32",
    min=1e-6,
    median=2e-6,
    p80=3e-6,
    n=5,
    flops=32.0,
    bytes=96.0,
    gflops=0.016,
    gbs=0.048,
    roof=9.6e-9,
    bound="memory",
    percent=0.48,
    max_error=None,
    relative_error=None,
    compile=0.1,
)
ABOUT = {"processor": "one", "jax": "0", "roofs": {"gbs": 10.0, "gflops": {"float32": 100.0}}}


def make_case(**changes) -> Case:
    """Return a case of a matrix product with known cost."""
    fields = dict(
        name="product",
        function=jnp.matmul,
        inputs=lambda: (jnp.ones((4, 8)), jnp.ones((8, 16))),
        flops=2 * 4 * 8 * 16,
        expected=bench.in_float64(jnp.matmul),
    )
    return Case(**(fields | changes))


def test_roofline_seconds_is_maximum_of_memory_and_arithmetic():
    assert PEAKS.roofline_seconds(100e9, 1e9, "float32") == (1.0, "arithmetic")
    assert PEAKS.roofline_seconds(100e9, 20e9, "float32") == (2.0, "memory")
    assert PEAKS.roofline_seconds(100e9, 1e9, "int8") == (0.25, "arithmetic")


def test_result_fields_follow_from_samples():
    (result,) = bench.measure([Contender(case=make_case())], PEAKS, seconds=0)
    assert result.n == 5 and 0 < result.min <= result.median <= result.p80
    assert result.bytes == 4 * (4 * 8 + 8 * 16 + 4 * 16)  # each argument and the result, once
    assert result.gflops == pytest.approx(result.flops / result.median / 1e9)
    assert result.gbs == pytest.approx(result.bytes / result.median / 1e9)
    assert result.roof == pytest.approx(result.bytes / 10e9) and result.bound == "memory"
    assert result.percent == pytest.approx(100 * result.roof / result.median)
    assert result.max_error == 0 and result.ratio == 1 and result.compile > 0


def test_case_with_wrong_result_reports_error():
    wrong = make_case(function=lambda x, w: jnp.matmul(x, w) + 0.5)
    (result,) = bench.measure([Contender(case=wrong)], PEAKS, seconds=0)
    assert result.max_error == 0.5 and result.relative_error == 0.5 / 8
    cut = make_case(function=lambda x, w: jnp.matmul(x, w)[:2])
    with pytest.raises(ValueError, match=naming("(2, 16)", "(4, 16)")):
        bench.measure([Contender(case=cut)], PEAKS, seconds=0)


def test_reference_in_float32_is_rejected():
    narrow = bench.in_float64(lambda x: x.astype(jnp.float32))
    with pytest.raises(TypeError, match=naming("float64")):
        narrow(jnp.ones(3))


def test_slower_contender_has_speed_ratio_below_one():
    def slow(x, w):
        return jax.lax.fori_loop(0, 300, lambda _, y: jnp.tanh(y @ w.T @ w), jnp.matmul(x, w))

    slow_case = make_case(function=slow, expected=None)
    results = bench.measure(
        [Contender(case=make_case()), Contender(case=slow_case)], PEAKS, seconds=0.01
    )
    assert results[0].n == results[1].n
    assert results[0].ratio == 1 and results[1].ratio < 0.9


def test_argument_sets_copy_only_cold_arguments():
    case = make_case(cold_argnums=(1,), reuse_distance=5 * 8 * 16 * 4)
    arguments = argument_sets(case)
    assert len(arguments) == 5
    assert len({args[1].unsafe_buffer_pointer() for args in arguments}) == 5
    assert len({args[0].unsafe_buffer_pointer() for args in arguments}) == 1


def test_donated_arguments_are_replaced_by_results():
    case = make_case(
        function=lambda x, w: (x + 1, w),
        expected=lambda x, w: np.ones((4, 8)) + 1,
        select_output=lambda out: out[0],
        donate_argnums=(0,),
        next_inputs=lambda before, out: (out[0], before[1]),
    )
    (result,) = bench.measure([Contender(case=case)], PEAKS, seconds=0)
    assert result.max_error == 0


TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 5e-2, "int4": 0.3}


def test_results_of_program_cases_match_float64_in_every_dtype():
    """The sizes are tiny, and the times are not checked."""
    plan = BenchPlan(names=["prefill", "decode 1x1", "embed"], seconds=0)
    measured = []
    for (result,) in bench.run(
        plan, plan.select(decoder_cases.bench_cases(TINY)), PEAKS, say=measured.append
    ):
        measured.append(result.case.split()[0])
        assert result.relative_error < TOLERANCE[result.dtype], result.case
    assert measured == ["prefill"] * 4 + ["decode"] * 4 + ["embed"] * 2


@pytest.mark.slow
def test_every_implementation_of_every_case_matches_float64():
    plan, messages, measured = BenchPlan(all_impls=True, seconds=0), [], set()
    for group in bench.run(plan, decoder_cases.bench_cases(TINY), PEAKS, say=messages.append):
        for result in group:
            measured.add((result.case.partition(" ")[0], result.form))
            assert result.relative_error is not None
            assert result.relative_error < TOLERANCE[result.dtype], (result.case, result.form)
    for operation, impls in kernels.IMPLS.items():
        assert {(operation, form) for form in ("chosen", *impls)} <= measured
    assert {("prefill", "chosen"), ("decode", "chosen"), ("embed", "chosen")} <= measured
    assert any(names(line, "matmul pad_to_two_rows", 8) for line in messages)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_random_params_have_dtypes_of_loaded_model(name):
    """Bug: benchmarks had `out` and `down` in bfloat16, while loaded models have them in int8."""
    from tests.transformer.conftest import GOLDEN
    from transformer import checkpoint

    for dtype in decoder_cases.DTYPES:
        loaded, cfg, _ = checkpoint.load(GOLDEN / name, dtype=dtype)
        random = decoder_cases.random_params(cfg, dtype)
        dtypes = [jax.tree.map(lambda leaf: leaf.dtype, p.layers) for p in (loaded, random)]
        assert dtypes[0] == dtypes[1]
        head = loaded.embed if loaded.head is None else loaded.head
        read = [part.weight for layer in loaded.layers for part in _maps(layer)] + [head.weight]
        assert decoder_cases._model_bytes(cfg, dtype) == sum(weight.nbytes for weight in read)


def _maps(layer) -> list[Linear]:
    return [part for part in vars(layer).values() if isinstance(part, Linear)]


def test_float64_decoder_supports_every_variant():
    from tests.transformer.conftest import VARIANTS, randomize
    from transformer import decoder

    ids = np.random.default_rng(0).integers(0, 320, (2, 12)).astype(np.int32)
    for name, impls in VARIANTS.items():
        cfg = Config.debug(**impls)
        params = randomize(decoder.init(jax.random.key(0), cfg))
        logits = jax.jit(decoder.forward, static_argnums=1)(params, cfg, ids)[0][:, -1]
        np.testing.assert_allclose(logits, exact.decoder(params, cfg, ids), atol=1e-4, err_msg=name)


def test_results_file_round_trips_and_is_compared(tmp_path):
    path = tmp_path / "a.jsonl"
    bench.write(path, ABOUT, [RESULT])
    assert [list(json.loads(line))[0] for line in path.read_text().splitlines()] == [
        "machine",
        "case",
    ]
    about, results = bench.read(path)
    assert about == ABOUT and results == [RESULT]
    faster = dataclasses.replace(RESULT, median=1e-6, percent=0.96)
    other = dataclasses.replace(RESULT, case="rotate 1x8")
    head, line = bench.compare(results, [faster, other]).splitlines()
    assert head.split()[:5] == ["CASE", "IMPL", "OLD", "NEW", "SPEED"]
    assert line.split()[3:8] == ["2", "us", "1", "us", "x2.00"]
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=naming(tmp_path / "b.jsonl")):
        bench.read(tmp_path / "b.jsonl")


def test_format_table_has_row_per_result():
    contender = dataclasses.replace(RESULT, form="fused", ratio=0.5)
    head, first, second = bench.format_table([RESULT, contender], has_turns=True).splitlines()
    assert head.split()[0] == "CASE" and head.split()[-1] == "SPEED"
    assert first.split()[:10] == ["norm", "1x8", "chosen", "2", "us", "1", "us", "3", "us", "5"]
    assert second.split()[-1] == "x0.50"


def test_roofline_plot_is_png(tmp_path):
    pytest.importorskip("matplotlib")
    bench.roofline([RESULT], ABOUT, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_plan_selects_cases_and_contenders():
    cases = [
        make_case(name="matmul 1x2 float32", operation="matmul"),
        make_case(name="decode 1x1 float32"),
    ]
    assert BenchPlan(names=["dec"]).select(cases) == cases[1:]
    with pytest.raises(ValueError, match=naming("'add'", "matmul", "decode")):
        BenchPlan(names=["add"]).select(cases)
    with pytest.raises(ValueError, match=naming("norm", "'fused'", *kernels.IMPLS["norm"])):
        BenchPlan(overrides={"norm": "fused"})
    with pytest.raises(ValueError, match=naming("OPERATION=IMPL", "'norm'")):
        bench.parse_overrides(["norm"])
    impls = [contender.impl for contender in BenchPlan(all_impls=True).contenders(cases[0])]
    assert impls == ["chosen", *kernels.IMPLS["matmul"]]
    contenders = BenchPlan(overrides={"norm": "reference"}).contenders(cases[1])
    assert [contender.impl for contender in contenders] == ["chosen", "norm=reference"]


def test_context_longer_than_model_supports_is_rejected():
    with pytest.raises(ValueError, match=naming("context", 8191, 8192)):
        decoder_cases.Sizes.from_checkpoint(None, context=8192)


HLO = """
ENTRY %main (a: f32[2]) -> f32[2] {
  %w.1 = f32[8,8]{1,0} parameter(0), metadata={op_name="params.layers[3].gate.weight"}
  %x.2 = f32[8]{0} add(%a, %a), metadata={op_name="jit(f)/mlp/add"}
  %dot.3 = f32[8]{0} dot(%w.1, %x.2), lhs_contracting_dims={1}
  ROOT %y = f32[8]{0} fusion(%dot.3), metadata={op_name="jit(f)/attention/attend_cached/exp"}
}
"""


def test_instruction_without_op_name_has_origins_of_operands():
    names = profile.instruction_origins(HLO)
    assert names["dot.3"] == "params.layers[3].gate.weight jit(f)/mlp/add"
    assert profile._stage(names["dot.3"]) == "products gate, up, down"
    assert profile._stage(names["y"]) == "attention over the cache"
    assert profile._stage("jit(f)/add") == profile.OTHER


def test_self_time_of_loop_excludes_body():
    def event(name, at, duration):
        return {"ts": at, "dur": duration, "args": {"hlo_op": name}}

    events = [event("dot", 2, 3), event("while", 0, 10), event("add", 5, 1), event("out", 10, 4)]
    assert dict(profile._self_times(events)) == {"while": 6, "dot": 3, "add": 1, "out": 4}


def test_profile_stages_sum_to_step():
    result = profile.profile_decode(TINY, PEAKS, dtypes=("float32", "int8"), say=lambda line: None)
    for table in result:
        spent = {stage["stage"]: stage["seconds"] for stage in table["stages"]}
        must_read = {stage["stage"] for stage in table["stages"] if stage["bytes"] is not None}
        assert len(must_read) == 4 and must_read <= profile.STAGES.keys()
        assert sum(spent.values()) == pytest.approx(table["profiled"], rel=0.5)
    assert "attention over the cache" in profile.format_profile(result)


_traced = []


def recorded_norm(x, scale, bias, eps):
    _traced.append(x.shape)
    return kernels.norms.reference(x, scale, bias, eps)


def test_profile_with_override_traces_that_implementation():
    """Bug: `bench --profile --impl norm=...` profiled the default implementation."""
    overrides = {"norm": f"{__name__}.recorded_norm"}
    profile.profile_decode(
        TINY, PEAKS, dtypes=("float32",), overrides=overrides, say=lambda line: None
    )
    assert _traced


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "transformer.bench", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
    )


@pytest.mark.slow
def test_bench_command_saves_compares_and_prints_json(tmp_path):
    arguments = ("norm rms 1x", "--forms", "--seconds", "0", "--save", str(tmp_path / "a.jsonl"))
    first = run(*arguments)
    assert first.returncode == 0 and names(first.stdout, "norm", *kernels.IMPLS["norm"])
    again = run("norm rms 1x", "--seconds", "0", "--compare", str(tmp_path / "a.jsonl"))
    assert re.search(r"\bx\d+\.\d\d\b", again.stdout), "the speedup"
    as_json = run("rotate 1x", "--seconds", "0", "--json")
    machine, result = map(json.loads, as_json.stdout.splitlines())
    assert machine["machine"]["roofs"]["gbs"] > 0 and result["case"].startswith("rotate 1x")


def test_bench_command_with_invalid_argument_exits_with_2():
    for arguments, facts in (
        (["add"], ["'add'", "decode"]),
        (["--try", "norm=fused"], ["norm", "'fused'", "reference"]),
        (["--compare", "/nowhere.jsonl"], ["/nowhere.jsonl"]),
        (["--context", "0"], ["context", 1, 0]),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert names(done.stderr, *facts) and "Traceback" not in done.stderr
