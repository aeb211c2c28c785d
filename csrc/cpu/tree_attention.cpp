#include "tree_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "team.h"

namespace pyengine {
namespace {

// A prefix is split at fixed tokens, so that the sums do not depend on the batch or the threads: 1,024 tokens
// of 64 floats are 512 kB of keys and values, several times what waking a worker costs.
constexpr int kSplitTokens = 1024;
// Query rows of one unit: 96 rows of 128 floats, their sums and their weights stay in a level-2 cache.
constexpr int kUnitRows = 96;
// Multiplications below which one thread is quicker than two: about 50 us.
constexpr double kWorthwhile = 2e6;

// The work of one thread at a time: the branches [first, last) of a prompt, one key-value head, one split of
// the prefix. The units of the same rows and head are neighbours; the one that ends last merges them all.
struct Unit {
  int32_t prompt, first, last, head;
  int32_t split, splits;  // the last split also does the tails
  int64_t partial;        // where its sums begin in Plan::partials, in floats
  int32_t group;          // of Plan::unfinished
};

struct Plan {
  std::vector<Unit> units;
  std::vector<std::atomic<int>> unfinished;  // units of each group
  std::vector<float> partials;               // of each unit: [rows, width] sums, then [rows] RowSoftmax
};

size_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

int64_t rows_of(const TreeArgs& a, const Unit& unit) {
  return int64_t(unit.last - unit.first) * a.tokens * (a.heads / a.kv_heads);
}

int64_t partial_size(const TreeArgs& a, int64_t rows) {
  return rows * (a.width + int64_t(sizeof(RowSoftmax) / sizeof(float)));
}

// The first token of its prefix that a query sees; the queries of an idle row see none.
int64_t first_seen(const TreeArgs& a, int64_t prompt, int64_t n, int64_t token) {
  const int64_t length = a.prefix_len[prompt], tail = a.tail_len[n];
  if (tail == 0) return length;
  return a.window ? std::clamp<int64_t>(length + tail - a.tokens + token + 1 - a.window, 0, length) : 0;
}

void make_plan(const TreeArgs& a, Plan& plan) {
  const int64_t branch_rows = a.tokens * (a.heads / a.kv_heads);
  const int32_t branches = int32_t(std::max<int64_t>(1, kUnitRows / branch_rows));
  plan.units.clear();
  int64_t floats = 0;
  int32_t groups = 0;
  for (int32_t b = 0; b < a.prompts; ++b) {
    const int32_t splits = std::max<int32_t>(1, (a.prefix_len[b] + kSplitTokens - 1) / kSplitTokens);
    for (int32_t first = a.first_row[b]; first < a.first_row[b + 1]; first += branches) {
      const int32_t last = std::min(first + branches, a.first_row[b + 1]);
      int64_t seen = a.prefix_len[b];  // from here on, by the oldest query of the rows
      for (int32_t n = first; n < last; ++n) seen = std::min(seen, first_seen(a, b, n, 0));
      const int32_t from = std::min(int32_t(seen / kSplitTokens), splits - 1);
      for (int32_t h = 0; h < a.kv_heads; ++h, ++groups)
        for (int32_t s = from; s < splits; ++s) {
          plan.units.push_back({b, first, last, h, s, splits, floats, groups});
          floats += partial_size(a, rows_of(a, plan.units.back()));
        }
    }
  }
  if (plan.partials.size() < size_t(floats)) plan.partials.resize(size_t(floats));
  plan.unfinished = std::vector<std::atomic<int>>(size_t(groups));
  for (const Unit& unit : plan.units) ++plan.unfinished[size_t(unit.group)];
}

// Up to kTileTokens tokens: a piece of a page, or of each of several leaves.
struct Tile {
  int tokens = 0, pieces = 0;
  int count[kTileTokens / kTokens];  // tokens of each piece; all but the last have a multiple of kTokens
  const char *keys[kTileTokens / kTokens], *values[kTileTokens / kTokens];
};

// One unit at work: its rows, and scratch for one tile of the cache.
struct Worker {
  const TreeArgs& a;
  const TreeKernels& kernels;
  const Unit& unit;
  float* const sums;  // [rows, width]
  RowSoftmax* const softmax;
  std::vector<float>&query, &logits, &widened, &alpha;
  std::vector<int64_t>& oldest;  // [rows], the first token of the prefix that each sees

  int group() const { return int(a.heads / a.kv_heads); }
  int branch_rows() const { return int(a.tokens) * group(); }

