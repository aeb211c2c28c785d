#include "team.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <exception>

namespace pyengine {
namespace {

using Clock = std::chrono::steady_clock;

// The team meets at the end of a job. A worker that has lost its core to another process arrives a slice of the
// scheduler late, 1 to 4 ms; the next jobs of this caller then run on it alone: 32, and twice as many each time that
// it happens again. A team that merely slept wakes in 50 us.
constexpr auto kHeldUp = std::chrono::microseconds(500);
constexpr int kShortestRest = 32, kLongestRest = 512;

struct Job {
  int64_t rows;
  void (*body)(void*, int64_t);
  void* context;
  pthread_t caller = pthread_self();
  Clock::time_point done{};  // when the caller found no row left
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};

  void work() noexcept {
    try {
      for (int64_t row; (row = next.fetch_add(1, std::memory_order_relaxed)) < rows;) body(context, row);
    } catch (...) {
      next.store(rows, std::memory_order_relaxed);
      if (!failed.exchange(true)) error = std::current_exception();
    }
    if (pthread_equal(pthread_self(), caller)) done = Clock::now();
  }
};

// What a compiler makes of `#pragma omp parallel`, in whichever OpenMP library torch has loaded: GCC's, LLVM's and
// Intel's all have it. Linking one here would bring a second library and a second team.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

Parallel torchs_team() {
  static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

std::atomic<bool> orphan{false};  // this process was forked, and has no workers
const int registered = pthread_atfork(nullptr, nullptr, [] { orphan.store(true); });

}  // namespace

void run_rows(int64_t rows, int threads, void (*body)(void*, int64_t), void* context) {
  (void)registered;
  static thread_local int rest = kShortestRest, resting = 0;  // jobs: of the next rest, and left of this one
  Job job{rows, body, context};
  const Parallel parallel = torchs_team();
  if (resting > 0 || !parallel || orphan.load(std::memory_order_relaxed)) {
    resting -= resting > 0;
    job.work();
  } else {
    parallel([](void* mine) { static_cast<Job*>(mine)->work(); }, &job, unsigned(threads), 0);
    if (Clock::now() - job.done > kHeldUp)
      resting = rest = rest < kLongestRest ? 2 * rest : rest;
    else if (rest > kShortestRest)
      --rest;
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace pyengine
