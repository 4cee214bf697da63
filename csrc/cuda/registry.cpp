// The search through the table, and the sentences for when it finds nothing. The success path allocates nothing and
// costs a fraction of a microsecond: it runs in every call.
#include "registry.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string_view>

#include "../core/platform.h"

namespace fae::cuda {

namespace {

constexpr int kLeastCapability = 80;
constexpr int kKnownDevices = 64;
// A problem is short where the large tiles of one batch entry, this many times over, would still leave SMs idle: the small
// tiles read K and V more often, which a full batch would pay for.
constexpr int kShortFactor = 4;
// Rows of one sequence up to which a short problem is left to the small tiles of older kernels: a warpgroup of Hopper's takes
// 64 rows at once, and that many keep its tensor cores busier than tiles of 16 do.
constexpr int kFewRows = 64;
constexpr const char* kForce = "FLASH_ATTN_EXT_KERNEL";

cudaError_t ask_driver(int index, Device* device) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&device->sm_count, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  device->compute_capability = 10 * major + minor;
  return error;
}

// Whether `name` stands in a list separated by commas.
bool listed(const char* list, const char* name) {
  const size_t length = std::strlen(name);
  for (const char* at = list; (at = std::strstr(at, name)) != nullptr; at += length)
    if ((at == list || at[-1] == ',') && (at[length] == ',' || at[length] == '\0')) return true;
  return false;
}

bool same_kind(const KernelEntry& e, const KernelKey& key) {
  return e.pass == key.pass && e.version == key.version && e.dtype == key.dtype;
}

bool has_tile(const KernelEntry& e, const KernelKey& key) {
  return key.tile_m == 0 || (e.tile.m == key.tile_m && e.tile.n == key.tile_n);
}

bool may_be_preferred(const KernelEntry& e, const Device& device) {
  return e.shared_bytes_unasked <= device.shared_bytes;
}

constexpr int kHopper = 90;

// Code for 9.0a runs on no later architecture.
bool runs_on(const KernelEntry& e, const Device& device) {
  if (!e.has_code) return false;
  return e.arch == kHopper ? device.compute_capability / 10 == kHopper / 10 : e.arch <= device.compute_capability;
}

bool can_copy(const KernelEntry& e, const KernelKey& key) { return e.arch < kHopper || key.no_bulk_copy == nullptr; }

bool fits(const KernelEntry& e, const KernelKey& key, const Device& device) {
  return e.head_dim_max >= key.head_dim && runs_on(e, device) && can_copy(e, key) &&
         e.tile.shared_bytes <= device.shared_bytes;
}

// The newest architecture first, then the least padding.
bool better(const KernelEntry& e, const KernelEntry& than) {
  return e.arch != than.arch ? e.arch > than.arch : e.head_dim_max < than.head_dim_max;
}

// The list that restricts the entries of this pass and version, or nullptr.
const char* forced_names(const KernelKey& key) {
  const char* names = std::getenv(kForce);
  if (names == nullptr || *names == '\0') return nullptr;
  int count;
  const KernelEntry* all = entries(&count);
  for (int i = 0; i < count; ++i)
    if (all[i].pass == key.pass && all[i].version == key.version && listed(names, all[i].name)) return names;
  return nullptr;
}

// A name in FLASH_ATTN_EXT_KERNEL that no entry has; empty if there is none.
std::string_view unknown_name() {
  const char* names = std::getenv(kForce);
  if (names == nullptr) return {};
  int count;
  const KernelEntry* all = entries(&count);
  for (std::string_view rest = names; !rest.empty();) {
    const std::string_view name = rest.substr(0, rest.find(','));
    bool known = name.empty();
    for (int i = 0; i < count && !known; ++i) known = name == all[i].name;
    if (!known) return name;
    rest.remove_prefix(name.size() + (name.size() < rest.size()));
  }
  return {};
}

// Of the rows of one batch entry, over its heads. Never of the batch: a row's bits do not depend on it.
bool tiles_are_few(const KernelEntry& e, const KernelKey& key, const Device& device) {
  const int64_t row_tiles = (int64_t{key.seqlen_q} + e.tile.m - 1) / e.tile.m * key.heads;
  return row_tiles * kShortFactor < device.sm_count;
}

bool leaves_to_small_tiles(const KernelEntry& e, const KernelKey& key, const Device& device) {
  return e.arch == kHopper && e.pass == Pass::kForward && key.seqlen_q != 0 && key.seqlen_q <= kFewRows &&
         tiles_are_few(e, key, device);
}

// ---- sentences ----

std::string text_of(int value) { return std::to_string(value); }
std::string text_of_tile(int m, int n) { return "(" + text_of(m) + ", " + text_of(n) + ")"; }
std::string text_of_capability(int capability) { return text_of(capability / 10) + "." + text_of(capability % 10); }

const char* text_of(DType t) {
  constexpr const char* kNames[] = {"float16", "bfloat16", "float32", "float64"};
  return kNames[static_cast<int>(t)];
}

std::string text_of(const KernelKey& key) {
  return std::string(key.pass == Pass::kForward ? "forward" : "backward") + " version " + text_of(key.version) + ", " +
         text_of(key.dtype) + ", head dimension " + text_of(key.head_dim);
}

void append(std::string* list, const std::string& item) {
  if (list->find(item) == std::string::npos) *list += (list->empty() ? "" : ", ") + item;
}

std::string explain_none(const KernelKey& key, const Device& device) {
  if (key.dtype == DType::kFloat64) return "float64 runs on the CPU only; cast to float32 for CUDA";
  if (device.compute_capability < kLeastCapability)
    return "this GPU has compute capability " + text_of_capability(device.compute_capability) +
           "; the CUDA kernels need 8.0 or newer. Move the tensors to the CPU, or call "
           "torch.nn.functional.scaled_dot_product_attention";
  if (const std::string_view name = unknown_name(); !name.empty())
    return std::string(kForce) + " names '" + std::string(name) + "', and no kernel has that name";

  const char* forced = forced_names(key);
  int count, candidates = 0, largest = 0;
  const KernelEntry* all = entries(&count);
  std::string reasons, tiles;
  for (int i = 0; i < count; ++i) {
    const KernelEntry& e = all[i];
    if (!same_kind(e, key)) continue;
    ++candidates;
    if (e.head_dim_max > largest) largest = e.head_dim_max;
    if (fits(e, key, device)) append(&tiles, text_of_tile(e.tile.m, e.tile.n));
    std::string reason;
    if (e.head_dim_max < key.head_dim)
      reason = "head dimensions up to " + text_of(e.head_dim_max);
    else if (!e.has_code)
      reason = "this build has no code for compute capability 9.0a";
    else if (!runs_on(e, device))
      reason = "needs compute capability " + (e.arch == kHopper ? "9.x" : text_of_capability(e.arch));
    else if (!can_copy(e, key))
      reason = key.no_bulk_copy;
    else if (e.tile.shared_bytes > device.shared_bytes)
      reason = "needs " + text_of(e.tile.shared_bytes) + " bytes of shared memory";
    else if (!has_tile(e, key))
      reason = "tile " + text_of_tile(e.tile.m, e.tile.n);
    else if (forced != nullptr && !listed(forced, e.name))
      reason = std::string("not in ") + kForce;
    reasons += (reasons.empty() ? "" : "; ") + std::string(e.name) + ": " + reason;
  }
  if (candidates == 0)
    return "no CUDA kernel for " + text_of(key) + " is built; supported_kernels() lists what there is";
  if (largest < key.head_dim)
    return "the CUDA kernels take head dimensions up to " + text_of(largest) + ", got " + text_of(key.head_dim) + " (" +
           text_of(key) + "); larger ones run on the CPU";
  if (key.tile_m != 0 && !tiles.empty() && forced == nullptr)
    return "block_size " + text_of_tile(key.tile_m, key.tile_n) + " is not built for " + text_of(key) +
           " on this GPU; it has " + tiles + ", or None for the best";
  return "no CUDA kernel serves " + text_of(key) + " on this GPU (compute capability " +
         text_of_capability(device.compute_capability) + ", " + text_of(device.shared_bytes) +
         " bytes of shared memory a block): " + reasons;
}

}  // namespace