  void read_query() {
    const float scale = a.softcap != 0 ? a.scale / a.softcap : a.scale * kLog2E;
    std::vector<float>::iterator to = query.begin();
    for (int64_t n = unit.first; n < unit.last; ++n)
      for (int64_t s = 0; s < a.tokens; ++s)
        for (int g = 0; g < group(); ++g, to += a.width) {
          const int64_t at = n * a.query.stride_row + s * a.query.stride_token +
                             (unit.head * group() + g) * a.query.stride_head;
          kernels.widen(a.query.data + at * int64_t(size_of(a.type)), a.type, int(a.width), &*to);
          for (int64_t d = 0; d < a.width; ++d) to[d] *= scale;
        }
  }

  int64_t bytes_at(const Store& store, int64_t at) const {
    return (at * store.stride_at + unit.head * store.stride_head) * int64_t(size_of(a.type));
  }

  // `tokens` more of a tile, from `start` on in a page or leaf.
  void add(Tile& tile, const Store& keys, const Store& values, int64_t at, int64_t start, int tokens) const {
    const int64_t size = int64_t(size_of(a.type));
    tile.keys[tile.pieces] = keys.data + bytes_at(keys, at) + start * size;
    tile.values[tile.pieces] = values.data + bytes_at(values, at) + start * values.stride_inner * size;
    tile.count[tile.pieces++] = tokens;
    tile.tokens += tokens;
  }

  // `count` lines of `cols` numbers in fp32, `stride` apart: in place, or in `scratch`.
  const float* read(const char* data, int64_t stride, int count, int cols, float* scratch) {
    if (a.type == DType::f32) return reinterpret_cast<const float*>(data);
    for (int i = 0; i < count; ++i)
      kernels.widen(data + i * stride * int64_t(size_of(a.type)), a.type, cols, scratch + i * cols);
    return scratch;
  }

  // Rows [first, first + n) of the unit see a tile; row i the tokens [from, to)[i] of it. next: the tile
  // after it, of pieces of so many tokens, or without any.
  template <class Range>
  void attend(int first, int n, const Store& keys, const Store& values, const Tile& tile, const Tile& next,
              int64_t piece, const Range& visible) {
    const int width = int(a.width), size = int(size_of(a.type));
    const int bytes = width * int(std::min<int64_t>(piece, kTileTokens)) * size;
    const float* wide[kTileTokens];
    const int cols = (tile.tokens + kTokens - 1) / kTokens * kTokens;
    const bool whole = tile.pieces == 1, f32 = a.type == DType::f32;
    const int step = whole ? cols : kTokens;
    for (int p = 0, at = 0; p < tile.pieces; ++p)
      for (int i = 0; i < tile.count[p]; i += step, at += step)
        wide[at / step] =
            read(tile.keys[p] + i * size, keys.stride_inner, width, step, &widened[size_t(at * width)]);
    (whole ? kernels.by_block : kernels.by_columns)(
        &query[size_t(first * width)], width, n, width, wide, f32 ? keys.stride_inner : step, cols, nullptr,
        logits.data(), kTileTokens, {next.keys, next.pieces, bytes});
    int low = tile.tokens, high = 0;
    for (int i = 0; i < n; ++i) {
      const auto [from, to] = visible(i);
      alpha[size_t(i)] = kernels.weights(&logits[size_t(i * kTileTokens)], cols, from, to, a.softcap * kLog2E,
                                         softmax[first + i]);
      low = std::min(low, from), high = std::max(high, to);
    }
    if (low >= high) return;
    // Only tokens that some row sees: what lies beyond may be NaN, and 0 * NaN would not be 0.
    for (int p = 0, at = 0; p < tile.pieces; at += tile.count[p++])
      for (int i = std::max(low, at); i < std::min(high, at + tile.count[p]); ++i)
        wide[i] = read(tile.values[p] + (i - at) * values.stride_inner * size, 0, 1, width,
                       &widened[size_t(i * width)]);
    (whole ? kernels.by_block : kernels.by_lines)(
        &logits[size_t(low)], kTileTokens, n, high - low, wide + low, f32 ? values.stride_inner : width,
        width, alpha.data(), sums + int64_t(first) * width, width, {next.values, next.pieces, bytes});
  }

