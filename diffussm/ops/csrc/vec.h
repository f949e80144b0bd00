// One SIMD register holds the same value of LANES neighbouring channels, so that no arithmetic crosses lanes.
// GCC vector extensions only: the compiler picks the instructions of the target (-march=native).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define DIFFUSSM_LANES 16
#elif defined(__AVX__)
#define DIFFUSSM_LANES 8
#else
#define DIFFUSSM_LANES 4
#endif

// A call would pass registers through memory; the compiler's own measure of size does not know that.
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace diffussm {

constexpr int LANES = DIFFUSSM_LANES;
constexpr int HALF = LANES / 2;  // doubles in a register of the same width

typedef float vf __attribute__((vector_size(LANES * 4), may_alias));
typedef float vf_unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(LANES * 4), may_alias));
typedef int32_t vi __attribute__((vector_size(LANES * 4), may_alias));
typedef uint16_t vh __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef double vd __attribute__((vector_size(HALF * 8), may_alias));
typedef int64_t vl __attribute__((vector_size(HALF * 8), may_alias));
typedef float vf_half __attribute__((vector_size(HALF * 4), may_alias));

struct bf16 {
  uint16_t bits;
};

ALWAYS_INLINE vf zero() { return vf{}; }

ALWAYS_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }

ALWAYS_INLINE vf load(const bf16* p) {
  const vu wide = __builtin_convertvector(*reinterpret_cast<const vh*>(p), vu) << 16;
  return reinterpret_cast<const vf&>(wide);
}

ALWAYS_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }

ALWAYS_INLINE void store(bf16* p, vf x) {
  const vu bits = reinterpret_cast<const vu&>(x);
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const vu quiet = (bits >> 16) | 0x40u;                            // adding to a NaN could turn it into a number
  const vi is_nan = x != x;
  const vu mask = reinterpret_cast<const vu&>(is_nan);
  *reinterpret_cast<vh*>(p) = __builtin_convertvector((quiet & mask) | (rounded & ~mask), vh);
}

// Writes past the caches where that is possible and `p` is aligned: a large output is not read again soon, and a plain
// store would first fetch the line it overwrites. Call `drain` before another thread may look.
#if defined(__AVX512F__)
constexpr bool STREAMS = true;
ALWAYS_INLINE void stream(float* p, vf x) {
  asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<vf*>(p)) : "v"(x));
}
inline void drain() { asm volatile("sfence" ::: "memory"); }
#else
constexpr bool STREAMS = false;
ALWAYS_INLINE void stream(float* p, vf x) { store(p, x); }
inline void drain() {}
#endif

// The last tile of channels may be narrower than a register: the missing lanes read 0 and are not written.
template <class T>
ALWAYS_INLINE vf load_part(const T* p, int lanes) {
  T row[LANES] = {};
  std::memcpy(row, p, sizeof(T) * static_cast<size_t>(lanes));
  return load(row);
}

template <class T>
ALWAYS_INLINE void store_part(T* p, vf x, int lanes) {
  T row[LANES];
  store(row, x);
  std::memcpy(p, row, sizeof(T) * static_cast<size_t>(lanes));
}

// A complex number in each lane.
struct cf {
  vf r, i;
};

ALWAYS_INLINE cf operator+(cf a, cf b) { return {a.r + b.r, a.i + b.i}; }
ALWAYS_INLINE cf operator-(cf a, cf b) { return {a.r - b.r, a.i - b.i}; }
ALWAYS_INLINE cf operator*(cf a, cf b) { return {a.r * b.r - a.i * b.i, a.r * b.i + a.i * b.r}; }
ALWAYS_INLINE cf times_conj(cf a, cf b) { return {a.r * b.r + a.i * b.i, a.i * b.r - a.r * b.i}; }  // a conj(b)
ALWAYS_INLINE cf times(cf a, float r, float i) { return {a.r * r - a.i * i, a.i * r + a.r * i}; }
ALWAYS_INLINE cf times_conj(cf a, float r, float i) { return {a.r * r + a.i * i, a.i * r - a.r * i}; }
ALWAYS_INLINE cf times_i(cf a) { return {-a.i, a.r}; }

// Makes a value live in a register here: otherwise the compiler may read it again from memory for each use, and the
// load ports are what limits a transform.
ALWAYS_INLINE void pin([[maybe_unused]] cf& a) {
#if defined(__x86_64__)
  asm("" : "+x"(a.r), "+x"(a.i));
#endif
}

// Complex arrays keep (real, imaginary) registers side by side: one point is one or two cache lines.
ALWAYS_INLINE cf get(const vf* x, long n) { return {x[2 * n], x[2 * n + 1]}; }
ALWAYS_INLINE void put(vf* x, long n, cf a) {
  x[2 * n] = a.r;
  x[2 * n + 1] = a.i;
}

}  // namespace diffussm
