// Tiles of LANES channels: how rows of (B, L, D) tensors and (D, L) kernels become registers, and where scratch lives.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "vec.h"

namespace diffussm {

inline long tiles_of(long channels) { return (channels + LANES - 1) / LANES; }
inline int lanes_of(long channels, long tile) {
  return static_cast<int>(std::min<long>(LANES, channels - tile * LANES));
}

// Asks for huge pages under a large output that nobody has touched yet: page faults of 4 KiB cost as much time as the
// arithmetic. Advice only; the kernel may ignore it.
inline void advise_huge([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(p) + page - 1) & ~(page - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(p) + bytes) & ~(page - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Scratch of one thread, kept between calls; it only grows. Nothing may be thrown through an OpenMP region, so running
// out of memory ends the process.
class Scratch {
 public:
  ~Scratch() { std::free(base_); }
  vf* take(long registers) noexcept {
    const size_t bytes = static_cast<size_t>(registers) * sizeof(vf);
    if (bytes > size_) {
      std::free(base_);
      size_ = (bytes + 4095) / 4096 * 4096;
      base_ = std::aligned_alloc(4096, size_);
      if (base_ == nullptr) std::abort();
    }
    return static_cast<vf*>(base_);
  }

 private:
  void* base_ = nullptr;
  size_t size_ = 0;
};

inline Scratch& scratch() {
  static thread_local Scratch mine;
  return mine;
}

// LANES x LANES transpose in registers: swap blocks of half the size, log2(LANES) times.
template <int S>
inline void swap_blocks(vf* m) {
  vi lo, hi;
  for (int i = 0; i < LANES; ++i) {
    const bool upper = (i & S) != 0;
    lo[i] = upper ? LANES + i - S : i;
    hi[i] = upper ? LANES + i : i + S;
  }
  for (int i = 0; i < LANES; ++i) {
    if ((i & S) != 0) continue;
    const vf a = m[i], b = m[i + S];
    m[i] = __builtin_shuffle(a, b, lo);
    m[i + S] = __builtin_shuffle(a, b, hi);
  }
}

inline void transpose(vf* m) {
#if DIFFUSSM_LANES >= 16
  swap_blocks<8>(m);
#endif
#if DIFFUSSM_LANES >= 8
  swap_blocks<4>(m);
#endif
  swap_blocks<2>(m);
  swap_blocks<1>(m);
}

// (D, L) rows of a tile -> (L, LANES). `k` points to the first channel of the tile.
inline void rows_to_lanes(const float* k, long length, int lanes, vf* out) {
  vf m[LANES];
  for (long l = 0; l < length; l += LANES) {
    const int n = static_cast<int>(std::min<long>(LANES, length - l));
    if (n == LANES && lanes == LANES) {
      for (int v = 0; v < LANES; ++v) m[v] = load(k + v * length + l);
      transpose(m);
      for (int i = 0; i < LANES; ++i) out[l + i] = m[i];
      continue;
    }
    for (int v = 0; v < LANES; ++v) m[v] = v < lanes ? load_part(k + v * length + l, n) : zero();
    transpose(m);
    for (int i = 0; i < n; ++i) out[l + i] = m[i];
  }
}

// (L, LANES) -> (D, L) rows of a tile.
inline void lanes_to_rows(const vf* in, long length, int lanes, float* k) {
  vf m[LANES];
  for (long l = 0; l < length; l += LANES) {
    const int n = static_cast<int>(std::min<long>(LANES, length - l));
    if (n == LANES && lanes == LANES) {
      for (int i = 0; i < LANES; ++i) m[i] = in[l + i];
      transpose(m);
      for (int v = 0; v < LANES; ++v) store(k + v * length + l, m[v]);
      continue;
    }
    for (int i = 0; i < LANES; ++i) m[i] = i < n ? in[l + i] : zero();
    transpose(m);
    for (int v = 0; v < lanes; ++v) store_part(k + v * length + l, m[v], n);
  }
}

// Rows of a (B, L, channels) tensor at one tile, or at a group of whole tiles: `stride` is the distance between rows in
// elements. Rows lie in pages of their own, where no hardware prefetcher follows: hence ahead(). They come to L2, as rows
// at a stride of many lines share few sets of L1.
template <class T, bool WHOLE>
struct Rows {
  T* base;
  long stride;
  int lanes;
  vf read(long l, int w) const {
    return WHOLE ? load(base + l * stride + w * LANES) : load_part(base + l * stride, lanes);
  }
  void write(long l, int w, vf x) const {
    WHOLE ? store(base + l * stride + w * LANES, x) : store_part(base + l * stride, x, lanes);
  }
  void ahead(long l) const { __builtin_prefetch(base + l * stride, 0, 2); }
  void ahead_write(long l) const { __builtin_prefetch(base + l * stride, 1); }
};

// The same for writing only, past the caches; base and rows start at whole registers.
struct StreamedRows {
  float* base;
  long stride;
  void write(long l, int w, vf x) const { stream(base + l * stride + w * LANES, x); }
  void ahead_write(long) const {}
};

// Whether rows of T from `base`, `bytes` in all, are better written past the caches.
template <class T>
inline bool worth_streaming([[maybe_unused]] const T* base, [[maybe_unused]] long stride, [[maybe_unused]] size_t bytes) {
  if constexpr (STREAMS && sizeof(T) == sizeof(float)) {
    constexpr size_t cached = size_t{1} << 22;  // what the next reader may still find in a cache
    return bytes > cached && reinterpret_cast<uintptr_t>(base) % sizeof(vf) == 0 && stride % LANES == 0;
  } else {
    return false;
  }
}

// One kernel in lanes, (L, LANES), each row times `scale`.
struct KernelRows {
  float* base;
  float scale;
  vf read(long l, int) const { return load(base + l * LANES) * scale; }
  void write(long l, int, vf x) const { store(base + l * LANES, x * scale); }
  void ahead(long) const {}
  void ahead_write(long) const {}
};

}  // namespace diffussm