cudaError_t device_facts(int index, Device* device) {
  static Device known[kKnownDevices];
  static std::atomic<bool> ready[kKnownDevices];
  static std::mutex mutex;
  if (index < 0 || index >= kKnownDevices) return ask_driver(index, device);
  if (!ready[index].load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> lock(mutex);
    Device facts;
    if (const cudaError_t error = ask_driver(index, &facts); error != cudaSuccess) return error;
    if (!ready[index].load(std::memory_order_relaxed)) known[index] = facts;
    ready[index].store(true, std::memory_order_release);
  }
  *device = known[index];
  return cudaSuccess;
}

cudaError_t current_device(Device* device) {
  int index = 0;
  if (const cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return error;
  return device_facts(index, device);
}

const KernelEntry* find(const KernelKey& key, const Device& device, std::string* why_not) {
  int count;
  const KernelEntry* all = entries(&count);
  const char* forced = forced_names(key);
  const bool chosen_by_caller = forced != nullptr || key.tile_m != 0;
  const auto serves = [&](const KernelEntry& e) {
    return same_kind(e, key) && fits(e, key, device) && has_tile(e, key) &&
           (forced == nullptr || listed(forced, e.name));
  };
  const KernelEntry* best = nullptr;
  for (int i = 0; i < count; ++i) {
    const KernelEntry& e = all[i];
    if ((best != nullptr && !better(e, *best)) || !serves(e)) continue;
    if (chosen_by_caller ||
        (!e.for_short_problems && may_be_preferred(e, device) && !leaves_to_small_tiles(e, key, device)))
      best = &e;
  }
  if (best == nullptr || (std::getenv(kForce) != nullptr && !unknown_name().empty())) {
    if (why_not != nullptr) *why_not = explain_none(key, device);
    return nullptr;
  }
  if (chosen_by_caller || key.seqlen_q == 0) return best;
  while (tiles_are_few(*best, key, device)) {
    const KernelEntry* smaller = nullptr;
    for (int i = 0; i < count && smaller == nullptr; ++i) {
      const KernelEntry& e = all[i];
      if (e.for_short_problems && e.arch == best->arch && e.head_dim_max == best->head_dim_max &&
          e.tile.m < best->tile.m && serves(e))
        smaller = &e;
    }
    if (smaller == nullptr) break;
    best = smaller;
  }
  return best;
}

}  // namespace fae::cuda
