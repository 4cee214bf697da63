"""What attention has to satisfy whatever the sizes: hypothesis draws small problems, always the same ones.

Two results of ours that are equal in exact arithmetic are compared by an a-priori bound of their rounding; where the
engine does the same operations in the same order, bit for bit. The geometry of masks is written here a second time.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import harness
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from flash_attn_ext import flash_attention, flash_attention_v1, naive_attention

pytestmark = pytest.mark.usefixtures("one_thread")

# Derandomized: a failure on one machine is a failure on all. No database, so that runs leave nothing behind.
PROPERTY = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
DTYPES = (torch.float64, torch.float32)


@dataclass(frozen=True)
class Problem:
    """One call, without its tensors: those follow from the seed."""

    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    seed: int
    causal: bool = False
    causal_align: str = "bottom-right"
    window: tuple[int | None, int | None] | None = None

    @property
    def mask_options(self) -> dict[str, Any]:
        return {"causal": self.causal, "causal_align": self.causal_align, "window": self.window}

    @property
    def is_plain_causal(self) -> bool:
        """What version 1 can say."""
        return self.window is None and self.causal_align == "bottom-right"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        q = self.randn(0, self.batch, self.heads, self.seqlen_q, self.head_dim)
        k = self.randn(1, self.batch, self.heads_kv, self.seqlen_k, self.head_dim)
        return q, k, self.randn(2, self.batch, self.heads_kv, self.seqlen_k, self.head_dim_v)

    def dout(self, salt: int = 3) -> Tensor:
        return self.randn(salt, self.batch, self.heads, self.seqlen_q, self.head_dim_v)

    def dlse(self, salt: int = 4) -> Tensor:
        return self.randn(salt, self.batch, self.heads, self.seqlen_q)

    def randn(self, salt: int, *shape: int) -> Tensor:
        return harness.randn(*shape, dtype=self.dtype, seed=10 * self.seed + salt)

    def visible(self) -> Tensor:
        """Bool (Sq, Sk), entry by entry as the contract words it."""
        shift = self.seqlen_k - self.seqlen_q if self.causal_align == "bottom-right" else 0
        left, right = self.window or (None, None)
        right = 0 if self.causal else right
        rows = [
            [
                (left is None or j >= i + shift - left) and (right is None or j <= i + shift + right)
                for j in range(self.seqlen_k)
            ]
            for i in range(self.seqlen_q)
        ]
        return torch.tensor(rows, dtype=torch.bool).view(self.seqlen_q, self.seqlen_k)


@st.composite
def problems(draw: st.DrawFn, masked: bool = False, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Problem:
    """Lengths reach past one tile of 64 rows and one of 512 keys; head dimensions past one vector."""
    heads_kv, group = draw(st.sampled_from(((1, 1), (2, 1), (1, 3), (2, 2))))
    options: dict[str, Any] = {}
    if masked:
        end = st.one_of(st.none(), st.integers(0, 80))
        options = {
            "causal": draw(st.booleans()),
            "causal_align": draw(st.sampled_from(("bottom-right", "top-left"))),
            "window": draw(st.one_of(st.none(), st.tuples(end, end))),
        }
    return Problem(
        batch=draw(st.integers(1, 2)),
        heads=heads_kv * group,
        heads_kv=heads_kv,
        seqlen_q=draw(st.integers(1, 80)),
        seqlen_k=draw(st.one_of(st.integers(1, 80), st.integers(250, 270), st.integers(505, 530))),
        head_dim=draw(st.integers(1, 36)),
        head_dim_v=draw(st.integers(1, 36)),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**16)),
        **options,
    )


plain, masked = problems(), problems(masked=True)
precise, masked_precise = problems(dtypes=DTYPES[:1]), problems(masked=True, dtypes=DTYPES[:1])


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return flash_attention(q, k, v, **options, return_lse=True)


def gradients(
    tensors: tuple[Tensor, ...], dout: Tensor, dlse: Tensor | None = None, function: Any = attend, **options: Any
) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out, lse = function(*leaves, **options)
    if dlse is None:
        return torch.autograd.grad(out, leaves, dout)
    return torch.autograd.grad((out, lse), leaves, (dout, dlse))


def naive(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return naive_attention(*args, **options, return_lse=True, upcast=True)


def bounds(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[float, float]:
    """What out and lse may differ by when computed in two ways: each is off by at most half of that.

    A score is a sum of D products and then rounded a few times more; P is off by twice the largest error of a score,
    relatively, and a sum over keys adds one rounding per key.
    """
    unit = torch.finfo(q.dtype).eps / 2
    scale = abs(q.shape[-1] ** -0.5 if scale is None else scale)
    longest = [float(torch.linalg.vector_norm(t.double(), dim=-1).max()) for t in (q, k)]
    score = max(1.0, scale * longest[0] * longest[1])
    lse = 2 * unit * ((q.shape[-1] + 8) * score + k.shape[-2] + 8)
    return 2 * lse * float(v.abs().max()), lse


def assert_near(ours: Tensor, other: Tensor, bound: float) -> None:
    assert ours.shape == other.shape
    finite = other.isfinite()
    assert torch.equal(ours[~finite].double(), other[~finite].double())  # -inf of empty rows; NaN equals nothing
    assert (ours - other)[finite].abs().max().item() <= bound if finite.any() else True


def assert_results_near(
    ours: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    tensors: tuple[Tensor, Tensor, Tensor],
    scale: float | None = None,
) -> None:
    for result, expected, bound in zip(ours, other, bounds(*tensors, scale), strict=True):
        assert_near(result, expected, bound)


def assert_gradients_near(ours: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    """fp64 alone, by the rule of tolerance.py; twice, since both sides may be ours."""
    for grad, expected in zip(ours, other, strict=True):
        assert grad.dtype == torch.float64
        assert_near(grad, expected, 2 * fp64_tolerance(expected))


def fp64_tolerance(expected: Tensor) -> float:
    return 1e-12 * max(1.0, float(expected.abs().max()))


# ---- symmetries of softmax -------------------------------------------------------------------------------------------


@PROPERTY
@given(plain)
def test_keys_may_come_in_any_order(problem):
    q, k, v = problem.tensors()
    order = torch.randperm(problem.seqlen_k, generator=torch.Generator().manual_seed(problem.seed))
    assert_results_near(attend(q, k[:, :, order], v[:, :, order]), attend(q, k, v), (q, k, v))


@PROPERTY
@given(precise)
def test_gradients_follow_the_order_of_keys(problem):
    q, k, v = problem.tensors()
    order = torch.randperm(problem.seqlen_k, generator=torch.Generator().manual_seed(problem.seed))
    dq, dk, dv = gradients((q, k, v), problem.dout(), problem.dlse())
    ours = gradients((q, k[:, :, order], v[:, :, order]), problem.dout(), problem.dlse())
    assert_gradients_near(ours, (dq, dk[:, :, order], dv[:, :, order]))


@PROPERTY
@given(masked, st.floats(-40, 40))
def test_a_constant_added_to_a_row_of_scores_moves_lse_alone(problem, size):
    """One more column of q holds the row's constant, and of k a 1."""
    q, k, v = problem.tensors()
    constant = size * torch.linspace(-1, 1, problem.seqlen_q, dtype=q.dtype).expand(q.shape[:3])
    wide = torch.cat((q, constant[..., None]), -1), torch.cat((k, torch.ones_like(k[..., :1])), -1)
    out, lse = attend(q, k, v, scale=0.5, **problem.mask_options)
    shifted = attend(*wide, v, scale=0.5, **problem.mask_options)
    assert_results_near(shifted, (out, lse + 0.5 * constant), (*wide, v), 0.5)


