// The CPU engine from a C++ program, without Python: fill AttentionParams, ask for a plan, hand over the workspace it
// names, run. Here each call is also compared with plain loops in double.
//
// tools/sanitize.sh builds this with AddressSanitizer and UBSan. Every buffer has its exact size: on the heap, where
// the sanitizer guards it against the engine's own code, and once more in front of a page that may not be touched, which
// guards it against the matrix kernels that oneDNN generates and the sanitizer does not see. Gaps between rows, outputs
// and workspaces start as NaN, so that what is read without having been written shows in the results.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/engine.h"
#include "guarded.h"

namespace {

using namespace fae;

// ---- buffers --------------------------------------------------------------------------------------------------------

enum class Memory { kHeap, kGuardPage };

// `count` elements, all NaN. A workspace is aligned to 64 bytes either way: its size is a multiple of that.
template <typename T>
class Buffer {
 public:
  Buffer(size_t count, Memory memory) : count_(count) {
    if (memory == Memory::kGuardPage) {
      guarded_ = std::make_unique<test::GuardedArray<T>>(count, 0xff);
      data_ = guarded_->data();
    } else {
      void* block = nullptr;
      if (posix_memalign(&block, 64, count * sizeof(T)) != 0) throw std::bad_alloc();
      heap_.reset(static_cast<T*>(block));
      data_ = heap_.get();
      std::memset(static_cast<void*>(data_), 0xff, count * sizeof(T));
    }
  }
  T* data() { return data_; }
  size_t size() const { return count_; }

 private:
  size_t count_;
  std::unique_ptr<T, decltype(&std::free)> heap_{nullptr, &std::free};
  std::unique_ptr<test::GuardedArray<T>> guarded_;
  T* data_ = nullptr;
};

// How a (batch, heads, seq, dim) tensor lies in memory.
enum class Layout { kHeadsFirst, kSeqFirst, kPaddedRows, kReversedSeq };

template <typename T>
class Tensor {
 public:
  Tensor(int64_t batch, int heads, int seq, int dim, Layout layout, Memory memory)
      : batch(batch), heads(heads), seq(seq), dim(dim) {
    const int64_t row = layout == Layout::kPaddedRows ? dim + 3 : dim;
    const bool seq_first = layout == Layout::kSeqFirst;
    ref_.stride_s = seq_first ? row * heads : row;
    ref_.stride_h = seq_first ? row : row * seq;
    ref_.stride_b = row * heads * seq;
    const bool empty = batch * heads * seq * dim == 0;
    // Up to the last element and not to the end of the last row's padding.
    buffer_ = std::make_unique<Buffer<T>>(empty ? 0 : ref_.stride_b * batch - row + dim, memory);
    T* first = buffer_->data();
    if (layout == Layout::kReversedSeq && !empty) {
      first += (seq - 1) * ref_.stride_s;
      ref_.stride_s = -ref_.stride_s;
    }
    ref_.data = first;
  }
  const TensorRef& ref() const { return ref_; }
  T& at(int64_t b, int h, int s, int d) { return ref_.row<T>(b, h, s)[d]; }
  void fill_normal(std::mt19937& rng) {
    std::normal_distribution<float> normal;
    for (int64_t b = 0; b < batch; ++b)
      for (int h = 0; h < heads; ++h)
        for (int s = 0; s < seq; ++s)
          for (int d = 0; d < dim; ++d) at(b, h, s, d) = static_cast<T>(normal(rng));
  }
  std::vector<double> values() {
    std::vector<double> v;
    for (int64_t b = 0; b < batch; ++b)
      for (int h = 0; h < heads; ++h)
        for (int s = 0; s < seq; ++s)
          for (int d = 0; d < dim; ++d) v.push_back(static_cast<double>(at(b, h, s, d)));
    return v;
  }

  const int64_t batch;
  const int heads, seq, dim;

