// Bidirectional convolution, forward and backward, on the (B, L, D) layout.
//
// A work item is a group of channels and a slice of the batch; when the directions read inputs of their own it is also
// one direction. A group is a cache line of fp32 channels, so that every line of u and y is used whole while it is at
// hand.
#include "conv.h"

#include <memory>
#include <type_traits>

#include "api.h"
#include "layout.h"

namespace diffussm {
namespace {

constexpr int GROUP = 16;             // channels of a group
constexpr int WIDE = GROUP / LANES;   // its tiles

long groups_of(long channels) { return (channels + GROUP - 1) / GROUP; }

// Slices of the batch depend on the shape alone, never on the number of threads, so that results do not either.
long slices_of(long batch, long channels) {
  const long wanted = (32 + groups_of(channels) - 1) / groups_of(channels);
  return std::max<long>(1, std::min(wanted, batch / 8));
}

// Complex buffers are 13 cache lines longer than a power of two: equal points of two buffers do not share a cache set.
long buffer_registers(long points) { return 2 * points + 26; }

template <class T>
size_t y_bytes(const ConvArgs& a) {
  return sizeof(T) * static_cast<size_t>(2 * a.batch * a.length * a.channels);
}

template <class T>
size_t du_bytes(const ConvArgs& a) {
  return a.shared ? y_bytes<T>(a) / 2 : y_bytes<T>(a);
}

// The part of the tensors that one work item sees.
struct Item {
  const Plan& plan;
  long pitch;        // registers from one buffer to the next
  long first;        // first channel
  int lanes;         // valid channels of the tile; LANES in whole groups
  int direction;     // 0 forward, 1 backward, BOTH
  long begin, end;   // of the batch
  vf* memory;        // scratch
  bool has_forward() const { return direction != 1; }
  bool has_backward() const { return direction != 0; }
};

// x <- R k / N for W tiles
template <int W>
void kernel_spectrum(const ConvArgs& a, const Item& it, const float* k, vf* rows, vf* x) {
  const float scale = 1.0f / static_cast<float>(it.plan.points);
  for (int w = 0; w < W; ++w, x += it.pitch) {
    rows_to_lanes(k + (it.first + w * LANES) * a.length, a.length, it.lanes, rows);
    first_stage<1>(it.plan, x, 0, a.length, KernelRows{reinterpret_cast<float*>(rows), scale});
    vf* const forward[] = {x};
    vf* const inverse[] = {static_cast<vf*>(nullptr)};
    middle(it.plan, forward, inverse, [=](long o) { transform_leaf(x + o); });
  }
}

// dk <- Re R^-1 g / N for W tiles: rows of (D, L), or with `tiled`, when slices are still to be added, tiles.
template <int W>
void kernel_gradient(const ConvArgs& a, const Item& it, vf* g, vf* rows, float* dk, bool tiled) {
  const float scale = 1.0f / static_cast<float>(it.plan.points);
  for (int w = 0; w < W; ++w, g += it.pitch) {
    vf* const forward[] = {static_cast<vf*>(nullptr)};
    vf* const inverse[] = {g};
    middle(it.plan, forward, inverse, [=](long o) { inverse_leaf(g + o); });
    float* const out = dk + (it.first + w * LANES) * a.length;
    last_stage<1>(it.plan, g, 0, a.length, KernelRows{tiled ? out : reinterpret_cast<float*>(rows), scale});
    if (!tiled) lanes_to_rows(rows, a.length, it.lanes, out);
  }
}

void convolve(const Item& it, vf* x, vf* y, const vf* kf, const vf* kb) {
  vf* const alone[] = {x};
  vf* const both[] = {y, x};
  if (it.direction == 0) {
    middle(it.plan, alone, alone, [=](long o) { conv_one_leaf<false>(x + o, kf + o); });
  } else if (it.direction == 1) {
    middle(it.plan, alone, alone, [=](long o) { conv_one_leaf<true>(x + o, kb + o); });
  } else {
    middle(it.plan, alone, both, [=](long o) { conv_leaf(x + o, y + o, kf + o, kb + o); });
  }
}

// The last stage into rows of a tensor whose size is `bytes`.
template <class T, int W, bool WHOLE>
void write_rows(const ConvArgs& a, const Item& it, const vf* x, T* base, long stride, size_t bytes) {
  if constexpr (WHOLE && sizeof(T) == sizeof(float)) {
    if (worth_streaming(base, stride, bytes)) {
      return last_stage<W>(it.plan, x, it.pitch, a.length, StreamedRows{base, stride});
    }
  }
  last_stage<W>(it.plan, x, it.pitch, a.length, Rows<T, WHOLE>{base, stride, it.lanes});
}

template <class T, int W, bool WHOLE>
void forward_item(const ConvArgs& a, const Item& it) {
  const Plan& plan = it.plan;
  const long pitch = it.pitch, side = it.direction == 1 ? a.channels : 0;
  vf *x = it.memory, *y = x + W * pitch, *kf = y + W * pitch, *kb = kf + W * pitch, *rows = kb + W * pitch;
  if (it.has_forward()) kernel_spectrum<W>(a, it, a.k_f, rows, kf);
  if (it.has_backward()) kernel_spectrum<W>(a, it, a.k_b, rows, kb);
  for (long b = it.begin; b < it.end; ++b) {
    const T* u = static_cast<const T*>(a.u) + b * a.u_batch + it.first + side;
    T* out = static_cast<T*>(a.y) + b * a.length * 2 * a.channels + it.first;
    first_stage<W>(plan, x, pitch, a.length, Rows<const T, WHOLE>{u, a.u_row, it.lanes});
    for (int w = 0; w < W; ++w) {
      const long p = w * pitch;
      convolve(it, x + p, y + p, kf + p, kb + p);
    }
    if (it.has_forward()) {
      write_rows<T, W, WHOLE>(a, it, it.direction == BOTH ? y : x, out, 2 * a.channels, y_bytes<T>(a));
    }
    if (it.has_backward()) write_rows<T, W, WHOLE>(a, it, x, out + a.channels, 2 * a.channels, y_bytes<T>(a));
  }
}

void differentiate(const Item& it, vf* u, vf* f, vf* g, const vf* kf, const vf* kb, vf* gf, vf* gb) {
  vf *const u_f[] = {u, f}, *const u_g[] = {u, g}, *const all[] = {u, f, g}, *const to_f[] = {f}, *const to_g[] = {g};
  if (it.direction == 0) {
    middle(it.plan, u_f, to_f, [=](long o) { grad_one_leaf<false>(u + o, f + o, kf + o, gf + o); });
  } else if (it.direction == 1) {
    middle(it.plan, u_g, to_g, [=](long o) { grad_one_leaf<true>(u + o, g + o, kb + o, gb + o); });
  } else {
    middle(it.plan, all, to_f, [=](long o) {
      grad_leaf(u + o, f + o, g + o, kf + o, kb + o, gf + o, gb + o);
    });
  }
}

template <class T, int W, bool WHOLE>
void backward_item(const ConvArgs& a, const Item& it, float* dk_f, float* dk_b, bool tiled) {
  const Plan& plan = it.plan;
  const long pitch = it.pitch, side = it.direction == 1 ? a.channels : 0;
  const long u_width = it.direction == BOTH ? a.channels : 2 * a.channels;
  vf *xu = it.memory, *xf = xu + W * pitch, *xb = xf + W * pitch, *kf = xb + W * pitch, *kb = kf + W * pitch;
  vf *gf = kb + W * pitch, *gb = gf + W * pitch, *rows = gb + W * pitch;
  if (it.has_forward()) kernel_spectrum<W>(a, it, a.k_f, rows, kf);
  if (it.has_backward()) kernel_spectrum<W>(a, it, a.k_b, rows, kb);
  std::fill(gf, rows, zero());
  for (long b = it.begin; b < it.end; ++b) {
    const T* u = static_cast<const T*>(a.u) + b * a.u_batch + it.first + side;
    const T* dy = static_cast<const T*>(a.dy) + b * a.dy_batch + it.first;
    T* du = static_cast<T*>(a.du) + b * a.length * u_width + it.first + side;
    first_stage<W>(plan, xu, pitch, a.length, Rows<const T, WHOLE>{u, a.u_row, it.lanes});
    if (it.has_forward()) {
      first_stage<W>(plan, xf, pitch, a.length, Rows<const T, WHOLE>{dy, a.dy_row, it.lanes});
    }
    if (it.has_backward()) {
      first_stage<W>(plan, xb, pitch, a.length, Rows<const T, WHOLE>{dy + a.channels, a.dy_row, it.lanes});
    }
    for (int w = 0; w < W; ++w) {
      const long p = w * pitch;
      differentiate(it, xu + p, xf + p, xb + p, kf + p, kb + p, gf + p, gb + p);
    }
    write_rows<T, W, WHOLE>(a, it, it.has_forward() ? xf : xb, du, u_width, du_bytes<T>(a));
  }
  if (it.has_forward()) kernel_gradient<W>(a, it, gf, rows, dk_f, tiled);
  if (it.has_backward()) kernel_gradient<W>(a, it, gb, rows, dk_b, tiled);
}

// Cuts the work into items and hands each to run(item, slice, whole group).
template <class Run>
void for_each_item(const ConvArgs& a, int buffers, Run run) {
  const Plan& plan = plan_for(a.length);
  const long slices = slices_of(a.batch, a.channels), pitch = buffer_registers(plan.points);
  const long directions = a.shared ? 1 : 2;
#pragma omp parallel for num_threads(a.threads) schedule(dynamic)
  for (long i = 0; i < groups_of(a.channels) * slices * directions; ++i) {
    const long group = i / (slices * directions), slice = i / directions % slices;
    Item it{plan, pitch, group * GROUP, LANES, a.shared ? BOTH : static_cast<int>(i % directions),
            a.batch * slice / slices, a.batch * (slice + 1) / slices,
            scratch().take(buffers * WIDE * pitch + a.length)};
    if (it.first + GROUP <= a.channels) {
      run(it, slice, std::true_type{});
      drain();
      continue;
    }
    for (; it.first < std::min(a.channels, (group + 1) * GROUP); it.first += LANES) {
      it.lanes = static_cast<int>(std::min<long>(LANES, a.channels - it.first));
      run(it, slice, std::false_type{});
    }
    drain();
  }
}

template <class T>
void forward(const ConvArgs& a) {
  advise_huge(a.y, y_bytes<T>(a));
  for_each_item(a, 4, [&a](const Item& it, long, auto whole) {
    if constexpr (whole) {
      forward_item<T, WIDE, true>(a, it);
    } else {
      forward_item<T, 1, false>(a, it);
    }
  });
}

// dk <- sum over slices of partial [slice][direction][tile][length][LANES]
void sum_slices(const ConvArgs& a, const float* partial, long slices, long plane) {
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (long i = 0; i < 2 * tiles_of(a.channels); ++i) {
    const long tile = i / 2, place = tile * a.length * LANES;
    const float* from = partial + (i % 2) * plane + place;
    float* out = (i % 2 == 0 ? a.dk_f : a.dk_b) + place;
    vf* sum = scratch().take(a.length);
    for (long l = 0; l < a.length; ++l) {
      sum[l] = load(from + l * LANES);
      for (long s = 1; s < slices; ++s) sum[l] += load(from + 2 * s * plane + l * LANES);
    }
    lanes_to_rows(sum, a.length, lanes_of(a.channels, tile), out);
  }
}

template <class T>
void backward(const ConvArgs& a) {
  const long slices = slices_of(a.batch, a.channels), plane = tiles_of(a.channels) * a.length * LANES;
  advise_huge(a.du, du_bytes<T>(a));
  advise_huge(a.dk_f, sizeof(float) * static_cast<size_t>(a.channels * a.length));
  advise_huge(a.dk_b, sizeof(float) * static_cast<size_t>(a.channels * a.length));
  const bool tiled = slices > 1;
  const std::unique_ptr<float[]> partial(tiled ? new float[static_cast<size_t>(2 * slices * plane)] : nullptr);
  for_each_item(a, 7, [&](const Item& it, long slice, auto whole) {
    float* dk_f = tiled ? partial.get() + 2 * slice * plane : a.dk_f;
    float* dk_b = tiled ? dk_f + plane : a.dk_b;
    if constexpr (whole) {
      backward_item<T, WIDE, true>(a, it, dk_f, dk_b, tiled);
    } else {
      backward_item<T, 1, false>(a, it, dk_f, dk_b, tiled);
    }
  });
  if (tiled) sum_slices(a, partial.get(), slices, plane);
}

template <class T>
void dispatch(const ConvArgs& a, bool gradients) {
  gradients ? backward<T>(a) : forward<T>(a);
}

}  // namespace
}  // namespace diffussm

extern "C" void diffussm_conv(const diffussm::ConvArgs* args, int gradients) {
  if (args->is_bf16) {
    diffussm::dispatch<diffussm::bf16>(*args, gradients != 0);
  } else {
    diffussm::dispatch<float>(*args, gradients != 0);
  }
}
