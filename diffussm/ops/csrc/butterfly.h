// Transforms of 4 and 8 points held in registers. Forward: natural order in; out of 8 points come those of even, then
// those of odd frequency (`frequency`). The inverse takes that order back and is not divided by the number of points.
#pragma once

#include "vec.h"

namespace diffussm {

constexpr float R2 = 0.70710678118654752f;  // 1 / sqrt 2

// Frequency of the p-th result.
template <int RADIX>
constexpr int frequency(int p) {
  return RADIX == 4 ? p : (p < 4 ? 2 * p : 2 * p - 7);
}

ALWAYS_INLINE void butterfly(cf& a, cf& b, cf& c, cf& d) {
  const cf t0 = a + c, t1 = a - c, t2 = b + d, t3 = b - d;
  a = t0 + t2;
  b = {t1.r + t3.i, t1.i - t3.r};
  c = t0 - t2;
  d = {t1.r - t3.i, t1.i + t3.r};
}

ALWAYS_INLINE void inverse_butterfly(cf& a, cf& b, cf& c, cf& d) {
  const cf t0 = a + c, t1 = a - c, t2 = b + d, t3 = b - d;
  a = t0 + t2;
  b = {t1.r - t3.i, t1.i + t3.r};
  c = t0 - t2;
  d = {t1.r + t3.i, t1.i - t3.r};
}

// The second half of a transform of RADIX points: the first half of `a` holds the sums a_k + a_(k + RADIX/2), the second
// the differences times exp(-2 pi i k / RADIX).
template <int RADIX>
ALWAYS_INLINE void merge_halves(cf* a) {
  if constexpr (RADIX == 8) {
    butterfly(a[0], a[1], a[2], a[3]);
    butterfly(a[4], a[5], a[6], a[7]);
  } else {
    const cf x0 = a[0] + a[1], x2 = a[0] - a[1], x1 = a[2] + a[3], x3 = a[2] - a[3];
    a[0] = x0, a[1] = x1, a[2] = x2, a[3] = x3;
  }
}

// What undoes merge_halves, up to a factor of RADIX / 2.
template <int RADIX>
ALWAYS_INLINE void split_halves(cf* a) {
  if constexpr (RADIX == 8) {
    inverse_butterfly(a[0], a[1], a[2], a[3]);
    inverse_butterfly(a[4], a[5], a[6], a[7]);
  } else {
    const cf e0 = a[0] + a[2], e1 = a[0] - a[2], o0 = a[1] + a[3], o1 = a[1] - a[3];
    a[0] = e0, a[1] = e1, a[2] = o0, a[3] = o1;
  }
}

template <int RADIX>
ALWAYS_INLINE void forward_points(cf* a) {
  if constexpr (RADIX == 4) {
    butterfly(a[0], a[1], a[2], a[3]);
  } else {
    const cf d0 = a[0] - a[4], d1 = a[1] - a[5], d2 = a[2] - a[6], d3 = a[3] - a[7];
    for (int k = 0; k < 4; ++k) a[k] = a[k] + a[k + 4];
    a[4] = d0;
    a[5] = {(d1.r + d1.i) * R2, (d1.i - d1.r) * R2};
    a[6] = {d2.i, -d2.r};
    a[7] = {(d3.i - d3.r) * R2, -(d3.r + d3.i) * R2};
    merge_halves<8>(a);
  }
}

template <int RADIX>
ALWAYS_INLINE void inverse_points(cf* a) {
  if constexpr (RADIX == 4) {
    inverse_butterfly(a[0], a[1], a[2], a[3]);
  } else {
    split_halves<8>(a);
    const cf d1 = a[5], d2 = a[6], d3 = a[7];
    const cf e[4] = {a[4],
                     {(d1.r - d1.i) * R2, (d1.i + d1.r) * R2},
                     {-d2.i, d2.r},
                     {-(d3.i + d3.r) * R2, (d3.r - d3.i) * R2}};
    for (int k = 0; k < 4; ++k) {
      const cf s = a[k];
      a[k] = s + e[k];
      a[k + 4] = s - e[k];
    }
  }
}

}  // namespace diffussm
