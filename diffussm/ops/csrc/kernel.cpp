// Convolution kernels from the parameters of diagonal state-space models, and their gradients.
//
// With l = L0 l1 + l0 the kernel is K[l1, l0] = sum_n Re(2 w_n z_n^(L0 l1) z_n^l0), w = C B (z - 1)/A: a real matrix
// product over (Re, Im) x n. Each lane is another channel, so the matrices hold registers. Powers are built in double
// by repeated multiplication and rounded once, the products are taken in fp32.
#include <cmath>
#include <vector>

#include "api.h"
#include "elementary.h"
#include "layout.h"

namespace diffussm {
namespace {

constexpr int MI = 4;                      // rows of the register block of the matrix product
constexpr int NJ = LANES == 16 ? 4 : 2;    // columns: MI * NJ sums must fit the register file

constexpr long L1_REGISTERS = 16384 / sizeof(vf);  // half of a small L1 cache

struct Split {
  long fine, coarse;  // L0, a multiple of NJ; L1, a multiple of MI
};

Split split(long length) {
  const long root = static_cast<long>(std::ceil(std::sqrt(static_cast<double>(length))));
  const long fine = (root + 3) / 4 * 4;
  return {fine, ((length + fine - 1) / fine + MI - 1) / MI * MI};
}

// One tile of parameters in double, [state][half of the register].
struct Modes {
  explicit Modes(long states) : states(states), memory(static_cast<size_t>(states) * 2) {}

  struct One {
    cd a, lambda, z, hold, b, c;  // lambda = dt A, hold = (z - 1)/A
  };

  void read(const KernelArgs& p, long tile, int lanes) {
    for (long n = 0; n < states; ++n) {
      for (int h = 0; h < 2; ++h) {
        One& one = memory[static_cast<size_t>(2 * n + h)];
        vd log_a{}, step{};
        one = One{};
        for (int v = 0; v < HALF; ++v) {
          const long d = tile * LANES + std::min<long>(h * HALF + v, lanes - 1);  // spare lanes repeat the last
          const long s = d * states + n;
          log_a[v] = static_cast<double>(p.log_a_real[s]);
          step[v] = static_cast<double>(p.log_dt[d]);
          one.a.i[v] = static_cast<double>(p.a_imag[s]);
          one.b.r[v] = static_cast<double>(p.b[2 * s]);
          one.b.i[v] = static_cast<double>(p.b[2 * s + 1]);
          one.c.r[v] = static_cast<double>(p.c[2 * s]);
          one.c.i[v] = static_cast<double>(p.c[2 * s + 1]);
        }
        if (n == 0) dt[h] = exp(step);
        one.a.r = -exp(log_a);
        one.lambda = one.a * dt[h];
        one.z = exp(one.lambda);
        one.hold = cd{one.z.r - 1.0, one.z.i} / one.a;
      }
    }
  }

  const One& at(long n, int h) const { return memory[static_cast<size_t>(2 * n + h)]; }