 private:
  TensorRef ref_;
  std::unique_ptr<Buffer<T>> buffer_;
};

template <typename T>
RowRef row_ref(Tensor<T>& t) {  // a (batch, heads, seq) tensor is one of (batch, heads, 1, seq)
  return {t.ref().data, t.ref().stride_b, t.ref().stride_h};
}

// ---- the calls ------------------------------------------------------------------------------------------------------

struct Case {
  const char* name;
  int64_t batch;
  int heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v;
  MaskSpec mask = {};
  Layout layout = Layout::kHeadsFirst;
  int block_m = 0, block_n = 0;  // of the forwards; 0 is the engine's choice
  bool with_dlse = false;
};

constexpr MaskSpec kCausal = {kOpenDistance, 0, false}, kCausalTopLeft = {kOpenDistance, 0, true};

const Case kCases[] = {
    {"one element", 1, 1, 1, 1, 1, 1, 1},
    {"one row, odd keys", 1, 2, 1, 1, 147, 16, 16},
    {"one key", 1, 2, 2, 131, 1, 32, 32, {}, Layout::kPaddedRows},
    {"no key", 2, 2, 1, 5, 0, 8, 8},
    {"odd everything", 2, 4, 2, 113, 203, 59, 59, kCausal, Layout::kHeadsFirst, 0, 0, true},
    {"strided, Dv < D", 2, 2, 1, 127, 129, 40, 23, {}, Layout::kSeqFirst, 0, 0, true},
    {"padded rows, Dv > D", 1, 3, 3, 65, 97, 17, 33, {20, 7, false}, Layout::kPaddedRows},
    {"reversed, empty rows", 1, 2, 2, 203, 60, 64, 64, kCausal, Layout::kReversedSeq, 0, 0, true},
    {"empty columns", 1, 4, 1, 60, 203, 64, 64, kCausalTopLeft, Layout::kPaddedRows},
    {"two backward chunks", 1, 2, 2, 257, 300, 32, 32, {64, 0, false}, Layout::kSeqFirst, 32, 32},
    {"several forward groups", 1, 1, 1, 600, 288, 8, 8, kCausal, Layout::kHeadsFirst, 96, 128},
    {"wide heads", 1, 2, 1, 96, 141, 160, 160, {30, 30, true}, Layout::kPaddedRows, 0, 0, true},
    {"D 256, Dv 1", 1, 1, 1, 33, 161, 256, 1, kCausal, Layout::kHeadsFirst},
    {"window 0", 1, 2, 2, 70, 70, 111, 111, {0, 0, false}, Layout::kSeqFirst, 64, 32},
};

template <typename T>
struct Traits;
template <>
struct Traits<double> {
  static constexpr DType kDType = DType::kFloat64;
  static constexpr double kTolerance = 1e-12;
  using Stats = double;
};
template <>
struct Traits<float> {
  static constexpr DType kDType = DType::kFloat32;
  static constexpr double kTolerance = 1e-5;
  using Stats = float;
};
template <>
struct Traits<c10::Half> {
  static constexpr DType kDType = DType::kFloat16;
  static constexpr double kTolerance = 4e-3;
  using Stats = float;
};
template <>
struct Traits<c10::BFloat16> {
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr double kTolerance = 3e-2;
  using Stats = float;
};

// Everything one call reads and writes.
template <typename T>
struct Call {
  using Stats = typename Traits<T>::Stats;
  Tensor<T> q, k, v, o, dout, dq, dk, dv;
  Tensor<Stats> lse, dlse;
  BackwardParams params;

  Call(const Case& c, Memory memory)
      : q(c.batch, c.heads, c.seqlen_q, c.head_dim, c.layout, memory),
        k(c.batch, c.heads_kv, c.seqlen_k, c.head_dim, c.layout, memory),
        v(c.batch, c.heads_kv, c.seqlen_k, c.head_dim_v, c.layout, memory),
        o(c.batch, c.heads, c.seqlen_q, c.head_dim_v, c.layout, memory),
        dout(c.batch, c.heads, c.seqlen_q, c.head_dim_v, c.layout, memory),
        dq(c.batch, c.heads, c.seqlen_q, c.head_dim, c.layout, memory),
        dk(c.batch, c.heads_kv, c.seqlen_k, c.head_dim, c.layout, memory),
        dv(c.batch, c.heads_kv, c.seqlen_k, c.head_dim_v, c.layout, memory),
        lse(c.batch, c.heads, 1, c.seqlen_q, Layout::kHeadsFirst, memory),
        dlse(c.batch, c.heads, 1, c.seqlen_q, Layout::kHeadsFirst, memory) {
    std::mt19937 rng(17);
    for (Tensor<T>* t : {&q, &k, &v, &dout}) t->fill_normal(rng);
    dlse.fill_normal(rng);

    AttentionParams& p = params.fwd;
    p.q = q.ref();
    p.k = k.ref();
    p.v = v.ref();
    p.o = o.ref();
    p.lse = row_ref(lse);
    p.sizes = {c.batch, c.heads, c.heads_kv, c.seqlen_q, c.seqlen_k, c.head_dim, c.head_dim_v};
    p.mask_spec = c.mask;
    p.scale = 1 / std::sqrt(static_cast<double>(c.head_dim));
    params.dout = dout.ref();
    params.dq = dq.ref();
    params.dk = dk.ref();
    params.dv = dv.ref();
    if (c.with_dlse) params.dlse = row_ref(dlse);
  }

