// The operators of flash_attn_ext: the only place where their schemas stand.
//
// Functional (nothing is written in place, no output aliases an input), symbolic window lengths, no keyword-only
// tensors: what export, AOTAutograd and register_autograd ask for. q, k, v are (B, H, S, D) or (B, S, D).
//   scale           None is 1 / sqrt(D)
//   window_left/right  keys visible on either side of the diagonal, both ends included; negative is open, causal is (-1, 0)
//   top_left        the diagonal starts at (0, 0); otherwise it ends at (Sq - 1, Sk - 1)
//   deterministic   of the gradients; None follows torch.are_deterministic_algorithms_enabled(). fwd carries it to bwd
//   block_m/n       a built tile, 0 for the best
// bwd keeps no state: out and lse may come from elsewhere (ring attention passes merged ones).
#include <torch/library.h>

TORCH_LIBRARY(flash_attn_ext, m) {
  m.def(
      "fwd(Tensor q, Tensor k, Tensor v, float? scale=None, SymInt window_left=-1, SymInt window_right=-1, "
      "bool top_left=False, bool? deterministic=None, int block_m=0, int block_n=0) -> (Tensor out, Tensor lse)");
  m.def(
      "fwd_v1(Tensor q, Tensor k, Tensor v, float? scale=None, SymInt window_left=-1, SymInt window_right=-1, "
      "bool top_left=False, bool? deterministic=None, int block_m=0, int block_n=0) -> (Tensor out, Tensor lse)");
  m.def(
      "bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float? scale=None, "
      "SymInt window_left=-1, SymInt window_right=-1, bool top_left=False, bool? deterministic=None) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");
}
