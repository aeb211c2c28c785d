// Rows of a batch spread over the threads that torch's own operators run on: a second team beside them would
// wake while the first still spins, and the two would share the cores.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pyengine {

// Calls body(context, row) once for each row in [0, rows), on up to `threads` threads: this one and torch's
// OpenMP workers, which take the next row when they are free. `threads` is torch's own number: OpenMP ends
// the workers that another number leaves over. An exception drops the rows not yet taken and is rethrown
// here; the first one wins.
//
// Where torch runs on something else than OpenMP, and after fork(), which no worker survives, the caller does
// it all.
void run_rows(int64_t rows, int threads, void (*body)(void*, int64_t), void* context);

// The same for a callable body(row), which several threads call at once.
template <class Body>
void parallel_rows(int64_t rows, int threads, Body&& body) {
  using Callable = std::remove_reference_t<Body>;
  if (threads < 2 || rows < 2) {
    for (int64_t row = 0; row < rows; ++row) body(row);
    return;
  }
  run_rows(
      rows, threads, [](void* context, int64_t row) { (*static_cast<Callable*>(context))(row); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace pyengine
