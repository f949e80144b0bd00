// Bidirectional long convolution of length 1024 or 4096 on tensor cores, for kernels that are known in advance.
//
// Sequences are multiplied as polynomials modulo x^N - i (N = 1024 SUBS): the transform R is a DFT after a modulation by
// exp(i pi n / 2N), the overflow of a real linear convolution lands in the imaginary part, and no zero padding is needed.
// One warp transforms 1024 points as a 32 x 32 matrix: two products with the DFT matrix and a twiddle between them
// (Monarch decomposition), all in registers. An accumulator fragment read as an operand is the transpose of itself or
// itself, so that the order of contractions below needs no shuffle at all. For 4096 points four warps take the residues
// n mod 4 and meet in one radix-4 butterfly through shared memory.
//
// Operands are float16 with one power of two for each warp's block, so that range is never lost; sums, twiddles and the
// butterfly are float32.
//
// Compile-time: SUBS 1 or 4; BF16 1 if u and y are bfloat16, 0 if float16.
// A block handles 8 channels of one sequence in one direction; grid (ceil(D / 8), 2, B).

#ifndef SHIM
typedef unsigned int u32;
typedef unsigned short u16;
#define DEVICE __device__ __forceinline__
extern __shared__ __align__(16) unsigned char shared_memory[];

// c += a b for one 16 x 8 x 16 tile of float16 with float32 sums.
DEVICE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE u32 pack_half(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE u32 pack_bfloat(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }
#endif

#define CHANNELS 8
#define WARPS (SUBS == 1 ? 8 : 4)
#define THREADS (32 * WARPS)
#define ROW 36                 // 32 elements and padding: the strided reads of a fragment hit 32 different banks
#define SEQUENCE (32 * ROW)    // elements of one padded 1024-point sequence
#define POINTS (1024 * SUBS)

// Table offsets in 16-byte units: six operand fragments, then the twiddles.
#define FRAGMENT 128           // 2 x 2 tiles, 32 lanes, 4 registers
#define T_IN_RE 0
#define T_IN_IM (1 * FRAGMENT)
#define T_DFT_RE (2 * FRAGMENT)
#define T_DFT_IM (3 * FRAGMENT)
#define T_OUT_RE (4 * FRAGMENT)
#define T_OUT_IM (5 * FRAGMENT)
#define T_TWIDDLE (6 * FRAGMENT)        // 8 tiles, 32 lanes, 4 complex numbers
#define T_UNTWIDDLE (T_TWIDDLE + 512)
#define T_BUTTERFLY (T_UNTWIDDLE + 512)

typedef float Tile[2][4][4];  // a 32 x 32 matrix: [row tile][column tile][register], rows 16 mi + g (+8), columns 8 ni + 2q

DEVICE float element(u16 x) {
#if BF16
  return __uint_as_float((u32)x << 16);
#else
  return half_to_float(x);
#endif
}

DEVICE u32 pack_element(float low, float high) {
#if BF16
  return pack_bfloat(low, high);
#else
  return pack_half(low, high);
#endif
}

// Power of two that brings the largest magnitude of the warp to 2^7..2^8: float16 keeps 11 bits down to 2^-22 of it.
DEVICE float block_scale(float largest) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) largest = fmaxf(largest, shuffle_xor(largest, mask));
  int exponent = (int)((__float_as_uint(largest) >> 23) & 255u);
  int wanted = 254 + 7 - exponent;  // exponent field of 2^(7 - floor(log2 largest))
  wanted = wanted > 250 ? 250 : (wanted < 4 ? 4 : wanted);
  return largest > 0.0f ? __uint_as_float((u32)wanted << 23) : 1.0f;
}

DEVICE float largest_of(const Tile& re, const Tile& im) {
  float m = 0.0f;
#pragma unroll
  for (int mi = 0; mi < 2; ++mi)
#pragma unroll
    for (int ni = 0; ni < 4; ++ni)
#pragma unroll
      for (int e = 0; e < 4; ++e) m = fmaxf(m, fmaxf(fabsf(re[mi][ni][e]), fabsf(im[mi][ni][e])));
  return m;
}

DEVICE void clear(Tile& x) {
#pragma unroll
  for (int mi = 0; mi < 2; ++mi)
#pragma unroll
    for (int ni = 0; ni < 4; ++ni)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[mi][ni][e] = 0.0f;
}

