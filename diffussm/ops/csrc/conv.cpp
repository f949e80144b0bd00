// Bidirectional convolution, forward and backward, on the (B, L, D) layout.
//
// A work item is a group of channels and a slice of the batch; when the directions read inputs of their own it is also one
// direction. A group is a cache line of fp32 channels, so that every line of u and y is used whole while it is at hand.
// Kernels come either as (D, L) rows or in tiles (D / LANES, L, LANES), which saves the transposes.
#include "conv.h"

#include <memory>
#include <type_traits>

#include "api.h"
#include "layout.h"

namespace diffussm {
namespace {

constexpr int WIDE = 16 / LANES;  // tiles of a group

// Slices of the batch depend on the shape alone, never on the number of threads, so that results do not either.
long slices_of(long batch, long groups) {
  const long wanted = (32 + groups - 1) / groups;
  return std::max<long>(1, std::min(wanted, batch / 8));
}

// Complex buffers are 13 cache lines longer than a power of two: equal points of two buffers do not compete for one set.
long buffer_registers(long points) { return 2 * points + 26; }

// The part of the tensors that one work item sees.
template <class T>
struct Item {
  const Plan& plan;
  long length;
  long pitch;   // registers from one buffer to the next
  int lanes;    // valid channels of the tile; LANES for whole groups
  long first;   // first channel
  long begin, end;  // of the batch
};

// x <- R k / N for one tile
template <int LEAF>
void kernel_spectrum(const Plan& plan, const float* k, bool tiled, long length, long tile, int lanes, vf* rows, vf* x) {
  const float scale = 1.0f / static_cast<float>(plan.points);
  const float* from = k + tile * LANES * length;
  if (!tiled) {
    rows_to_lanes(from, length, lanes, rows);
    from = reinterpret_cast<const float*>(rows);
  }
  first_stage<1>(plan, x, 0, length, [=](long l, int) { return load(from + l * LANES) * scale; });
  vf* const forward[] = {x};
  vf* const inverse[] = {static_cast<vf*>(nullptr)};
  middle<LEAF>(plan, forward, inverse, [=](long o) { transform_leaf<LEAF>(x + o); });
}

// out (length, LANES) <- Re R^-1 g / N
template <int LEAF>
void kernel_gradient(const Plan& plan, vf* g, long length, vf* out) {
  const float scale = 1.0f / static_cast<float>(plan.points);
  vf* const forward[] = {static_cast<vf*>(nullptr)};
  vf* const inverse[] = {g};
  middle<LEAF>(plan, forward, inverse, [=](long o) { inverse_leaf<LEAF>(g + o); });
  last_stage<1>(plan, g, 0, length, [=](long l, int, vf row) { out[l] = row * scale; });
}

template <int LEAF, bool ADJOINT>
void convolve_one(const Plan& plan, vf* x, const vf* k) {
  vf* const both[] = {x};
  middle<LEAF>(plan, both, both, [=](long o) { conv_one_leaf<LEAF, ADJOINT>(x + o, k + o); });
}

template <class T, int LEAF, int W, bool WHOLE>
void forward_item(const Item<T>& it, const ConvArgs& a, int direction, vf* memory) {
  const Plan& plan = it.plan;
  const long pitch = it.pitch, length = it.length, channels = a.channels;
  vf *x = memory, *y = x + W * pitch, *kf = y + W * pitch, *kb = kf + W * pitch, *rows = kb + W * pitch;
  for (int w = 0; w < W; ++w) {
    const long tile = it.first / LANES + w;
    if (direction != 1) kernel_spectrum<LEAF>(plan, a.k_f, a.tiled, length, tile, it.lanes, rows, kf + w * pitch);
    if (direction != 0) kernel_spectrum<LEAF>(plan, a.k_b, a.tiled, length, tile, it.lanes, rows, kb + w * pitch);
  }
  for (long b = it.begin; b < it.end; ++b) {
    const T* u = static_cast<const T*>(a.u) + b * a.u_batch + it.first + (direction == 1 ? channels : 0);
    T* out = static_cast<T*>(a.y) + b * length * 2 * channels + it.first;
    const Rows<const T> in{u, a.u_row, it.lanes};
    const Rows<T> out_f{out, 2 * channels, it.lanes}, out_b{out + channels, 2 * channels, it.lanes};
    first_stage<W>(plan, x, pitch, length, [=](long l, int w) { return in.template read<WHOLE>(l, w); });
    for (int w = 0; w < W; ++w) {
      vf *xw = x + w * pitch, *yw = y + w * pitch;
      const vf *kfw = kf + w * pitch, *kbw = kb + w * pitch;
      if (direction == 0) {
        convolve_one<LEAF, false>(plan, xw, kfw);
      } else if (direction == 1) {
        convolve_one<LEAF, true>(plan, xw, kbw);
      } else {
        vf* const forward[] = {xw};
        vf* const inverse[] = {yw, xw};
        middle<LEAF>(plan, forward, inverse, [=](long o) { conv_leaf<LEAF>(xw + o, yw + o, kfw + o, kbw + o); });
      }
    }
    if (direction != 1) {
      last_stage<W>(plan, direction == 0 ? x : y, pitch, length, [=](long l, int w, vf r) { out_f.template write<WHOLE>(l, w, r); });
    }
    if (direction != 0) {
      last_stage<W>(plan, x, pitch, length, [=](long l, int w, vf r) { out_b.template write<WHOLE>(l, w, r); });
    }
  }
}

template <class T, int LEAF, int W, bool WHOLE>
void backward_item(const Item<T>& it, const ConvArgs& a, int direction, float* dk_f, float* dk_b, vf* memory) {
  const Plan& plan = it.plan;
  const long pitch = it.pitch, length = it.length, channels = a.channels, u_width = direction == BOTH ? channels : 2 * channels;
  vf *xu = memory, *xf = xu + W * pitch, *xb = xf + W * pitch, *kf = xb + W * pitch, *kb = kf + W * pitch;
  vf *gf = kb + W * pitch, *gb = gf + W * pitch, *rows = gb + W * pitch;
  const long first_tile = it.first / LANES;
  for (int w = 0; w < W; ++w) {
    if (direction != 1) kernel_spectrum<LEAF>(plan, a.k_f, a.tiled, length, first_tile + w, it.lanes, rows, kf + w * pitch);
    if (direction != 0) kernel_spectrum<LEAF>(plan, a.k_b, a.tiled, length, first_tile + w, it.lanes, rows, kb + w * pitch);
  }
  std::fill(gf, rows, zero());
  for (long b = it.begin; b < it.end; ++b) {
    const long side = direction == 1 ? channels : 0;
    const T* dy = static_cast<const T*>(a.dy) + b * a.dy_batch + it.first;
    const Rows<const T> in{static_cast<const T*>(a.u) + b * a.u_batch + it.first + side, a.u_row, it.lanes};
    const Rows<const T> dy_f{dy, a.dy_row, it.lanes}, dy_b{dy + channels, a.dy_row, it.lanes};
    const Rows<T> out{static_cast<T*>(a.du) + b * length * u_width + it.first + side, u_width, it.lanes};
    first_stage<W>(plan, xu, pitch, length, [=](long l, int w) { return in.template read<WHOLE>(l, w); });
    if (direction != 1) first_stage<W>(plan, xf, pitch, length, [=](long l, int w) { return dy_f.template read<WHOLE>(l, w); });
    if (direction != 0) first_stage<W>(plan, xb, pitch, length, [=](long l, int w) { return dy_b.template read<WHOLE>(l, w); });
    for (int w = 0; w < W; ++w) {
      const long p = w * pitch;
      vf *u = xu + p, *f = xf + p, *g = xb + p, *hf = gf + p, *hb = gb + p;
      const vf *cf_ = kf + p, *cb = kb + p;
      if (direction == 0) {
        vf* const forward[] = {u, f};
        vf* const inverse[] = {f};
        middle<LEAF>(plan, forward, inverse, [=](long o) { grad_one_leaf<LEAF, false>(u + o, f + o, cf_ + o, hf + o); });
      } else if (direction == 1) {
        vf* const forward[] = {u, g};
        vf* const inverse[] = {g};
        middle<LEAF>(plan, forward, inverse, [=](long o) { grad_one_leaf<LEAF, true>(u + o, g + o, cb + o, hb + o); });
      } else {
        vf* const forward[] = {u, f, g};
        vf* const inverse[] = {f};
        middle<LEAF>(plan, forward, inverse, [=](long o) {
          grad_leaf<LEAF>(u + o, f + o, g + o, cf_ + o, cb + o, hf + o, hb + o);
        });
      }
    }
    last_stage<W>(plan, direction == 1 ? xb : xf, pitch, length, [=](long l, int w, vf r) { out.template write<WHOLE>(l, w, r); });
  }
  for (int w = 0; w < W; ++w) {
    const long place = (first_tile + w) * length * LANES;
    const size_t bytes = sizeof(vf) * static_cast<size_t>(length);
    if (direction != 1) {
      kernel_gradient<LEAF>(plan, gf + w * pitch, length, rows);
      std::memcpy(dk_f + place, rows, bytes);
    }
    if (direction != 0) {
      kernel_gradient<LEAF>(plan, gb + w * pitch, length, rows);
      std::memcpy(dk_b + place, rows, bytes);
    }
  }
}

// Cuts the work into items and hands each to run(item, direction, slice, whole group, scratch).
template <class T, class Run>
void for_each_item(const ConvArgs& a, int buffers, Run run) {
  const Plan& plan = plan_for(a.length);
  const long groups = (a.channels + 15) / 16, slices = slices_of(a.batch, groups), pitch = buffer_registers(plan.points);
  const long directions = a.shared ? 1 : 2;
#pragma omp parallel for num_threads(a.threads) schedule(dynamic)
  for (long i = 0; i < groups * slices * directions; ++i) {
    const long group = i / (slices * directions), slice = i / directions % slices;
    const int direction = a.shared ? BOTH : static_cast<int>(i % directions);
    vf* memory = scratch().take(buffers * WIDE * pitch + a.length);
    Item<T> item{plan, a.length, pitch, LANES, group * 16, a.batch * slice / slices, a.batch * (slice + 1) / slices};
    if (item.first + 16 <= a.channels) {
      run(item, direction, slice, std::true_type{}, memory);
      continue;
    }
    for (; item.first < a.channels; item.first += LANES) {
      item.lanes = static_cast<int>(std::min<long>(LANES, a.channels - item.first));
      run(item, direction, slice, std::false_type{}, memory);
    }
  }
}

template <class T, int LEAF>
void forward(const ConvArgs& a) {
  advise_huge(a.y, sizeof(T) * static_cast<size_t>(2 * a.batch * a.length * a.channels));
  for_each_item<T>(a, 4, [&a](const Item<T>& item, int direction, long, auto whole, vf* memory) {
    if constexpr (whole) {
      forward_item<T, LEAF, WIDE, true>(item, a, direction, memory);
    } else {
      forward_item<T, LEAF, 1, false>(item, a, direction, memory);
    }
  });
}

template <class T, int LEAF>
void backward(const ConvArgs& a) {
  const long tiles = tiles_of(a.channels), slices = slices_of(a.batch, (a.channels + 15) / 16), plane = tiles * a.length * LANES;
  advise_huge(a.du, sizeof(T) * static_cast<size_t>((a.shared ? 1 : 2) * a.batch * a.length * a.channels));
  // Kernel gradients of each slice, in tiles: [slice][direction][tile][length][LANES]. With one slice and tiled kernels the
  // result is written in place.
  const bool direct = a.tiled && slices == 1;
  const std::unique_ptr<float[]> partial(direct ? nullptr : new float[static_cast<size_t>(2 * slices * plane)]);
  for_each_item<T>(a, 7, [&](const Item<T>& item, int direction, long slice, auto whole, vf* memory) {
    float* f = direct ? a.dk_f : partial.get() + 2 * slice * plane;
    float* b = direct ? a.dk_b : f + plane;
    if constexpr (whole) {
      backward_item<T, LEAF, WIDE, true>(item, a, direction, f, b, memory);
    } else {
      backward_item<T, LEAF, 1, false>(item, a, direction, f, b, memory);
    }
  });
  if (direct) return;
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (long i = 0; i < 2 * tiles; ++i) {
    const long tile = i / 2, place = tile * a.length * LANES;
    const float* from = partial.get() + (i % 2) * plane + place;
    float* out = i % 2 == 0 ? a.dk_f : a.dk_b;
    vf* sum = scratch().take(a.length);
    for (long l = 0; l < a.length; ++l) {
      sum[l] = load(from + l * LANES);
      for (long s = 1; s < slices; ++s) sum[l] += load(from + 2 * s * plane + l * LANES);
    }
    if (a.tiled) {
      std::memcpy(out + place, sum, sizeof(vf) * static_cast<size_t>(a.length));
    } else {
      lanes_to_rows(sum, a.length, lanes_of(a.channels, tile), out + place);
    }
  }
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

extern "C" int diffussm_lanes() { return diffussm::LANES; }

extern "C" void diffussm_conv(const diffussm::ConvArgs* args, int gradients) {
  if (args->is_bf16) {
    diffussm::dispatch<diffussm::bf16>(*args, gradients != 0);
  } else {
    diffussm::dispatch<float>(*args, gradients != 0);
  }
}
