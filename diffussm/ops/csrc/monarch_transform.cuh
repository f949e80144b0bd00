// The transform R of 1024 points by one warp, and its inverse: two matrix products and a twiddle between them.
#pragma once

#include "monarch_tile.cuh"

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
