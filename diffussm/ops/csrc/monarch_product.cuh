// The product with the kernel's spectrum; for 4096 points between a radix-4 butterfly of four warps and its inverse.
#pragma once

#include "monarch_tile.cuh"

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
