#include "fft.h"

#include <cmath>
#include <map>
#include <memory>
#include <mutex>

namespace diffussm {

long padded_points(long length) {
  long points = MIN_POINTS;
  while (points < length) points *= 2;
  return points;
}

namespace {

int log2_of(long n) { return __builtin_ctzl(static_cast<unsigned long>(n)); }

int frequency_of(int radix, int p) { return radix == 8 ? frequency<8>(p) : frequency<4>(p); }

void put_turn(std::vector<float>& to, double turn) {
  const double angle = 2 * 3.14159265358979323846 * turn;
  to.push_back(static_cast<float>(std::cos(angle)));
  to.push_back(static_cast<float>(std::sin(angle)));
}

Stage make_stage(long points, int radix) {
  Stage stage{points, radix, {}};
  for (long j = 0; j < points / radix; ++j) {
    for (int p = 1; p < radix; ++p) {
      put_turn(stage.twiddle, -static_cast<double>(j * frequency_of(radix, p)) / static_cast<double>(points));
    }
  }
  return stage;
}

// Radices as large as they come: 8 first and 8 in the leaf, and between them 8 as often as the rest are 4.
std::unique_ptr<const Plan> make_plan(long points) {
  auto plan = std::make_unique<Plan>();
  plan->points = points;
  int left = log2_of(points) - 3;  // doublings before the leaf
  plan->first = left == 2 || left == 4 ? 4 : 8;
  left -= log2_of(plan->first);
  for (long j = 0; j < points / plan->first; ++j) {
    for (int p = 0; p < plan->first; ++p) {
      const double turns = static_cast<double>(j * (1 - 4 * frequency_of(plan->first, p)));
      put_turn(plan->twist, turns / static_cast<double>(4 * points));
    }
  }
  for (long n = points / plan->first; left > 0;) {
    const int radix = left == 2 || left == 4 ? 4 : 8;
    plan->stages.push_back(make_stage(n, radix));
    n /= radix;
    left -= log2_of(radix);
  }
  return plan;
}

}  // namespace

const Plan& plan_for(long length) {
  static std::mutex mutex;
  static std::map<long, std::unique_ptr<const Plan>> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& plan = plans[padded_points(length)];
  if (!plan) plan = make_plan(padded_points(length));
  return *plan;
}

}  // namespace diffussm
