// What one warp holds: a 32 x 32 matrix in registers, in float16 operands and float32 sums, and the instructions on it.
#pragma once

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
