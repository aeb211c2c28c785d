// pyengine._C, the ops on a CPU. pyengine/ops checks shapes and dtypes before it calls.
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "arguments.h"
#include "cpu/linear.h"
#include "cpu/linear_logprob.h"
#include "cpu/select_block.h"
#include "cpu/tilt.h"
#include "cpu/tree_attention.h"
#if defined(PYENGINE_CUDA_ARCHITECTURES)
#include "cuda/bindings_cuda.h"
#endif

namespace py = pybind11;
using pyengine::address;
using pyengine::at;
using pyengine::call;
using pyengine::Column;
using pyengine::DotKernels;
using pyengine::DType;
using pyengine::LogprobKernels;
namespace keys = pyengine::keys;
using pyengine::TiltKernels;
using pyengine::TreeKernels;
using pyengine::View;
using pyengine::whole;

namespace {

// What `table` (tilt_kernels, ...) has for a forced instruction set, or for the best one.
template <class Kernels>
const Kernels& available(const Kernels* (*table)(const char*), const char* isa) {
  const Kernels* kernels = table(isa);
  if (!kernels) throw py::value_error(std::string("instruction set not available on this machine: ") + isa);
  return *kernels;
}

void tilt_sample(const py::dict& given, int threads, const char* isa) {
  const pyengine::TiltCall call(given);
  const TiltKernels& kernels = available(pyengine::tilt_kernels, isa);
  py::gil_scoped_release release;
  pyengine::tilt_sample(call.args, threads, kernels);
}

void tilt_fold(py::handle state, const py::dict& given, int64_t first_id, int threads, const char* isa) {
  const pyengine::TiltRows rows(given);
  auto* const states = static_cast<pyengine::TiltState*>(address(state));
  const TiltKernels& kernels = available(pyengine::tilt_kernels, isa);
  py::gil_scoped_release release;
  pyengine::tilt_fold(rows.args, states, first_id, threads, kernels);
}

// given: batch, temperature and the outputs.
void tilt_finish(py::handle state, const py::dict& given) {
  const Column<float> temperatures(at(given, keys::temperature));
  pyengine::TiltArgs args{};
  args.batch = whole(at(given, keys::batch));
  args.temperature = temperatures.data(), args.temperature_stride = temperatures.stride();
  pyengine::write_to(args, given);
  pyengine::tilt_finish(args, static_cast<const pyengine::TiltState*>(address(state)));
}

// A row of the state tensor before its first tile.
py::tuple untouched_state() {
  const pyengine::TiltState state;
  std::array<double, pyengine::kTiltState> fields;
  static_assert(sizeof fields == sizeof state);
  std::memcpy(fields.data(), &state, sizeof state);
  py::tuple row(fields.size());
  for (size_t i = 0; i < fields.size(); ++i) row[i] = fields[i];
  return row;
}

pyengine::LogitTile logit_tile(int64_t rows, int64_t cols, int64_t start, const View& tile, int type,
                               const View& bias, float softcap, float temperature, const View& target) {
  pyengine::LogitTile out{};
  out.rows = rows, out.cols = cols, out.start = start;
  out.data = tile.data, out.type = DType(type), out.stride = tile.stride[0];
  out.bias = bias.as<float>(), out.softcap = softcap, out.inverse_temperature = 1 / temperature;
  out.target = target.as<int64_t>();
  return out;
}

void fold_logits(int64_t rows, int64_t cols, int64_t start, py::handle tile, int type, py::handle bias,
                 float softcap, float temperature, py::handle target, py::handle state, int threads,
                 const char* isa) {
  const auto logits =
      logit_tile(rows, cols, start, View(tile), type, View(bias), softcap, temperature, View(target));
  auto* const states = static_cast<double*>(address(state));
  const LogprobKernels& kernels = available(pyengine::logprob_kernels, isa);
  py::gil_scoped_release release;
  pyengine::fold_logits(logits, kernels, threads, states);
}

void logit_gradient(int64_t rows, int64_t cols, int64_t start, py::handle tile, int type, py::handle bias,
                    float softcap, float temperature, py::handle target, py::handle lse, py::handle entropy,
                    py::handle grad_logp, py::handle grad_entropy, py::handle to, int threads,
                    const char* isa) {
  const auto logits =
      logit_tile(rows, cols, start, View(tile), type, View(bias), softcap, temperature, View(target));
  const View out(to), by_logp(grad_logp), by_entropy(grad_entropy), known_lse(lse), known_entropy(entropy);
  const LogprobKernels& kernels = available(pyengine::logprob_kernels, isa);
  py::gil_scoped_release release;
  pyengine::logit_gradient(logits, kernels, threads, known_lse.as<float>(), known_entropy.as<float>(),
                           by_logp.as<float>(), by_entropy.as<float>(), out.as<float>(), out.stride[0]);
}

// All contiguous, and fp32 but for the weight; scale and bias may be None.
void linear(int64_t rows, int64_t outputs, int64_t width, py::handle x, py::handle weight, int type,
            py::handle scale, py::handle bias, py::handle out, int threads, const char* isa) {
  pyengine::LinearArgs args{};
  args.rows = rows, args.outputs = outputs, args.width = width;
  args.x = static_cast<const float*>(address(x));
  args.weight = address(weight), args.type = DType(type);
  args.scale = scale.is_none() ? nullptr : static_cast<const float*>(address(scale));
  args.bias = bias.is_none() ? nullptr : static_cast<const float*>(address(bias));
  args.out = static_cast<float*>(address(out));
  const DotKernels& kernels = available(pyengine::dot_kernels, isa);
  py::gil_scoped_release release;
  pyengine::linear(args, kernels, threads);
}

void rms_norm(int64_t rows, int64_t width, py::handle x, py::handle weight, float eps, py::handle out,
              const char* isa) {
  pyengine::rms_norm(rows, width, static_cast<const float*>(address(x)),
                     static_cast<const float*>(address(weight)), eps, static_cast<float*>(address(out)),
                     available(pyengine::dot_kernels, isa));
}

void select_block(const py::dict& given, int threads, const char* isa) {
  const pyengine::SelectCall call(given);
  const DotKernels& kernels = available(pyengine::dot_kernels, isa);
  py::gil_scoped_release release;
  pyengine::select_block(call.args, kernels, threads);
}

// sizes: tokens of a page, pages, tokens of a leaf, leaves, columns of pages, columns of leaves, prompts,
// rows, new tokens of a row. tree: its tables, int32 on the CPU and contiguous.
void check_tree(std::array<int64_t, 9> sizes, std::array<py::object, 5> tree) {
  pyengine::TreeTables t{};
  t.page_tokens = sizes[0], t.page_count = sizes[1], t.leaf_tokens = sizes[2], t.leaf_count = sizes[3];
  t.columns = t.pages_stride = sizes[4], t.leaf_columns = t.leaves_stride = sizes[5];
  t.prompts = sizes[6], t.rows = sizes[7], t.tokens = sizes[8];
  const int32_t** const tables[] = {&t.pages, &t.prefix_len, &t.first_row, &t.leaves, &t.tail_len};
  for (size_t i = 0; i < tree.size(); ++i) *tables[i] = static_cast<int32_t*>(address(tree[i]));
  const std::string fault = pyengine::tree_fault(t);
  if (!fault.empty()) throw py::value_error("tree_attention: " + fault);
}

// tree_attention over given stores and a given tree, which are looked at once: a model's decode step makes a
// call for every layer. Owns its tensors.
class TreeCall {
 public:
  // stores: prefix keys, prefix values, tail keys, tail values. tree: pages, prefix_len, first_row, leaves,
  // tail_len, int32; the tail_len of each run is what its memory holds then. shape: prompts, rows, kv_heads,
  // width, tokens of a page, of a leaf, columns of leaves.
  TreeCall(std::array<int64_t, 7> shape, int type, std::array<py::object, 4> stores,
           std::array<py::object, 5> tree, const char* isa)
      : stores_(std::move(stores)), tree_(std::move(tree)), kernels_(available(pyengine::tree_kernels, isa)) {
    const auto store = [&](size_t i, size_t inner) {
      const View x(stores_[i]);
      return pyengine::Store{x.as<char>(), x.stride[0], x.stride[1], x.stride[inner]};
    };
    args_.prompts = shape[0], args_.rows = shape[1];
    args_.kv_heads = shape[2], args_.width = shape[3], args_.page_tokens = shape[4],
    args_.leaf_tokens = shape[5];
    args_.type = DType(type);
    args_.prefix_key = store(0, 3), args_.prefix_value = store(1, 2);
    args_.tail_key = store(2, 3), args_.tail_value = store(3, 2);
    const View pages(tree_[0]);
    args_.pages = pages.as<int32_t>(), args_.pages_stride = pages.stride[0];
    args_.prefix_len = static_cast<int32_t*>(address(tree_[1]));
    args_.first_row = static_cast<int32_t*>(address(tree_[2]));
    const View leaves(tree_[3]);
    args_.leaves = leaves.as<int32_t>(), args_.leaves_stride = leaves.stride[0];
    args_.tail_len = static_cast<int32_t*>(address(tree_[4]));
    for (int64_t n = 0; n < args_.rows; ++n)
      room_.push_back(args_.leaf_tokens *
                      pyengine::count_leaves(args_.leaves + n * args_.leaves_stride, shape[6]));
  }

