// Rows of a batch spread over threads. The workers sleep between jobs: a second busy-waiting team beside
// torch's costs milliseconds on a busy machine.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pyengine {

// Calls body(context, row) once for each row in [0, rows), on this thread and on up to `threads` - 1
// workers. Every thread takes the next row when it is free, so that a worker that wakes late costs nothing;
// the call returns when all rows are done. While another job runs, this one runs on its caller alone. An
// exception drops the rows not yet taken and is rethrown here; the first one wins.
//
// After fork() the child's first job starts workers of its own.
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
