// tree_attention on a CPU: the branches of a prompt read its cached prefix once, and each its own short tail.
#pragma once

#include <cstdint>
#include <string>

#include "../algebra.h"

namespace pyengine {

// Keys are stored [width, tokens] with tokens side by side, values [tokens, width] with width side by side,
// so that both products of attention run over whole vectors. kTileTokens divides a page; the tokens of a
// leaf are a multiple of kTokens. All pointers are borrowed for the call; strides are in elements.
constexpr int kTileTokens = 64, kTokens = 16;

// The keys or the values of many pages, or leaves: `at` strides over those, `inner` over the slower of
// (width, tokens).
struct Store {
  char* data;
  int64_t stride_at, stride_head, stride_inner;
};

// Tensors [rows, tokens, heads, width] with unit stride along width.
struct RowView {
  const char* data;
  int64_t stride_row, stride_token, stride_head;
};

struct TreeArgs {
  int64_t prompts, rows, tokens, heads, kv_heads, width, page_tokens, leaf_tokens;
  DType type;  // of all tensors but the sinks
  RowView query;
  RowView key, value;  // of the new tokens, which are written to the tails first; null: they are there
  Store prefix_key, prefix_value, tail_key, tail_value;
  const int32_t *pages, *prefix_len, *first_row, *leaves, *tail_len;
  int64_t pages_stride, leaves_stride;
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: none
  const float* sinks;    // [heads], or null
  char* out;             // [rows, tokens, heads, width], contiguous
};

// What one row has seen so far, in log2 units: the largest logit, and the sum of 2^(logit - top), spread over
// the lanes of one vector.
struct RowSoftmax {
  float top, sum[kTokens];
};

// Memory that is wanted next: `pieces` of so many bytes each.
struct Wanted {
  const char* const* from;
  int pieces, bytes;
};

struct TreeKernels {
  const char* name;
  // c[r][.] = alpha[r] * c[r][.] + sum_i a[r][i] * b[i][.]; without alpha c starts at 0. cols is a multiple
  // of kTokens. A row's bits depend on its own numbers only. Meanwhile what is wanted next is fetched
  // into the level-2 cache: a page or leaf is too short for the hardware to see it coming. b comes in one
  // block whose lines are `stride` apart, in such blocks of kTokens columns, or line by line. One block has a
  // form of its own: AVX2 has too few registers for the addresses of several, and took 1.5 times as long.
  using Multiply = void (*)(const float* a, int64_t lda, int rows, int depth, const float* const* b,
                            int64_t stride, int cols, const float* alpha, float* c, int64_t ldc,
                            const Wanted& next);
  Multiply by_block, by_columns, by_lines;
  // Turns the logits s[from .. to) into weights 2^(s - top), all others of `cols` into 0, and returns by how
  // much earlier sums are to be scaled. With a softcap: s = softcap * tanh(s), in log2 units.
  float (*weights)(float* s, int cols, int from, int to, float softcap, RowSoftmax& row);
  float (*sum)(const RowSoftmax& row);
  void (*widen)(const void* from, DType type, int n, float* to);
};

extern const TreeKernels tree_kernels_portable;
#if defined(__x86_64__)
extern const TreeKernels tree_kernels_avx2;
extern const TreeKernels tree_kernels_avx512;
#endif

// The tables of a tree and the sizes of the stores that they point into.
struct TreeTables {
  int64_t prompts, rows, tokens, columns,
      leaf_columns;  // pages is [prompts, columns], leaves [rows, leaf_columns]
  int64_t page_tokens, page_count, leaf_tokens, leaf_count;
  const int32_t *pages, *prefix_len, *first_row, *leaves, *tail_len;
  int64_t pages_stride, leaves_stride;
};

// The first entry that points outside the stores, or at what another row writes; empty where there is none.
// The kernels trust the tables: this is looked at once for all layers and steps over one tree.
std::string tree_fault(const TreeTables& tables);

// The leaves of a row, before the first -1.
int64_t count_leaves(const int32_t* leaves, int64_t columns);

// What is wrong with row n's tail of so many tokens, in leaves with so much room; empty where nothing is.
std::string tail_fault(int64_t n, int64_t tail, int64_t tokens, int64_t room);

const TreeKernels* tree_kernels(const char* forced);  // as tilt_kernels

void tree_attention(const TreeArgs& args, const TreeKernels& kernels, int threads);

}  // namespace pyengine
