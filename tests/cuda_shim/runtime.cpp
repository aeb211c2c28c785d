// The threads of cuda_runtime.h.
#include <cuda_runtime.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <ucontext.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

extern char __start_cuda_shared[], __stop_cuda_shared[];

namespace shim {
namespace {

struct Warp {
  // Two generations, so that a lane may write the next exchange while another still reads this one.
  std::atomic<uint64_t> words[2][32];
  std::atomic<int> kinds[2][32];
  uint64_t seen[32][32];
  std::atomic<unsigned> arrived{0}, generation{0};
};

struct Launch {
  unsigned blocks, threads;
  const std::function<void()>& body;
  std::vector<Warp> warps;
  unsigned block = 0;
  Launch(unsigned b, unsigned t, const std::function<void()>& f)
      : blocks(b), threads(t), body(f), warps(t / 32) {}
};

Launch* running = nullptr;

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "cuda shim: %s\n", what);
  std::abort();
}

// One thread's way through all blocks. Shared memory starts each block as NaN.
void run_thread() {
  for (unsigned b = 0; b < running->blocks; ++b) {
    if (thread() == 0) {
      std::memset(__start_cuda_shared, 0xff, size_t(__stop_cuda_shared - __start_cuda_shared));
      running->block = b;
    }
    __syncthreads();
    running->body();
    __syncthreads();
  }
}

#if defined(SHIM_THREADS)

thread_local unsigned self;
pthread_barrier_t barrier;

void wait() { sched_yield(); }

#else

constexpr size_t kStack = 128 << 10;

struct Fibre {
  unsigned index;
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool started = false, done = false;
};

std::vector<Fibre> fibres(1024);
Fibre* current = nullptr;
jmp_buf scheduler;
bool progress = false;
unsigned at_barrier = 0, barrier_generation = 0;

void wait() {
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

void enter() {
  run_thread();
  current->done = progress = true;
  _longjmp(scheduler, 1);
}

// Swapping contexts costs two system calls, so they only start a fibre; jumps do the rest.
void resume(Fibre& fibre) {
  if (_setjmp(scheduler) != 0) return;
  current = &fibre;
  if (fibre.started) _longjmp(fibre.resume, 1);
  fibre.started = true;
  setcontext(&fibre.start);
}

#endif

}  // namespace

unsigned block() { return running->block; }
unsigned grid() { return running->blocks; }

// Relaxed throughout: an exchange orders no other memory, and ThreadSanitizer must not believe it does.
const uint64_t* exchange(uint64_t word, int kind) {
  Warp& warp = running->warps[thread() / 32];
  const unsigned generation = warp.generation.load(std::memory_order_relaxed), turn = generation % 2;
  warp.words[turn][lane()].store(word, std::memory_order_relaxed);
  warp.kinds[turn][lane()].store(kind, std::memory_order_relaxed);
  if (warp.arrived.fetch_add(1, std::memory_order_relaxed) == 31) {
    warp.arrived.store(0, std::memory_order_relaxed);
    warp.generation.store(generation + 1, std::memory_order_relaxed);
#if !defined(SHIM_THREADS)
    progress = true;
#endif
  } else {
    while (warp.generation.load(std::memory_order_relaxed) == generation) wait();
  }
  uint64_t* seen = warp.seen[lane()];
  for (int i = 0; i < 32; ++i) {
    if (warp.kinds[turn][i].load(std::memory_order_relaxed) != kind) die("the lanes of a warp diverged");
    seen[i] = warp.words[turn][i].load(std::memory_order_relaxed);
  }
  return seen;
}

#if defined(SHIM_THREADS)

unsigned thread() { return self; }

void launch(unsigned blocks, unsigned threads, const std::function<void()>& body) {
  Launch now(blocks, threads, body);
  running = &now;
  pthread_barrier_init(&barrier, nullptr, threads);
  std::vector<std::thread> all;
  for (unsigned t = 0; t < threads; ++t)
    all.emplace_back([t] {
      self = t;
      run_thread();
    });
  for (std::thread& t : all) t.join();
  pthread_barrier_destroy(&barrier);
}

#else

unsigned thread() { return current->index; }

void launch(unsigned blocks, unsigned threads, const std::function<void()>& body) {
  Launch now(blocks, threads, body);
  running = &now;
  for (unsigned t = 0; t < threads; ++t) {
    Fibre& fibre = fibres[t];
    fibre.index = t, fibre.started = fibre.done = false;
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = fibre.stack.get(), fibre.start.uc_stack.ss_size = kStack;
    makecontext(&fibre.start, enter, 0);
  }
  for (unsigned alive = threads; alive > 0;) {
    progress = false, alive = 0;
    for (unsigned t = 0; t < threads; ++t) {
      if (!fibres[t].done) resume(fibres[t]);
      alive += !fibres[t].done;
    }
    if (!progress) die("a barrier that some threads never reach");
  }
}

#endif

}  // namespace shim

void __syncthreads() {
#if defined(SHIM_THREADS)
  pthread_barrier_wait(&shim::barrier);
#else
  const unsigned generation = shim::barrier_generation;
  if (++shim::at_barrier == shim::running->threads) {
    shim::at_barrier = 0, ++shim::barrier_generation;
    shim::progress = true;
  } else {
    while (shim::barrier_generation == generation) shim::wait();
  }
#endif
}
