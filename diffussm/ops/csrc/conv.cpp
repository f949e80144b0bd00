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
template <int LEAF, int W>
void kernel_spectrum(const ConvArgs& a, const Item& it, const float* k, vf* rows, vf* x) {
  const float scale = 1.0f / static_cast<float>(it.plan.points);
  for (int w = 0; w < W; ++w, x += it.pitch) {
    rows_to_lanes(k + (it.first + w * LANES) * a.length, a.length, it.lanes, rows);
    first_stage<1>(it.plan, x, 0, a.length, KernelRows{reinterpret_cast<float*>(rows), scale});
    vf* const forward[] = {x};
    vf* const inverse[] = {static_cast<vf*>(nullptr)};
    middle<LEAF>(it.plan, forward, inverse, [=](long o) { transform_leaf<LEAF>(x + o); });
  }
}

// dk, in tiles, <- Re R^-1 g / N for W tiles
template <int LEAF, int W>
void kernel_gradient(const ConvArgs& a, const Item& it, vf* g, float* dk) {
  const float scale = 1.0f / static_cast<float>(it.plan.points);
  for (int w = 0; w < W; ++w, g += it.pitch) {
    vf* const forward[] = {static_cast<vf*>(nullptr)};
    vf* const inverse[] = {g};
    middle<LEAF>(it.plan, forward, inverse, [=](long o) { inverse_leaf<LEAF>(g + o); });
    last_stage<1>(it.plan, g, 0, a.length, KernelRows{dk + (it.first + w * LANES) * a.length, scale});
  }
}

template <int LEAF>
void convolve(const Item& it, vf* x, vf* y, const vf* kf, const vf* kb) {
  vf* const alone[] = {x};
  vf* const both[] = {y, x};
  if (it.direction == 0) {
    middle<LEAF>(it.plan, alone, alone, [=](long o) { conv_one_leaf<LEAF, false>(x + o, kf + o); });
  } else if (it.direction == 1) {
    middle<LEAF>(it.plan, alone, alone, [=](long o) { conv_one_leaf<LEAF, true>(x + o, kb + o); });
  } else {
    middle<LEAF>(it.plan, alone, both, [=](long o) { conv_leaf<LEAF>(x + o, y + o, kf + o, kb + o); });
  }
}

template <class T, int LEAF, int W, bool WHOLE>
void forward_item(const ConvArgs& a, const Item& it) {
  const Plan& plan = it.plan;
  const long pitch = it.pitch, side = it.direction == 1 ? a.channels : 0;
  vf *x = it.memory, *y = x + W * pitch, *kf = y + W * pitch, *kb = kf + W * pitch, *rows = kb + W * pitch;
  if (it.has_forward()) kernel_spectrum<LEAF, W>(a, it, a.k_f, rows, kf);
  if (it.has_backward()) kernel_spectrum<LEAF, W>(a, it, a.k_b, rows, kb);
  for (long b = it.begin; b < it.end; ++b) {
    const T* u = static_cast<const T*>(a.u) + b * a.u_batch + it.first + side;
    T* out = static_cast<T*>(a.y) + b * a.length * 2 * a.channels + it.first;
    first_stage<W>(plan, x, pitch, a.length, Rows<const T, WHOLE>{u, a.u_row, it.lanes});
    for (int w = 0; w < W; ++w) {
      const long p = w * pitch;
      convolve<LEAF>(it, x + p, y + p, kf + p, kb + p);
    }
    if (it.has_forward()) {
      const vf* from = it.direction == BOTH ? y : x;
      last_stage<W>(plan, from, pitch, a.length, Rows<T, WHOLE>{out, 2 * a.channels, it.lanes});
    }
    if (it.has_backward()) {
      last_stage<W>(plan, x, pitch, a.length, Rows<T, WHOLE>{out + a.channels, 2 * a.channels, it.lanes});
    }
  }
}

