"""The benchmarks from the outside: what they write, refuse and compute from a record. Nothing here judges a time."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flash_attn_ext.cli import _grids, _outcome, _peers, _record, _report, _timing, bench

ROOT = Path(__file__).resolve().parents[1]
# The record format, written out a second time on purpose: other programs read these names.
PROVENANCE = {"commit", "csrc_sha256", "gpu", "driver", "cuda", "torch", "cudnn", "command", "date", "gemm_tflops"}
ROW = {"case", "impl", "direction", "deterministic", "dtype", "head_dim", "causal", "batch", "heads", "heads_kv"}
ROW |= {"seqlen_q", "seqlen_k", "ms", "tflops", "clock_mhz", "power_w"}
QUICK = ["--rounds", "2", "--sample-ms", "1"]


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench")
    bench.add_arguments(parser)
    return parser.parse_args([str(option) for option in options])


def script(name: str) -> ModuleType:
    """Import one of the scripts in benchmarks/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def make_row(impl: str, tflops: float, **changes: Any) -> dict[str, Any]:
    row = {"case": "grid", "impl": impl, "direction": "fwd", "deterministic": False, "dtype": "bf16", "head_dim": 64}
    row |= {"causal": False, "batch": 4, "heads": 32, "heads_kv": 32, "seqlen_q": 4096, "seqlen_k": 4096}
    row |= {"ms": 100.0 / tflops, "tflops": tflops, "clock_mhz": 1500.0, "power_w": 700.0}
    return row | changes


