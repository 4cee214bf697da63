// The introspection module _C: what this binary is, what it can run and how it would run a given call. No torch header:
// it compiles in seconds and reads the same plans that the operators follow.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/config.h"
#include "cpu/engine.h"
#include "cpu/gemm.h"
#if defined(FAE_WITH_CUDA)
#include "cuda/bulk_copy.h"
#include "cuda/core_check.h"
#include "cuda/pack_groups.h"
#include "cuda/registry.h"
#endif

#define FAE_STRING_(...) #__VA_ARGS__
#define FAE_STRING(...) FAE_STRING_(__VA_ARGS__)

namespace py = pybind11;

namespace {

struct Named {
  const char* name;
  fae::DType dtype;
};
constexpr Named kDTypes[] = {{"float16", fae::DType::kFloat16},
                             {"bfloat16", fae::DType::kBFloat16},
                             {"float32", fae::DType::kFloat32},
                             {"float64", fae::DType::kFloat64}};

fae::DType dtype_of(const std::string& name) {
  for (const Named& d : kDTypes)
    if (name == d.name) return d.dtype;
  throw py::value_error("dtype '" + name + "' is none of float16, bfloat16, float32, float64");
}

py::dict build_info() {
  py::dict d;
#if defined(FAE_WITH_CUDA)
  d["cuda"] = true;
  d["cuda_archs"] = FAE_STRING(FAE_CUDA_ARCHS);
#else
  d["cuda"] = false;
  d["cuda_archs"] = "";
#endif
  d["torch"] = FAE_STRING(FAE_TORCH_VERSION);
  d["compiler"] = __VERSION__;
  d["cpu_isa"] = fae::cpu::tile_isa();
  d["cpu_bf16_gemm"] = fae::cpu::has_bf16_gemm();
  return d;
}

// What every engine has, in the words of supported_kernels().
std::vector<std::string> features() {
  return {"causal", "causal_align", "window", "gqa", "lse", "dlse", "strides", "head_dim_v", "deterministic"};
}

py::dict tile_row(const char* name, py::object head_dim_max, int rows, int keys, const char* why) {
  py::dict d;
  d["name"] = name;
  d["head_dim_max"] = head_dim_max;
  d["tile"] = std::vector<int>{rows, keys};
  d["why"] = why;
  return d;
}

py::object cpu_head_dim_max(int largest) {
  constexpr int kAny = 1 << 30;
  return largest == kAny ? py::object(py::none()) : py::object(py::int_(largest));
}

py::dict cpu_kernel(const char* pass, int version, const Named& dtype, const char* operand) {
  py::list tiles;
  const auto add = [&](const auto& t, int rows, int keys) {
    tiles.append(tile_row(t.name, cpu_head_dim_max(t.max_head_dim), rows, keys, t.why));
  };
  if (std::string(pass) == "bwd")
    for (const auto& t : fae::cpu::kBackwardTiles) add(t, t.chunk, t.tile_n);
  else if (version == 1)
    add(fae::cpu::kForwardV1Tile, fae::cpu::kForwardV1Tile.tile_m, fae::cpu::kForwardV1Tile.tile_n);
  else
    for (const auto& t : std::string(operand) == "bf16" ? fae::cpu::kForwardBf16Tiles : fae::cpu::kForwardTiles)
      add(t, t.tile_m, t.tile_n);
  py::dict d;
  d["device"] = "cpu";
  d["arch"] = fae::cpu::tile_isa();
  d["pass"] = pass;
  d["version"] = version;
  d["dtype"] = dtype.name;
  d["operand"] = operand;
  d["head_dim_max"] = py::none();  // any
  d["features"] = features();
  d["tiles"] = tiles;
  return d;
}

#if defined(FAE_WITH_CUDA)

std::string arch_of(const fae::cuda::KernelEntry& e) { return "sm" + std::to_string(e.arch); }
const char* pass_of(const fae::cuda::KernelEntry& e) { return e.pass == fae::cuda::Pass::kForward ? "fwd" : "bwd"; }
const char* dtype_name(fae::DType t) { return kDTypes[static_cast<int>(t)].name; }

// float32 takes fp32 operands, or one TF32 product where the caller's precision allows it.
const char* cuda_operand(fae::DType t, bool fp32_exact) {
  return t == fae::DType::kFloat16 ? "fp16" : t == fae::DType::kBFloat16 ? "bf16" : fp32_exact ? "fp32" : "tf32";
}

void add_launch(py::dict& d, const fae::cuda::KernelEntry& e) {
  d["threads"] = e.tile.threads;
  d["stages"] = e.tile.stages;
  d["shared_bytes"] = e.tile.shared_bytes;
}

// One row for each arch, pass, version and dtype; its entries stand under "tiles" in the order of preference.
void append_cuda_kernels(py::list& rows) {
  int count;
  const fae::cuda::KernelEntry* all = fae::cuda::entries(&count);
  const auto same = [](const fae::cuda::KernelEntry& a, const fae::cuda::KernelEntry& b) {
    return a.arch == b.arch && a.pass == b.pass && a.version == b.version && a.dtype == b.dtype;
  };
  for (int i = 0; i < count; ++i) {
    if (std::any_of(all, all + i, [&](const auto& e) { return same(e, all[i]); })) continue;
    py::list tiles;
    int largest = 0;
    for (int j = i; j < count; ++j) {
      const fae::cuda::KernelEntry& e = all[j];
      if (!same(e, all[i])) continue;
      largest = std::max(largest, e.head_dim_max);
      py::dict tile = tile_row(e.name, py::int_(e.head_dim_max), e.tile.m, e.tile.n, e.why);
      add_launch(tile, e);
      tile["for_short_problems"] = e.for_short_problems;
      tile["shared_bytes_unasked"] = e.shared_bytes_unasked;
      tiles.append(tile);
    }
    py::dict d;
    d["device"] = "cuda";
    d["arch"] = arch_of(all[i]);
    d["pass"] = pass_of(all[i]);
    d["version"] = all[i].version;
    d["dtype"] = dtype_name(all[i].dtype);
    d["operand"] = cuda_operand(all[i].dtype, true);
    d["head_dim_max"] = largest;
    d["features"] = features();
    d["tiles"] = tiles;
    rows.append(d);
  }
}

#endif

py::list supported_kernels() {
  py::list rows;
  const fae::Sizes any{1, 1, 1, 1, 1, 64, 64};
  for (const Named& dtype : kDTypes) {
    const char* operand = fae::cpu::plan_forward(2, any, dtype.dtype, 0, 0, 1).operand;
    rows.append(cpu_kernel("fwd", 1, dtype, operand));
    rows.append(cpu_kernel("fwd", 2, dtype, operand));
    rows.append(cpu_kernel("bwd", 2, dtype, operand));
  }
#if defined(FAE_WITH_CUDA)
  append_cuda_kernels(rows);
#endif
  return rows;
}

bool is_backward(const std::string& pass) {
  if (pass != "fwd" && pass != "bwd") throw py::value_error("pass '" + pass + "' is neither 'fwd' nor 'bwd'");
  return pass == "bwd";
}

py::dict plan(const std::string& pass, int version, const std::string& dtype, int64_t batch, int heads, int heads_kv,
              int seqlen_q, int seqlen_k, int head_dim, int head_dim_v, int block_m, int block_n, int threads) {
  const fae::Sizes sizes{batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v};
  py::dict d;
  d["device"] = "cpu";
  d["arch"] = fae::cpu::tile_isa();
  d["pass"] = pass;
  d["version"] = version;
  d["dtype"] = dtype;
  if (!is_backward(pass)) {
    const auto p = fae::cpu::plan_forward(version, sizes, dtype_of(dtype), block_m, block_n, threads);
    d["kernel"] = p.tile_name;
    d["tile"] = py::make_tuple(p.tile_m, p.tile_n);
    d["rows_per_task"] = p.rows_per_task;
    d["rows_per_product"] = p.rows_per_product;
    d["tasks"] = p.tasks;
    d["threads"] = p.slots;
    d["operand"] = p.operand;
    d["workspace_bytes"] = p.workspace_bytes;
    d["why"] = p.why;
  } else {
    const auto p = fae::cpu::plan_backward(sizes, dtype_of(dtype), threads);
    d["kernel"] = p.tile_name;
    d["tile"] = py::make_tuple(p.chunk, p.tile_n);
    d["schedule"] = p.heads_in_parallel ? "one task per key/value head" : "Latin rectangle over row and key chunks";
    d["threads"] = p.slots;
    d["operand"] = p.operand;
    d["workspace_bytes"] = p.workspace_bytes;
    d["why"] = p.why;
  }
  return d;
}

#if defined(FAE_WITH_CUDA)

// What the choice of a kernel depends on, of a device by its index: the last three arguments of plan_cuda.
py::dict cuda_device(int index) {
  fae::cuda::Device device;
  if (const int error = fae::cuda::device_facts(index, &device); error != 0)
    throw std::runtime_error(std::string("no CUDA device ") + std::to_string(index) +
                             " to ask: " + fae::cuda::error_text(error));
  py::dict d;
  d["compute_capability"] = device.compute_capability;
  d["sm_count"] = device.sm_count;
  d["shared_bytes"] = device.shared_bytes;
  return d;
}

// Why the copy engine cannot serve a call: tensors as (address, shape, strides). None: it can.
std::optional<std::string> bulk_copy_obstacle(
    const std::vector<std::tuple<uintptr_t, std::vector<int64_t>, std::vector<int64_t>>>& tensors,
    std::optional<double> scale) {
  const char* why = scale.has_value() ? fae::cuda::scale_obstacle(*scale) : nullptr;
  for (const auto& [data, sizes, strides] : tensors)
    if (why == nullptr && !sizes.empty())
      why = fae::cuda::bulk_copy_obstacle({data, sizes.data(), strides.data(), static_cast<int>(sizes.size())});
  return why == nullptr ? std::nullopt : std::optional<std::string>(why);
}

// As csrc/ops/op_cuda.cpp chooses, for any GPU, present or not. {"why_not": text} where nothing serves.
py::dict plan_cuda(const std::string& pass, int version, const std::string& dtype, int64_t batch, int heads,
                   int heads_kv, int seqlen_q, int seqlen_k, int head_dim, int head_dim_v, int block_m, int block_n,
                   bool deterministic, bool fp32_exact, int compute_capability, int sm_count, int shared_bytes,
                   int64_t window_left, int64_t window_right, bool top_left,
                   const std::optional<std::string>& no_bulk_copy) {
  using namespace fae::cuda;
  Call call;
  call.p.fwd.sizes = {batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v};
  const auto distance = [](int64_t w) {
    return w < 0 || w >= fae::kOpenDistance ? fae::kOpenDistance : static_cast<int>(w);
  };
  call.p.fwd.mask_spec = {distance(window_left), distance(window_right), top_left};
  call.p.deterministic = deterministic;
  call.device = {compute_capability, sm_count, shared_bytes};
  call.fp32_exact = fp32_exact;
  const Pass which = is_backward(pass) ? Pass::kBackward : Pass::kForward;
  const fae::Sizes& sizes = call.p.fwd.sizes;
  if (which == Pass::kForward && version == 2) pack_groups(&call.p.fwd, fae::size_of(dtype_of(dtype)));
  const KernelKey key = {which,
                         version,
                         dtype_of(dtype),
                         std::max(head_dim, head_dim_v),
                         block_m,
                         block_n,
                         sizes.seqlen_q,
                         sizes.heads,
                         no_bulk_copy.has_value() ? no_bulk_copy->c_str() : nullptr};
  std::string why_not;
  const KernelEntry* entry = find(key, call.device, &why_not);
  py::dict d;
  if (entry == nullptr) {
    d["why_not"] = why_not;
    return d;
  }
  d["device"] = "cuda";
  d["arch"] = arch_of(*entry);
  d["pass"] = pass;
  d["version"] = version;
  d["dtype"] = dtype;
  d["kernel"] = entry->name;
  d["tile"] = py::make_tuple(entry->tile.m, entry->tile.n);
  add_launch(d, *entry);
  d["operand"] = cuda_operand(entry->dtype, fp32_exact);
  if (which == Pass::kBackward) d["deterministic"] = deterministic;
  // Nothing is launched for an empty call.
  const bool empty = batch == 0 || seqlen_q == 0 || seqlen_k == 0;
  d["workspace_bytes"] = empty ? 0 : entry->workspace_bytes(call);
  d["why"] = entry->why;
  if (key.no_bulk_copy != nullptr) {
    KernelKey copied = key;
    copied.no_bulk_copy = nullptr;
    const KernelEntry* faster = find(copied, call.device);
    if (faster != nullptr && faster->arch > entry->arch)
      d["passed_over"] = std::string(faster->name) + ": " + key.no_bulk_copy;
  }
  return d;
}

// Compares core/ on the current CUDA device with the host on `count` pseudo-random probes; returns the differences.
std::vector<std::string> check_core_on_cuda(int count) {
  std::vector<fae::cuda::CoreProbe> probes(count);
  uint32_t state = 12345u;
  const auto random = [&](int bound) {
    state = state * 1664525u + 1013904223u;
    return static_cast<int>((state >> 8) % static_cast<uint32_t>(bound));
  };
  for (auto& p : probes) {
    p.seqlen_q = 1 + random(300);
    p.seqlen_k = 1 + random(300);
    p.spec.window_left = random(2) ? fae::kOpenDistance : random(100);
    p.spec.window_right = random(3) == 0 ? fae::kOpenDistance : random(2) ? 0 : random(100);
    p.spec.top_left = random(2) != 0;
    p.row = random(p.seqlen_q);
    p.rows_end = p.row + 1 + random(p.seqlen_q - p.row);
    p.key = random(p.seqlen_k);
    p.keys_end = p.key + 1 + random(p.seqlen_k - p.key);
    const float inf = std::numeric_limits<float>::infinity();
    p.m_old = random(4) == 0 ? -inf : static_cast<float>(random(2000) - 1000) * 0.01f;
    p.m_new = random(8) == 0 && p.m_old == -inf ? -inf : std::max(p.m_old, static_cast<float>(random(2000)) * 0.01f);
    p.l = p.m_new == -inf ? 0.0f : 0.5f + static_cast<float>(random(1000));
    p.philox_row = static_cast<uint32_t>(random(1 << 20));
    p.philox_col = static_cast<uint32_t>(random(1 << 20));
  }
  std::vector<fae::cuda::CoreAnswer> answers(count);
  if (const int error = fae::cuda::run_core_probes(probes.data(), answers.data(), count); error != 0)
    throw std::runtime_error(std::string("flash_attn_ext: the CUDA self-test did not run: ") +
                             fae::cuda::error_text(error));
  std::vector<std::string> differences;
  for (int i = 0; i < count; ++i) {
    const auto host = fae::cuda::answer_core_probe(probes[i]);
    const auto& device = answers[i];
    const auto same = [](float a, float b) { return a == b || std::fabs(a - b) <= 1e-5f * std::fabs(b); };
    if (host.visible != device.visible || host.key_begin != device.key_begin || host.key_end != device.key_end ||
        host.row_begin != device.row_begin || host.row_end != device.row_end ||
        host.whole_begin != device.whole_begin || host.whole_end != device.whole_end ||
        host.tile_is_full != device.tile_is_full || host.dropout_half != device.dropout_half)
      differences.push_back("probe " + std::to_string(i) + ": mask or dropout differs");
    if (!same(host.rescale, device.rescale) || !same(host.inverse_sum, device.inverse_sum) ||
        !same(host.lse, device.lse) || !same(host.lse_base2, device.lse_base2))
      differences.push_back("probe " + std::to_string(i) + ": softmax rule differs");
  }
  return differences;
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Introspection of the flash_attn_ext binary.";
  m.def("build_info", &build_info);
  m.def("supported_kernels", &supported_kernels);
  m.def("plan", &plan, py::kw_only(), py::arg("pass_"), py::arg("version"), py::arg("dtype"), py::arg("batch"),
        py::arg("heads"), py::arg("heads_kv"), py::arg("seqlen_q"), py::arg("seqlen_k"), py::arg("head_dim"),
        py::arg("head_dim_v"), py::arg("block_m"), py::arg("block_n"), py::arg("threads"));
#if defined(FAE_WITH_CUDA)
  m.def("cuda_device", &cuda_device, py::arg("index"));
  m.def("plan_cuda", &plan_cuda, py::kw_only(), py::arg("pass_"), py::arg("version"), py::arg("dtype"),
        py::arg("batch"), py::arg("heads"), py::arg("heads_kv"), py::arg("seqlen_q"), py::arg("seqlen_k"),
        py::arg("head_dim"), py::arg("head_dim_v"), py::arg("block_m"), py::arg("block_n"), py::arg("deterministic"),
        py::arg("fp32_exact"), py::arg("compute_capability"), py::arg("sm_count"), py::arg("shared_bytes"),
        py::arg("window_left") = -1, py::arg("window_right") = -1, py::arg("top_left") = false,
        py::arg("no_bulk_copy") = py::none());
  m.def("bulk_copy_obstacle", &bulk_copy_obstacle, py::arg("tensors"), py::arg("scale") = py::none());
  m.def("check_core_on_cuda", &check_core_on_cuda, py::arg("count") = 4096);
#endif
}
