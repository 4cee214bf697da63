"""Which CUDA kernel a call gets, on GPUs that need not be here: the search of cuda/registry.cpp by _C.plan_cuda."""

from __future__ import annotations

from typing import Any

import pytest

import flash_attn_ext
from flash_attn_ext._binary import _C

if not flash_attn_ext.build_info()["cuda"]:
    pytest.skip("flash_attn_ext is built without CUDA", allow_module_level=True)

# compute capability, SMs, shared memory that one block may ask for
GPUS = {
    "A100": (80, 108, 166912),
    "RTX 3090": (86, 82, 101376),
    "RTX 4090": (89, 128, 101376),
    "H100": (90, 132, 232448),
    "RTX 5090": (120, 170, 101376),
}
ROWS = [row for row in flash_attn_ext.supported_kernels() if row["device"] == "cuda"]
IDS = [f"{row['arch']}-{row['pass']}_v{row['version']}-{row['dtype']}" for row in ROWS]
HEAD_DIMS = (1, 8, 31, 32, 33, 64, 65, 80, 96, 97, 128, 129, 160, 192, 193, 224, 256)
LONG = {"batch": 4, "heads": 16, "heads_kv": 4, "seqlen_q": 4096, "seqlen_k": 4096}

every_row = pytest.mark.parametrize("row", ROWS, ids=IDS)
every_gpu = pytest.mark.parametrize("gpu", GPUS)


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASH_ATTN_EXT_KERNEL", raising=False)


def plan(row: dict[str, Any], gpu: str | tuple[int, int, int], head_dim: int = 64, **call: Any) -> dict[str, Any]:
    capability, sms, shared_bytes = GPUS[gpu] if isinstance(gpu, str) else gpu
    call = {
        "head_dim_v": head_dim,
        "block_m": 0,
        "block_n": 0,
        "deterministic": False,
        "fp32_exact": True,
        # Else Hopper's own kernels would be taken on its GPUs.
        "no_bulk_copy": "the test asks for sm80" if row.get("arch") == "sm80" else None,
        **LONG,
        **call,
    }
    device = {"compute_capability": capability, "sm_count": sms, "shared_bytes": shared_bytes}
    return _C.plan_cuda(
        pass_=row["pass"], version=row["version"], dtype=row["dtype"], head_dim=head_dim, **call, **device
    )


def runs_on(row: dict[str, Any], gpu: str) -> bool:
    """sm80 rows run everywhere from there on, sm90 rows on compute capability 9.x alone."""
    return row["arch"] == "sm80" or GPUS[gpu][0] // 10 == 9


def fitting(row: dict[str, Any], gpu: str, head_dim: int) -> list[dict[str, Any]]:
    """The tiles of a row that can serve, in the order of preference."""
    able = [t for t in row["tiles"] if t["head_dim_max"] >= head_dim and t["shared_bytes"] <= GPUS[gpu][2]]
    return sorted(able, key=lambda t: t["head_dim_max"])  # stable: the table's order within a head dimension


def unasked(tile: dict[str, Any], gpu: str) -> bool:
    """Whether a tile that can serve may be taken without being named."""
    return tile["shared_bytes_unasked"] <= GPUS[gpu][2]


def is_known_gap(row: dict[str, Any], gpu: str, head_dim: int) -> bool:
    """The fp32 backward at D > 128 keeps K, V, Q, dO and the scores on chip, and 99 KB do not hold them."""
    return (row["pass"], row["dtype"]) == ("bwd", "float32") and head_dim > 128 and GPUS[gpu][2] <= 101376


def test_the_table_has_every_pass_and_dtype() -> None:
    have = {(row["arch"], row["pass"], row["version"], row["dtype"]) for row in ROWS}
    dtypes = ("float16", "bfloat16", "float32")
    everywhere = {
        ("sm80", p, version, dtype) for p, version in (("fwd", 1), ("fwd", 2), ("bwd", 2)) for dtype in dtypes
    }
    assert have == everywhere | {("sm90", p, 2, dtype) for p in ("fwd", "bwd") for dtype in dtypes[:2]}
    assert all(row["head_dim_max"] == 256 for row in ROWS)


def test_names_are_unique_within_a_dtype() -> None:
    names = [(t["name"], row["dtype"]) for row in ROWS for t in row["tiles"]]
    assert len(names) == len(set(names))


@every_row
def test_tiles_of_one_head_dimension_differ(row: dict[str, Any]) -> None:
    """Else block_size could not name them, and the later one would never run."""
    for head_dim in {t["head_dim_max"] for t in row["tiles"]}:
        same = [(*t["tile"], t["shared_bytes"]) for t in row["tiles"] if t["head_dim_max"] == head_dim]
        assert len(same) == len(set(same)), (head_dim, same)


