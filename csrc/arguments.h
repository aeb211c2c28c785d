// How an op's arguments cross from Python: one dict for an op, with its tensors and numbers by the names that
// the op's struct has for them, for the CPU and the CUDA bindings alike. No library of torch is linked, so
// one build serves every torch and building needs none: tensors are asked for their address and strides by
// name. The callers' tensors own all memory: on a CPU for the call, on a GPU until the stream has passed it.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <optional>
#include <type_traits>

#include "select_args.h"
#include "tilt_args.h"

namespace pyengine {

namespace py = pybind11;

inline py::object call(py::handle object, PyObject* method) {
  PyObject* const result = PyObject_CallMethodNoArgs(object.ptr(), method);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline int64_t whole(py::handle number) {
  const int64_t n = PyLong_AsLongLong(number.ptr());
  if (n == -1 && PyErr_Occurred()) throw py::error_already_set();
  return n;
}

inline void* address(py::handle tensor) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  return PyLong_AsVoidPtr(call(tensor, data_ptr).ptr());
}

// A tensor of up to four dimensions; no tensor where it is None.
struct View {
  void* data = nullptr;
  std::array<int64_t, 4> stride{};

  explicit View(py::handle tensor) {
    static PyObject* const strides = PyUnicode_InternFromString("stride");
    if (tensor.is_none()) return;
    data = address(tensor);
    const py::object all = call(tensor, strides);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(all.ptr()) && i < 4; ++i)
      stride[size_t(i)] = whole(PyTuple_GET_ITEM(all.ptr(), i));
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// A parameter of the rows: a number for all, which lives here, or a tensor with one or two dimensions.
template <class T>
struct Column {
  T number{};
  std::optional<View> tensor;

  explicit Column(py::handle value) {
    if (PyFloat_Check(value.ptr()))
      number = T(PyFloat_AS_DOUBLE(value.ptr()));
    else if (PyLong_Check(value.ptr()))
      number = std::is_integral_v<T> ? T(whole(value)) : T(PyLong_AsDouble(value.ptr()));
    else
      tensor.emplace(value);
  }
  Column(const Column&) = delete;

  const T* data() const { return tensor ? tensor->as<T>() : &number; }
  int64_t stride(size_t dimension = 0) const { return tensor ? tensor->stride[dimension] : 0; }
};

// A name in a dict of arguments, made once: a look-up by a new string takes three times as long.
struct Key {
  PyObject* name;
  explicit Key(const char* text) : name(PyUnicode_InternFromString(text)) {}
};

namespace keys {
inline const Key batch("batch"), beta("beta"), branches("branches"), given("given"), given_type("given_type"),
    gumbel("gumbel"), heads("heads"), index("index"), kl("kl"), logits("logits"), logits_type("logits_type"),
    logp_base("logp_base"), logp_policy("logp_policy"), lsc("lsc"), mask("mask"), min_p("min_p"),
    position("position"), probability("probability"), probe("probe"), probe_type("probe_type"),
    reference("reference"), seed("seed"), temperature("temperature"), token("token"), top_k("top_k"),
    top_p("top_p"), utility("utility"), valid("valid"), values("values"), values_type("values_type"),
    vocab("vocab"), weights("weights"), width("width");
}  // namespace keys

// KeyError where it is missing: a misspelt argument is no argument.
inline py::handle at(const py::dict& given, const Key& key) {
  PyObject* const value = PyDict_GetItemWithError(given.ptr(), key.name);
  if (!value && !PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key.name);
  if (!value) throw py::error_already_set();
  return value;
}

inline DType dtype_at(const py::dict& given, const Key& key) { return DType(whole(at(given, key))); }

inline bool truth_at(const py::dict& given, const Key& key) { return at(given, key).ptr() == Py_True; }

template <class T>
void set(const Column<T>& column, const T*& data, int64_t& stride) {
  data = column.data(), stride = column.stride();
}

inline void write_to(TiltArgs& args, const py::dict& given) {
  args.token = static_cast<int64_t*>(address(at(given, keys::token)));
  args.logp_base = static_cast<float*>(address(at(given, keys::logp_base)));
  args.logp_policy = static_cast<float*>(address(at(given, keys::logp_policy)));
  args.kl = static_cast<float*>(address(at(given, keys::kl)));
  args.valid = static_cast<bool*>(address(at(given, keys::valid)));
}

// What tilt_sample and tilt_fold read alike; owns the numbers that args points to.
struct TiltRows {
  Column<float> weights, temperature;
  Column<int64_t> seed, position;
  TiltArgs args{};

