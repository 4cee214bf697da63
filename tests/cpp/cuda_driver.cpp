// Every CUDA kernel of the registry on two small ragged problems, for compute-sanitizer (tools/compute_sanitizer.sh): each
// tensor is an allocation of its own and exactly as large as it has to be, nothing is initialised that a kernel has to
// write, and results are held against fp64 on the host.
//
//   cuda_driver [--many N] [NAME...]      the kernels of these names alone; with --many Hopper's kernels alone, on a problem
//                                         of more tiles than SMs, N times: for builds that provoke races
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/params.h"
#include "cuda/registry.h"

namespace {

using namespace fae;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

struct Problem {
  Sizes sizes;
  MaskSpec mask;
  DType dtype;
  bool misaligned;  // tensors start one element after an aligned address
  double scale() const { return 1.0 / std::sqrt(static_cast<double>(sizes.head_dim)); }
};

size_t encode(DType t, float x, unsigned char* to) {
  if (t == DType::kFloat16) {
    const __half h = __float2half(x);
    std::memcpy(to, &h, 2);
  } else if (t == DType::kBFloat16) {
    const __nv_bfloat16 h = __float2bfloat16(x);
    std::memcpy(to, &h, 2);
  } else {
    std::memcpy(to, &x, 4);
  }
  return size_of(t);
}

float decode(DType t, const unsigned char* from) {
  if (t == DType::kFloat16) {
    __half h;
    std::memcpy(&h, from, 2);
    return __half2float(h);
  }
  if (t == DType::kBFloat16) {
    __nv_bfloat16 h;
    std::memcpy(&h, from, 2);
    return __bfloat162float(h);
  }
  float x;
  std::memcpy(&x, from, 4);
  return x;
}

// (batch, heads, seq, dim), contiguous.
struct Tensor {
  DType dtype;
  int heads, seq, dim;
  std::vector<double> values;
  unsigned char *memory = nullptr, *data = nullptr;

