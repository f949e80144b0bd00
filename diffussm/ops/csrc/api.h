// The plain C interface that Python calls: one struct of arguments for each function. Counts and strides are in
// elements, rows of u and dy have a stride of 1 between channels, all else is contiguous. Python's mirror is
// diffussm/ops/cpu.py.
#pragma once

namespace diffussm {

constexpr int BOTH = 2;  // direction: 0 forward, 1 backward, both of one input

struct ConvArgs {
  const void* u;   // (B, L, D) if shared, else (B, L, 2D): the forward direction's input, then the backward's
  const void* dy;  // (B, L, 2D)
  const float* k_f;
  const float* k_b;  // kernels, (D, L)
  void* y;           // (B, L, 2D)
  void* du;          // like u, contiguous
  float* dk_f;
  float* dk_b;  // like the kernels
  long u_batch, u_row, dy_batch, dy_row;
  long batch, length, channels;
  int is_bf16, shared, threads;
};

struct KernelArgs {
  const float* log_dt;      // (D,)
  const float* log_a_real;  // (D, states)
  const float* a_imag;      // (D, states)
  const float* b;           // (D, states, 2)
  const float* c;           // (D, states, 2)
  const float* skip;        // (D,)
  float* k;                 // kernels, written; or for gradients their gradient, read
  float* d_log_dt;
  float* d_log_a_real;
  float* d_a_imag;
  float* d_b;
  float* d_c;
  float* d_skip;
  long length, channels, states;
  int threads;
};

}  // namespace diffussm

#pragma GCC visibility push(default)
extern "C" {
void diffussm_conv(const diffussm::ConvArgs* args, int gradients);
void diffussm_kernel(const diffussm::KernelArgs* args, int gradients);
}
#pragma GCC visibility pop