  // query, new_key, new_value: [rows, tokens, heads, width], or packed as a model's layers have them,
  // [heads, rows * tokens, width]. False, and nothing done, where one does not fit.
  bool run(py::handle query, py::handle new_key, py::handle new_value, bool packed, int64_t heads,
           int64_t tokens, float scale, float softcap, int64_t window, py::handle sinks, py::handle out,
           int threads) const {
    for (int64_t n = 0; n < args_.rows; ++n) {
      const std::string fault = pyengine::tail_fault(n, args_.tail_len[n], tokens, room_[size_t(n)]);
      if (!fault.empty()) throw py::value_error("tree_attention: " + fault);
    }
    if (heads % args_.kv_heads || window < 0 || softcap < 0) return false;
    pyengine::TreeArgs args = args_;
    args.tokens = tokens, args.heads = heads;
    if (!rows(query, packed, heads, tokens, &args.query) ||
        !rows(new_key, packed, args.kv_heads, tokens, &args.key) ||
        !rows(new_value, packed, args.kv_heads, tokens, &args.value))
      return false;
    args.scale = scale, args.softcap = softcap, args.window = window;
    args.sinks = View(sinks).as<float>();
    args.out = static_cast<char*>(address(out));
    py::gil_scoped_release release;
    pyengine::tree_attention(args, kernels_, threads);
    return true;
  }