  void forward(int version, const Case& c, int threads, Memory memory) {
    const cpu::ForwardPlan plan =
        cpu::plan_forward(version, params.fwd.sizes, Traits<T>::kDType, c.block_m, c.block_n, threads);
    Buffer<std::byte> workspace(plan.workspace_bytes, memory);
    const auto run = version == 1 ? cpu::forward_v1 : cpu::forward_v2;
    run(params.fwd, Traits<T>::kDType, plan, workspace.data());
  }
  void backward(int threads, Memory memory) {
    const cpu::BackwardPlan plan = cpu::plan_backward(params.fwd.sizes, Traits<T>::kDType, threads);
    Buffer<std::byte> workspace(plan.workspace_bytes, memory);
    cpu::backward_v2(params, Traits<T>::kDType, plan, workspace.data());
  }
};

// ---- the same in plain loops ----------------------------------------------------------------------------------------

struct Expected {
  std::vector<double> out, lse, dq, dk, dv;
};

template <typename T>
Expected plain_loops(const Case& c, Call<T>& call) {
  const auto index = [](int heads, int seq, int dim, int64_t b, int h, int s) {
    return ((b * heads + h) * seq + s) * dim;
  };
  const int group = c.heads / c.heads_kv, d = c.head_dim, dv = c.head_dim_v;
  const std::vector<double> q = call.q.values(), k = call.k.values(), v = call.v.values(), dout = call.dout.values(),
                            dlse = call.dlse.values();
  Expected e;
  e.out.assign(dout.size(), 0);
  e.lse.assign(dlse.size(), 0);
  e.dq.assign(q.size(), 0);
  e.dk.assign(k.size(), 0);
  e.dv.assign(v.size(), 0);
  const double scale = call.params.fwd.scale;
  const int64_t shift = c.mask.top_left ? 0 : c.seqlen_k - c.seqlen_q;
  std::vector<double> p(static_cast<size_t>(c.seqlen_k));
  for (int64_t b = 0; b < c.batch; ++b)
    for (int h = 0; h < c.heads; ++h)
      for (int i = 0; i < c.seqlen_q; ++i) {
        const double* q_i = &q[index(c.heads, c.seqlen_q, d, b, h, i)];
        const double* do_i = &dout[index(c.heads, c.seqlen_q, dv, b, h, i)];
        double* out_i = &e.out[index(c.heads, c.seqlen_q, dv, b, h, i)];
        double* dq_i = &e.dq[index(c.heads, c.seqlen_q, d, b, h, i)];
        const int64_t row = index(c.heads, c.seqlen_q, 1, b, h, i);
        const auto key = [&](int j) { return index(c.heads_kv, c.seqlen_k, d, b, h / group, j); };
        const auto value = [&](int j) { return index(c.heads_kv, c.seqlen_k, dv, b, h / group, j); };
        double top = -std::numeric_limits<double>::infinity(), sum = 0;
        for (int j = 0; j < c.seqlen_k; ++j) {
          const bool visible = i + shift - j <= c.mask.window_left && j - i - shift <= c.mask.window_right;
          p[j] = -std::numeric_limits<double>::infinity();
          if (!visible) continue;
          p[j] = 0;
          for (int x = 0; x < d; ++x) p[j] += scale * q_i[x] * k[key(j) + x];
          top = std::max(top, p[j]);
        }
        for (int j = 0; j < c.seqlen_k; ++j) sum += p[j] = std::isinf(p[j]) ? 0 : std::exp(p[j] - top);
        e.lse[row] = top + std::log(sum);  // -inf where no key is visible
        double delta = c.with_dlse && sum > 0 ? -dlse[row] : 0;
        for (int j = 0; j < c.seqlen_k; ++j) {
          if (p[j] == 0) continue;
          p[j] /= sum;
          for (int x = 0; x < dv; ++x) out_i[x] += p[j] * v[value(j) + x];
        }
        for (int x = 0; x < dv; ++x) delta += do_i[x] * out_i[x];
        for (int j = 0; j < c.seqlen_k; ++j) {
          if (p[j] == 0) continue;
          double dp = 0;
          for (int x = 0; x < dv; ++x) {
            dp += do_i[x] * v[value(j) + x];
            e.dv[value(j) + x] += p[j] * do_i[x];
          }
          const double ds = p[j] * (dp - delta) * scale;
          for (int x = 0; x < d; ++x) {
            dq_i[x] += ds * k[key(j) + x];
            e.dk[key(j) + x] += ds * q_i[x];
          }
        }
      }
  return e;
}

int failures = 0;

void compare(const std::string& what, const std::vector<double>& got, const std::vector<double>& want,
             double tolerance) {
  double largest = 1, worst = 0;
  for (const double x : want)
    if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = got[i] == want[i] ? 0 : std::fabs(got[i] - want[i]);  // equal infinities differ by nothing
    worst = error <= worst ? worst : error;                                    // a NaN stays
  }
  if (got.size() == want.size() && worst <= tolerance * largest) return;
  std::printf("FAILED %s: off by %g, allowed %g\n", what.c_str(), worst, tolerance * largest);
  ++failures;
}

