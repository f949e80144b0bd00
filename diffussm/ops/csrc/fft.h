// The right-angle transform of LANES real sequences at once, and its inverse.
//
// With w = exp(i pi / 2N), x_n w^n under a DFT of length N does arithmetic modulo x^N - i. A linear convolution of two
// real sequences of length <= N then leaves its overflow in the imaginary part, so no padding to 2N is needed (R.
// Crandall and B. Fagin, "Discrete weighted transforms and large-integer arithmetic", Math. Comp. 62, 1994).
//
// Forward: decimation in frequency, natural order in, digit-reversed out. Inverse: decimation in time, the other way.
// Products are taken in the digit-reversed order, so nothing is ever permuted. The twist by w^n is part of the first
// and the last stage, which read and write real rows. The recursion goes depth first: below a few hundred points all
// stays in L1.
#pragma once

#include <vector>

#include "vec.h"

namespace diffussm {

constexpr long MIN_POINTS = 16;
constexpr long AHEAD = 8;  // steps of the first and last stage between asking for a row and needing it

inline int log2_of(long n) { return __builtin_ctzl(static_cast<unsigned long>(n)); }

// Twiddle factors of one length, computed in double.
struct Plan {
  long points;                            // N, a power of two, at least MIN_POINTS
  int leaf;                               // 4 or 8: size of the transforms done in registers, so that N / leaf is 4^k
  std::vector<float> twist;               // [N/4][4] complex: exp(i pi j (1 - 4p) / 2N), first and last stage
  std::vector<std::vector<float>> stage;  // by log2(n): [n/4][3] complex: exp(-2 pi i j p / n), p = 1..3
  const float* twiddle(long n) const { return stage[static_cast<size_t>(log2_of(n))].data(); }
};

long padded_points(long length);       // smallest N that holds `length`
const Plan& plan_for(long length);     // built once for each N, kept for the life of the process

constexpr float C8 = 0.92387953251128674f, S8 = 0.38268343236508977f;  // cos and sin of pi/8
constexpr float R2 = 0.70710678118654752f;                             // 1 / sqrt 2

inline void butterfly(cf& a, cf& b, cf& c, cf& d) {
  const cf t0 = a + c, t1 = a - c, t2 = b + d, t3 = b - d;
  a = t0 + t2;
  b = {t1.r + t3.i, t1.i - t3.r};
  c = t0 - t2;
  d = {t1.r - t3.i, t1.i + t3.r};
}

inline void inverse_butterfly(cf& a, cf& b, cf& c, cf& d) {
  const cf t0 = a + c, t1 = a - c, t2 = b + d, t3 = b - d;
  a = t0 + t2;
  b = {t1.r - t3.i, t1.i + t3.r};
  c = t0 - t2;
  d = {t1.r + t3.i, t1.i - t3.r};
}

// Transforms of 4 or 8 points held in local variables.
template <int LEAF>
inline void leaf_forward(cf* a) {
  if constexpr (LEAF == 4) {
    butterfly(a[0], a[1], a[2], a[3]);
  } else {
    const cf d0 = a[0] - a[4], d1 = a[1] - a[5], d2 = a[2] - a[6], d3 = a[3] - a[7];
    for (int k = 0; k < 4; ++k) a[k] = a[k] + a[k + 4];
    a[4] = d0;
    a[5] = {(d1.r + d1.i) * R2, (d1.i - d1.r) * R2};
    a[6] = {d2.i, -d2.r};
    a[7] = {(d3.i - d3.r) * R2, -(d3.r + d3.i) * R2};
    butterfly(a[0], a[1], a[2], a[3]);
    butterfly(a[4], a[5], a[6], a[7]);
  }
}

template <int LEAF>
inline void leaf_inverse(cf* a) {
  if constexpr (LEAF == 4) {
    inverse_butterfly(a[0], a[1], a[2], a[3]);
  } else {
    inverse_butterfly(a[0], a[1], a[2], a[3]);
    inverse_butterfly(a[4], a[5], a[6], a[7]);
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

// First stage of W transforms side by side, from real rows; transform w lives at x + w * pitch. from.read(n, w) returns
// row n and is called for n < length only; from.ahead(n) hears which row comes AHEAD steps later.
template <int W, class Source>
inline void first_stage(const Plan& plan, vf* x, long pitch, long length, const Source& from) {
  const long q = plan.points / 4;
  const float* t = plan.twist.data();
  for (long j = 0; j < q; ++j, t += 8) {
    for (long n = j + AHEAD; n < length && n < j + AHEAD + 4 * q; n += q) from.ahead(n);
    for (int w = 0; w < W; ++w) {
      const vf x0 = j < length ? from.read(j, w) : zero();
      const vf x1 = j + q < length ? from.read(j + q, w) : zero();
      const vf x2 = (j + 2 * q < length ? from.read(j + 2 * q, w) : zero()) * R2;
      const vf x3 = j + 3 * q < length ? from.read(j + 3 * q, w) : zero();
      const vf ur = x0 + x2, vr = x0 - x2;
      const vf pr = C8 * x1 + S8 * x3, pi = S8 * x1 + C8 * x3, mr = C8 * x1 - S8 * x3, mi = S8 * x1 - C8 * x3;
      vf* out = x + w * pitch;
      put(out, j, times({ur + pr, x2 + pi}, t[0], t[1]));
      put(out, j + q, times({vr + mi, -(x2 + mr)}, t[2], t[3]));
      put(out, j + 2 * q, times({ur - pr, x2 - pi}, t[4], t[5]));
      put(out, j + 3 * q, times({vr - mi, mr - x2}, t[6], t[7]));
    }
  }
}

// Last stage of W inverse transforms, to real rows, not divided by N: to.write(n, w, row) for n < length.
template <int W, class Target>
inline void last_stage(const Plan& plan, const vf* x, long pitch, long length, const Target& to) {
  const long q = plan.points / 4;
  const float* t = plan.twist.data();
  for (long j = 0; j < q; ++j, t += 8) {
    for (long n = j + AHEAD; n < length && n < j + AHEAD + 4 * q; n += q) to.ahead_write(n);
    for (int w = 0; w < W; ++w) {
      const vf* in = x + w * pitch;
      const cf s0 = times_conj(get(in, j), t[0], t[1]), s1 = times_conj(get(in, j + q), t[2], t[3]);
      const cf s2 = times_conj(get(in, j + 2 * q), t[4], t[5]), s3 = times_conj(get(in, j + 3 * q), t[6], t[7]);
      const cf t0 = s0 + s2, t1 = s0 - s2, t2 = s1 + s3, t3 = s1 - s3;
      if (j < length) to.write(j, w, t0.r + t2.r);
      if (j + q < length) to.write(j + q, w, C8 * (t1.r - t3.i) + S8 * (t1.i + t3.r));
      if (j + 2 * q < length) to.write(j + 2 * q, w, R2 * ((t0.r - t2.r) + (t0.i - t2.i)));
      if (j + 3 * q < length) to.write(j + 3 * q, w, S8 * (t1.r + t3.i) + C8 * (t1.i - t3.r));
    }
  }
}

inline void stage_forward(const Plan& plan, vf* x, long n) {
  const long q = n / 4;
  const float* w = plan.twiddle(n);
  for (long j = 0; j < q; ++j, w += 6) {
    cf a = get(x, j), b = get(x, j + q), c = get(x, j + 2 * q), d = get(x, j + 3 * q);
    pin(a), pin(b), pin(c), pin(d);
    butterfly(a, b, c, d);
    put(x, j, a);
    put(x, j + q, times(b, w[0], w[1]));
    put(x, j + 2 * q, times(c, w[2], w[3]));
    put(x, j + 3 * q, times(d, w[4], w[5]));
  }
}

inline void stage_inverse(const Plan& plan, vf* x, long n) {
  const long q = n / 4;
  const float* w = plan.twiddle(n);
  for (long j = 0; j < q; ++j, w += 6) {
    cf a = get(x, j), b = get(x, j + q), c = get(x, j + 2 * q), d = get(x, j + 3 * q);
    pin(a), pin(b), pin(c), pin(d);
    b = times_conj(b, w[0], w[1]), c = times_conj(c, w[2], w[3]), d = times_conj(d, w[4], w[5]);
    inverse_butterfly(a, b, c, d);
    put(x, j, a);
    put(x, j + q, b);
    put(x, j + 2 * q, c);
    put(x, j + 3 * q, d);
  }
}

// All stages between the first and the last, depth first: transforms the arrays `forward`, calls leaf(o) for each group
// of LEAF points, o its place in registers, and transforms the arrays `inverse` back.
template <int LEAF, int F, int I, class Leaf>
void middle_block(const Plan& plan, vf* const (&forward)[F], vf* const (&inverse)[I], long offset, long n,
                  const Leaf& leaf) {
  if (n == LEAF) return leaf(offset);
  for (vf* x : forward) {
    if (x != nullptr) stage_forward(plan, x + offset, n);
  }
  const long m = n / 4;
  for (long o = offset; o < offset + 2 * n; o += 2 * m) {
    if (m == LEAF) {
      leaf(o);
    } else {
      middle_block<LEAF>(plan, forward, inverse, o, m, leaf);
    }
  }
  for (vf* x : inverse) {
    if (x != nullptr) stage_inverse(plan, x + offset, n);
  }
}

template <int LEAF, int F, int I, class Leaf>
inline void middle(const Plan& plan, vf* const (&forward)[F], vf* const (&inverse)[I], const Leaf& leaf) {
  for (int p = 0; p < 4; ++p) middle_block<LEAF>(plan, forward, inverse, p * (plan.points / 2), plan.points / 4, leaf);
}

}  // namespace diffussm