def make_record(*rows: dict[str, Any], refused: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    provenance = dict.fromkeys(PROVENANCE, "x") | {"gemm_tflops": 700.0}
    return {"provenance": provenance, "rows": list(rows), "refused": list(refused)}


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run tiny shapes in both directions, one of which a peer refuses."""
    folder = tmp_path_factory.mktemp("bench")
    options = ["--shape", "1,2,32,16", "--shape", "1,4:2,16:48,16", "--dtype", "fp32,bf16", "--directions", "fwd,bwd"]
    assert bench.run(parse(*options, *QUICK, "--threads", "1", "--out", str(folder))) == 0
    return folder


def test_record_has_the_documented_fields(finished: Path) -> None:
    record = json.loads((finished / "bench_shapes_cpu.json").read_text(encoding="utf-8"))
    assert set(record["provenance"]) >= PROVENANCE
    assert _record.problems(record) == []
    assert record["rows"]
    for row in record["rows"]:
        assert set(row) >= ROW
        assert row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["cpu_ms"] > 0
        assert len(row["ms_rounds"]) == 2
        flops = 4.0 * row["batch"] * row["heads"] * row["seqlen_q"] * row["seqlen_k"] * row["head_dim"]
        flops *= (0.5 if row["causal"] else 1.0) * (2.5 if row["direction"] == "bwd" else 1.0)
        assert row["tflops"] == pytest.approx(flops / row["ms"] / 1e9)
    ours = [row for row in record["rows"] if row["impl"] == "flash_attn_ext"]
    assert Counter((row["direction"], row["dtype"]) for row in ours) == dict.fromkeys(
        [(d, t) for d in ("fwd", "bwd") for t in ("fp32", "bf16")], 4
    )
    about = record["provenance"]
    assert about["csrc_sha256"]
    assert about["cpu"]
    assert about["gemm_tflops"] > 0
    assert about["threads"] == 1
    assert about["command"] == (
        "python -m flash_attn_ext bench --shape 1,2,32,16 --shape 1,4:2,16:48,16 --device cpu --dtype fp32,bf16 "
        "--directions fwd,bwd --threads 1 --sample-ms 1 --rounds 2"
    )
    assert str(ROOT) not in json.dumps(record), "a record names no folder of the machine it came from"


def test_refusals_are_kept_with_their_reason(finished: Path) -> None:
    record = json.loads((finished / "bench_shapes_cpu.json").read_text(encoding="utf-8"))
    assert {(row["impl"], row["causal"], row["seqlen_k"]) for row in record["refused"]} == {("sdpa", True, 48)}
    assert all("top-left" in row["reason"] for row in record["refused"])
    assert "sdpa refused: is_causal of PyTorch is top-left" in (finished / "bench_shapes_cpu.md").read_text("utf-8")


def test_markdown_and_picture(finished: Path) -> None:
    lines = (finished / "bench_shapes_cpu.md").read_text(encoding="utf-8").splitlines()
    assert any("4*B*H*Sq*Sk*D" in line for line in lines)
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 16
    assert len({line.count("|") for line in table}) == 1
    assert sum("refused" in line for line in table) == 4
    pytest.importorskip("matplotlib")
    assert (finished / "bench_shapes_cpu.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_global_switches_are_put_back() -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    args = parse("--shape", "1,1,8,8", "--peers", "none", "--mask", "full", "--deterministic", "--threads", "1", *QUICK)
    assert bench.run(args) == 0
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", "nowhere"], "invalid choice: 'nowhere'"),
        (["--shape", "1,8,64"], "has 3 part(s): write B,H,S,D"),
        (["--shape", "1,8,x,64"], "is not made of integers"),
        (["--shape", "1,8,0,64"], "positive integers"),
        (["--shape", "1,8:3,64,64"], "3 key/value heads do not divide 8"),
        (["--shape", "1:2,8,64,64"], "Hq:Hk and Sq:Sk"),
        (["--shape", "1,8,64:64:64,64"], "Hq:Hk and Sq:Sk"),
        (["--grid", "cpu", "--dtype", "fp8"], "choose from fp16, bf16, fp32, fp64"),
        (["--grid", "cpu", "--directions", "sideways"], "choose from fwd, bwd"),
        (["--grid", "cpu", "--peers", "xformers"], "choose from none, deterministic, v1, sdpa"),
        (["--grid", "cpu", "--rounds", "0"], "is not a positive integer"),
    ],
)
def test_options_that_do_not_parse(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say what to time: --grid (cpu, cpu-quick"),
        (["--grid", "cpu", "--shape", "1,1,8,8"], "--grid and --shape exclude each other"),
        (
            ["--grid", "cpu", "--peers", "cudnn"],
            "--peers cudnn: does not run on cpu; there are deterministic, v1, sdpa, naive",
        ),
        (["--grid", "cpu", "--threshold", "-1"], "--threshold -1 is not positive"),
        (["--grid", "cpu", "--compare", "missing.json"], "missing.json cannot be read"),
    ],
)
def test_options_that_do_not_fit(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run(parse(*options)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run(parse("--grid", "h100", "--device", "cuda")) == 2
    assert "PyTorch sees no CUDA device" in capsys.readouterr().err


# ---- grids, peers ----------------------------------------------------------------------------------------------------


def test_h100_grid_is_16k_tokens_of_hidden_2048() -> None:
    cells = _grids.grid_cells(_grids.GRIDS["h100"], "cuda", None, None)
    assert len(cells) * len(_grids.GRIDS["h100"].directions) == 72
    assert all(c.batch * c.seqlen_q == 16384 and c.heads * c.head_dim == 2048 and c.dtype == "bf16" for c in cells)


def test_every_grid_names_known_peers_and_has_cells() -> None:
    for grid in _grids.GRIDS.values():
        for device in ("cpu", "cuda"):
            assert _grids.grid_cells(grid, device, None, None)
            assert set(grid.dtypes[device]) <= set(_grids.DTYPES)
            for name in (grid.peers or {}).get(device, ()):
                assert device in _peers.IMPLEMENTATIONS[name].devices


@pytest.mark.parametrize("causal", [False, True])
def test_flops_of_a_window_count_the_keys_that_rows_see(causal: bool) -> None:
    cell = _grids.Cell(2, 3, 3, 40, 60, 8, causal, "fp32", window=16)
    rows, keys = torch.arange(40)[:, None] + 20, torch.arange(60)
    visible = (keys >= rows - 16) & ((keys <= rows) | (not causal))
    assert cell.flops("fwd") == 4 * 2 * 3 * 8 * visible.sum().item()
    assert cell.label == f"B2 H3 S40:60 D8 {'causal' if causal else 'full'} window 16"


def test_windows_are_timed_and_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Peers that have none say so; naive agrees with ours."""
    small = replace(
        _grids.GRIDS["beyond"].problems[5], batch=1, heads=1, heads_kv=1, seqlen_q=64, seqlen_k=64, window=9
    )
    monkeypatch.setitem(_grids.GRIDS, "beyond", replace(_grids.GRIDS["beyond"], problems=(small,)))
    file = tmp_path / "record.json"
    options = "--grid beyond --dtype fp32 --peers sdpa,naive,v1 --rounds 1 --sample-ms 1 --directions fwd --json"
    assert bench.run(parse(*options.split(), file)) == 0
    record = _record.load(file)
    assert {row["impl"]: row["window"] for row in record["rows"]} == {_peers.OURS: 9, "naive": 9}
    reasons = {row["impl"]: row["reason"] for row in record["refused"]}
    assert "PyTorch has no window" in reasons["sdpa"] and "version 1 has no window" in reasons["v1"]
    assert "causal window 9" in _record.describe(record["rows"][0])


def test_naive_is_refused_where_it_would_not_fit() -> None:
    cell = _grids.Cell(64, 64, 64, 2**17, 2**17, 64, False, "fp32")
    inputs = _peers.Inputs(*(torch.empty(0) for _ in range(4)))
    with pytest.raises(_peers.Refused, match="GiB for S x S matrices"):
        _peers.prepare("naive", cell, "fwd", inputs, False)


def test_a_wrong_result_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = _peers.Implementation("wrong", ("cpu",), lambda cell, deterministic: lambda q, k, v: v + 1)
    monkeypatch.setitem(_peers.IMPLEMENTATIONS, "sdpa", wrong)
    args = parse("--shape", "1,1,8,8", "--peers", "sdpa", "--mask", "full", *QUICK)
    assert bench.run(args) == 1
    assert "WRONG: B1 H1 S8 D8 full fp32 fwd: sdpa differs" in capsys.readouterr().out


# ---- timing ----------------------------------------------------------------------------------------------------------


def test_order_rotates_and_gives_everyone_every_place() -> None:
    assert [_timing.order(["a", "b"], r) for r in range(4)] == [["a", "b"], ["b", "a"], ["b", "a"], ["a", "b"]]
    for names in (["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]):
        rounds = [_timing.order(names, r) for r in range(2 * len(names))]
        for place in range(len(names)):
            assert Counter(order[place] for order in rounds) == dict.fromkeys(names, 2)
    assert _timing.order([], 3) == []


class CountingTimer:
    """Reports 1, 2, 3, ... milliseconds, and remembers who was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def calls_for(self, call: Any) -> int:
        return 3

    def sample(self, call: Any, calls: int) -> _timing.Sample:
        self.asked.append(call())
        return _timing.Sample(float(len(self.asked)), power_w=2.0 * len(self.asked))


def test_measure_interleaves_and_takes_medians() -> None:
    timer = CountingTimer()
    found = _timing.measure({"a": lambda: "a", "b": lambda: "b"}, timer, 4)
    assert timer.asked == ["a", "b", "b", "a", "b", "a", "a", "b"]
    a = found["a"]
    assert [s.ms for s in a.samples] == [1.0, 4.0, 6.0, 7.0]
    assert (a.ms, a.low, a.high, a.iqr, a.calls) == (5.0, 1.0, 7.0, 3.0, 3)
    assert a.median_of("power_w") == 10.0
    assert a.median_of("clock_mhz") is None


def test_a_slow_first_call_does_not_set_the_length_of_a_sample() -> None:
    slow = iter([0.1])  # what has to be imported or compiled
    assert _timing.CpuTimer(0.01).calls_for(lambda: time.sleep(next(slow, 0.0))) > 10


def test_measure_keeps_the_reason_of_a_refusal() -> None:
    def refuse() -> str:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    found = _timing.measure({"a": refuse, "b": lambda: "b"}, CountingTimer(), 3)
    assert found["a"].error == "out of memory"
    assert found["a"].samples == []
    assert len(found["b"].samples) == 3


def test_cpu_timer_measures_a_call() -> None:
    x = torch.randn(64, 64)
    sample = _timing.CpuTimer(0.002).sample(lambda: x @ x, 10)
    assert 0 < sample.ms < 1000
    assert sample.cpu_ms is not None


def test_ratio_is_our_speed_over_theirs() -> None:
    cell = _grids.Cell(1, 1, 1, 8, 8, 8, True, "fp32")
    ours, theirs = (_timing.Measurement([_timing.Sample(ms, cpu_ms=2 * ms)]) for ms in (2.0, 3.0))
    out = _timing.Measurement(error="out of memory")
    outcome = _outcome.Outcome(cell, "bwd", False, {_peers.OURS: ours, "sdpa": theirs, "naive": out})
    assert outcome.ratio("sdpa") == pytest.approx(1.5)
    assert outcome.cpu_ratio("sdpa") == pytest.approx(1.5)
    assert outcome.ratio("naive") is None
    assert [row["impl"] for row in outcome.rows()] == [_peers.OURS, "sdpa"]
    assert next(outcome.rows())["tflops"] == pytest.approx(4 * 8 * 8 * 8 * 0.5 * 2.5 / 2e-3 / 1e12)
    assert [row["reason"] for row in outcome.refused()] == ["out of memory"]


# ---- records ---------------------------------------------------------------------------------------------------------


def test_problems_of_a_record_are_named() -> None:
    assert _record.problems([]) == ["it is not an object with a list `rows`"]
    broken = make_record(make_row("cudnn", 500.0, ms="fast"))
    del broken["provenance"]["commit"], broken["rows"][0]["head_dim"]
    assert _record.problems(broken) == [
        "provenance lacks commit",
        "rows[0] lacks head_dim",
        "rows[0].ms is 'fast'",
    ]


def test_record_survives_the_file(tmp_path: Path) -> None:
    record = make_record(make_row(_peers.OURS, 450.0), make_row("cudnn", 500.0))
    _record.save(record, tmp_path / "a" / "record.json")
    assert _record.load(tmp_path / "a" / "record.json") == record
    (tmp_path / "b.json").write_text("{", encoding="utf-8")
    with pytest.raises(_record.RecordError, match="is not JSON"):
        _record.load(tmp_path / "b.json")


def test_hash_of_the_tree_is_the_one_of_the_build(tmp_path: Path) -> None:
    """The algorithm, not the sources: those may have changed since the build."""
    (tmp_path / "csrc" / "core").mkdir(parents=True)
    (tmp_path / "csrc" / "a.cpp").write_bytes(b"int a;\n")
    before = _record.csrc_sha256(tmp_path)
    (tmp_path / "csrc" / "core" / "b.h").write_bytes(b"int b;\n")
    assert _record.csrc_sha256(tmp_path) != before
    source = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert 'digest.update(str(path.relative_to(ROOT)).encode() + b"\\0" + path.read_bytes())' in source


def test_slower_than_an_older_record() -> None:
    """Then 400 of cuDNN's 500; now 400 of 520, then twice as fast: relative to cuDNN 0.96 and 2."""
    old = make_record(make_row(_peers.OURS, 400.0), make_row("cudnn", 500.0), make_row(_peers.OURS, 100.0, causal=True))
    new = make_record(make_row(_peers.OURS, 400.0), make_row("cudnn", 520.0), make_row(_peers.OURS, 200.0, causal=True))
    table, slower = bench.compare_records(new, old, 0.95)
    assert [row[3:] for row in table.rows] == [["cudnn", "0.96x", ""], ["time", "2.00x", ""]]
    assert slower == 0
    table, slower = bench.compare_records(new, old, 0.97)
    assert [row[5] for row in table.rows] == ["SLOWER", ""]
    assert slower == 1


def test_compare_with_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """cuDNN at 500 and 400: the bars are 1.2 * 500 = 600 and, cuDNN being the fastest, 400."""
    compare = script("compare")
    ours_refused = {k: v for k, v in make_row(_peers.OURS, 1.0, head_dim=256, heads=8, heads_kv=8).items() if k in ROW}
    for name in ("ms", "tflops", "clock_mhz", "power_w"):
        del ours_refused[name]
    record = make_record(
        make_row(_peers.OURS, 540.0),
        make_row("cudnn", 500.0),
        make_row("fa2", 300.0),
        make_row(_peers.OURS, 420.0, causal=True),
        make_row("cudnn", 400.0, causal=True),
        make_row("cudnn", 450.0, head_dim=256, heads=8, heads_kv=8),
        refused=(ours_refused | {"reason": "no kernel"},),
    )
    target = {"head_dim": 64, "direction": "fwd", "seqlen": 4096, "batch": 4, "heads": 32, "dtype": "bf16"}
    targets = [
        target | {"causal": False, "fastest": "fa3", "fastest_over_cudnn": 1.2},
        target | {"causal": True, "fastest": "cudnn", "fastest_over_cudnn": 1.0},
        target | {"causal": True, "seqlen": 512, "batch": 32, "fastest": "cudnn", "fastest_over_cudnn": 1.0},
    ]
    verdicts, unmeasured = compare.judge(record, targets)
    assert [(v.over_reference, v.over_bar, v.holder) for v in verdicts] == [
        (pytest.approx(1.08), pytest.approx(0.9), "fa3"),
        (pytest.approx(1.05), pytest.approx(1.05), "cudnn"),
        (None, None, "cudnn"),
    ]
    assert unmeasured == 1
    assert compare.counts(verdicts, unmeasured) == [
        "2 of 3 cells at least as fast as cuDNN or SDPA of this run, least 1.050x; 1 refused by us",
        "1 of 3 cells at least as fast as the fastest peer, least 0.900x; 1 refused by us",
        "1 targets are not in the record",
    ]

    files = tmp_path / "record.json", tmp_path / "targets.json"
    _record.save(record, files[0])
    files[1].write_text(json.dumps({"rows": targets}), encoding="utf-8")
    assert compare.main([*map(str, files), "--markdown"]) == 0
    assert "| 540.0 | 500.0 | 1.08x | 600.0 | fa3 | 0.90x | below |" in capsys.readouterr().out
    assert compare.main([*map(str, files), "--strict"]) == 1
    assert compare.main([str(files[0]), str(files[0])]) == 2
    assert "has no row with" in capsys.readouterr().err


def test_table_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    table = _report.Table("title", ["name", "n"], notes=["a note"])
    table.add("a [b]", "1")
    table.print()
    assert "a [b]" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    table.print()
    assert capsys.readouterr().out == "title\nname   n\na [b]  1\n  a note\n\n"
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        table.add("alone")


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0, "0"), (1234.5, "1234"), (12.345, "12.3"), (0.0012345, "0.00123")]
)
def test_numbers(value: float | None, text: str) -> None:
    assert _report.number(value) == text


