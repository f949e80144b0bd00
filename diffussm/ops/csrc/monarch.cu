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

#include "monarch_product.cuh"
#include "monarch_transform.cuh"

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