// (re, im) *= (table), element by element.
DEVICE void twiddle(Tile& re, Tile& im, const uint4* table, int lane) {
#pragma unroll
  for (int mi = 0; mi < 2; ++mi)
#pragma unroll
    for (int ni = 0; ni < 4; ++ni) {
      const float4* at = (const float4*)table + ((mi * 4 + ni) * 32 + lane) * 2;
      float4 a = at[0], b = at[1];
      float wr[4] = {a.x, a.z, b.x, b.z}, wi[4] = {a.y, a.w, b.y, b.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float r = re[mi][ni][e] * wr[e] - im[mi][ni][e] * wi[e];
        im[mi][ni][e] = re[mi][ni][e] * wi[e] + im[mi][ni][e] * wr[e];
        re[mi][ni][e] = r;
      }
    }
}

// A fragment tile packed to float16 pairs: [mi][ni][row half].
DEVICE void pack_tile(u32 (&out)[2][4][2], const Tile& x, float scale) {
#pragma unroll
  for (int mi = 0; mi < 2; ++mi)
#pragma unroll
    for (int ni = 0; ni < 4; ++ni) {
      out[mi][ni][0] = pack_half(x[mi][ni][0] * scale, x[mi][ni][1] * scale);
      out[mi][ni][1] = pack_half(x[mi][ni][2] * scale, x[mi][ni][3] * scale);
    }
}

// R of one sequence: (re, im)[k1][k2] = spectrum at k1 + 32 k2, times the returned scale.
DEVICE float transform(Tile& re, Tile& im, const u16* seq, const uint4* table, int lane) {
  const int g = lane >> 2, q = lane & 3;
  // u[n1][n2] as right operand, n = 32 n1 + n2.
  float raw[2][4][2][2];
  float largest = 0.0f;
#pragma unroll
  for (int kt = 0; kt < 2; ++kt)
#pragma unroll
    for (int nt = 0; nt < 4; ++nt)
#pragma unroll
      for (int v = 0; v < 2; ++v)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float x = element(seq[(kt * 16 + 8 * v + 2 * q + e) * ROW + nt * 8 + g]);
          raw[kt][nt][v][e] = x;
          largest = fmaxf(largest, fabsf(x));
        }
  float scale = block_scale(largest), total = scale;
  clear(re);
  clear(im);
#pragma unroll
  for (int mi = 0; mi < 2; ++mi)
#pragma unroll
    for (int kt = 0; kt < 2; ++kt) {
      uint4 fr = table[T_IN_RE + (mi * 2 + kt) * 32 + lane], fi = table[T_IN_IM + (mi * 2 + kt) * 32 + lane];
#pragma unroll
      for (int nt = 0; nt < 4; ++nt) {
        u32 b0 = pack_half(raw[kt][nt][0][0] * scale, raw[kt][nt][0][1] * scale);
        u32 b1 = pack_half(raw[kt][nt][1][0] * scale, raw[kt][nt][1][1] * scale);
        mma(re[mi][nt], fr.x, fr.y, fr.z, fr.w, b0, b1);
        mma(im[mi][nt], fi.x, fi.y, fi.z, fi.w, b0, b1);
      }
    }
  twiddle(re, im, table + T_TWIDDLE, lane);
  scale = block_scale(largest_of(re, im));
  total *= scale;
  u32 zr[2][4][2], zi[2][4][2];
  pack_tile(zr, re, scale);
  pack_tile(zi, im, scale);
  clear(re);
  clear(im);
  // Z F: the accumulator is the left operand as it stands; F is symmetric, so its left fragments serve on the right.
#pragma unroll
  for (int kt = 0; kt < 2; ++kt)