  long states;
  vd dt[2];
  std::vector<One> memory;
};

// Half a register of floats, as doubles.
inline void put_half(vf* to, int h, vd x) {
  reinterpret_cast<vf_half*>(to)[h] = __builtin_convertvector(x, vf_half);
}
inline vd get_half(const vf* from, int h) {
  return __builtin_convertvector(reinterpret_cast<const vf_half*>(from)[h], vd);
}

// write(i, h, z[h]^i) for i < count and both halves h, which go side by side to hide each other's latency. Powers under
// 1e-19 become 0, which no fp32 sum can tell, so that no product is subnormal: those are slow on many processors.
template <class Write>
inline void powers(const cd (&z)[2], long count, Write write) {
  cd x[2];
  for (cd& one : x) one = {vd{} + 1.0, vd{}};
  for (long i = 0; i < count; ++i) {
    for (int h = 0; h < 2; ++h) {
      write(i, h, x[h]);
      x[h] = x[h] * z[h];
      const vl gone = x[h].r * x[h].r + x[h].i * x[h].i < vd{} + 1e-38;
      x[h].r = gone ? vd{} : x[h].r;
      x[h].i = gone ? vd{} : x[h].i;
    }
  }
}

cd power(cd z, long exponent) {
  cd x{vd{} + 1.0, vd{}};
  for (; exponent > 0; exponent /= 2) {
    if (exponent % 2 == 1) x = x * z;
    z = z * z;
  }
  return x;
}

// sum[i][j] = sum_r a[i * pitch + r] b[j * pitch + r]
inline void dot_block(const vf* a, const vf* b, long pitch, long count, vf (&sum)[MI][NJ]) {
  for (auto& row : sum) {
    for (vf& s : row) s = zero();
  }
  for (long r = 0; r < count; ++r) {
    for (int i = 0; i < MI; ++i) {
      for (int j = 0; j < NJ; ++j) sum[i][j] += a[i * pitch + r] * b[j * pitch + r];
    }
  }
}

void tile_kernel(const KernelArgs& p, long tile, Modes& modes) {
  const int lanes = lanes_of(p.channels, tile);
  const Split size = split(p.length);
  const long count = 2 * p.states, pitch = count + 1;  // an odd pitch spreads the rows over the cache sets
  vf* fine = scratch().take((size.fine + size.coarse) * pitch + p.length);
  vf *coarse = fine + size.fine * pitch, *rows = coarse + size.coarse * pitch;
  modes.read(p, tile, lanes);
  for (long n = 0; n < p.states; ++n) {
    const auto &m0 = modes.at(n, 0), &m1 = modes.at(n, 1);
    powers({m0.z, m1.z}, size.fine, [&](long i, int h, cd x) {
      put_half(fine + i * pitch + n, h, x.r);
      put_half(fine + i * pitch + p.states + n, h, -x.i);
    });
    const cd w[2] = {m0.b * m0.c * m0.hold * (vd{} + 2.0), m1.b * m1.c * m1.hold * (vd{} + 2.0)};
    powers({power(m0.z, size.fine), power(m1.z, size.fine)}, size.coarse, [&](long i, int h, cd x) {
      const cd y = w[h] * x;
      put_half(coarse + i * pitch + n, h, y.r);
      put_half(coarse + i * pitch + p.states + n, h, y.i);
    });
  }
  // A few columns at a time: they stay in L1 while the rows pass by.
  const long at_once = std::max<long>(1, L1_REGISTERS / (pitch * NJ)) * NJ;
  for (long from = 0; from < size.fine; from += at_once) {
    for (long l1 = 0; l1 < size.coarse && l1 * size.fine < p.length; l1 += MI) {
      for (long l0 = from; l0 < std::min(from + at_once, size.fine); l0 += NJ) {
        vf sum[MI][NJ];
        dot_block(coarse + l1 * pitch, fine + l0 * pitch, pitch, count, sum);
        for (int i = 0; i < MI; ++i) {
          for (int j = 0; j < NJ; ++j) {
            const long l = (l1 + i) * size.fine + l0 + j;
            if (l < p.length) rows[l] = sum[i][j];
          }
        }
      }
    }
  }
  rows[0] += load_part(p.skip + tile * LANES, lanes);
  lanes_to_rows(rows, p.length, lanes, p.k + tile * LANES * p.length);
}

// Sums over l0 of one group of MI / 2 rows of dk and of the same rows weighted by l0, times z^l0.
inline void sum_block(const vf* dk, const vf* weighted, const vf* z, long fine, cf (&plain)[MI / 2],
                      cf (&ramp)[MI / 2]) {
  for (int i = 0; i < MI / 2; ++i) plain[i] = ramp[i] = {zero(), zero()};
  for (long l = 0; l < fine; ++l) {
    const cf x = get(z, l);
    for (int i = 0; i < MI / 2; ++i) {
      const vf d = dk[i * fine + l], e = weighted[i * fine + l];
      plain[i] = {plain[i].r + d * x.r, plain[i].i + d * x.i};
      ramp[i] = {ramp[i].r + e * x.r, ramp[i].i + e * x.i};
    }
  }
}

void write_gradients(const KernelArgs& p, long tile, int lanes, const Modes& modes, const vf* sums) {
  vd d_log_dt[2] = {};
  const vd two = vd{} + 2.0;
  for (long n = 0; n < p.states; ++n) {
    for (int h = 0; h < 2; ++h) {
      // S0 = sum_l dk z^l and S1 = sum_l l dk z^l; d loss = 2 Re(S0 dw + w S1 dlambda).
      const cd s0{get_half(sums + 4 * n, h), get_half(sums + 4 * n + 1, h)};
      const cd s1{get_half(sums + 4 * n + 2, h), get_half(sums + 4 * n + 3, h)};
      const auto& m = modes.at(n, h);
      const cd w = m.b * m.c * m.hold;
      const cd lambda = m.b * m.c * m.z / m.a * s0 + w * s1;
      const cd a = lambda * modes.dt[h] - w / m.a * s0;
      const cd db = m.c * m.hold * s0 * two, dc = m.b * m.hold * s0 * two;
      d_log_dt[h] += two * (lambda.r * m.lambda.r - lambda.i * m.lambda.i);
      const vd d_log_a = two * a.r * m.a.r;
      for (int v = 0; v < HALF && h * HALF + v < lanes; ++v) {
        const long s = (tile * LANES + h * HALF + v) * p.states + n;
        p.d_log_a_real[s] = static_cast<float>(d_log_a[v]);
        p.d_a_imag[s] = static_cast<float>(-2.0 * a.i[v]);
        p.d_b[2 * s] = static_cast<float>(db.r[v]);
        p.d_b[2 * s + 1] = static_cast<float>(-db.i[v]);
        p.d_c[2 * s] = static_cast<float>(dc.r[v]);
        p.d_c[2 * s + 1] = static_cast<float>(-dc.i[v]);
      }
    }
  }
  for (int v = 0; v < lanes; ++v) p.d_log_dt[tile * LANES + v] = static_cast<float>(d_log_dt[v / HALF][v % HALF]);
}

void tile_gradients(const KernelArgs& p, long tile, Modes& modes) {
  const int lanes = lanes_of(p.channels, tile);
  const Split size = split(p.length);
  const long cells = size.fine * size.coarse;
  vf* dk = scratch().take(2 * cells + 2 * p.states * (size.fine + size.coarse) + 4 * p.states);
  vf *weighted = dk + cells, *fine = weighted + cells, *coarse = fine + 2 * p.states * size.fine;
  vf* sums = coarse + 2 * p.states * size.coarse;
  rows_to_lanes(p.k + tile * LANES * p.length, p.length, lanes, dk);
  std::fill(dk + p.length, dk + cells, zero());
  for (long l = 0; l < cells; ++l) weighted[l] = dk[l] * static_cast<float>(l % size.fine);
  std::fill(sums, sums + 4 * p.states, zero());
  modes.read(p, tile, lanes);
  for (long n = 0; n < p.states; ++n) {
    vf *z = fine + 2 * n * size.fine, *y = coarse + 2 * n * size.coarse;
    const cd step[2] = {modes.at(n, 0).z, modes.at(n, 1).z};
    powers(step, size.fine, [&](long i, int h, cd x) {
      put_half(z + 2 * i, h, x.r);
      put_half(z + 2 * i + 1, h, x.i);
    });
    powers({power(step[0], size.fine), power(step[1], size.fine)}, size.coarse, [&](long i, int h, cd x) {
      put_half(y + 2 * i, h, x.r);
      put_half(y + 2 * i + 1, h, x.i);
    });
  }
  // A few states at a time: their powers stay in L1 while the rows of dk pass by.
  const long at_once = std::max<long>(1, L1_REGISTERS / (2 * size.fine));
  for (long from = 0; from < p.states; from += at_once) {
    for (long l1 = 0; l1 < size.coarse && l1 * size.fine < p.length; l1 += MI / 2) {
      for (long n = from; n < std::min(from + at_once, p.states); ++n) {
        cf plain[MI / 2], ramp[MI / 2];
        sum_block(dk + l1 * size.fine, weighted + l1 * size.fine, fine + 2 * n * size.fine, size.fine, plain, ramp);
        vf* s = sums + 4 * n;
        cf s0 = get(s, 0), s1 = get(s, 1);
        for (int i = 0; i < MI / 2; ++i) {
          const float start = static_cast<float>((l1 + i) * size.fine);
          const cf y = get(coarse + 2 * n * size.coarse, l1 + i);
          s0 = s0 + y * plain[i];
          s1 = s1 + y * cf{ramp[i].r + start * plain[i].r, ramp[i].i + start * plain[i].i};
        }
        put(s, 0, s0);
        put(s, 1, s1);
      }
    }
  }
  write_gradients(p, tile, lanes, modes, sums);
  store_part(p.d_skip + tile * LANES, dk[0], lanes);
}

}  // namespace
}  // namespace diffussm

extern "C" void diffussm_kernel(const diffussm::KernelArgs* args, int gradients) {
  using namespace diffussm;
  const long tiles = tiles_of(args->channels);
  if (gradients == 0) advise_huge(args->k, sizeof(float) * static_cast<size_t>(args->channels * args->length));
#pragma omp parallel num_threads(args->threads)
  {
    Modes modes(args->states);
#pragma omp for schedule(dynamic)
    for (long tile = 0; tile < tiles; ++tile) {
      gradients != 0 ? tile_gradients(*args, tile, modes) : tile_kernel(*args, tile, modes);
    }
  }
}