# ---- the scripts -----------------------------------------------------------------------------------------------------


def test_origin_tables_agree_and_measure_memory(tmp_path: Path) -> None:
    file = tmp_path / "origin.json"
    assert script("origin_tables").main(["--only", "agreement", "--only", "memory", "--json", str(file)]) == 0
    results = json.loads(file.read_text(encoding="utf-8"))
    assert [row["impl"] for row in results["agreement"]] == ["v1", "v2"] * 3
    assert all(row["allclose"] and row["max_abs_difference"] < 1e-5 for row in results["agreement"])
    naive = [row for row in results["memory"] if row["impl"] == "naive"]
    for row in naive:
        batch, length, head_dim = row["shape"]
        assert row["output_bytes"] == 4 * batch * length * head_dim
        assert row["peak_bytes"] >= 2 * 4 * batch * length**2, "two S x S matrices, at least"
    assert set(results["provenance"]) >= PROVENANCE


def test_origin_tables_fail_where_versions_disagree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = script("origin_tables")
    monkeypatch.setitem(tables.IMPLEMENTATIONS, "v1", lambda q, k, v: v)
    assert tables.main(["--only", "agreement"]) == 1
    assert "does not agree with naive_attention" in capsys.readouterr().err


def test_block_size_table_has_every_pair() -> None:
    tables = script("origin_tables")
    table, rows = tables.block_size_table(torch.device("cpu"), (1, 64, 16), 1)
    assert len(table.rows) == 8
    assert len(rows) == 2 * 17
    assert all(row["ms"] is not None for row in rows), [row["reason"] for row in rows if row["reason"]]


