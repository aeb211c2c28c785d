// What may be wrong with the tables of a tree.
#include <algorithm>
#include <vector>

#include "tree_attention.h"

namespace pyengine {
namespace {

std::string out_of_range(const char* table, int64_t at, int64_t value, const std::string& bound) {
  return std::string("tree.") + table + "[" + std::to_string(at) + "] is " + std::to_string(value) + ", " +
         bound;
}

}  // namespace

std::string tree_fault(const TreeTables& t) {
  if (t.first_row[0] != 0) return out_of_range("first_row", 0, t.first_row[0], "it must be 0");
  for (int64_t b = 0; b < t.prompts; ++b) {
    if (t.first_row[b + 1] < t.first_row[b] || t.first_row[b + 1] > t.rows)
      return out_of_range(
          "first_row", b + 1, t.first_row[b + 1],
          "it must be in " + std::to_string(t.first_row[b]) + " .. " + std::to_string(t.rows));
    const int64_t length = t.prefix_len[b], room = t.columns * t.page_tokens;
    if (length < 0 || length > room)
      return out_of_range("prefix_len", b, length, "its pages hold " + std::to_string(room) + " tokens");
    for (int64_t i = 0; i * t.page_tokens < length; ++i) {
      const int32_t page = t.pages[b * t.pages_stride + i];
      if (page < 0 || page >= t.page_count)
        return out_of_range("pages", b, page, "there are " + std::to_string(t.page_count) + " pages");
    }
  }
  if (t.first_row[t.prompts] != t.rows)
    return out_of_range("first_row", t.prompts, t.first_row[t.prompts],
                        "there are " + std::to_string(t.rows) + " rows");
  std::vector<bool> taken(static_cast<size_t>(t.leaf_count));
  for (int64_t n = 0; n < t.rows; ++n) {
    const int32_t* const leaves = t.leaves + n * t.leaves_stride;
    const int64_t own = count_leaves(leaves, t.leaf_columns);
    for (int64_t i = 0; i < t.leaf_columns; ++i) {
      if (i >= own && leaves[i] == -1) continue;
      if (i >= own) return out_of_range("leaves", n, leaves[i], "behind the row's last leaf");
      if (leaves[i] < 0 || leaves[i] >= t.leaf_count)
        return out_of_range("leaves", n, leaves[i], "there are " + std::to_string(t.leaf_count) + " leaves");
      if (taken[size_t(leaves[i])]) return out_of_range("leaves", n, leaves[i], "which is taken already");
      taken[size_t(leaves[i])] = true;
    }
    const std::string fault = tail_fault(n, t.tail_len[n], t.tokens, own * t.leaf_tokens);
    if (!fault.empty()) return fault;
  }
  return {};
}

int64_t count_leaves(const int32_t* leaves, int64_t columns) {
  return std::find(leaves, leaves + columns, -1) - leaves;
}

std::string tail_fault(int64_t n, int64_t tail, int64_t tokens, int64_t room) {
  if (tail == 0 || (tokens <= tail && tail <= room)) return {};
  return "tree.tail_len[" + std::to_string(n) + "] is " + std::to_string(tail) + ": it counts the " +
         std::to_string(tokens) + " new tokens, and the row's leaves have room for " + std::to_string(room);
}

}  // namespace pyengine
