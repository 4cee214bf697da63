"""dq, dk, dv, also through lse, of every case against the oracle's; foreign out and lse; gradcheck."""

from __future__ import annotations

import cases
import harness
import pytest
import torch
from cases import Case

from flash_attn_ext import flash_attention, naive_attention

pytestmark = pytest.mark.usefixtures("poisoned")

ALL = (*cases.CASES, *cases.in_dtype(cases.select(cases.PAIRWISE, max_work=2**23), "float64"))
V1 = [case for case in cases.CORE if harness.v1_takes(case) and case.work < 2**24]
FEW = (  # where a special form of the call is tried on every dtype
    Case(113, 203, 40, batch=2, heads=4, heads_kv=2, causal=True),
    Case(300, 140, 64, heads=3, heads_kv=1, window=(37, 21), layout="strided"),  # rows that see nothing
    Case(70, 300, 96, head_dim_v=48, layout="misaligned"),
)
FEW = tuple(case for dtype in cases.DTYPES for case in cases.in_dtype(FEW, dtype))


@pytest.mark.parametrize("device, case", harness.on_devices(ALL, "bwd"), indirect=["device"])
def test_v2(device, case):
    harness.check_backward(case, device, deterministic=False)


@pytest.mark.parametrize("device, case", harness.on_devices(FEW, "bwd"), indirect=["device"])
def test_v2_deterministic(device, case):
    harness.check_backward(case, device, deterministic=True)


@pytest.mark.parametrize("device, case", harness.on_devices(V1, "bwd", 2), indirect=["device"])
def test_v1_trains_through_the_v2_backward(device, case):
    if not harness.has_kernel(case, device, "fwd", 1):
        pytest.skip("no kernel of version 1 for this case")
    harness.check_backward(case, device, 1)


@pytest.mark.parametrize("device, case", harness.on_devices(FEW, "bwd"), indirect=["device"])
def test_gradients_have_the_shape_and_order_of_their_tensors(device, case):
    x = harness.inputs_of(case, device)
    grads = harness.run_backward(case, device)
    for name, tensor in x.leaves.items():
        assert grads[name].shape == tensor.shape  # Hk heads for dk and dv
        assert torch.empty_like(tensor).stride() == grads[name].stride()


def grads_of(case, device, loss, attention=None):
    x = harness.inputs_of(case, device, requires_grad=True)
    leaves = x.leaves
    torch.manual_seed(harness.SEED)
    out, lse = (attention or flash_attention)(x.q, x.k, x.v, **x.kwargs, return_lse=True)
    return dict(
        zip(leaves, torch.autograd.grad(loss(out, lse), list(leaves.values()), materialize_grads=True), strict=True)
    )