  Tensor(const Problem& p, int heads_, int seq_, int dim_)
      : dtype(p.dtype),
        heads(heads_),
        seq(seq_),
        dim(dim_),
        values(static_cast<size_t>(p.sizes.batch) * heads * seq * dim) {
    const size_t lead = p.misaligned ? size_of(dtype) : 0;
    check(cudaMalloc(reinterpret_cast<void**>(&memory), lead + values.size() * size_of(dtype)), "cudaMalloc");
    data = memory + lead;
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() { cudaFree(memory); }

  void fill(unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (double& x : values) x = normal(random);
    upload();
  }
  void upload() {  // and keeps what rounding leaves
    std::vector<unsigned char> bytes(values.size() * size_of(dtype));
    for (size_t i = 0; i < values.size(); ++i) {
      encode(dtype, static_cast<float>(values[i]), &bytes[i * size_of(dtype)]);
      values[i] = decode(dtype, &bytes[i * size_of(dtype)]);
    }
    check(cudaMemcpy(data, bytes.data(), bytes.size(), cudaMemcpyHostToDevice), "upload");
  }
  std::vector<double> download() const {
    std::vector<unsigned char> bytes(values.size() * size_of(dtype));
    check(cudaMemcpy(bytes.data(), data, bytes.size(), cudaMemcpyDeviceToHost), "download");
    std::vector<double> result(values.size());
    for (size_t i = 0; i < result.size(); ++i) result[i] = decode(dtype, &bytes[i * size_of(dtype)]);
    return result;
  }
  double* row(int64_t b, int h, int s) { return &values[((b * heads + h) * seq + s) * dim]; }
  TensorRef ref() const { return {data, int64_t{heads} * seq * dim, int64_t{seq} * dim, dim}; }
};

double dot(const double* a, const double* b, int n) {
  double sum = 0.0;
  for (int i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// fp64 results into `values` of out, dq, dk, dv, and lse.
void reference(const Problem& p, Tensor& q, Tensor& k, Tensor& v, Tensor& dout, const std::vector<double>& dlse,
               Tensor& out, std::vector<double>& lse, Tensor& dq, Tensor& dk, Tensor& dv) {
  const Sizes& z = p.sizes;
  const IntervalMask mask = IntervalMask::make(p.mask, z.seqlen_q, z.seqlen_k);
  for (Tensor* t : {&out, &dq, &dk, &dv}) std::fill(t->values.begin(), t->values.end(), 0.0);
  std::vector<double> weights(z.seqlen_k);
  for (int64_t b = 0; b < z.batch; ++b)
    for (int h = 0; h < z.heads; ++h)
      for (int i = 0; i < z.seqlen_q; ++i) {
        const int g = z.kv_head(h), begin = mask.begin(i), end = mask.end(i);
        const size_t at = (b * z.heads + h) * z.seqlen_q + i;
        double top = -INFINITY, sum = 0.0;
        for (int j = begin; j < end; ++j)
          top = std::max(top, weights[j] = p.scale() * dot(q.row(b, h, i), k.row(b, g, j), z.head_dim));
        for (int j = begin; j < end; ++j) sum += weights[j] = std::exp(weights[j] - top);
        lse[at] = begin < end ? top + std::log(sum) : -INFINITY;
        double* const o = out.row(b, h, i);
        for (int j = begin; j < end; ++j)
          for (int d = 0; d < z.head_dim_v; ++d) o[d] += weights[j] / sum * v.row(b, g, j)[d];
        const double delta = dot(o, dout.row(b, h, i), z.head_dim_v) - dlse[at];
        for (int j = begin; j < end; ++j) {
          const double w = weights[j] / sum;
          const double ds = p.scale() * w * (dot(dout.row(b, h, i), v.row(b, g, j), z.head_dim_v) - delta);
          for (int d = 0; d < z.head_dim_v; ++d) dv.row(b, g, j)[d] += w * dout.row(b, h, i)[d];
          for (int d = 0; d < z.head_dim; ++d) {
            dq.row(b, h, i)[d] += ds * k.row(b, g, j)[d];
            dk.row(b, g, j)[d] += ds * q.row(b, h, i)[d];
          }
        }
      }
}

// The largest error over what is allowed; NaN counts as infinite. The tests judge finer: this is for the sanitizer.
double compare(const std::vector<double>& ours, const std::vector<double>& expected, DType dtype) {
  double largest = 1.0, error = 0.0;
  for (double x : expected)
    if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
  for (size_t i = 0; i < ours.size(); ++i) {
    if (ours[i] == expected[i]) continue;  // infinities
    const double difference = std::fabs(ours[i] - expected[i]);
    error = difference == difference ? std::max(error, difference) : INFINITY;
  }
  return error / largest / (dtype == DType::kFloat32 ? 2e-5 : dtype == DType::kFloat16 ? 4e-3 : 3e-2);
}

bool run(const cuda::KernelEntry& entry, const cuda::Device& device, const Problem& p, int times) {
  const Sizes& z = p.sizes;
  Tensor q(p, z.heads, z.seqlen_q, z.head_dim), k(p, z.heads_kv, z.seqlen_k, z.head_dim),
      v(p, z.heads_kv, z.seqlen_k, z.head_dim_v), dout(p, z.heads, z.seqlen_q, z.head_dim_v),
      out(p, z.heads, z.seqlen_q, z.head_dim_v), dq(p, z.heads, z.seqlen_q, z.head_dim),
      dk(p, z.heads_kv, z.seqlen_k, z.head_dim), dv(p, z.heads_kv, z.seqlen_k, z.head_dim_v);
  q.fill(1);
  k.fill(2);
  v.fill(3);
  dout.fill(4);
  const Problem stats = {z, p.mask, DType::kFloat32, false};
  Tensor lse(stats, z.heads, z.seqlen_q, 1), dlse(stats, z.heads, z.seqlen_q, 1);
  dlse.fill(5);
  reference(p, q, k, v, dout, dlse.values, out, lse.values, dq, dk, dv);

  cuda::Call call;
  call.device = device;
  call.p.fwd.q = q.ref();
  call.p.fwd.k = k.ref();
  call.p.fwd.v = v.ref();
  call.p.fwd.o = out.ref();
  call.p.fwd.lse = {lse.data, int64_t{z.heads} * z.seqlen_q, z.seqlen_q};
  call.p.fwd.sizes = z;
  call.p.fwd.mask_spec = p.mask;
  call.p.fwd.scale = p.scale();
  call.p.dout = dout.ref();
  call.p.dq = dq.ref();
  call.p.dk = dk.ref();
  call.p.dv = dv.ref();
  call.p.dlse = {dlse.data, int64_t{z.heads} * z.seqlen_q, z.seqlen_q};
  const bool backward = entry.pass == cuda::Pass::kBackward;
  if (backward) {
    out.upload();
    lse.upload();
  }
  double worst = 0.0;
  for (const bool deterministic : {true, false}) {
    if (!backward && !deterministic) continue;
    call.p.deterministic = deterministic;
    void* workspace = nullptr;
    const size_t bytes = entry.workspace_bytes(call);
    if (bytes != 0) check(cudaMalloc(&workspace, bytes), "cudaMalloc");
    for (int i = 0; i < times; ++i) {
      // What the last launch left must not stand in for what this one misses: NaN. Nor does initcheck see what the copy
      // engine stores.
      if (i > 0 || (entry.arch == 90 && !backward))
        for (Tensor* t : backward ? std::vector<Tensor*>{&dq, &dk, &dv} : std::vector<Tensor*>{&out, &lse})
          check(cudaMemset(t->data, 0xff, t->values.size() * size_of(t->dtype)), "cudaMemset");
      check(entry.launch(call, workspace, nullptr), entry.name);
      check(cudaDeviceSynchronize(), entry.name);
      if (backward)
        for (Tensor* t : {&dq, &dk, &dv}) worst = std::max(worst, compare(t->download(), t->values, p.dtype));
      else
        worst = std::max({worst, compare(out.download(), out.values, p.dtype),
                          compare(lse.download(), lse.values, DType::kFloat32)});
    }
    check(cudaFree(workspace), "cudaFree");
  }
  if (worst > 1.0)
    std::fprintf(stderr, "%s, D %d Dv %d, Sq %d Sk %d: %.1f times the allowed error\n", entry.name, z.head_dim,
                 z.head_dim_v, z.seqlen_q, z.seqlen_k, worst);
  return worst <= 1.0;
}

}  // namespace

int main(int argc, char** argv) {
  cuda::Device device;
  check(cuda::current_device(&device), "no CUDA device");
  const bool many = argc > 2 && std::strcmp(argv[1], "--many") == 0;
  const int times = many ? std::atoi(argv[2]) : 1, first_name = many ? 3 : 1;
  int count, launched = 0, failed = 0;
  const cuda::KernelEntry* all = cuda::entries(&count);
  for (int i = 0; i < count; ++i) {
    const cuda::KernelEntry& e = all[i];
    const auto is_this = [&](const char* name) { return std::strcmp(name, e.name) == 0; };
    const bool hopper = e.arch == 90;  // 9.x alone; the copy engine takes aligned tensors alone
    if (argc > first_name && std::none_of(argv + first_name, argv + argc, is_this)) continue;
    if (many && !hopper) continue;
    if ((hopper ? device.compute_capability / 10 != 9 : e.arch > device.compute_capability) ||
        e.tile.shared_bytes > device.shared_bytes) {
      std::printf("%s: not on this GPU\n", e.name);
      continue;
    }
    const int rows = e.tile.m + 17, keys = 2 * e.tile.n + 5;
    MaskSpec causal, window;
    causal.window_right = 0;
    window.window_left = e.tile.n;
    window.window_right = 3;
    window.top_left = true;
    const int most = e.head_dim_max, splits = hopper ? 4101 : 9 * e.tile.n + 1;
    // Whole vectors and one head; then odd dimensions, GQA and addresses that no vector load takes.
    const Problem plain = {{1, 1, 1, rows, keys, most, most}, causal, e.dtype, false};
    const Problem ragged = {
        {1, 2, 1, rows, keys, most - (hopper ? 8 : 3), most - (hopper ? 16 : 6)}, window, e.dtype, !hopper};
    // Few rows and many keys: split over CTAs.
    const Problem decode = {{2, 1, 1, 3, splits, most, most}, MaskSpec{}, e.dtype, false};
    // Several tiles for each CTA.
    const Problem stream = {{2, 20, 4, 4 * e.tile.m - 3, keys + e.tile.m, most, most}, causal, e.dtype, false};
    std::vector<Problem> problems = {plain, ragged, decode};
    if (many) problems.push_back(stream);
    for (const Problem& p : problems) failed += !run(e, device, p, times);
    if (hopper && e.pass == cuda::Pass::kBackward) {
      // dQ comes together in one of three ways, and the rows' statistics in one of two: by the number of key tiles for each CTA,
      // by the keys that a row sees, and whether it has to be deterministic.
      cuda::Device small = device;
      small.sm_count = 2;
      failed += !run(e, small, {{1, 4, 4, 500, 510, most, most}, causal, e.dtype, false}, times);
      failed += !run(e, small, {{1, 4, 4, 500, 510, most, most}, MaskSpec{}, e.dtype, false}, times);
      failed += !run(e, small, {{1, 4, 4, 500, 800, most, most}, MaskSpec{}, e.dtype, false}, times);
      // In turn in two sections of heads, of which the second goes the other way round. The reference takes a second.
      if (e.dtype == DType::kBFloat16 && most <= 128) {
        small.sm_count = 1;
        failed += !run(e, small, {{1, 3, 3, 1300, 1310, most, most}, causal, e.dtype, false}, times);
      }
      small.sm_count = 8;
      failed += !run(e, small, {{1, 16, 16, 250, 510, most, most}, causal, e.dtype, false}, times);
      small.sm_count = 4;
      failed += !run(e, small, {{1, 1, 1, 200, 1400, most, most}, causal, e.dtype, false}, times);
      failed += !run(e, small, {{1, 4, 4, 200, 300, most, most}, causal, e.dtype, false}, times);
      // Two key tiles, whose query tiles four CTAs share.
      failed += !run(e, device, {{1, 2, 1, 2200, 200, most, most}, MaskSpec{}, e.dtype, false}, times);
      // Two key tiles, whose six heads two CTAs share.
      failed += !run(e, device, {{1, 6, 1, 200, 200, most, most}, causal, e.dtype, false}, times);
    }
    ++launched;
  }
  std::printf("cuda_driver: %d kernels launched, %d problems wrong\n", launched, failed);
  return failed == 0 && launched > 0 ? 0 : 1;
}
