// exp, sin and cos of HALF doubles at once, good to a few units of the last place for |x| < 1e6: Cody-Waite reduction
// and Taylor polynomials, which are long enough on the reduced interval.
#pragma once

#include "vec.h"

namespace diffussm {

struct cd {
  vd r, i;
};

inline cd operator+(cd a, cd b) { return {a.r + b.r, a.i + b.i}; }
inline cd operator-(cd a, cd b) { return {a.r - b.r, a.i - b.i}; }
inline cd operator*(cd a, cd b) { return {a.r * b.r - a.i * b.i, a.r * b.i + a.i * b.r}; }
inline cd operator*(cd a, vd b) { return {a.r * b, a.i * b}; }
inline cd operator/(cd a, cd b) {
  const vd scale = 1.0 / (b.r * b.r + b.i * b.i);
  return {(a.r * b.r + a.i * b.i) * scale, (a.i * b.r - a.r * b.i) * scale};
}

namespace detail {

constexpr double ROUND = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves the nearest integer in the low bits

inline vl bits(vd x) { return reinterpret_cast<const vl&>(x); }
inline vd number(vl x) { return reinterpret_cast<const vd&>(x); }

}  // namespace detail

inline vd exp(vd x) {
  using namespace detail;
  const vd low = vd{} - 708.0, high = vd{} + 708.0;
  x = x < low ? low : x;  // a NaN compares false and stays
  x = x > high ? high : x;
  const vd shifted = x * 1.4426950408889634 + ROUND;
  const vd k = shifted - ROUND;
  const vd r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10;
  vd p = vd{} + 1.0 / 6227020800.0;
  constexpr double inverse_factorials[] = {
      1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0,
      1.0 / 120.0,       1.0 / 24.0,       1.0 / 6.0,       0.5,            1.0,           1.0};
  for (const double f : inverse_factorials) p = p * r + f;
  return p * number((bits(shifted) - bits(vd{} + ROUND) + 1023) << 52);
}

inline void sincos(vd x, vd& sine, vd& cosine) {
  using namespace detail;
  const vd shifted = x * 0.63661977236758134 + ROUND;
  const vd k = shifted - ROUND;
  const vd r = ((x - k * 1.57079632673412561417e+00) - k * 6.07710050630396597660e-11) - k * 2.02226624879595063154e-21;
  const vd r2 = r * r;
  vd s = vd{} + 1.0 / 355687428096000.0, c = vd{} + 1.0 / 20922789888000.0;
  constexpr double of_sine[] = {-1.0 / 1307674368000.0, 1.0 / 6227020800.0, -1.0 / 39916800.0, 1.0 / 362880.0,
                                -1.0 / 5040.0,          1.0 / 120.0,        -1.0 / 6.0};
  constexpr double of_cosine[] = {-1.0 / 87178291200.0, 1.0 / 479001600.0, -1.0 / 3628800.0, 1.0 / 40320.0,
                                  -1.0 / 720.0,         1.0 / 24.0,        -0.5,             1.0};
  for (const double f : of_sine) s = s * r2 + f;
  for (const double f : of_cosine) c = c * r2 + f;
  s = s * r2 * r + r;
  const vl quadrant = bits(shifted) & 3;
  const vl odd = (quadrant & 1) != 0;
  const vl flip_sine = (quadrant & 2) << 62, flip_cosine = ((quadrant + 1) & 2) << 62;
  sine = number(bits(odd ? c : s) ^ flip_sine);
  cosine = number(bits(odd ? s : c) ^ flip_cosine);
}

inline cd exp(cd x) {
  const vd size = exp(x.r);
  vd s, c;
  sincos(x.i, s, c);
  return {size * c, size * s};
}

}  // namespace diffussm