#pragma unroll
    for (int ft = 0; ft < 2; ++ft) {
      uint4 fr = table[T_DFT_RE + (ft * 2 + kt) * 32 + lane], fi = table[T_DFT_IM + (ft * 2 + kt) * 32 + lane];
      u32 r[2][2] = {{fr.x, fr.z}, {fr.y, fr.w}}, i[2][2] = {{fi.x, fi.z}, {fi.y, fi.w}};
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int mi = 0; mi < 2; ++mi) {
          u32 ar[4] = {zr[mi][2 * kt][0], zr[mi][2 * kt][1], zr[mi][2 * kt + 1][0], zr[mi][2 * kt + 1][1]};
          u32 ai[4] = {zi[mi][2 * kt][0], zi[mi][2 * kt][1], zi[mi][2 * kt + 1][0], zi[mi][2 * kt + 1][1]};
          const u32 n = 0x80008000u;
          int nt = 2 * ft + h;
          mma(re[mi][nt], ar[0], ar[1], ar[2], ar[3], r[h][0], r[h][1]);
          mma(re[mi][nt], ai[0], ai[1], ai[2], ai[3], i[h][0] ^ n, i[h][1] ^ n);
          mma(im[mi][nt], ar[0], ar[1], ar[2], ar[3], i[h][0], i[h][1]);
          mma(im[mi][nt], ai[0], ai[1], ai[2], ai[3], r[h][0], r[h][1]);
        }
    }
  return total;
}

// Real part of the unnormalised inverse of (re, im)[k1][k2] into re[n1][n2], times the returned scale.
DEVICE float inverse(Tile& re, Tile& im, const uint4* table, int lane) {
  const u32 n = 0x80008000u;
  float scale = block_scale(largest_of(re, im)), total = scale;
  u32 sr[2][4][2], si[2][4][2];
  pack_tile(sr, re, scale);
  pack_tile(si, im, scale);
  clear(re);
  clear(im);
  // V[n2][k1] = sum_k2 conj(F)[n2][k2] S[k1][k2]: the accumulator read as a right operand is its transpose.
#pragma unroll
  for (int mi = 0; mi < 2; ++mi)
#pragma unroll
    for (int kt = 0; kt < 2; ++kt) {
      uint4 fr = table[T_DFT_RE + (mi * 2 + kt) * 32 + lane], fi = table[T_DFT_IM + (mi * 2 + kt) * 32 + lane];
#pragma unroll
      for (int nt = 0; nt < 4; ++nt) {
        u32 r0 = sr[nt >> 1][2 * kt][nt & 1], r1 = sr[nt >> 1][2 * kt + 1][nt & 1];
        u32 i0 = si[nt >> 1][2 * kt][nt & 1], i1 = si[nt >> 1][2 * kt + 1][nt & 1];
        mma(re[mi][nt], fr.x, fr.y, fr.z, fr.w, r0, r1);
        mma(re[mi][nt], fi.x, fi.y, fi.z, fi.w, i0, i1);
        mma(im[mi][nt], fr.x, fr.y, fr.z, fr.w, i0, i1);
        mma(im[mi][nt], fi.x, fi.y, fi.z, fi.w, r0 ^ n, r1 ^ n);
      }
    }
  twiddle(re, im, table + T_UNTWIDDLE, lane);
  scale = block_scale(largest_of(re, im));
  total *= scale;
  pack_tile(sr, re, scale);
  pack_tile(si, im, scale);
  clear(re);
#pragma unroll
  for (int mi = 0; mi < 2; ++mi)
#pragma unroll
    for (int kt = 0; kt < 2; ++kt) {
      uint4 fr = table[T_OUT_RE + (mi * 2 + kt) * 32 + lane], fi = table[T_OUT_IM + (mi * 2 + kt) * 32 + lane];
#pragma unroll
      for (int nt = 0; nt < 4; ++nt) {
        mma(re[mi][nt], fr.x, fr.y, fr.z, fr.w, sr[nt >> 1][2 * kt][nt & 1], sr[nt >> 1][2 * kt + 1][nt & 1]);
        mma(re[mi][nt], fi.x, fi.y, fi.z, fi.w, si[nt >> 1][2 * kt][nt & 1], si[nt >> 1][2 * kt + 1][nt & 1]);
      }
    }
  return total;
}

DEVICE void multiply(float& re, float& im, u32 pair) {
  float kr = half_to_float((u16)(pair & 0xffffu)), ki = half_to_float((u16)(pair >> 16));
  float r = re * kr - im * ki;
  im = re * ki + im * kr;
  re = r;
}