def test_call_cost_times_every_layer(tmp_path: Path) -> None:
    cost, threads = script("call_cost"), torch.get_num_threads()
    try:
        assert cost.main(["--rounds", "1", "--sample-ms", "0.5", "--json", str(tmp_path / "cost.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "cost.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) >= 12
    assert all(row["us"] is not None and row["us"] > 0 for row in rows), rows


def test_train_step_times_every_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps, file = script("train_step"), tmp_path / "steps.json"
    small = "--layers 1 --width 32 --vocabulary 11 --tokens 32 --seq-lens 16,32 --head-dims 16 --rounds 1 --json"
    assert steps.main([*small.split(), str(file)]) == 0
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert {(row["seq_len"], row["batch"], row["impl"]) for row in rows} >= {(16, 2, _peers.OURS), (32, 1, "sdpa")}
    assert all(row["ms"] > 0 and row["parameters"] == 2 * 11 * 32 + 12 * 32**2 + 3 * 32 for row in rows)
    with pytest.raises(SystemExit):
        steps.main(["--width", "32", "--head-dims", "24"])
    assert "an even divisor of the width" in capsys.readouterr().err


def test_the_traffic_formula_and_the_profile_are_read() -> None:
    traffic = script("v1_traffic")
    problem = traffic.Problem(2, 3, 128, 64)
    read, write = problem.formula(32, groups=2)
    matrix, row = 4 * 128 * 64, 4 * 128  # bytes of a head's Q, K, V or O, and of its m or l
    assert read == 6 * (4 * (2 * matrix + 2 * row) + 2 * 2 * matrix + 2 * row)
    assert write == 6 * (5 * (matrix + 2 * row) + row)
    assert traffic.Problem(2, 3, 128, 64, "bf16").formula(32, 2)[1] == write + 6 * matrix // 2
    head = ",".join(f'"{name}"' for name in ("ID", *traffic.METRICS.values()))
    printed = f'==PROF== text\n{head}\n"",{",".join(["sector"] * 5)}\n"0","1,000","20","3.0","4","132"\n'
    counted = {"l2_read": 32000, "l2_write": 640, "dram_read": 3, "dram_write": 4, "grid": 132}
    assert traffic.read_profile(printed) == [counted]
    table, rows = traffic.report(problem, [(64, 32)], [counted], {(64, 32): 1.5})
    assert len(table.rows) == len(rows) == 1 and rows[0]["groups"] == 22
    with pytest.raises(RuntimeError, match="ncu printed no table"):
        traffic.read_profile("==ERROR== no counters")
    assert traffic.parse_blocks("64x128,32x32") == [(64, 128), (32, 32)]


def test_bad_arguments_of_the_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    tables, cost = script("origin_tables"), script("call_cost")
    for main, options, message in (
        (tables.main, ["--block-shape", "4,64"], "write B,S,D"),
        (tables.main, ["--rounds", "0"], "at least 1"),
        (cost.main, ["--shape", "1,1,8"], "write B,H,S,D"),
        (cost.main, ["--rounds", "0"], "have to be positive"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(options)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_importing_the_package_loads_no_table_or_plotting_library() -> None:
    code = "import flash_attn_ext, sys; print([m for m in ('rich', 'matplotlib') if m in sys.modules])"
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.stdout.strip() == "[]", done.stderr
