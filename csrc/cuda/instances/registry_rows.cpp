// Written by table.py: do not edit. All entries, in the order of preference.
#include "../registry.h"

namespace fae::cuda {

namespace rows {
KernelEntry sm80_fwd_d32_fp16();
KernelEntry sm80_fwd_d32_bf16();
KernelEntry sm80_fwd_d64_n128_fp16();
KernelEntry sm80_fwd_d64_n128_bf16();
KernelEntry sm80_fwd_d64_fp16();
KernelEntry sm80_fwd_d64_bf16();
KernelEntry sm80_fwd_d64_m16_fp16();
KernelEntry sm80_fwd_d64_m16_bf16();
KernelEntry sm80_fwd_d96_fp16();
KernelEntry sm80_fwd_d96_bf16();
KernelEntry sm80_fwd_d128_fp16();
KernelEntry sm80_fwd_d128_bf16();
KernelEntry sm80_fwd_d128_m16_fp16();
KernelEntry sm80_fwd_d128_m16_bf16();
KernelEntry sm80_fwd_d192_fp16();
KernelEntry sm80_fwd_d192_bf16();
KernelEntry sm80_fwd_d256_fp16();
KernelEntry sm80_fwd_d256_bf16();
KernelEntry sm80_fwd_d256_small_fp16();
KernelEntry sm80_fwd_d256_small_bf16();
KernelEntry sm80_fwd_f32_d32_fp32();
KernelEntry sm80_fwd_f32_d64_fp32();
KernelEntry sm80_fwd_f32_d64_m16_fp32();
KernelEntry sm80_fwd_f32_d128_fp32();
KernelEntry sm80_fwd_f32_d256_fp32();
KernelEntry sm80_fwd_f32_d256_small_fp32();
KernelEntry sm80_fwd_v1_d64_n128_fp16();
KernelEntry sm80_fwd_v1_d64_n128_bf16();
KernelEntry sm80_fwd_v1_d64_n128_w8_fp16();
KernelEntry sm80_fwd_v1_d64_n128_w8_bf16();
KernelEntry sm80_fwd_v1_d64_n128_w2_fp16();
KernelEntry sm80_fwd_v1_d64_n128_w2_bf16();
KernelEntry sm80_fwd_v1_d64_n64_fp16();
KernelEntry sm80_fwd_v1_d64_n64_bf16();
KernelEntry sm80_fwd_v1_d64_n64_w8_fp16();
KernelEntry sm80_fwd_v1_d64_n64_w8_bf16();
KernelEntry sm80_fwd_v1_d64_n64_w2_fp16();
KernelEntry sm80_fwd_v1_d64_n64_w2_bf16();
KernelEntry sm80_fwd_v1_d64_n32_fp16();
KernelEntry sm80_fwd_v1_d64_n32_bf16();
KernelEntry sm80_fwd_v1_d64_n32_w8_fp16();
KernelEntry sm80_fwd_v1_d64_n32_w8_bf16();
KernelEntry sm80_fwd_v1_d64_n32_w2_fp16();
KernelEntry sm80_fwd_v1_d64_n32_w2_bf16();
KernelEntry sm80_fwd_v1_d128_n128_fp16();
KernelEntry sm80_fwd_v1_d128_n128_bf16();
KernelEntry sm80_fwd_v1_d128_n128_w2_fp16();
KernelEntry sm80_fwd_v1_d128_n128_w2_bf16();
KernelEntry sm80_fwd_v1_d128_n64_fp16();
KernelEntry sm80_fwd_v1_d128_n64_bf16();
KernelEntry sm80_fwd_v1_d128_n64_w8_fp16();
KernelEntry sm80_fwd_v1_d128_n64_w8_bf16();
KernelEntry sm80_fwd_v1_d128_n64_w2_fp16();
KernelEntry sm80_fwd_v1_d128_n64_w2_bf16();
KernelEntry sm80_fwd_v1_d128_n32_fp16();
KernelEntry sm80_fwd_v1_d128_n32_bf16();
KernelEntry sm80_fwd_v1_d128_n32_w8_fp16();
KernelEntry sm80_fwd_v1_d128_n32_w8_bf16();
KernelEntry sm80_fwd_v1_d128_n32_w2_fp16();
KernelEntry sm80_fwd_v1_d128_n32_w2_bf16();
KernelEntry sm80_fwd_v1_d256_n32_fp16();
KernelEntry sm80_fwd_v1_d256_n32_bf16();
KernelEntry sm80_fwd_v1_d256_n32_w8_fp16();
KernelEntry sm80_fwd_v1_d256_n32_w8_bf16();
KernelEntry sm80_fwd_v1_d256_n32_w2_fp16();
KernelEntry sm80_fwd_v1_d256_n32_w2_bf16();
KernelEntry sm80_fwd_v1_f32_d64_n128_fp32();
KernelEntry sm80_fwd_v1_f32_d64_n128_w8_fp32();
KernelEntry sm80_fwd_v1_f32_d64_n128_w2_fp32();
KernelEntry sm80_fwd_v1_f32_d64_n64_fp32();
KernelEntry sm80_fwd_v1_f32_d64_n64_w8_fp32();
KernelEntry sm80_fwd_v1_f32_d64_n64_w2_fp32();
KernelEntry sm80_fwd_v1_f32_d64_n32_fp32();
KernelEntry sm80_fwd_v1_f32_d64_n32_w8_fp32();
KernelEntry sm80_fwd_v1_f32_d64_n32_w2_fp32();
KernelEntry sm80_fwd_v1_f32_d128_n64_fp32();
KernelEntry sm80_fwd_v1_f32_d128_n64_w2_fp32();
KernelEntry sm80_fwd_v1_f32_d128_n32_fp32();
KernelEntry sm80_fwd_v1_f32_d128_n32_w8_fp32();
KernelEntry sm80_fwd_v1_f32_d128_n32_w2_fp32();
KernelEntry sm80_fwd_v1_f32_d256_n32_fp32();
KernelEntry sm80_bwd_d32_fp16();
KernelEntry sm80_bwd_d32_bf16();
KernelEntry sm80_bwd_d64_fp16();
KernelEntry sm80_bwd_d64_bf16();
KernelEntry sm80_bwd_d96_fp16();
KernelEntry sm80_bwd_d96_bf16();
KernelEntry sm80_bwd_d128_w8_fp16();
KernelEntry sm80_bwd_d128_w8_bf16();
KernelEntry sm80_bwd_d128_s1_fp16();
KernelEntry sm80_bwd_d128_s1_bf16();
KernelEntry sm80_bwd_d192_m128_fp16();
KernelEntry sm80_bwd_d192_m128_bf16();
KernelEntry sm80_bwd_d192_small_fp16();
KernelEntry sm80_bwd_d192_small_bf16();
KernelEntry sm80_bwd_d256_m128_fp16();
KernelEntry sm80_bwd_d256_m128_bf16();
KernelEntry sm80_bwd_d256_s1_fp16();
KernelEntry sm80_bwd_d256_s1_bf16();
KernelEntry sm80_bwd_d256_small_fp16();
KernelEntry sm80_bwd_d256_small_bf16();
KernelEntry sm80_bwd_f32_d32_fp32();
KernelEntry sm80_bwd_f32_d64_fp32();
KernelEntry sm80_bwd_f32_d128_fp32();
KernelEntry sm80_bwd_f32_d128_s1_fp32();
KernelEntry sm80_bwd_f32_d256_w8_fp32();
KernelEntry sm80_bwd_f32_d256_fp32();
}  // namespace rows

namespace {
KernelEntry row(KernelEntry entry, const char* name, bool for_short_problems = false) {
  entry.name = name;
  entry.for_short_problems = for_short_problems;
  return entry;
}
}  // namespace

const KernelEntry* entries(int* count) {
  static const KernelEntry kEntries[] = {
      row(rows::sm80_fwd_d32_fp16(), "sm80_fwd_d32"),
      row(rows::sm80_fwd_d32_bf16(), "sm80_fwd_d32"),
      row(rows::sm80_fwd_d64_n128_fp16(), "sm80_fwd_d64_n128"),
      row(rows::sm80_fwd_d64_n128_bf16(), "sm80_fwd_d64_n128"),
      row(rows::sm80_fwd_d64_fp16(), "sm80_fwd_d64"),
      row(rows::sm80_fwd_d64_bf16(), "sm80_fwd_d64"),
      row(rows::sm80_fwd_d64_m16_fp16(), "sm80_fwd_d64_m16", true),
      row(rows::sm80_fwd_d64_m16_bf16(), "sm80_fwd_d64_m16", true),
      row(rows::sm80_fwd_d96_fp16(), "sm80_fwd_d96"),
      row(rows::sm80_fwd_d96_bf16(), "sm80_fwd_d96"),
      row(rows::sm80_fwd_d128_fp16(), "sm80_fwd_d128"),
      row(rows::sm80_fwd_d128_bf16(), "sm80_fwd_d128"),
      row(rows::sm80_fwd_d128_m16_fp16(), "sm80_fwd_d128_m16", true),
      row(rows::sm80_fwd_d128_m16_bf16(), "sm80_fwd_d128_m16", true),
      row(rows::sm80_fwd_d192_fp16(), "sm80_fwd_d192"),
      row(rows::sm80_fwd_d192_bf16(), "sm80_fwd_d192"),
      row(rows::sm80_fwd_d256_fp16(), "sm80_fwd_d256"),
      row(rows::sm80_fwd_d256_bf16(), "sm80_fwd_d256"),
      row(rows::sm80_fwd_d256_small_fp16(), "sm80_fwd_d256_small"),
      row(rows::sm80_fwd_d256_small_bf16(), "sm80_fwd_d256_small"),
      row(rows::sm80_fwd_f32_d32_fp32(), "sm80_fwd_f32_d32"),
      row(rows::sm80_fwd_f32_d64_fp32(), "sm80_fwd_f32_d64"),
      row(rows::sm80_fwd_f32_d64_m16_fp32(), "sm80_fwd_f32_d64_m16", true),
      row(rows::sm80_fwd_f32_d128_fp32(), "sm80_fwd_f32_d128"),
      row(rows::sm80_fwd_f32_d256_fp32(), "sm80_fwd_f32_d256"),
      row(rows::sm80_fwd_f32_d256_small_fp32(), "sm80_fwd_f32_d256_small"),
      row(rows::sm80_fwd_v1_d64_n128_fp16(), "sm80_fwd_v1_d64_n128"),
      row(rows::sm80_fwd_v1_d64_n128_bf16(), "sm80_fwd_v1_d64_n128"),
      row(rows::sm80_fwd_v1_d64_n128_w8_fp16(), "sm80_fwd_v1_d64_n128_w8"),
      row(rows::sm80_fwd_v1_d64_n128_w8_bf16(), "sm80_fwd_v1_d64_n128_w8"),
      row(rows::sm80_fwd_v1_d64_n128_w2_fp16(), "sm80_fwd_v1_d64_n128_w2"),
      row(rows::sm80_fwd_v1_d64_n128_w2_bf16(), "sm80_fwd_v1_d64_n128_w2"),
      row(rows::sm80_fwd_v1_d64_n64_fp16(), "sm80_fwd_v1_d64_n64"),
      row(rows::sm80_fwd_v1_d64_n64_bf16(), "sm80_fwd_v1_d64_n64"),
      row(rows::sm80_fwd_v1_d64_n64_w8_fp16(), "sm80_fwd_v1_d64_n64_w8"),
      row(rows::sm80_fwd_v1_d64_n64_w8_bf16(), "sm80_fwd_v1_d64_n64_w8"),
      row(rows::sm80_fwd_v1_d64_n64_w2_fp16(), "sm80_fwd_v1_d64_n64_w2"),
      row(rows::sm80_fwd_v1_d64_n64_w2_bf16(), "sm80_fwd_v1_d64_n64_w2"),
      row(rows::sm80_fwd_v1_d64_n32_fp16(), "sm80_fwd_v1_d64_n32"),
      row(rows::sm80_fwd_v1_d64_n32_bf16(), "sm80_fwd_v1_d64_n32"),
      row(rows::sm80_fwd_v1_d64_n32_w8_fp16(), "sm80_fwd_v1_d64_n32_w8"),
      row(rows::sm80_fwd_v1_d64_n32_w8_bf16(), "sm80_fwd_v1_d64_n32_w8"),
      row(rows::sm80_fwd_v1_d64_n32_w2_fp16(), "sm80_fwd_v1_d64_n32_w2"),
      row(rows::sm80_fwd_v1_d64_n32_w2_bf16(), "sm80_fwd_v1_d64_n32_w2"),
      row(rows::sm80_fwd_v1_d128_n128_fp16(), "sm80_fwd_v1_d128_n128"),
      row(rows::sm80_fwd_v1_d128_n128_bf16(), "sm80_fwd_v1_d128_n128"),
      row(rows::sm80_fwd_v1_d128_n128_w2_fp16(), "sm80_fwd_v1_d128_n128_w2"),
      row(rows::sm80_fwd_v1_d128_n128_w2_bf16(), "sm80_fwd_v1_d128_n128_w2"),
      row(rows::sm80_fwd_v1_d128_n64_fp16(), "sm80_fwd_v1_d128_n64"),
      row(rows::sm80_fwd_v1_d128_n64_bf16(), "sm80_fwd_v1_d128_n64"),
      row(rows::sm80_fwd_v1_d128_n64_w8_fp16(), "sm80_fwd_v1_d128_n64_w8"),
      row(rows::sm80_fwd_v1_d128_n64_w8_bf16(), "sm80_fwd_v1_d128_n64_w8"),
      row(rows::sm80_fwd_v1_d128_n64_w2_fp16(), "sm80_fwd_v1_d128_n64_w2"),
      row(rows::sm80_fwd_v1_d128_n64_w2_bf16(), "sm80_fwd_v1_d128_n64_w2"),
      row(rows::sm80_fwd_v1_d128_n32_fp16(), "sm80_fwd_v1_d128_n32"),
      row(rows::sm80_fwd_v1_d128_n32_bf16(), "sm80_fwd_v1_d128_n32"),
      row(rows::sm80_fwd_v1_d128_n32_w8_fp16(), "sm80_fwd_v1_d128_n32_w8"),
      row(rows::sm80_fwd_v1_d128_n32_w8_bf16(), "sm80_fwd_v1_d128_n32_w8"),
      row(rows::sm80_fwd_v1_d128_n32_w2_fp16(), "sm80_fwd_v1_d128_n32_w2"),
      row(rows::sm80_fwd_v1_d128_n32_w2_bf16(), "sm80_fwd_v1_d128_n32_w2"),
      row(rows::sm80_fwd_v1_d256_n32_fp16(), "sm80_fwd_v1_d256_n32"),
      row(rows::sm80_fwd_v1_d256_n32_bf16(), "sm80_fwd_v1_d256_n32"),
      row(rows::sm80_fwd_v1_d256_n32_w8_fp16(), "sm80_fwd_v1_d256_n32_w8"),
      row(rows::sm80_fwd_v1_d256_n32_w8_bf16(), "sm80_fwd_v1_d256_n32_w8"),
      row(rows::sm80_fwd_v1_d256_n32_w2_fp16(), "sm80_fwd_v1_d256_n32_w2"),
      row(rows::sm80_fwd_v1_d256_n32_w2_bf16(), "sm80_fwd_v1_d256_n32_w2"),
      row(rows::sm80_fwd_v1_f32_d64_n128_fp32(), "sm80_fwd_v1_f32_d64_n128"),
      row(rows::sm80_fwd_v1_f32_d64_n128_w8_fp32(), "sm80_fwd_v1_f32_d64_n128_w8"),
      row(rows::sm80_fwd_v1_f32_d64_n128_w2_fp32(), "sm80_fwd_v1_f32_d64_n128_w2"),
      row(rows::sm80_fwd_v1_f32_d64_n64_fp32(), "sm80_fwd_v1_f32_d64_n64"),
      row(rows::sm80_fwd_v1_f32_d64_n64_w8_fp32(), "sm80_fwd_v1_f32_d64_n64_w8"),
      row(rows::sm80_fwd_v1_f32_d64_n64_w2_fp32(), "sm80_fwd_v1_f32_d64_n64_w2"),
      row(rows::sm80_fwd_v1_f32_d64_n32_fp32(), "sm80_fwd_v1_f32_d64_n32"),
      row(rows::sm80_fwd_v1_f32_d64_n32_w8_fp32(), "sm80_fwd_v1_f32_d64_n32_w8"),
      row(rows::sm80_fwd_v1_f32_d64_n32_w2_fp32(), "sm80_fwd_v1_f32_d64_n32_w2"),
      row(rows::sm80_fwd_v1_f32_d128_n64_fp32(), "sm80_fwd_v1_f32_d128_n64"),
      row(rows::sm80_fwd_v1_f32_d128_n64_w2_fp32(), "sm80_fwd_v1_f32_d128_n64_w2"),
      row(rows::sm80_fwd_v1_f32_d128_n32_fp32(), "sm80_fwd_v1_f32_d128_n32"),
      row(rows::sm80_fwd_v1_f32_d128_n32_w8_fp32(), "sm80_fwd_v1_f32_d128_n32_w8"),
      row(rows::sm80_fwd_v1_f32_d128_n32_w2_fp32(), "sm80_fwd_v1_f32_d128_n32_w2"),
      row(rows::sm80_fwd_v1_f32_d256_n32_fp32(), "sm80_fwd_v1_f32_d256_n32"),
      row(rows::sm80_bwd_d32_fp16(), "sm80_bwd_d32"),
      row(rows::sm80_bwd_d32_bf16(), "sm80_bwd_d32"),
      row(rows::sm80_bwd_d64_fp16(), "sm80_bwd_d64"),
      row(rows::sm80_bwd_d64_bf16(), "sm80_bwd_d64"),
      row(rows::sm80_bwd_d96_fp16(), "sm80_bwd_d96"),
      row(rows::sm80_bwd_d96_bf16(), "sm80_bwd_d96"),
      row(rows::sm80_bwd_d128_w8_fp16(), "sm80_bwd_d128_w8"),
      row(rows::sm80_bwd_d128_w8_bf16(), "sm80_bwd_d128_w8"),
      row(rows::sm80_bwd_d128_s1_fp16(), "sm80_bwd_d128_s1"),
      row(rows::sm80_bwd_d128_s1_bf16(), "sm80_bwd_d128_s1"),
      row(rows::sm80_bwd_d192_m128_fp16(), "sm80_bwd_d192_m128"),
      row(rows::sm80_bwd_d192_m128_bf16(), "sm80_bwd_d192_m128"),
      row(rows::sm80_bwd_d192_small_fp16(), "sm80_bwd_d192_small"),
      row(rows::sm80_bwd_d192_small_bf16(), "sm80_bwd_d192_small"),
      row(rows::sm80_bwd_d256_m128_fp16(), "sm80_bwd_d256_m128"),
      row(rows::sm80_bwd_d256_m128_bf16(), "sm80_bwd_d256_m128"),
      row(rows::sm80_bwd_d256_s1_fp16(), "sm80_bwd_d256_s1"),
      row(rows::sm80_bwd_d256_s1_bf16(), "sm80_bwd_d256_s1"),
      row(rows::sm80_bwd_d256_small_fp16(), "sm80_bwd_d256_small"),
      row(rows::sm80_bwd_d256_small_bf16(), "sm80_bwd_d256_small"),
      row(rows::sm80_bwd_f32_d32_fp32(), "sm80_bwd_f32_d32"),
      row(rows::sm80_bwd_f32_d64_fp32(), "sm80_bwd_f32_d64"),
      row(rows::sm80_bwd_f32_d128_fp32(), "sm80_bwd_f32_d128"),
      row(rows::sm80_bwd_f32_d128_s1_fp32(), "sm80_bwd_f32_d128_s1"),
      row(rows::sm80_bwd_f32_d256_w8_fp32(), "sm80_bwd_f32_d256_w8"),
      row(rows::sm80_bwd_f32_d256_fp32(), "sm80_bwd_f32_d256"),
  };
  *count = static_cast<int>(sizeof(kEntries) / sizeof(kEntries[0]));
  return kEntries;
}

}  // namespace fae::cuda