template <int LEAF>
void differentiate(const Item& it, vf* u, vf* f, vf* g, const vf* kf, const vf* kb, vf* gf, vf* gb) {
  vf *const u_f[] = {u, f}, *const u_g[] = {u, g}, *const all[] = {u, f, g}, *const to_f[] = {f}, *const to_g[] = {g};
  if (it.direction == 0) {
    middle<LEAF>(it.plan, u_f, to_f, [=](long o) { grad_one_leaf<LEAF, false>(u + o, f + o, kf + o, gf + o); });
  } else if (it.direction == 1) {
    middle<LEAF>(it.plan, u_g, to_g, [=](long o) { grad_one_leaf<LEAF, true>(u + o, g + o, kb + o, gb + o); });
  } else {
    middle<LEAF>(it.plan, all, to_f, [=](long o) {
      grad_leaf<LEAF>(u + o, f + o, g + o, kf + o, kb + o, gf + o, gb + o);
    });
  }
}

template <class T, int LEAF, int W, bool WHOLE>
void backward_item(const ConvArgs& a, const Item& it, float* dk_f, float* dk_b) {
  const Plan& plan = it.plan;
  const long pitch = it.pitch, side = it.direction == 1 ? a.channels : 0;
  const long u_width = it.direction == BOTH ? a.channels : 2 * a.channels;
  vf *xu = it.memory, *xf = xu + W * pitch, *xb = xf + W * pitch, *kf = xb + W * pitch, *kb = kf + W * pitch;
  vf *gf = kb + W * pitch, *gb = gf + W * pitch, *rows = gb + W * pitch;
  if (it.has_forward()) kernel_spectrum<LEAF, W>(a, it, a.k_f, rows, kf);
  if (it.has_backward()) kernel_spectrum<LEAF, W>(a, it, a.k_b, rows, kb);
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
      differentiate<LEAF>(it, xu + p, xf + p, xb + p, kf + p, kb + p, gf + p, gb + p);
    }
    last_stage<W>(plan, it.has_forward() ? xf : xb, pitch, a.length, Rows<T, WHOLE>{du, u_width, it.lanes});
  }
  if (it.has_forward()) kernel_gradient<LEAF, W>(a, it, gf, dk_f);
  if (it.has_backward()) kernel_gradient<LEAF, W>(a, it, gb, dk_b);
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
      continue;
    }
    for (; it.first < std::min(a.channels, (group + 1) * GROUP); it.first += LANES) {
      it.lanes = static_cast<int>(std::min<long>(LANES, a.channels - it.first));
      run(it, slice, std::false_type{});
    }
  }
}

template <class T, int LEAF>
void forward(const ConvArgs& a) {
  advise_huge(a.y, sizeof(T) * static_cast<size_t>(2 * a.batch * a.length * a.channels));
  for_each_item(a, 4, [&a](const Item& it, long, auto whole) {
    if constexpr (whole) {
      forward_item<T, LEAF, WIDE, true>(a, it);
    } else {
      forward_item<T, LEAF, 1, false>(a, it);
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

template <class T, int LEAF>
void backward(const ConvArgs& a) {
  const long slices = slices_of(a.batch, a.channels), plane = tiles_of(a.channels) * a.length * LANES;
  advise_huge(a.du, sizeof(T) * static_cast<size_t>((a.shared ? 1 : 2) * a.batch * a.length * a.channels));
  const std::unique_ptr<float[]> partial(new float[static_cast<size_t>(2 * slices * plane)]);
  for_each_item(a, 7, [&](const Item& it, long slice, auto whole) {
    float* dk_f = partial.get() + 2 * slice * plane;
    float* dk_b = dk_f + plane;
    if constexpr (whole) {
      backward_item<T, LEAF, WIDE, true>(a, it, dk_f, dk_b);
    } else {
      backward_item<T, LEAF, 1, false>(a, it, dk_f, dk_b);
    }
  });
  sum_slices(a, partial.get(), slices, plane);
}

template <class T>
void dispatch(const ConvArgs& a, bool gradients) {
  const bool small_leaf = plan_for(a.length).leaf == 4;
  if (gradients) {
    small_leaf ? backward<T, 4>(a) : backward<T, 8>(a);
  } else {
    small_leaf ? forward<T, 4>(a) : forward<T, 8>(a);
  }
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
