// Attention without PyTorch: causal fp16 forward and backward through cuda/registry.h, checked on the host.
//
// A call is data (core/params.h): pointers, strides in elements, sizes. find() names the kernel, the kernel says how much
// workspace it wants, launch() queues everything on a stream. CMakeLists.txt beside this file builds it.
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cuda/registry.h"

namespace {

constexpr int kBatch = 2, kHeads = 4, kHeadsKv = 2, kRows = 300, kKeys = 420, kDim = 64;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver ? 77 : 1);
}

// A contiguous (batch, heads, seq, dim) tensor on the device, with its values on the host.
struct Tensor {
  int heads, seq;
  std::vector<float> host;
  __half* device = nullptr;

  Tensor(int heads_, int seq_, unsigned seed) : heads(heads_), seq(seq_), host(size_t{kBatch} * heads * seq * kDim) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<__half> rounded(host.size());
    for (size_t i = 0; i < host.size(); ++i) {
      rounded[i] = __float2half(seed == 0 ? 0.0f : normal(random));
      host[i] = __half2float(rounded[i]);
    }
    check(cudaMalloc(reinterpret_cast<void**>(&device), rounded.size() * sizeof(__half)), "cudaMalloc");
    check(cudaMemcpy(device, rounded.data(), rounded.size() * sizeof(__half), cudaMemcpyHostToDevice), "copy");
  }

  fae::TensorRef ref() const {
    return {device, int64_t{heads} * seq * kDim, int64_t{seq} * kDim, kDim};  // strides of batch, head, seq
  }
  void fetch() {
    std::vector<__half> values(host.size());
    check(cudaMemcpy(values.data(), device, values.size() * sizeof(__half), cudaMemcpyDeviceToHost), "copy back");
    for (size_t i = 0; i < host.size(); ++i) host[i] = __half2float(values[i]);
  }
  const float* row(int b, int h, int s) const { return &host[((size_t{1} * b * heads + h) * seq + s) * kDim]; }
};

double dot(const float* a, const float* b) {
  double sum = 0.0;
  for (int d = 0; d < kDim; ++d) sum += double{a[d]} * b[d];
  return sum;
}

void run(fae::cuda::Pass pass, const fae::cuda::Call& call) {
  std::string why_not;
  const fae::cuda::KernelEntry* entry = fae::cuda::find({pass, 2, fae::DType::kFloat16, kDim}, call.device, &why_not);
  if (entry == nullptr) {
    std::fprintf(stderr, "%s\n", why_not.c_str());
    std::exit(1);
  }
  void* workspace = nullptr;
  const size_t bytes = entry->workspace_bytes(call);
  if (bytes != 0) check(cudaMalloc(&workspace, bytes), "cudaMalloc");
  check(entry->launch(call, workspace, nullptr), entry->name);
  check(cudaDeviceSynchronize(), entry->name);
  check(cudaFree(workspace), "cudaFree");
  std::printf("%s: tile %d x %d, %zu bytes of workspace\n", entry->name, entry->tile.m, entry->tile.n, bytes);
}

}  // namespace

int main() {
  fae::cuda::Call call;
  check(fae::cuda::current_device(&call.device), "no CUDA device");

  Tensor q(kHeads, kRows, 1), k(kHeadsKv, kKeys, 2), v(kHeadsKv, kKeys, 3), dout(kHeads, kRows, 4);
  Tensor out(kHeads, kRows, 0), dq(kHeads, kRows, 0), dk(kHeadsKv, kKeys, 0), dv(kHeadsKv, kKeys, 0);
  float* lse = nullptr;
  check(cudaMalloc(reinterpret_cast<void**>(&lse), sizeof(float) * kBatch * kHeads * kRows), "cudaMalloc");

  fae::AttentionParams& p = call.p.fwd;
  p.q = q.ref();
  p.k = k.ref();
  p.v = v.ref();
  p.o = out.ref();
  p.lse = {lse, int64_t{kHeads} * kRows, kRows};
  p.sizes = {kBatch, kHeads, kHeadsKv, kRows, kKeys, kDim, kDim};
  p.scale = 1.0 / std::sqrt(double{kDim});
  p.mask_spec.window_right = 0;  // causal: the last row sees the last key
  call.p.dout = dout.ref();
  call.p.dq = dq.ref();
  call.p.dk = dk.ref();
  call.p.dv = dv.ref();
  call.p.deterministic = true;

  run(fae::cuda::Pass::kForward, call);
  run(fae::cuda::Pass::kBackward, call);
  for (Tensor* t : {&out, &dq, &dk, &dv}) t->fetch();

  // out, and dv of the first key/value head, by the definition.
  double worst = 0.0;
  std::vector<double> dv_expected(size_t{kKeys} * kDim);
  for (int b = 0; b < kBatch; ++b)
    for (int h = 0; h < kHeads; ++h)
      for (int i = 0; i < kRows; ++i) {
        const int group = h / (kHeads / kHeadsKv), visible = i + kKeys - kRows + 1;
        std::vector<double> weights(visible);
        double sum = 0.0, expected[kDim] = {};
        for (int j = 0; j < visible; ++j)
          sum += weights[j] = std::exp(p.scale * dot(q.row(b, h, i), k.row(b, group, j)));
        for (int j = 0; j < visible; ++j)
          for (int d = 0; d < kDim; ++d) {
            expected[d] += weights[j] / sum * v.row(b, group, j)[d];
            if (b == 0 && group == 0) dv_expected[size_t{1} * j * kDim + d] += weights[j] / sum * dout.row(b, h, i)[d];
          }
        for (int d = 0; d < kDim; ++d) worst = std::fmax(worst, std::fabs(expected[d] - out.row(b, h, i)[d]));
      }
  double worst_dv = 0.0;
  for (int j = 0; j < kKeys; ++j)
    for (int d = 0; d < kDim; ++d)
      worst_dv = std::fmax(worst_dv, std::fabs(dv_expected[size_t{1} * j * kDim + d] - dv.row(0, 0, j)[d]));
  std::printf("largest error: out %.2e, dv %.2e\n", worst, worst_dv);
  return worst < 5e-3 && worst_dv < 5e-2 ? 0 : 1;  // NaN fails too
}
