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

std::unique_ptr<const Plan> make_plan(long points) {
  const double pi = 3.14159265358979323846;
  auto plan = std::make_unique<Plan>();
  plan->points = points;
  const int log2 = log2_of(points);
  plan->leaf = log2 % 2 == 0 ? 4 : 8;
  for (long j = 0; j < points / 4; ++j) {
    for (int p = 0; p < 4; ++p) {
      const double angle = pi * static_cast<double>(j * (1 - 4 * p)) / static_cast<double>(2 * points);
      plan->twist.push_back(static_cast<float>(std::cos(angle)));
      plan->twist.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  plan->stage.resize(static_cast<size_t>(log2) + 1);
  for (long n = points / 4; n > plan->leaf; n /= 4) {
    auto& stage = plan->stage[static_cast<size_t>(log2_of(n))];
    for (long j = 0; j < n / 4; ++j) {
      for (int p = 1; p < 4; ++p) {
        const double angle = -2 * pi * static_cast<double>(j * p) / static_cast<double>(n);
        stage.push_back(static_cast<float>(std::cos(angle)));
        stage.push_back(static_cast<float>(std::sin(angle)));
      }
    }
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