 private:
  bool rows(py::handle tensor, bool packed, int64_t heads, int64_t tokens, pyengine::RowView* to) const {
    static PyObject* const size = PyUnicode_InternFromString("size");
    if (tensor.is_none()) return true;
    const py::object sizes = call(tensor, size);
    const std::array<int64_t, 4> wanted =
        packed ? std::array<int64_t, 4>{heads, args_.rows * tokens, args_.width}
               : std::array<int64_t, 4>{args_.rows, tokens, heads, args_.width};
    const size_t dimensions = packed ? 3 : 4;
    if (size_t(PyTuple_GET_SIZE(sizes.ptr())) != dimensions) return false;
    for (size_t i = 0; i < dimensions; ++i)
      if (whole(PyTuple_GET_ITEM(sizes.ptr(), Py_ssize_t(i))) != wanted[i]) return false;
    const View x(tensor);
    const auto& s = x.stride;
    if (s[dimensions - 1] != 1) return false;
    *to = packed ? pyengine::RowView{x.as<char>(), tokens * s[1], s[1], s[0]}
                 : pyengine::RowView{x.as<char>(), s[0], s[1], s[2]};
    return true;
  }

  std::vector<int64_t> room_;  // of each row, in tokens
  std::array<py::object, 4> stores_;
  std::array<py::object, 5> tree_;
  const TreeKernels& kernels_;
  pyengine::TreeArgs args_{};
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of pyengine; call them through pyengine.ops.";
  m.def("tilt_sample", &tilt_sample);
  m.def("tilt_fold", &tilt_fold);
  m.def("tilt_finish", &tilt_finish);
  m.def("fold_logits", &fold_logits);
  m.def("logit_gradient", &logit_gradient);
  py::class_<TreeCall>(m, "TreeCall", "pyengine/ops/tree_attention.py holds the contract.")
      .def(py::init<std::array<int64_t, 7>, int, std::array<py::object, 4>, std::array<py::object, 5>,
                    const char*>())
      .def("run", &TreeCall::run);
  m.def("check_tree", &check_tree);
  m.def("select_block", &select_block);
  m.def("linear", &linear);
  m.def("rms_norm", &rms_norm);
  m.attr("TILT_STATE") = untouched_state();
  m.def(
      "instruction_set", [](const char* isa) { return available(pyengine::tilt_kernels, isa).name; },
      py::arg("isa") = py::none(), "The instruction set the CPU kernels run with.");
  m.def("compiler", [] { return std::string(PYENGINE_COMPILER); }, "Compiler that built this module.");
#if defined(PYENGINE_CUDA_ARCHITECTURES)
  const std::vector<std::string> architectures = {PYENGINE_CUDA_ARCHITECTURES};
  pyengine::cuda::bind(m);
#else
  const std::vector<std::string> architectures;
#endif
  m.def(
      "cuda_architectures", [architectures] { return architectures; },
      "What the CUDA kernels were compiled for; empty without them.");
}