@PROPERTY
@given(masked)
def test_the_sign_of_scale_may_move_into_q(problem):
    """Exactly: only signs change, and they change alike."""
    q, k, v = problem.tensors()
    ours = attend(-q, k, v, scale=-0.3, **problem.mask_options)
    for result, expected in zip(ours, attend(q, k, v, scale=0.3, **problem.mask_options), strict=True):
        assert torch.equal(result, expected)


@PROPERTY
@given(masked)
def test_scale_zero_is_the_mean_of_visible_values(problem):
    q, k, v = problem.tensors()
    weights = problem.visible().to(v.dtype)
    count = weights.sum(-1)
    v_of_q = v.repeat_interleave(problem.heads // problem.heads_kv, 1)
    mean = weights @ v_of_q / count.clamp(min=1)[:, None]
    for function in [attend] if not problem.is_plain_causal else [attend, version_1]:
        ours = function(q, k, v, scale=0.0, **problem.mask_options)
        assert_results_near(ours, (mean, count.log().expand(ours[1].shape)), (q, k, v), 0.0)


# ---- merging ---------------------------------------------------------------------------------------------------------


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The results of disjoint sets of keys, as ring attention joins them; a set that a row does not see weighs 0."""
    lse = torch.logsumexp(torch.stack([part[1] for part in parts]), 0)
    weights = [(part[1] - lse).exp().masked_fill(part[1].isneginf(), 0.0)[..., None] for part in parts]
    return sum(w * part[0] for w, part in zip(weights, parts, strict=True)), lse


@PROPERTY
@given(plain, st.lists(st.integers(0, 530), min_size=1, max_size=4))
def test_keys_in_pieces_merged_by_lse(problem, cuts):
    """Empty pieces as well."""
    q, k, v = problem.tensors()
    borders = [0, *sorted(min(cut, problem.seqlen_k) for cut in cuts), problem.seqlen_k]
    parts = [attend(q, k[:, :, a:b], v[:, :, a:b]) for a, b in itertools.pairwise(borders)]
    assert_results_near(merge(parts), attend(q, k, v), (q, k, v))


@PROPERTY
@given(plain, st.integers(0, 530))
def test_causal_keys_in_two_pieces_merged_by_lse(problem, cut):
    """The second piece ends where the keys end, so bottom-right is its diagonal too; the first one's is a window."""
    q, k, v = problem.tensors()
    shift, cut = problem.seqlen_k - problem.seqlen_q, min(cut, problem.seqlen_k)
    if shift < 0:  # a window cannot begin left of the first key: drop the rows that see nothing
        q, shift = q[:, :, -shift:], 0
    first = attend(q, k[:, :, :cut], v[:, :, :cut], window=(None, shift), causal_align="top-left")
    second = attend(q, k[:, :, cut:], v[:, :, cut:], causal=True)
    assert_results_near(merge([first, second]), attend(q, k, v, causal=True), (q, k, v))


# ---- masks -----------------------------------------------------------------------------------------------------------


@PROPERTY
@given(masked)
def test_causal_and_window_are_an_explicit_mask(problem):
    q, k, v = problem.tensors()
    ours = attend(q, k, v, **problem.mask_options)
    ref = naive(q, k, v, mask=problem.visible())
    assert_results_near(ours, tuple(r.to(o.dtype) for r, o in zip(ref, ours, strict=True)), (q, k, v))


@PROPERTY
@given(masked_precise)
def test_gradients_under_an_explicit_mask(problem):
    tensors, dout, dlse = problem.tensors(), problem.dout(), problem.dlse()
    ours = gradients(tensors, dout, dlse, **problem.mask_options)
    assert_gradients_near(ours, gradients(tensors, dout, dlse, naive, mask=problem.visible()))


@PROPERTY
@given(masked)
def test_rows_that_see_nothing(problem):
    """Zero, -inf, zero gradient; and what is asked of them (dout, dlse) moves no bit of any gradient."""
    tensors, options = problem.tensors(), problem.mask_options
    out, lse = attend(*tensors, **options)
    empty = ~problem.visible().any(-1)
    assert not out[:, :, empty].any() and lse[:, :, empty].isneginf().all()
    assert lse[:, :, ~empty].isfinite().all() and out.isfinite().all()
    grads = gradients(tensors, problem.dout(), problem.dlse(), **options)
    assert not grads[0][:, :, empty].any()
    dout, dlse = problem.dout().clone(), problem.dlse().clone()
    dout[:, :, empty], dlse[:, :, empty] = 0.0, 0.0
    for grad, without in zip(grads, gradients(tensors, dout, dlse, **options), strict=True):
        assert grad.isfinite().all() and torch.equal(grad, without)


@PROPERTY
@given(masked)
def test_keys_that_nobody_sees(problem):
    """Their gradients are zero, and their values, NaN aside, move no bit."""
    (q, k, v), options = problem.tensors(), problem.mask_options
    unseen = ~problem.visible().any(0)
    _, dk, dv = gradients((q, k, v), problem.dout(), **options)
    assert not dk[:, :, unseen].any() and not dv[:, :, unseen].any()
    out, lse = attend(q, k, v, **options)
    k[:, :, unseen], v[:, :, unseen] = 3.0, -1e6
    for result, expected in zip(attend(q, k, v, **options), (out, lse), strict=True):
        assert torch.equal(result, expected)


# ---- heads, batches, dimensions --------------------------------------------------------------------------------------


@PROPERTY
@given(masked)
def test_gqa_is_repeated_heads(problem):
    """The same bits forward: a query head does not know with whom it shares its keys."""
    q, k, v = problem.tensors()
    group = problem.heads // problem.heads_kv
    repeated = q, *(t.repeat_interleave(group, 1) for t in (k, v))
    ours, other = attend(q, k, v, **problem.mask_options), attend(*repeated, **problem.mask_options)
    assert torch.equal(ours[0], other[0]) and torch.equal(ours[1], other[1])


@PROPERTY
@given(masked_precise)
def test_gradients_of_gqa_are_summed_over_the_group(problem):
    q, k, v = problem.tensors()
    group = problem.heads // problem.heads_kv
    repeated = q, *(t.repeat_interleave(group, 1) for t in (k, v))
    dq, dk, dv = gradients(repeated, problem.dout(), problem.dlse(), **problem.mask_options)
    summed = (t.unflatten(1, (problem.heads_kv, group)).sum(2) for t in (dk, dv))
    ours = gradients((q, k, v), problem.dout(), problem.dlse(), **problem.mask_options)
    assert_gradients_near(ours, (dq, *summed))


@PROPERTY
@given(masked, st.integers(1, 40), st.integers(1, 40))
def test_padded_head_dimensions_are_sliced_ones(problem, more, more_v):
    """Zeros at the end of q and k add nothing to a score; zeros at the end of v come out as zeros."""
    q, k, v = problem.tensors()
    scale = problem.head_dim**-0.5
    out, lse = attend(pad(q, (0, more)), pad(k, (0, more)), pad(v, (0, more_v)), scale=scale, **problem.mask_options)
    assert not out[..., problem.head_dim_v :].any()
    ours = out[..., : problem.head_dim_v], lse
    assert_results_near(ours, attend(q, k, v, **problem.mask_options), (q, k, v))


@PROPERTY
@given(masked)
def test_a_row_does_not_depend_on_its_batch_or_heads(problem):
    """Bit for bit, gradients as well: each batch entry and each group of heads alone."""
    tensors, options, dout, dlse = problem.tensors(), problem.mask_options, problem.dout(), problem.dlse()
    out, lse = attend(*tensors, **options)
    grads = gradients(tensors, dout, dlse, **options)
    group = problem.heads // problem.heads_kv
    for b, h in itertools.product(range(problem.batch), range(problem.heads_kv)):
        of_q, of_kv = (
            (slice(b, b + 1), slice(h * group, (h + 1) * group)),
            (slice(b, b + 1), slice(h, h + 1)),
        )
        alone = tensors[0][of_q], tensors[1][of_kv], tensors[2][of_kv]
        out_alone, lse_alone = attend(*alone, **options)
        assert torch.equal(out_alone, out[of_q]) and torch.equal(lse_alone, lse[of_q])
        ours = gradients(alone, dout[of_q], dlse[of_q], **options)
        for grad, whole, part in zip(ours, grads, (of_q, of_kv, of_kv), strict=True):
            assert torch.equal(grad, whole[part])


# ---- versions, linearity ---------------------------------------------------------------------------------------------


def version_1(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """out of flash_attention_v1, and lse, which only its operator returns."""
    causal = options.get("causal", False)
    out, lse = harness.ops.fwd_v1(q, k, v, scale, -1, 0 if causal else -1)
    assert torch.equal(flash_attention_v1(q, k, v, scale, causal), out)
    return out, lse


@PROPERTY
@given(plain, st.booleans(), st.sampled_from((None, -0.4, 1.7)))
def test_version_1_is_version_2(problem, causal, scale):
    tensors = problem.tensors()
    ours = version_1(*tensors, scale, causal=causal)
    assert_results_near(ours, attend(*tensors, scale=scale, causal=causal), tensors, scale)


@PROPERTY
@given(precise, st.booleans())
def test_version_1_trains_like_version_2(problem, causal):
    tensors, dout = problem.tensors(), problem.dout()
    leaves = [t.detach().requires_grad_() for t in tensors]
    ours = torch.autograd.grad(flash_attention_v1(*leaves, causal=causal), leaves, dout)
    assert_gradients_near(ours, gradients(tensors, dout, causal=causal))


@PROPERTY
@given(masked, st.floats(-2, 2), st.floats(-2, 2))
def test_linear_in_v(problem, a, b):
    q, k, v = problem.tensors()
    other = problem.randn(5, *v.shape)
    both = attend(q, k, a * v + b * other, **problem.mask_options)[0]
    first, second = (attend(q, k, x, **problem.mask_options)[0] for x in (v, other))
    largest = torch.stack((v, other)).abs().amax(0)
    assert_near(both, a * first + b * second, 2 * (abs(a) + abs(b)) * bounds(q, k, largest)[0])


@PROPERTY
@given(masked)
def test_a_power_of_two_moves_through_v_and_dout_exactly(problem):
    """Nothing along the way may depend on the size of a value: no threshold, no absolute epsilon."""
    (q, k, v), options = problem.tensors(), problem.mask_options
    assert torch.equal(attend(q, k, v * 2.0**-20, **options)[0], attend(q, k, v, **options)[0] * 2.0**-20)
    small = gradients((q, k, v), problem.dout() * 2.0**-20, **options)
    for ours, grad in zip(small, gradients((q, k, v), problem.dout(), **options), strict=True):
        assert torch.equal(ours, grad * 2.0**-20)


@PROPERTY
@given(masked_precise, st.floats(-2, 2), st.floats(-2, 2))
def test_gradients_are_linear_in_dout_and_dlse(problem, a, b):
    tensors, options = problem.tensors(), problem.mask_options
    pairs = (problem.dout(3), problem.dlse(4)), (problem.dout(6), problem.dlse(7))
    both = gradients(tensors, *(a * x + b * y for x, y in zip(*pairs, strict=True)), **options)
    first, second = (gradients(tensors, *pair, **options) for pair in pairs)
    for ours, x, y in zip(both, first, second, strict=True):
        allowed = abs(a) * fp64_tolerance(x) + abs(b) * fp64_tolerance(y) + fp64_tolerance(ours)
        assert_near(ours, a * x + b * y, allowed)


@PROPERTY
@given(masked_precise)
def test_gradients_of_out_and_of_lse_add_up(problem):
    tensors, dout, dlse, options = problem.tensors(), problem.dout(), problem.dlse(), problem.mask_options
    both = gradients(tensors, dout, dlse, **options)
    of_out, of_lse = gradients(tensors, dout, **options), gradients(tensors, dout * 0, dlse, **options)
    assert_gradients_near(both, tuple(x + y for x, y in zip(of_out, of_lse, strict=True)))
    assert not of_lse[2].any()  # lse does not know v