  void attend_prefix() {
    const int64_t length = a.prefix_len[unit.prompt];
    const int64_t begin = int64_t(unit.split) * kSplitTokens, end = std::min(length, begin + kSplitTokens);
    const int32_t* pages = a.pages + unit.prompt * a.pages_stride;
    const int rows = int(rows_of(a, unit));
    int64_t seen = length;
    std::vector<int64_t>::iterator to = oldest.begin();
    for (int64_t n = unit.first; n < unit.last; ++n)
      for (int64_t s = 0; s < a.tokens; ++s, to += group()) {
        std::fill_n(to, group(), first_seen(a, unit.prompt, n, s));
        seen = std::min(seen, *to);
      }
    const auto tile_at = [&](int64_t start) {
      Tile tile;
      if (start < end)
        add(tile, a.prefix_key, a.prefix_value, pages[start / a.page_tokens], start % a.page_tokens,
            int(std::min<int64_t>(kTileTokens, end - start)));
      return tile;
    };
    const int64_t from = std::max(begin, seen / kTileTokens * kTileTokens);
    Tile tile = tile_at(from);
    for (int64_t start = from; start < end; start += kTileTokens) {
      const Tile next = tile_at(start + kTileTokens);
      attend(0, rows, a.prefix_key, a.prefix_value, tile, next, a.page_tokens, [&](int i) {
        return std::pair<int, int>(int(std::clamp<int64_t>(oldest[size_t(i)] - start, 0, tile.tokens)),
                                   tile.tokens);
      });
      tile = next;
    }
  }

  // The first token of a tile of row n's tail that a query sees.
  int64_t first_tile(int64_t n) const {
    const int64_t seen = a.window ? std::max<int64_t>(0, a.tail_len[n] - a.tokens + 1 - a.window) : 0;
    return seen / kTileTokens * kTileTokens;
  }

  // The tile of row n's tail from `start` on; empty where that is no row of the unit, or it is idle.
  Tile tail_tile(int64_t n, int64_t start) const {
    Tile tile;
    const int64_t count = n < unit.last ? std::min<int64_t>(kTileTokens, a.tail_len[n] - start) : 0;
    while (tile.tokens < count) {
      const int64_t at = start + tile.tokens, inside = at % a.leaf_tokens;
      const int here = int(std::min<int64_t>(a.leaf_tokens - inside, count - tile.tokens));
      add(tile, a.tail_key, a.tail_value, leaf(n, at), inside, here);
    }
    return tile;
  }

  void attend_tails() {
    for (int64_t n = unit.first; n < unit.last; ++n) {
      const int64_t tail = a.tail_len[n];
      if (tail == 0) continue;
      if (a.key.data) append(n);
      Tile tile = tail_tile(n, first_tile(n));
      for (int64_t start = first_tile(n); start < tail; start += kTileTokens) {
        const int64_t after = start + kTileTokens;
        const Tile next = after < tail        ? tail_tile(n, after)
                          : n + 1 < unit.last ? tail_tile(n + 1, first_tile(n + 1))
                                              : Tile{};
        attend(int(n - unit.first) * branch_rows(), branch_rows(), a.tail_key, a.tail_value, tile, next,
               a.leaf_tokens, [&](int i) {
                 const int64_t at = tail - a.tokens + i / group();  // of the query, in the tail
                 const int64_t from = a.window ? at + 1 - a.window : 0;
                 return std::pair<int, int>(int(std::clamp<int64_t>(from - start, 0, tile.tokens)),
                                            int(std::clamp<int64_t>(at + 1 - start, 0, tile.tokens)));
               });
        tile = next;
      }
    }
  }

  int32_t leaf(int64_t n, int64_t token) const {
    return a.leaves[n * a.leaves_stride + token / a.leaf_tokens];
  }

