#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pyengine {
namespace {

using Clock = std::chrono::steady_clock;

// How long the caller watches for the last rows of its workers before it sleeps: a row or two. Longer would
// keep a worker that shares its core from finishing.
constexpr int kGlances = 2000;

// A worker that loses its core in the middle of a row holds the caller up for a slice of the scheduler, 1 to
// 4 ms. The next jobs then run on their callers alone: 8, and twice as many each time that it happens again.
constexpr auto kHeldUp = std::chrono::microseconds(300);
constexpr int kShortestRest = 8, kLongestRest = 512;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

struct Job {
  int64_t rows;
  void (*body)(void*, int64_t);
  void* context;
  int wanted;  // workers that may still join; under the pool's mutex
  std::atomic<int64_t> next{0};
  std::atomic<int> inside{0};  // workers at work; grows under the pool's mutex only
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  void work() noexcept {
    try {
      for (int64_t row; (row = next.fetch_add(1, std::memory_order_relaxed)) < rows;) body(context, row);
    } catch (...) {
      next.store(rows, std::memory_order_relaxed);
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
};

// Never destroyed: its workers sleep until the process ends.
struct Pool {
  std::atomic_flag busy = ATOMIC_FLAG_INIT;
  std::mutex mutex;
  std::condition_variable posted, left;
  Job* job = nullptr;
  std::vector<std::thread::native_handle_type> workers;  // detached, and never end
  int avoided = -1;                                      // the core that they keep off
  int rest = kShortestRest, resting = 0;  // jobs; of the next rest, and left of this one. The caller's.

  void serve() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      posted.wait(lock, [&] { return job && job->wanted > 0 && job->next.load() < job->rows; });
      Job& mine = *job;
      --mine.wanted;
      ++mine.inside;
      lock.unlock();
      mine.work();
      lock.lock();
      if (--mine.inside == 0) left.notify_one();
    }
  }

  // Signals stay with the threads that Python knows. Fewer workers than asked for are no error.
  void grow(int to) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      workers.reserve(size_t(to));  // before the thread, which must not be lost to a failing push_back
      while (int(workers.size()) < to) {
        std::thread worker([this] { serve(); });
        workers.push_back(worker.native_handle());
        worker.detach();
        avoided = -1;
      }
    } catch (const std::exception&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  // A worker that slept on the caller's core is woken there and takes turns with it, beside an idle core: 8
  // rows then took as long as on one thread. The kernel call is made only when the caller has moved.
  void keep_off_this_core() {
#if defined(__linux__)
    const int core = sched_getcpu();
    cpu_set_t others;
    if (core < 0 || core == avoided || sched_getaffinity(0, sizeof others, &others) != 0) return;
    CPU_CLR(core, &others);
    if (CPU_COUNT(&others) == 0) return;
    for (const auto worker : workers) pthread_setaffinity_np(worker, sizeof others, &others);
    avoided = core;
#endif
  }

  void run(Job& mine) {
    if (resting > 0) {
      --resting;
      return mine.work();
    }
    {
      std::lock_guard<std::mutex> lock(mutex);
      grow(mine.wanted);
      keep_off_this_core();
      job = &mine;
    }
    if (mine.wanted == 1)
      posted.notify_one();
    else
      posted.notify_all();
    mine.work();
    {
      std::lock_guard<std::mutex> lock(mutex);
      job = nullptr;  // nobody joins from here on
    }
    for (int i = 0; i < kGlances && mine.inside.load(std::memory_order_acquire) > 0; ++i) pause();
    const Clock::time_point done = Clock::now();
    std::unique_lock<std::mutex> lock(mutex);  // also keeps `mine` until the last worker has let go of it
    left.wait(lock, [&] { return mine.inside.load() == 0; });
    if (Clock::now() - done > kHeldUp)
      resting = rest = rest < kLongestRest ? 2 * rest : rest;
    else if (rest > kShortestRest)
      --rest;
  }
};

std::atomic<Pool*> pool{nullptr};

// Threads do not survive fork(): the child forgets the parent's pool, whose mutex may be held for ever.
const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });

Pool& current() {
  (void)registered;
  Pool* found = pool.load();
  if (!found) {
    Pool* made = new Pool;
    if (pool.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

}  // namespace

void run_rows(int64_t rows, int threads, void (*body)(void*, int64_t), void* context) {
  Pool& mine = current();
  Job job{rows, body, context, int(threads - 1 < rows - 1 ? threads - 1 : rows - 1)};
  if (mine.busy.test_and_set()) {
    job.work();
  } else {
    mine.run(job);
    mine.busy.clear();
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace pyengine
