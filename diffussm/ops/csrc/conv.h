// What happens to LEAF points in the transform domain: the innermost stages of the transforms around a product, fused
// with it. Arguments are registers of the first point; K, the kernels' spectra, are divided by N.
#pragma once

#include "fft.h"

namespace diffussm {

ALWAYS_INLINE void read_points(const vf* x, cf* a) {
  for (int k = 0; k < LEAF; ++k) {
    a[k] = get(x, k);
    pin(a[k]);
  }
}

ALWAYS_INLINE void write_points(vf* x, const cf* a) {
  for (int k = 0; k < LEAF; ++k) put(x, k, a[k]);
}

ALWAYS_INLINE void transform_leaf(vf* x) {
  cf a[LEAF];
  read_points(x, a);
  forward_points<LEAF>(a);
  write_points(x, a);
}

ALWAYS_INLINE void inverse_leaf(vf* x) {
  cf a[LEAF];
  read_points(x, a);
  inverse_points<LEAF>(a);
  write_points(x, a);
}

// a K of the forward direction; the backward direction is the adjoint, so its K enters conjugated.
template <bool ADJOINT>
ALWAYS_INLINE cf times_kernel(cf a, cf k) {
  return ADJOINT ? times_conj(a, k) : a * k;
}

// Both directions of the same input: y <- R^-1(K_f R x), x <- R^-1(conj(K_b) R x).
ALWAYS_INLINE void conv_leaf(vf* x, vf* y, const vf* kf, const vf* kb) {
  cf a[LEAF], b[LEAF];
  read_points(x, a);
  forward_points<LEAF>(a);
  for (int k = 0; k < LEAF; ++k) b[k] = a[k] * get(kf, k);
  inverse_points<LEAF>(b);
  write_points(y, b);
  for (int k = 0; k < LEAF; ++k) a[k] = times_conj(a[k], get(kb, k));
  inverse_points<LEAF>(a);
  write_points(x, a);
}

// One direction: x <- R^-1(K R x).
template <bool ADJOINT>
ALWAYS_INLINE void conv_one_leaf(vf* x, const vf* kernel) {
  cf a[LEAF];
  read_points(x, a);
  forward_points<LEAF>(a);
  for (int k = 0; k < LEAF; ++k) a[k] = times_kernel<ADJOINT>(a[k], get(kernel, k));
  inverse_points<LEAF>(a);
  write_points(x, a);
}

// Gradients, both directions of the same input: f <- R^-1(conj(K_f) R f + K_b R g), gf += conj(R u) R f,
// gb += R u conj(R g). u and g are used up.
ALWAYS_INLINE void grad_leaf(vf* u, vf* f, vf* g, const vf* kf, const vf* kb, vf* gf, vf* gb) {
  cf a[LEAF];
  transform_leaf(u);
  read_points(f, a);
  forward_points<LEAF>(a);
  for (int k = 0; k < LEAF; ++k) {
    put(gf, k, get(gf, k) + times_conj(a[k], get(u, k)));
    put(f, k, times_conj(a[k], get(kf, k)));
  }
  read_points(g, a);
  forward_points<LEAF>(a);
  for (int k = 0; k < LEAF; ++k) {
    put(gb, k, get(gb, k) + times_conj(get(u, k), a[k]));
    a[k] = get(f, k) + a[k] * get(kb, k);
  }
  inverse_points<LEAF>(a);
  write_points(f, a);
}

// Gradients of one direction: f <- R^-1(K* R f), gk += the product that belongs to the direction. u is used up.
template <bool ADJOINT>
ALWAYS_INLINE void grad_one_leaf(vf* u, vf* f, const vf* kernel, vf* gk) {
  cf a[LEAF];
  transform_leaf(u);
  read_points(f, a);
  forward_points<LEAF>(a);
  for (int k = 0; k < LEAF; ++k) {
    const cf product = ADJOINT ? times_conj(get(u, k), a[k]) : times_conj(a[k], get(u, k));
    put(gk, k, get(gk, k) + product);
    a[k] = times_kernel<!ADJOINT>(a[k], get(kernel, k));
  }
  inverse_points<LEAF>(a);
  write_points(f, a);
}

}  // namespace diffussm