  // The new tokens of row n join its tail.
  void append(int64_t n) {
    const int64_t size = int64_t(size_of(a.type));
    const auto from = [&](const RowView& x, int64_t s) {
      return x.data + (n * x.stride_row + s * x.stride_token + unit.head * x.stride_head) * size;
    };
    for (int64_t s = 0; s < a.tokens; ++s) {
      const int64_t token = a.tail_len[n] - a.tokens + s, at = token % a.leaf_tokens;
      char* const key = a.tail_key.data + bytes_at(a.tail_key, leaf(n, token));
      char* const value = a.tail_value.data + bytes_at(a.tail_value, leaf(n, token));
      std::memcpy(value + at * a.tail_value.stride_inner * size, from(a.value, s), size_t(a.width * size));
      for (int64_t d = 0; d < a.width; ++d)
        std::memcpy(key + (d * a.tail_key.stride_inner + at) * size, from(a.key, s) + d * size, size_t(size));
    }
  }
};

uint16_t bf16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t f16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to 2^16 or beyond
  if (magnitude < 0x38800000)
    return uint16_t(sign | uint32_t(std::lrint(std::abs(x) * 0x1p24f)));  // subnormal
  return uint16_t(sign | (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

void narrow(const float* from, int64_t n, DType type, char* to) {
  if (type == DType::f32) std::memcpy(to, from, size_t(n) * sizeof(float));
  for (int64_t i = 0; type != DType::f32 && i < n; ++i) {
    const uint16_t bits = type == DType::bf16 ? bf16_bits(from[i]) : f16_bits(from[i]);
    std::memcpy(to + 2 * i, &bits, sizeof bits);
  }
}

// All units of a group are done: their sums become the rows' output, in the order of the splits.
void merge_units(const TreeArgs& a, const TreeKernels& kernels, const Unit* first, int64_t count,
                 const std::vector<float>& partials) {
  const int64_t rows = rows_of(a, *first), group = a.heads / a.kv_heads;
  std::vector<float> out(size_t(a.width));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t head = first->head * group + r % group, token = r / group;  // from the first branch on
    const auto softmax_of = [&](int64_t u) -> const RowSoftmax& {
      const float* const sums = &partials[size_t(first[u].partial)];
      return reinterpret_cast<const RowSoftmax*>(sums + rows * a.width)[r];
    };
    float top = a.sinks ? a.sinks[head] * kLog2E : -INFINITY, sum = 0;
    for (int64_t u = 0; u < count; ++u) top = std::max(top, softmax_of(u).top);
    if (a.sinks) sum = std::exp2(a.sinks[head] * kLog2E - top);
    std::fill(out.begin(), out.end(), 0.0f);
    for (int64_t u = 0; u < count; ++u) {
      const float part = kernels.sum(softmax_of(u)), its_top = softmax_of(u).top;
      const float scale =
          its_top == -INFINITY ? part : std::exp2(its_top - top);  // saw nothing, 0, or only NaN
      sum += part * scale;
      const float* const from = &partials[size_t(first[u].partial + r * a.width)];
      for (int64_t d = 0; d < a.width; ++d) out[size_t(d)] += from[d] * scale;
    }
    const bool idle = a.tail_len[first->first + token / a.tokens] == 0;
    for (float& x : out) x = idle ? 0 : x / sum;
    const int64_t at = ((first->first * a.tokens + token) * a.heads + head) * a.width;
    narrow(out.data(), a.width, a.type, a.out + at * int64_t(size_of(a.type)));
  }
}

double work_of(const TreeArgs& a) {
  double keys = 0;
  for (int64_t n = 0; n < a.rows; ++n) keys += a.tail_len[n];
  for (int64_t b = 0; b < a.prompts; ++b)
    keys += double(a.first_row[b + 1] - a.first_row[b]) *
            double(a.window ? std::min<int64_t>(a.prefix_len[b], a.window) : a.prefix_len[b]);
  return keys * double(a.tokens * a.heads * a.width);
}

}  // namespace

const TreeKernels* tree_kernels(const char* forced) {
  return choose<TreeKernels>(PYENGINE_BUILDS(tree_kernels), forced);
}

void tree_attention(const TreeArgs& args, const TreeKernels& kernels, int threads) {
  thread_local Plan plan;
  make_plan(args, plan);
  Plan& shared = plan;  // the caller's, in every worker
  parallel_rows(int64_t(shared.units.size()), work_of(args) < kWorthwhile ? 1 : threads, [&](int64_t i) {
    thread_local std::vector<float> query, logits, widened, alpha;
    thread_local std::vector<int64_t> oldest;
    const Unit& unit = shared.units[size_t(i)];
    const size_t rows = size_t(rows_of(args, unit)), width = size_t(args.width);
    if (query.size() < rows * width) query.resize(rows * width);
    if (alpha.size() < rows) alpha.resize(rows), oldest.resize(rows), logits.resize(rows * kTileTokens);
    if (widened.size() < width * kTileTokens) widened.resize(width * kTileTokens);
    float* const sums = &shared.partials[size_t(unit.partial)];
    RowSoftmax* const softmax = reinterpret_cast<RowSoftmax*>(sums + rows * width);
    std::fill(sums, sums + rows * width, 0.0f);
    std::fill(softmax, softmax + rows, RowSoftmax{-INFINITY, {}});
    Worker worker{args, kernels, unit, sums, softmax, query, logits, widened, alpha, oldest};
    worker.read_query();
    worker.attend_prefix();
    const bool last = unit.split == unit.splits - 1;
    if (last) worker.attend_tails();
    if (shared.unfinished[size_t(unit.group)].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      int64_t first = i;
      while (first > 0 && shared.units[size_t(first - 1)].group == unit.group) --first;
      int64_t count = 1;
      while (first + count < int64_t(shared.units.size()) &&
             shared.units[size_t(first + count)].group == unit.group)
        ++count;
      merge_units(args, kernels, &shared.units[size_t(first)], count, shared.partials);
    }
  });
}

}  // namespace pyengine
