// The introspection module _C: what this binary is, what it can run and how it would run a given call. No torch header:
// it compiles in seconds and reads the same plans that the operators follow.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/config.h"
#include "cpu/engine.h"
#include "cpu/gemm.h"
#if defined(FAE_WITH_CUDA)
#include "cuda/core_check.h"
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

py::dict cpu_kernel(const char* pass, int version, const Named& dtype, const char* operand) {
  py::dict d;
  d["device"] = "cpu";
  d["arch"] = fae::cpu::tile_isa();
  d["pass"] = pass;
  d["version"] = version;
  d["dtype"] = dtype.name;
  d["operand"] = operand;
  d["head_dim_max"] = py::none();  // any
  d["features"] = std::vector<std::string>{"causal", "causal_align", "window",     "gqa",          "lse",
                                           "dlse",   "strides",      "head_dim_v", "deterministic"};
  return d;
}

py::list supported_kernels() {
  py::list rows;
  const fae::Sizes any{1, 1, 1, 1, 1, 64, 64};
  for (const Named& dtype : kDTypes) {
    const char* operand = fae::cpu::plan_forward(2, any, dtype.dtype, 0, 0, 1).operand;
    rows.append(cpu_kernel("fwd", 1, dtype, operand));
    rows.append(cpu_kernel("fwd", 2, dtype, operand));
    rows.append(cpu_kernel("bwd", 2, dtype, operand));
  }
  return rows;
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
  if (pass == "fwd") {
    const auto p = fae::cpu::plan_forward(version, sizes, dtype_of(dtype), block_m, block_n, threads);
    d["kernel"] = p.tile_name;
    d["tile"] = py::make_tuple(p.tile_m, p.tile_n);
    d["rows_per_task"] = p.rows_per_task;
    d["tasks"] = p.tasks;
    d["threads"] = p.slots;
    d["operand"] = p.operand;
    d["workspace_bytes"] = p.workspace_bytes;
    d["why"] = p.why;
  } else if (pass == "bwd") {
    const auto p = fae::cpu::plan_backward(sizes, dtype_of(dtype), threads);
    d["kernel"] = p.tile_name;
    d["tile"] = py::make_tuple(p.chunk, p.tile_n);
    d["schedule"] = p.heads_in_parallel ? "one task per key/value head" : "Latin rectangle over row and key chunks";
    d["threads"] = p.slots;
    d["operand"] = p.operand;
    d["workspace_bytes"] = p.workspace_bytes;
    d["why"] = p.why;
  } else {
    throw py::value_error("pass '" + pass + "' is neither 'fwd' nor 'bwd'");
  }
  return d;
}

#if defined(FAE_WITH_CUDA)
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
  m.def("check_core_on_cuda", &check_core_on_cuda, py::arg("count") = 4096);
#endif
}