#if SUBS == 1
DEVICE void apply_spectrum(Tile& re, Tile& im, const uint4* spectrum, int lane) {
#pragma unroll
  for (int mi = 0; mi < 2; ++mi)
#pragma unroll
    for (int ni = 0; ni < 4; ++ni) {
      uint4 k = spectrum[(mi * 4 + ni) * 32 + lane];
      u32 pair[4] = {k.x, k.y, k.z, k.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) multiply(re[mi][ni][e], im[mi][ni][e], pair[e]);
    }
}
#else
// Four sub-spectra X_r to X[k + 1024 j] = sum_r w^r (-i)^(r j) X_r[k], times the kernel's, and back. One row tile at a
// time: every warp writes its 16 numbers a lane, takes column tile `warp` of all four, and reads its own again.
DEVICE void apply_spectrum(Tile& re, Tile& im, const uint4* spectrum, const uint4* table, float2* exchange, int warp,
                           int lane) {
#pragma unroll
  for (int mi = 0; mi < 2; ++mi) {
    float2* own = exchange + warp * 16 * 32 + lane;
#pragma unroll
    for (int ni = 0; ni < 4; ++ni)
#pragma unroll
      for (int e = 0; e < 4; ++e) own[(ni * 4 + e) * 32] = make_float2(re[mi][ni][e], im[mi][ni][e]);
    sync_block();
    const int tile = mi * 4 + warp;
    const float4* at = (const float4*)(table + T_BUTTERFLY) + (tile * 32 + lane) * 2;
    float4 a = at[0], b = at[1];
    float w1r[4] = {a.x, a.z, b.x, b.z}, w1i[4] = {a.y, a.w, b.y, b.w};
    u32 k[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint4 packed = spectrum[(tile * 32 + lane) * 4 + j];
      k[j][0] = packed.x; k[j][1] = packed.y; k[j][2] = packed.z; k[j][3] = packed.w;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float2* all = exchange + (warp * 4 + e) * 32 + lane;
      float xr[4], xi[4], wr[4], wi[4];
      wr[0] = 1.0f; wi[0] = 0.0f;
#pragma unroll
      for (int r = 1; r < 4; ++r) {
        wr[r] = wr[r - 1] * w1r[e] - wi[r - 1] * w1i[e];
        wi[r] = wr[r - 1] * w1i[e] + wi[r - 1] * w1r[e];
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float2 x = all[r * 16 * 32];
        xr[r] = x.x * wr[r] - x.y * wi[r];
        xi[r] = x.x * wi[r] + x.y * wr[r];
      }
      // Forward butterfly (multiples of -i), product, inverse butterfly (multiples of i).
      float sr = xr[0] + xr[2], si = xi[0] + xi[2], dr = xr[0] - xr[2], di = xi[0] - xi[2];
      float tr = xr[1] + xr[3], ti = xi[1] + xi[3], er = xr[1] - xr[3], ei = xi[1] - xi[3];
      float yr[4] = {sr + tr, dr + ei, sr - tr, dr - ei}, yi[4] = {si + ti, di - er, si - ti, di + er};
#pragma unroll
      for (int j = 0; j < 4; ++j) multiply(yr[j], yi[j], k[j][e]);
      sr = yr[0] + yr[2]; si = yi[0] + yi[2]; dr = yr[0] - yr[2]; di = yi[0] - yi[2];
      tr = yr[1] + yr[3]; ti = yi[1] + yi[3]; er = yr[1] - yr[3]; ei = yi[1] - yi[3];
      xr[0] = sr + tr; xi[0] = si + ti;
      xr[1] = dr - ei; xi[1] = di + er;
      xr[2] = sr - tr; xi[2] = si - ti;
      xr[3] = dr + ei; xi[3] = di - er;
#pragma unroll
      for (int r = 0; r < 4; ++r)
        all[r * 16 * 32] = make_float2(xr[r] * wr[r] + xi[r] * wi[r], xi[r] * wr[r] - xr[r] * wi[r]);
    }
    sync_block();
#pragma unroll
    for (int ni = 0; ni < 4; ++ni)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float2 x = own[(ni * 4 + e) * 32];
        re[mi][ni][e] = x.x;
        im[mi][ni][e] = x.y;
      }
  }
}
#endif

