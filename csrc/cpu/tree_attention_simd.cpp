// The vector kernels of tree_attention, once for each instruction set.
#include "isa.h"
#include "tree_attention.h"

namespace {

using pyengine::RowSoftmax;

constexpr int kVecs = 4;  // of a row, in flight
constexpr int kRows = kLanes == 16 ? 6 : 3;  // 24 sums of 32 registers, or 12 of 16

// Memory that is wanted next: so many cache lines of it are asked for at each step of a product.
struct Ahead {
  const char* next;
  int lines;
};

template <int R, int N>
void multiply_block(const float* a, int64_t lda, int depth, const float* b, int64_t ldb, const float* alpha,
                    float* c, int64_t ldc, Ahead& ahead) {
  Vec sum[R][N];
  for (int r = 0; r < R; ++r) PYENGINE_EACH sum[r][u] = alpha ? load(c + r * ldc + u * kLanes) * alpha[r] : Vec{};
  const char* line = ahead.next;
  for (int i = 0; i < depth; ++i) {
    for (int l = 0; l < ahead.lines; ++l, line += 64) __builtin_prefetch(line, 0, 2);
    Vec x[N];
    PYENGINE_EACH x[u] = load(b + i * ldb + u * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec y = splat(a[r * lda + i]);
      PYENGINE_EACH sum[r][u] += y * x[u];
    }
  }
  ahead.next = line;
  for (int r = 0; r < R; ++r) PYENGINE_EACH store(c + r * ldc + u * kLanes, sum[r][u]);
}

template <int N>
void multiply_rows(const float* a, int64_t lda, int rows, int depth, const float* b, int64_t ldb,
                   const float* alpha, float* c, int64_t ldc, Ahead& ahead) {
  constexpr decltype(&multiply_block<1, N>) by_rows[] = {multiply_block<1, N>, multiply_block<2, N>,
                                                         multiply_block<3, N>, multiply_block<4, N>,
                                                         multiply_block<5, N>, multiply_block<6, N>};
  for (int r = 0; r < rows; r += kRows) {
    const int n = rows - r < kRows ? rows - r : kRows;
    by_rows[n - 1](a + r * lda, lda, depth, b, ldb, alpha ? alpha + r : nullptr, c + r * ldc, ldc, ahead);
  }
}

void multiply(const float* a, int64_t lda, int rows, int depth, const float* b, int64_t ldb, int cols,
              const float* alpha, float* c, int64_t ldc, const char* next, int bytes) {
  const int blocks = (rows + kRows - 1) / kRows * ((cols + kVecs * kLanes - 1) / (kVecs * kLanes));
  Ahead ahead{next, next ? (bytes / 64 + blocks * depth - 1) / (blocks * depth) : 0};
  constexpr decltype(&multiply_rows<1>) by_vecs[] = {multiply_rows<1>, multiply_rows<2>, multiply_rows<3>,
                                                     multiply_rows<4>};
  for (int at = 0; at < cols; at += kVecs * kLanes) {
    const int vecs = (cols - at) / kLanes < kVecs ? (cols - at) / kLanes : kVecs;
    by_vecs[vecs - 1](a, lda, rows, depth, b + at, ldb, alpha, c + at, ldc, ahead);
  }
}

float weights(float* s, int cols, int from, int to, float softcap, RowSoftmax& row) {
  Vec top = splat(row.top);
  for (int i = 0; i < cols; i += kLanes) {
    Vec x = load(s + i);
    if (softcap != 0) x = tanh(x) * softcap;
    const uint32_t up_to = to >= i + kLanes ? ~0u : to <= i ? 0u : (1u << (to - i)) - 1;
    const uint32_t before = from <= i ? 0u : from >= i + kLanes ? ~0u : (1u << (from - i)) - 1;
    x = select(up_to & ~before, x, splat(-INFINITY));
    top = max(x, top);  // drops NaN, which then shows in the sum
    store(s + i, x);
  }
  const float before = row.top, now = max_lane(top), shift = now == -INFINITY ? 0.0f : now;
  Vec sum = {};
  for (int i = 0; i < cols; i += kLanes) {
    Vec x[1] = {load(s + i) - shift};
    exp2_in_place<true>(x);
    sum += x[0];
    store(s + i, x[0]);
  }
  Vec scale[1] = {splat(before - shift)};
  exp2_in_place<true>(scale);
  row.top = now;
  row.sum = row.sum * scale[0][0] + sum_lanes(sum);
  return scale[0][0];
}

}  // namespace

namespace pyengine {
extern const TreeKernels PYENGINE_PASTE(tree_kernels_, PYENGINE_ISA);
const TreeKernels PYENGINE_PASTE(tree_kernels_,
                                 PYENGINE_ISA) = {PYENGINE_STRING(PYENGINE_ISA), multiply, weights, widen};
}  // namespace pyengine