  explicit TiltRows(const py::dict& given)
      : weights(at(given, keys::weights)),
        temperature(at(given, keys::temperature)),
        seed(at(given, keys::seed)),
        position(at(given, keys::position)) {
    args.batch = whole(at(given, keys::batch)), args.vocab = whole(at(given, keys::vocab));
    args.heads = whole(at(given, keys::heads));
    const View rows(at(given, keys::logits)), scores(at(given, keys::values)), allowed(at(given, keys::mask));
    args.logits = rows.data, args.logits_type = dtype_at(given, keys::logits_type);
    args.logits_stride = rows.stride[0];
    args.values = scores.data, args.values_type = dtype_at(given, keys::values_type);
    args.values_stride_head = scores.stride[0], args.values_stride_row = scores.stride[1];
    args.weights = weights.data();
    args.weights_stride_row = weights.stride(0), args.weights_stride_head = weights.stride(1);
    args.mask = allowed.as<bool>(), args.mask_stride = allowed.stride[0];
    set(temperature, args.temperature, args.temperature_stride);
    set(seed, args.seed, args.seed_stride);
    set(position, args.position, args.position_stride);
  }
};

// All of tilt_sample.
struct TiltCall : TiltRows {
  Column<int64_t> top_k;
  Column<float> top_p, min_p;

  explicit TiltCall(const py::dict& given)
      : TiltRows(given),
        top_k(at(given, keys::top_k)),
        top_p(at(given, keys::top_p)),
        min_p(at(given, keys::min_p)) {
    set(top_k, args.top_k, args.top_k_stride);
    set(top_p, args.top_p, args.top_p_stride);
    set(min_p, args.min_p, args.min_p_stride);
    args.gumbel = truth_at(given, keys::gumbel);
    write_to(args, given);
  }
};

// All of select_block.
struct SelectCall {
  Column<int64_t> seed, position;
  SelectArgs args{};

  explicit SelectCall(const py::dict& all) : seed(at(all, keys::seed)), position(at(all, keys::position)) {
    args.batch = whole(at(all, keys::batch)), args.branches = whole(at(all, keys::branches));
    args.heads = whole(at(all, keys::heads)), args.width = whole(at(all, keys::width));
    const View x(at(all, keys::given)), y(at(all, keys::probe)), lambda(at(all, keys::weights)),
        against(at(all, keys::reference));
    args.given = x.data, args.given_type = dtype_at(all, keys::given_type);
    args.given_stride_row = x.stride[0], args.given_stride_branch = x.stride[1];
    args.given_stride_last = x.stride[2];
    args.probe = y.data, args.probe_type = dtype_at(all, keys::probe_type);
    args.probe_stride_head = y.stride[0], args.probe_stride_last = y.stride[1];
    args.weights = lambda.as<float>(), args.weights_stride = lambda.stride[0];
    args.reference = against.as<float>();
    args.reference_stride_row = against.stride[0], args.reference_stride_head = against.stride[1];
    args.lsc = truth_at(all, keys::lsc), args.beta = PyFloat_AsDouble(at(all, keys::beta).ptr());
    set(seed, args.seed, args.seed_stride);
    set(position, args.position, args.position_stride);
    args.index = static_cast<int64_t*>(address(at(all, keys::index)));
    args.probability = static_cast<float*>(address(at(all, keys::probability)));
    args.utility = static_cast<float*>(address(at(all, keys::utility)));
  }
};

}  // namespace pyengine