// u: strides in elements, channel c of direction r at u + r u_direction + c u_d; y (B, L, 2D) contiguous.
// spectrum: (2, D, 8 tiles, 32 lanes, SUBS, 4) float16 pairs; gain (2, D): what turns the result into y.
extern "C" __global__ void __launch_bounds__(THREADS) monarch(
    const u16* u, u16* y, const uint4* spectrum, const float* gain, const uint4* table, int L, int D, int u_direction,
    int u_b, int u_l, int u_d) {
  u16* tile = (u16*)shared_memory;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int first = blockIdx.x * CHANNELS, direction = blockIdx.y;
  const long long sequence = blockIdx.z;
  const u16* in = u + sequence * u_b + (long long)direction * u_direction + (long long)first * u_d;
  u16* out = y + sequence * L * (2LL * D) + (long long)direction * D + first;
  const bool whole = first + CHANNELS <= D;
  const bool wide_in = whole && u_d == 1 && ((u_b | u_l | u_direction) & 7) == 0 && ((unsigned long long)u & 15) == 0;
  for (int p = thread; p < POINTS; p += THREADS) {
    const int m = p / SUBS;
    u16* at = tile + (p % SUBS) * SEQUENCE + (m >> 5) * ROW + (m & 31);
    u16 x[CHANNELS];
    if (wide_in && p < L) {
      uint4 v = *(const uint4*)(in + (long long)p * u_l);
      u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) x[c] = (u16)(w[c / 2] >> (16 * (c & 1)));
    } else {
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
        x[c] = (p < L && first + c < D) ? in[(long long)p * u_l + (long long)c * u_d] : (u16)0;
    }
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) at[c * SUBS * SEQUENCE] = x[c];
  }
  sync_block();
#if SUBS == 1
  const int channel = warp;
  {
#else
  float2* exchange = (float2*)(shared_memory + CHANNELS * SUBS * SEQUENCE * 2);
  for (int channel = 0; channel < CHANNELS; ++channel) {
#endif
    const int known = first + channel < D ? first + channel : D - 1;
    const long long row = (long long)direction * D + known;
    const uint4* k = spectrum + row * (8 * 32 * SUBS);
    u16* seq = tile + (channel * SUBS + (SUBS == 1 ? 0 : warp)) * SEQUENCE;
    Tile re, im;
    float scale = transform(re, im, seq, table, lane);
#if SUBS == 1
    apply_spectrum(re, im, k, lane);
#else
    const float undo = 1.0f / scale;  // the warps' scales differ, and the butterfly mixes them
#pragma unroll
    for (int mi = 0; mi < 2; ++mi)
#pragma unroll
      for (int ni = 0; ni < 4; ++ni)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          re[mi][ni][e] *= undo;
          im[mi][ni][e] *= undo;
        }
    scale = 1.0f;
    apply_spectrum(re, im, k, table, exchange, warp, lane);
#endif
    const float first_scale = scale;
    const float second_scale = inverse(re, im, table, lane);
    const float factor = gain[row] / first_scale / second_scale;  // one division each: the product may leave float32
    const int g = lane >> 2, q = lane & 3;
    sync_warp();
#pragma unroll
    for (int mi = 0; mi < 2; ++mi)
#pragma unroll
      for (int ni = 0; ni < 4; ++ni)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          u32 pair = pack_element(re[mi][ni][2 * h] * factor, re[mi][ni][2 * h + 1] * factor);
          *(u32*)(seq + (mi * 16 + 8 * h + g) * ROW + ni * 8 + 2 * q) = pair;
        }
  }
  sync_block();
  const bool wide_out = whole && (D & 7) == 0 && ((unsigned long long)y & 15) == 0;
  for (int p = thread; p < POINTS && p < L; p += THREADS) {
    const int m = p / SUBS;
    const u16* at = tile + (p % SUBS) * SEQUENCE + (m >> 5) * ROW + (m & 31);
    u16* to = out + (long long)p * (2LL * D);
    if (wide_out) {
      u32 w[4];
#pragma unroll
      for (int c = 0; c < 4; ++c)
        w[c] = (u32)at[2 * c * SUBS * SEQUENCE] | ((u32)at[(2 * c + 1) * SUBS * SEQUENCE] << 16);
      *(uint4*)to = make_uint4(w[0], w[1], w[2], w[3]);
    } else {
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
        if (first + c < D) to[c] = at[c * SUBS * SEQUENCE];
    }
  }
}
