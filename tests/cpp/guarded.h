// Memory that faults where a kernel reads or writes past its end, whoever compiled the kernel: an array whose last byte
// is the last byte of a page, with a page behind it that may not be touched. (AddressSanitizer sees only code that was
// compiled with it, so not the kernels that oneDNN generates.)
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

namespace fae::test {

enum class Guard { kBehind, kInFront };

template <typename T>
class GuardedArray {
 public:
  // Every byte is set to `fill`; 0xff makes a NaN of each element in every format there is.
  explicit GuardedArray(size_t count, int fill, Guard guard = Guard::kBehind) : count_(count), fill_(fill) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = count * sizeof(T);
    inner_bytes_ = (bytes + page - 1) / page * page;
    map_bytes_ = inner_bytes_ + 2 * page;
    void* map = mmap(nullptr, map_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) throw std::bad_alloc();
    map_ = static_cast<unsigned char*>(map);
    inner_ = map_ + page;
    if (inner_bytes_ > 0 && mprotect(inner_, inner_bytes_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    std::memset(inner_, fill, inner_bytes_);
    first_ = guard == Guard::kBehind ? inner_bytes_ - bytes : 0;
  }
  ~GuardedArray() { munmap(map_, map_bytes_); }
  GuardedArray(const GuardedArray&) = delete;
  GuardedArray& operator=(const GuardedArray&) = delete;

  T* data() { return reinterpret_cast<T*>(inner_ + first_); }
  const T* data() const { return reinterpret_cast<const T*>(inner_ + first_); }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data()[i]; }
  const T& operator[](size_t i) const { return data()[i]; }

  // The rest of the pages, on the side that no guard page watches, is as it was.
  bool slack_untouched() const {
    for (size_t i = 0; i < inner_bytes_; ++i)
      if ((i < first_ || i >= first_ + count_ * sizeof(T)) && inner_[i] != static_cast<unsigned char>(fill_))
        return false;
    return true;
  }
  // Whether element i still holds the bytes it was created with.
  bool untouched(size_t i) const {
    const unsigned char* p = inner_ + first_ + i * sizeof(T);
    for (size_t b = 0; b < sizeof(T); ++b)
      if (p[b] != static_cast<unsigned char>(fill_)) return false;
    return true;
  }

 private:
  size_t count_;
  int fill_;
  size_t inner_bytes_ = 0, map_bytes_ = 0, first_ = 0;
  unsigned char* map_ = nullptr;
  unsigned char* inner_ = nullptr;
};

}  // namespace fae::test