@every_gpu
@every_row
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dimension_has_a_kernel_on_every_gpu(head_dim: int, row: dict[str, Any], gpu: str) -> None:
    """The first of the table that fits, of the smallest padded head dimension; D and Dv count alike."""
    if not runs_on(row, gpu):
        assert plan(row, gpu, head_dim)["arch"] == "sm80"
        return
    tiles = [t for t in fitting(row, gpu, head_dim) if not t["for_short_problems"] and unasked(t, gpu)]
    if is_known_gap(row, gpu, head_dim):
        assert not tiles  # else the gap is closed: strike it from the list and from the documentation
        assert "bytes of shared memory" in plan(row, gpu, head_dim)["why_not"]
        return
    expected = tiles[0]
    for dims in ((head_dim, head_dim), (head_dim, 1), (1, head_dim)):
        told = plan(row, gpu, dims[0], head_dim_v=dims[1])
        assert told.get("kernel") == expected["name"], told
        assert told["shared_bytes"] == expected["shared_bytes"] <= GPUS[gpu][2]
        assert list(told["tile"]) == expected["tile"] and told["arch"] == row["arch"]
        assert told["workspace_bytes"] >= 0


@every_row
def test_operands(row: dict[str, Any]) -> None:
    exact, quick = (plan(row, "H100", fp32_exact=exact)["operand"] for exact in (True, False))
    assert exact == row["operand"] == {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}[row["dtype"]]
    assert quick == ("tf32" if row["dtype"] == "float32" else exact)


