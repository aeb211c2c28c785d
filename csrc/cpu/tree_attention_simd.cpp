// The vector kernels of tree_attention, once for each instruction set.
#include "isa.h"
#include "tree_attention.h"

namespace {

using pyengine::RowSoftmax;
static_assert(kLanes <= pyengine::kTokens, "a row's sum is one vector");

constexpr int kVecs = 4;                     // of a row, in flight
constexpr int kRows = kLanes == 16 ? 6 : 3;  // 24 sums of 32 registers, or 12 of 16

// What is wanted next: so many cache lines of it are asked for at each step of a product, of each piece in
// its share of a block's steps. Earlier blocks have asked for `before` bytes of each.
struct Ahead {
  pyengine::Wanted next;
  int lines;
  int64_t before = 0;
};

// The right factor of a product, its columns from `at` on in N vectors: in one piece ...
template <int N>
struct Block {
  const float* from;
  int64_t stride;
  Block(const float* const* piece, int64_t stride, int at) : from(*piece + at), stride(stride) {}
  Vec at(int i, int u) const { return load(from + i * stride + u * kLanes); }
};

// ... in pieces of kTokens columns ...
template <int N>
struct Columns {
  const float* from[N];
  int64_t stride;
  Columns(const float* const* piece, int64_t stride, int at) : stride(stride) {
    PYENGINE_EACH from[u] =
        piece[(at + u * kLanes) / pyengine::kTokens] + (at + u * kLanes) % pyengine::kTokens;
  }
  Vec at(int i, int u) const { return load(from[u] + i * stride); }
};

// ... or row by row.
template <int N>
struct Lines {
  const float* const* line;
  int from;
  Lines(const float* const* line, int64_t, int at) : line(line), from(at) {}
  Vec at(int i, int u) const { return load(line[i] + from + u * kLanes); }
};

template <int R, int N, template <int> class Factor>
void multiply_block(const float* a, int64_t lda, int depth, const Factor<N> b, const float* alpha, float* c,
                    int64_t ldc, Ahead& ahead) {
  Vec sum[R][N];
  for (int r = 0; r < R; ++r)
    PYENGINE_EACH sum[r][u] = alpha ? load(c + r * ldc + u * kLanes) * alpha[r] : Vec{};
  const int pieces = ahead.next.pieces ? ahead.next.pieces : 1, lines = ahead.lines;
  for (int p = 0, i = 0; p < pieces; ++p) {
    const char* line = lines ? ahead.next.from[p] + ahead.before : nullptr;
    for (const int stop = depth * (p + 1) / pieces; i < stop; ++i) {
      for (int l = 0; l < lines; ++l, line += 64) __builtin_prefetch(line, 0, 2);
      Vec x[N];
      PYENGINE_EACH x[u] = b.at(i, u);
      for (int r = 0; r < R; ++r) {
        const Vec y = splat(a[r * lda + i]);
        PYENGINE_EACH sum[r][u] += y * x[u];
      }
    }
  }
  ahead.before += int64_t(depth / pieces) * lines * 64;
  for (int r = 0; r < R; ++r) PYENGINE_EACH store(c + r * ldc + u * kLanes, sum[r][u]);
}

template <int N, template <int> class Factor>
void multiply_rows(const float* a, int64_t lda, int rows, int depth, const float* const* b, int64_t stride,
                   int at, const float* alpha, float* c, int64_t ldc, Ahead& ahead) {
  constexpr decltype(&multiply_block<1, N, Factor>) by_rows[] = {
      multiply_block<1, N, Factor>, multiply_block<2, N, Factor>, multiply_block<3, N, Factor>,
      multiply_block<4, N, Factor>, multiply_block<5, N, Factor>, multiply_block<6, N, Factor>};
  const Factor<N> factor(b, stride, at);
  for (int r = 0; r < rows; r += kRows) {
    const int n = rows - r < kRows ? rows - r : kRows;
    by_rows[n - 1](a + r * lda, lda, depth, factor, alpha ? alpha + r : nullptr, c + r * ldc + at, ldc,
                   ahead);
  }
}

template <template <int> class Factor>
void multiply(const float* a, int64_t lda, int rows, int depth, const float* const* b, int64_t stride,
              int cols, const float* alpha, float* c, int64_t ldc, const pyengine::Wanted& next) {
  const int blocks = (rows + kRows - 1) / kRows * ((cols + kVecs * kLanes - 1) / (kVecs * kLanes));
  Ahead ahead{next, (next.pieces * (next.bytes / 64) + blocks * depth - 1) / (blocks * depth)};
  constexpr decltype(&multiply_rows<1, Factor>) by_vecs[] = {
      multiply_rows<1, Factor>, multiply_rows<2, Factor>, multiply_rows<3, Factor>, multiply_rows<4, Factor>};
  for (int at = 0; at < cols; at += kVecs * kLanes) {
    const int vecs = (cols - at) / kLanes < kVecs ? (cols - at) / kLanes : kVecs;
    by_vecs[vecs - 1](a, lda, rows, depth, b, stride, at, alpha, c, ldc, ahead);
  }
}

// One bit a lane of tokens [from, to) among those that begin at i.
uint32_t lanes_between(int i, int from, int to) {
  const uint32_t up_to = to >= i + kLanes ? ~0u : to <= i ? 0u : (1u << (to - i)) - 1;
  const uint32_t before = from <= i ? 0u : from >= i + kLanes ? ~0u : (1u << (from - i)) - 1;
  return up_to & ~before;
}

// N vectors at once: a row's exponentials overlap, and the next row's do not wait for its maximum.
template <int N>
float weights_of(float* s, int cols, int from, int to, float softcap, RowSoftmax& row) {
  Vec top = splat(row.top);
  const bool whole = from <= 0 && to >= cols && softcap == 0;
  for (int i = 0; i < cols; i += N * kLanes) {
    if (whole) {
      PYENGINE_EACH top = max(load(s + i + u * kLanes), top);  // drops NaN, which then shows in the sum
      continue;
    }
    PYENGINE_EACH {
      const int at = i + u * kLanes;
      Vec x = load(s + at);
      if (softcap != 0) x = tanh(x) * softcap;
      x = select(lanes_between(at, from, to), x, splat(-INFINITY));
      top = max(x, top);
      store(s + at, x);
    }
  }
  const float before = row.top, now = max_lane(top), shift = now == -INFINITY ? 0.0f : now;
  float scale = 1;
  Vec sum[N];
  PYENGINE_EACH sum[u] = u == 0 ? load(row.sum) : Vec{};
  if (now != before) {
    Vec x[1] = {splat(before - shift)};
    exp2_in_place<true>(x);
    scale = x[0][0];
    sum[0] *= scale;
    row.top = now;
  }
  for (int i = 0; i < cols; i += N * kLanes) {
    Vec x[N];
    PYENGINE_EACH x[u] = load(s + i + u * kLanes) - shift;
    exp2_in_place<true>(x);
    PYENGINE_EACH {
      sum[u] += x[u];
      store(s + i + u * kLanes, x[u]);
    }
  }
  for (int u = 1; u < N; ++u) sum[0] += sum[u];
  store(row.sum, sum[0]);
  return scale;
}

float weights(float* s, int cols, int from, int to, float softcap, RowSoftmax& row) {
  const auto kernel = cols % (4 * kLanes) == 0   ? weights_of<4>
                      : cols % (2 * kLanes) == 0 ? weights_of<2>
                                                 : weights_of<1>;
  return kernel(s, cols, from, to, softcap, row);
}

float sum_of(const RowSoftmax& row) { return sum_lanes(load(row.sum)); }

}  // namespace

namespace pyengine {
extern const TreeKernels PYENGINE_PASTE(tree_kernels_, PYENGINE_ISA);
const TreeKernels PYENGINE_PASTE(tree_kernels_, PYENGINE_ISA) = {PYENGINE_STRING(PYENGINE_ISA),
                                                                 multiply<Block>,
                                                                 multiply<Columns>,
                                                                 multiply<Lines>,
                                                                 weights,
                                                                 sum_of,
                                                                 widen};
}  // namespace pyengine
