// The right-angle transform of LANES real sequences at once, and its inverse.
//
// With w = exp(i pi / 2N), x_n w^n under a DFT of length N does arithmetic modulo x^N - i. A linear convolution of two
// real sequences of length <= N then leaves its overflow in the imaginary part, so no padding to 2N is needed (R.
// Crandall and B. Fagin, "Discrete weighted transforms and large-integer arithmetic", Math. Comp. 62, 1994).
//
// Forward: decimation in frequency, natural order in, digit-reversed out. Inverse: decimation in time, the other way.
// Products are taken in the digit-reversed order, so nothing is ever permuted. The twist by w^n is part of the first
// and the last stage, which read and write real rows. Stages are of radix 8 where the length allows it, since passes
// over memory are what costs; the recursion goes depth first: below a few hundred points all stays in L1.
#pragma once

#include <vector>

#include "butterfly.h"

namespace diffussm {

constexpr long MIN_POINTS = 32;
constexpr int LEAF = 8;     // points of the innermost transforms, done in registers around the product
constexpr long AHEAD = 16;  // rows between asking for a row and needing it

// One stage between the first and the last: blocks of `points` become `radix` blocks.
struct Stage {
  long points;
  int radix;                   // 4 or 8
  std::vector<float> twiddle;  // [points/radix][radix - 1] complex: exp(-2 pi i j f_p / points), p = 1 .. radix - 1
};

// How a length is taken apart, with factors computed in double.
struct Plan {
  long points;               // N, a power of two, at least MIN_POINTS
  int first;                 // radix of the first and the last stage, 4 or 8
  std::vector<float> twist;  // [N/first][first] complex: exp(i pi j (1 - 4 f_p) / 2N)
  std::vector<Stage> stages;
};

long padded_points(long length);    // smallest N that holds `length`
const Plan& plan_for(long length);  // kept for the life of the process

// cos and sin of pi k / 16
constexpr float COSINES[] = {1.0f, 0.98078528040323044f, 0.92387953251128674f, 0.83146961230254524f, R2,
                             0.55557023301960222f, 0.38268343236508977f, 0.19509032201612827f, 0.0f,
                             -0.19509032201612827f};
constexpr float cosine16(int k) { return COSINES[k < 0 ? -k : k]; }
constexpr float sine16(int k) { return k < 0 ? -cosine16(8 + k) : cosine16(8 - k); }

// First stage of W transforms side by side, from real rows; transform w lives at x + w * pitch. from.read(n, w) returns
// row n and is called for n < length only; from.ahead(n) hears which row comes AHEAD rows later.
template <int W, int RADIX, class Source>
inline void first_stage_of(const Plan& plan, vf* x, long pitch, long length, const Source& from) {
  constexpr int HALF_RADIX = RADIX / 2, STEP = 8 / RADIX;
  const long q = plan.points / RADIX;
  const float* t = plan.twist.data();
  for (long j = 0; j < q; ++j, t += 2 * RADIX) {
    for (long n = j + AHEAD / RADIX; n < length && n < j + AHEAD / RADIX + plan.points; n += q) from.ahead(n);
    for (int w = 0; w < W; ++w) {
      cf a[RADIX];
      for (int k = 0; k < HALF_RADIX; ++k) {
        // Rows half the sequence apart differ by a factor of exp(i pi / 4) = (1 + i) R2.
        const long low = j + k * q, high = low + plan.points / 2;
        const vf x0 = low < length ? from.read(low, w) : zero();
        const vf x1 = high < length ? from.read(high, w) * R2 : zero();
        a[k] = times({x0 + x1, x1}, cosine16(k * STEP), sine16(k * STEP));
        a[k + HALF_RADIX] = times({x0 - x1, -x1}, cosine16(-3 * k * STEP), sine16(-3 * k * STEP));
      }
      merge_halves<RADIX>(a);
      vf* out = x + w * pitch;
      for (int p = 0; p < RADIX; ++p) put(out, j + p * q, times(a[p], t[2 * p], t[2 * p + 1]));
    }
  }
}

template <int W, class Source>
inline void first_stage(const Plan& plan, vf* x, long pitch, long length, const Source& from) {
  plan.first == 8 ? first_stage_of<W, 8>(plan, x, pitch, length, from)
                  : first_stage_of<W, 4>(plan, x, pitch, length, from);
}

// Last stage of W inverse transforms, to real rows, not divided by N: to.write(n, w, row) for n < length.
template <int W, int RADIX, class Target>
inline void last_stage_of(const Plan& plan, const vf* x, long pitch, long length, const Target& to) {
  constexpr int HALF_RADIX = RADIX / 2, STEP = 8 / RADIX;
  const long q = plan.points / RADIX;
  const float* t = plan.twist.data();
  for (long j = 0; j < q; ++j, t += 2 * RADIX) {
    for (long n = j + AHEAD / RADIX; n < length && n < j + AHEAD / RADIX + plan.points; n += q) to.ahead_write(n);
    for (int w = 0; w < W; ++w) {
      const vf* in = x + w * pitch;
      cf a[RADIX];
      for (int p = 0; p < RADIX; ++p) a[p] = times_conj(get(in, j + p * q), t[2 * p], t[2 * p + 1]);
      split_halves<RADIX>(a);
      for (int k = 0; k < HALF_RADIX; ++k) {
        const cf even = times_conj(a[k], cosine16(k * STEP), sine16(k * STEP));
        const cf odd = times_conj(a[k + HALF_RADIX], cosine16(-3 * k * STEP), sine16(-3 * k * STEP));
        const long low = j + k * q, high = low + plan.points / 2;
        if (low < length) to.write(low, w, even.r + odd.r);
        if (high < length) to.write(high, w, ((even.r - odd.r) + (even.i - odd.i)) * R2);
      }
    }
  }
}

template <int W, class Target>
inline void last_stage(const Plan& plan, const vf* x, long pitch, long length, const Target& to) {
  plan.first == 8 ? last_stage_of<W, 8>(plan, x, pitch, length, to)
                  : last_stage_of<W, 4>(plan, x, pitch, length, to);
}

template <int RADIX>
inline void stage_forward(const Stage& stage, vf* x) {
  const long q = stage.points / RADIX;
  const float* t = stage.twiddle.data();
  for (long j = 0; j < q; ++j, t += 2 * (RADIX - 1)) {
    cf a[RADIX];
    for (int k = 0; k < RADIX; ++k) {
      a[k] = get(x, j + k * q);
      pin(a[k]);
    }
    forward_points<RADIX>(a);
    put(x, j, a[0]);
    for (int p = 1; p < RADIX; ++p) put(x, j + p * q, times(a[p], t[2 * p - 2], t[2 * p - 1]));
  }
}

template <int RADIX>
inline void stage_inverse(const Stage& stage, vf* x) {
  const long q = stage.points / RADIX;
  const float* t = stage.twiddle.data();
  for (long j = 0; j < q; ++j, t += 2 * (RADIX - 1)) {
    cf a[RADIX];
    for (int p = 0; p < RADIX; ++p) {
      a[p] = get(x, j + p * q);
      pin(a[p]);
    }
    for (int p = 1; p < RADIX; ++p) a[p] = times_conj(a[p], t[2 * p - 2], t[2 * p - 1]);
    inverse_points<RADIX>(a);
    for (int k = 0; k < RADIX; ++k) put(x, j + k * q, a[k]);
  }
}

// All stages between the first and the last, depth first: transforms the arrays `forward`, calls leaf(o) for each group
// of LEAF points, o its place in registers, and transforms the arrays `inverse` back.
template <int F, int I, class Leaf>
void middle_block(const Stage* stage, const Stage* end, vf* const (&forward)[F], vf* const (&inverse)[I], long offset,
                  const Leaf& leaf) {
  if (stage == end) return leaf(offset);
  for (vf* x : forward) {
    if (x != nullptr) stage->radix == 8 ? stage_forward<8>(*stage, x + offset) : stage_forward<4>(*stage, x + offset);
  }
  const long step = 2 * stage->points / stage->radix;
  for (long o = offset; o < offset + 2 * stage->points; o += step) {
    if (stage + 1 == end) {
      leaf(o);
    } else {
      middle_block(stage + 1, end, forward, inverse, o, leaf);
    }
  }
  for (vf* x : inverse) {
    if (x != nullptr) stage->radix == 8 ? stage_inverse<8>(*stage, x + offset) : stage_inverse<4>(*stage, x + offset);
  }
}

template <int F, int I, class Leaf>
inline void middle(const Plan& plan, vf* const (&forward)[F], vf* const (&inverse)[I], const Leaf& leaf) {
  const Stage *stage = plan.stages.data(), *end = stage + plan.stages.size();
  for (int p = 0; p < plan.first; ++p) {
    middle_block(stage, end, forward, inverse, p * (2 * plan.points / plan.first), leaf);
  }
}

}  // namespace diffussm