LOSSES = {
    "sum": lambda out, lse: out.sum(),  # dout is one number, expanded with strides of 0
    "sum_of_rows": lambda out, lse: out.double()[:, :, ::2].sum(),  # dout is strided
    "transposed": lambda out, lse: (out.mT.contiguous() * 0.5).sum(),  # dout's last dimension is not contiguous
    "lse": lambda out, lse: lse.masked_fill(~lse.isfinite(), 0.0).sum(),  # no dout
    "lse_rows": lambda out, lse: lse[:, :, 1::2].masked_fill(~lse[:, :, 1::2].isfinite(), 0.0).sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("device, case", harness.on_devices(FEW, "bwd"), indirect=["device"])
def test_other_losses(device, case, loss):
    ours = grads_of(case, device, LOSSES[loss])

    def oracle(*args, **kwargs):
        return naive_attention(*args, **kwargs, upcast=True)

    expected = harness.expected_backward(case, device)  # for its bounds
    ref, naive = (grads_of(case, device, LOSSES[loss], f) for f in (oracle, naive_attention))
    if loss.startswith("lse"):
        assert not ours["dv"].any()
    harness.compare(ours, expected._replace(ref=ref, naive=naive), case)


WITHOUT_KEYS = (
    Case(200, 100, 64, heads=3, heads_kv=3, causal=True),
    Case(700, 300, 128, batch=2, heads=4, heads_kv=2, causal=True),
    Case(300, 140, 48, heads=3, heads_kv=1, window=(37, 21)),
)
WITHOUT_KEYS = tuple(case for dtype in cases.DTYPES for case in cases.in_dtype(WITHOUT_KEYS, dtype))


@pytest.mark.parametrize("device, case", harness.on_devices(WITHOUT_KEYS, "bwd"), indirect=["device"])
def test_dlse_of_rows_that_see_nothing(device, case):
    """It may be anything, NaN too: it moves no bit of any gradient."""
    x, window = harness.inputs_of(case, device), harness.operator_window(case)
    options = (case.scale, *window, case.causal_align == "top-left")
    out, lse = harness.ops.fwd(x.q, x.k, x.v, *options)
    empty = lse.isneginf()
    assert empty.any() and not empty.all()
    for deterministic in (True, False):
        grads, expected = (
            harness.ops.bwd(x.dout, x.dlse.masked_fill(empty, value), x.q, x.k, x.v, out, lse, *options, deterministic)
            for value in (float("nan"), 0.0)
        )
        for grad, without in zip(grads, expected, strict=True):
            assert grad.isfinite().all()
            assert torch.equal(grad, without) or not deterministic


@pytest.mark.parametrize("with_dlse", [False, True], ids=["dout", "dout_dlse"])
@pytest.mark.parametrize("device, case", harness.on_devices(FEW, "bwd"), indirect=["device"])
def test_foreign_out_and_lse(device, case, with_dlse):
    """Keys in two halves, results merged by lse, backward of each half with the merged out and lse: what ring attention
    does. The gradients are those of the whole."""
    x = harness.inputs_of(case, device)
    middle, top_left = 77, case.causal_align == "top-left"
    left, right = harness.operator_window(case)
    # The same diagonal for both halves: a half that ends where the keys end keeps bottom-right. The first does so only
    # in terms of its own length, so its rows are told through top-left geometry of shifted windows where there is one.
    if left >= 0 or right >= 0:
        shift = 0 if top_left else case.seqlen_k - case.seqlen_q
        offsets = (shift, shift - middle)
    else:
        offsets = (None, None)
    halves = []
    for (start, stop), offset in zip(((0, middle), (middle, case.seqlen_k)), offsets, strict=True):
        window = (
            (-1, -1) if offset is None else (left - offset if left >= 0 else -1, right + offset if right >= 0 else -1)
        )
        if offset is not None and ((left >= 0 and left - offset < 0) or (right >= 0 and right + offset < 0)):
            pytest.skip("this diagonal is outside what a window can say for one half")
        halves.append((x.k[:, :, start:stop], x.v[:, :, start:stop], case.scale, *window, offset is not None))
    parts = [harness.ops.fwd(x.q, *half) for half in halves]
    lse = torch.logsumexp(torch.stack([part[1] for part in parts]), 0)
    weights = [(part[1] - lse).exp().masked_fill(part[1].isneginf(), 0.0)[..., None] for part in parts]
    out = sum(w * part[0].to(w.dtype) for w, part in zip(weights, parts, strict=True)).to(x.q.dtype)
    dlse = x.dlse if with_dlse else None
    grads = [harness.ops.bwd(x.dout, dlse, x.q, *half[:2], out, lse, *half[2:]) for half in halves]
    expected = harness.expected_backward(case, device, with_dlse)
    ours = {
        "dq": grads[0][0].to(lse.dtype) + grads[1][0].to(lse.dtype),  # 16-bit gradients are rounded once more
        "dk": torch.cat([g[1] for g in grads], 2),
        "dv": torch.cat([g[2] for g in grads], 2),
    }
    ours["dq"] = ours["dq"].to(x.q.dtype)
    harness.compare(ours, expected, case)