void compare_bits(const std::string& what, const std::vector<double>& got, const std::vector<double>& want) {
  if (got.empty() || std::memcmp(got.data(), want.data(), got.size() * sizeof(double)) == 0) return;
  std::printf("FAILED %s: other bits than with one thread\n", what.c_str());
  ++failures;
}

template <typename T>
void check(const char* dtype, const Case& c) {
  const double tolerance = Traits<T>::kTolerance;
  for (const Memory memory : {Memory::kHeap, Memory::kGuardPage}) {
    Expected want, one_thread;
    for (const int threads : {1, 2, 5}) {
      at::set_num_threads(threads);
      const std::string name = std::string(c.name) + ", " + dtype + ", " + std::to_string(threads) + " threads" +
                               (memory == Memory::kHeap ? "" : ", guard pages");
      Call<T> call(c, memory);
      if (threads == 1) want = plain_loops(c, call);
      call.forward(1, c, threads, memory);
      compare(name + ": out of version 1", call.o.values(), want.out, tolerance);
      compare(name + ": lse of version 1", call.lse.values(), want.lse, tolerance);
      call.forward(2, c, threads, memory);
      compare(name + ": out", call.o.values(), want.out, tolerance);
      compare(name + ": lse", call.lse.values(), want.lse, tolerance);
      call.backward(threads, memory);
      // The gradients sum many rounded terms: measured against the largest of them.
      compare(name + ": dq", call.dq.values(), want.dq, 4 * tolerance);
      compare(name + ": dk", call.dk.values(), want.dk, 4 * tolerance);
      compare(name + ": dv", call.dv.values(), want.dv, 4 * tolerance);
      const Expected got = {call.o.values(), call.lse.values(), call.dq.values(), call.dk.values(), call.dv.values()};
      if (threads == 1) {
        one_thread = got;
        continue;
      }
      compare_bits(name + ": out", got.out, one_thread.out);
      compare_bits(name + ": lse", got.lse, one_thread.lse);
      compare_bits(name + ": dq", got.dq, one_thread.dq);
      compare_bits(name + ": dk", got.dk, one_thread.dk);
      compare_bits(name + ": dv", got.dv, one_thread.dv);
    }
  }
}

}  // namespace

int main() {
  for (const Case& c : kCases) {
    check<double>("fp64", c);
    check<float>("fp32", c);
    check<c10::Half>("fp16", c);
    check<c10::BFloat16>("bf16", c);
  }
  const char* operand = cpu::plan_backward({1, 1, 1, 1, 1, 1, 1}, DType::kBFloat16, 1).operand;
  std::printf("%zu cases, 4 dtypes, 3 thread counts, bf16 multiplied in %s: %d failures\n", std::size(kCases), operand,
              failures);
  return failures == 0 ? 0 : 1;
}
