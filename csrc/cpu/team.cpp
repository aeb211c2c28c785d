#include "team.h"

#include <dlfcn.h>
#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>

namespace pyengine {
namespace {

using Clock = std::chrono::steady_clock;

// Where another process wants a core too, a team can cost more than it brings: it meets at the end of a job,
// to which a worker that lost its core comes a slice of the scheduler late, 1 to 8 ms; and its workers spin
// for some milliseconds afterwards, in which the caller may lose its own core to them. When either takes
// longer than the caller worked, it works alone for a while, twice as long each time that it happens again.
// A team that merely slept wakes in 50 us.
constexpr Clock::duration kHeldUp = std::chrono::microseconds(500);
constexpr Clock::duration kShortestRest = std::chrono::milliseconds(50), kLongestRest = 64 * kShortestRest;

Clock::duration own_time() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec);
}

struct Job {
  int64_t rows;
  void (*body)(void*, int64_t);
  void* context;
  pthread_t caller = pthread_self();
  Clock::time_point start = Clock::now(), done{};  // when the caller found no row left
  Clock::duration worked = own_time(), lost{};     // its time on a core, and off it, until then
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
    if (!pthread_equal(pthread_self(), caller)) return;
    done = Clock::now();
    worked = own_time() - worked;
    lost = done - start - worked;
  }
};

// What a compiler makes of `#pragma omp parallel`, in whichever OpenMP library torch has loaded: GCC's,
// LLVM's and Intel's all have it. Linking one here would bring a second library and a second team.
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
  static thread_local Clock::duration rest = kShortestRest;
  static thread_local Clock::time_point until{};  // rests
  Job job{rows, body, context};
  const Parallel parallel = torchs_team();
  if (job.start < until || !parallel || orphan.load(std::memory_order_relaxed)) {
    job.work();
  } else {
    parallel([](void* mine) { static_cast<Job*>(mine)->work(); }, &job, unsigned(threads), 0);
    const Clock::time_point now = Clock::now();
    if (std::max(now - job.done, job.lost) > std::max(kHeldUp, job.worked)) {
      until = now + rest;
      rest = std::min(2 * rest, kLongestRest);
    } else {
      rest = std::max(rest - rest / 64, kShortestRest);
    }
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace pyengine