@every_gpu
@every_row
def test_short_problems(row: dict[str, Any], gpu: str) -> None:
    """A smaller tile where the rows of one batch entry, over its heads, leave most SMs without one; of any batch."""
    if row["arch"] == "sm90":
        pytest.skip("see test_short_problems_on_hopper")
    for head_dim in sorted({t["head_dim_max"] for t in row["tiles"]}):
        tiles = [t for t in fitting(row, gpu, head_dim) if t["head_dim_max"] == head_dim]
        expected = next((t for t in tiles if not t["for_short_problems"] and unasked(t, gpu)), None)
        if expected is None:
            continue
        for seqlen, heads in ((1, 1), (300, 2), (600, 16), (4096, 1), (4096, 64)):
            best = expected
            for t in tiles:
                few = 4 * -(-seqlen // best["tile"][0]) * heads < GPUS[gpu][1]
                if few and t["for_short_problems"] and t["tile"][0] < best["tile"][0]:
                    best = t
            call = {"seqlen_q": seqlen, "heads": heads, "heads_kv": 1}
            assert {plan(row, gpu, head_dim, **call, batch=b)["kernel"] for b in (1, 2, 1000)} == {best["name"]}


def test_short_problems_on_hopper() -> None:
    """Few rows of few heads are left to sm80's small tiles and its splits; from 65 rows on a Hopper tile is better."""
    row = next(row for row in ROWS if (row["arch"], row["pass"], row["dtype"]) == ("sm90", "fwd", "bfloat16"))
    kernels = {
        (seqlen, heads): plan(row, "H100", 128, seqlen_q=seqlen, heads=heads, heads_kv=1)["kernel"]
        for seqlen, heads in ((1, 1), (1, 32), (64, 8), (65, 1), (4096, 1), (64, 64))
    }
    assert {kernels[1, 1], kernels[1, 32], kernels[64, 8]} == {"sm80_fwd_d128_m16"}
    assert {kernels[65, 1], kernels[4096, 1], kernels[64, 64]} == {"sm90_fwd_d128"}


def test_one_row_of_grouped_heads_is_planned_as_rows_of_one() -> None:
    """Kernel, tile and workspace are those of the group's heads as rows, over the keys in sight."""
    heads_apart = {"batch": 2, "seqlen_q": 1, "heads": 32, "heads_kv": 8}
    for row in (row for row in ROWS if (row["pass"], row["version"]) == ("fwd", 2)):
        for left, right, keys in ((-1, -1, 20_000), (4999, 0, 5000)):
            apart = plan(row, "H100", 64, **heads_apart, seqlen_k=20_000, window_left=left, window_right=right)
            assert apart == plan(row, "H100", 64, batch=2, seqlen_q=4, heads=8, heads_kv=8, seqlen_k=keys)
            assert apart["workspace_bytes"] > 0


def test_hopper_kernels_are_for_hopper_alone() -> None:
    """Code for compute capability 9.0a runs on 9.x alone; the smallest padded head dimension counts there."""
    for row in ROWS:
        if row["arch"] != "sm90":
            continue
        for capability in (80, 86, 89, 100, 103, 120):
            assert plan(row, (capability, 132, 232448))["arch"] == "sm80"
        assert plan(row, (90, 132, 232448))["arch"] == "sm90"
        for head_dim, kernel in ((8, "d64"), (72, "d80"), (88, "d96"), (104, "d112"), (120, "d128"), (136, "d192")):
            assert plan(row, "H100", head_dim)["kernel"] == f"sm90_{row['pass']}_{kernel}"


def test_what_the_copy_engine_cannot_do_is_left_to_sm80() -> None:
    row = next(row for row in ROWS if (row["arch"], row["pass"], row["dtype"]) == ("sm90", "fwd", "bfloat16"))
    good = (1024, [2, 4, 100, 64], [25600, 6400, 64, 1])
    for tensor, scale, why in (
        (good, None, None),
        (good, 0.3, None),
        ((1024, [2, 4, 100, 64], [0, 0, 64, 1]), None, None),  # expanded
        ((1024, [1, 4, 100, 64], [7, 6400, 64, 1]), None, None),  # the stride of one entry does not count
        ((1026, [2, 4, 100, 64], [25600, 6400, 64, 1]), None, "a tensor does not start on a multiple of 16 bytes"),
        ((1024, [2, 4, 100, 64], [25600, 6400, 68, 1]), None, "a stride is not a multiple of 16 bytes"),
        ((1026, [2, 4, 100, 64], [25600, 6400, 1, 100]), None, None),  # copied before
        ((1024, [2, 4, 100, 60], [24000, 6000, 60, 1]), None, "a head dimension is not a multiple of 8"),
        (good, 0.0, "the scale is not positive"),
        (good, -0.3, "the scale is not positive"),
    ):
        assert _C.bulk_copy_obstacle([good, tensor], scale) == why
        told = plan(row, "H100", 64, no_bulk_copy=why)
        assert told["arch"] == ("sm90" if why is None else "sm80")
        assert told.get("passed_over") == (None if why is None else f"sm90_fwd_d64: {why}")


def test_some_row_is_for_short_problems() -> None:
    """Else the test above says nothing."""
    assert any(t["for_short_problems"] for row in ROWS for t in row["tiles"])


def test_a_tile_that_would_be_alone_on_its_sm(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is passed over on a GPU that holds one such block, and can be named there all the same."""
    row = next(row for row in ROWS if any(t["shared_bytes_unasked"] for t in row["tiles"]))
    tile = next(t for t in row["tiles"] if t["shared_bytes_unasked"])
    assert tile["shared_bytes"] <= GPUS["RTX 4090"][2] < tile["shared_bytes_unasked"] <= GPUS["A100"][2]
    kernels = {gpu: plan(row, gpu, tile["head_dim_max"])["kernel"] for gpu in GPUS}
    assert {gpu for gpu, kernel in kernels.items() if kernel == tile["name"]} == {"A100", "H100"}
    named = {"block_m": tile["tile"][0], "block_n": tile["tile"][1]}
    assert plan(row, "RTX 4090", tile["head_dim_max"], **named)["kernel"] == tile["name"]
    monkeypatch.setenv("FLASH_ATTN_EXT_KERNEL", tile["name"])
    assert plan(row, "RTX 4090", tile["head_dim_max"])["kernel"] == tile["name"]


# ---- what the caller asks for ----------------------------------------------------------------------------------------


@every_row
def test_a_tile_that_is_asked_for(row: dict[str, Any]) -> None:
    for tile in row["tiles"]:
        told = plan(row, "H100", tile["head_dim_max"], block_m=tile["tile"][0], block_n=tile["tile"][1])
        assert list(told["tile"]) == tile["tile"]


@every_row
def test_a_tile_that_is_not_built(row: dict[str, Any]) -> None:
    told = plan(row, "H100", 64, block_m=48, block_n=7)
    assert told["why_not"].startswith("block_size (48, 7) is not built for ")
    for tile in fitting(row, "H100", 64):
        assert str(tuple(tile["tile"])) in told["why_not"]


@every_row
def test_a_forced_kernel(row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for tile in row["tiles"]:
        monkeypatch.setenv("FLASH_ATTN_EXT_KERNEL", tile["name"])
        for head_dim in (1, tile["head_dim_max"]):
            assert plan(row, "H100", head_dim)["kernel"] == tile["name"]
            if row["arch"] == "sm90":
                assert f"{tile['name']}: needs compute capability 9.x" in plan(row, "A100", head_dim)["why_not"]
                told = plan(row, "H100", head_dim, no_bulk_copy="of a test")
                assert f"{tile['name']}: of a test" in told["why_not"]
            elif tile["shared_bytes"] > GPUS["A100"][2]:
                assert f"{tile['name']}: needs {tile['shared_bytes']} bytes" in plan(row, "A100", head_dim)["why_not"]
    largest = max(row["tiles"], key=lambda t: t["head_dim_max"])
    least = min(row["tiles"], key=lambda t: t["head_dim_max"])
    monkeypatch.setenv("FLASH_ATTN_EXT_KERNEL", f"{largest['name']},{least['name']}")  # the smallest that fits of both
    assert plan(row, "H100", 1)["kernel"] == least["name"]
    assert plan(row, "H100", largest["head_dim_max"])["kernel"] == largest["name"]
    monkeypatch.setenv("FLASH_ATTN_EXT_KERNEL", least["name"])
    told = plan(row, "H100", 256)
    assert f"{least['name']}: head dimensions up to {least['head_dim_max']}" in told["why_not"]
    assert f"{largest['name']}: not in FLASH_ATTN_EXT_KERNEL" in told["why_not"]


def test_a_forced_kernel_leaves_other_passes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = next(row for row in ROWS if (row["pass"], row["version"]) == ("fwd", 2))
    free = [plan(row, "H100")["kernel"] for row in ROWS if (row["pass"], row["version"]) != ("fwd", 2)]
    monkeypatch.setenv("FLASH_ATTN_EXT_KERNEL", forward["tiles"][-1]["name"])
    assert [plan(row, "H100")["kernel"] for row in ROWS if (row["pass"], row["version"]) != ("fwd", 2)] == free


@every_row
def test_a_forced_kernel_that_is_none(row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for names in ("sm80_fwd_d6", f"{row['tiles'][0]['name']},nonsense"):
        monkeypatch.setenv("FLASH_ATTN_EXT_KERNEL", names)
        wrong = names.split(",")[-1]
        told = plan(row, "H100")["why_not"]
        assert told == f"FLASH_ATTN_EXT_KERNEL names '{wrong}', and no kernel has that name"


# ---- what does not run -----------------------------------------------------------------------------------------------


@every_row
def test_why_not(row: dict[str, Any]) -> None:
    assert "head dimensions up to 256, got 257" in plan(row, "H100", 257)["why_not"]
    assert "head dimensions up to 256, got 512" in plan(row, "H100", 64, head_dim_v=512)["why_not"]
    assert "compute capability 7.5; the CUDA kernels need 8.0 or newer" in plan(row, (75, 40, 65536))["why_not"]
    wide = plan({**row, "dtype": "float64"}, "H100")["why_not"]
    assert wide == "float64 runs on the CPU only; cast to float32 for CUDA"
    assert "is built; supported_kernels()" in plan({**row, "version": 7}, "H100")["why_not"]
    tiny = plan(row, (80, 108, 1024))["why_not"]
    assert "1024 bytes of shared memory a block" in tiny
    for tile in row["tiles"]:  # a reason for each candidate
        assert f"{tile['name']}: " in tiny


def test_nonsense_raises() -> None:
    with pytest.raises(ValueError, match="sideways"):
        plan({"pass": "sideways", "version": 2, "dtype": "float32"}, "H100")
    with pytest.raises(ValueError, match="int8"):
        plan({"pass": "fwd", "version": 2, "dtype": "int8"}, "H100")


# ---- workspace -------------------------------------------------------------------------------------------------------


@every_row
@pytest.mark.parametrize("deterministic", [False, True])
def test_workspace_is_linear(row: dict[str, Any], deterministic: bool) -> None:
    if row["version"] == 1:
        pytest.skip("version 1's depends on the strides of out, which a plan does not know")
    sizes = [
        plan(row, "H100", seqlen_q=s, seqlen_k=s, deterministic=deterministic)["workspace_bytes"]
        for s in (4096, 8192, 16384)
    ]
    # One in a thousand: where dQ is summed in turn, which long sequences are not, a word for each query tile.
    assert sizes[2] - sizes[1] <= 2 * (sizes[1] - sizes[0]) + sizes[0] // 1000 + 1024
    assert sizes[2] < LONG["batch"] * LONG["heads"] * 16384**2 / 8  # the scores in 16 bits would be 16 times as much


@every_row
def test_an_empty_call_needs_no_workspace(row: dict[str, Any]) -> None:
    for name in ("batch", "seqlen_q", "seqlen_k"):
        assert plan(row, "H100", **{name: 0})["workspace_bytes"] == 0
