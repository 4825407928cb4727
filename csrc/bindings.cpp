// prism_kernels._C: arguments arrive checked (kernels/prism_kernels/*/api.py); here they become pointers, and results
// become Python objects. Work that can be long runs without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "adamw.h"
#include "balance.h"
#include "decode.h"
#include "elementwise.h"
#include "packing.h"
#include "sampling.h"
#include "spans.h"

namespace py = pybind11;

namespace {

constexpr size_t kLongText = 1 << 16;  // bytes from which releasing the GIL is worth its price

template <typename T>
struct View {
  explicit View(const py::buffer& buffer) : info(buffer.request()) {
    if (info.ndim != 1 || info.itemsize != sizeof(T)) throw py::value_error("expected a one-dimensional buffer");
  }
  const T* data() const { return static_cast<const T*>(info.ptr); }
  int64_t size() const { return info.size; }
  py::buffer_info info;
};

// Millions of new lists without a cycle among them would set off collection after collection.
struct PausedCollector {
  PausedCollector() : was_on(PyGC_Disable()) {}
  ~PausedCollector() {
    if (was_on) PyGC_Enable();
  }
  const int was_on;
};

py::list indices(const int64_t* begin, const int64_t* end) {
  py::list out(end - begin);
  for (const int64_t* i = begin; i != end; ++i) PyList_SET_ITEM(out.ptr(), i - begin, py::int_(*i).release().ptr());
  return out;
}

// [[(tree, [branch, ...]), ...], ...]
py::list nested(const prism::Packs& packs) {
  const PausedCollector paused;
  const int64_t* branch = packs.branch.data();
  py::list out(packs.pack_start.size() - 1);
  for (size_t i = 0; i + 1 < packs.pack_start.size(); ++i) {
    const int64_t first = packs.pack_start[i], last = packs.pack_start[i + 1];
    py::list pack(last - first);
    for (int64_t j = first; j < last; ++j) {
      py::tuple part(2);
      PyTuple_SET_ITEM(part.ptr(), 0, py::int_(packs.tree[j]).release().ptr());
      py::list held = indices(branch + packs.branch_start[j], branch + packs.branch_start[j + 1]);
      PyTuple_SET_ITEM(part.ptr(), 1, held.release().ptr());
      PyList_SET_ITEM(pack.ptr(), j - first, part.release().ptr());
    }
    PyList_SET_ITEM(out.ptr(), i, pack.release().ptr());
  }
  return out;
}

py::object pack_trees(const py::buffer& root, const py::buffer& branch, const py::buffer& start,
                      const std::optional<py::buffer>& kept, double token, double attention, double predicted,
                      const py::buffer& vision, int64_t capacity, int64_t multiple, bool split_for_multiple, bool cost_given) {
  const View<int64_t> roots(root), branches(branch), starts(start);
  const View<double> visions(vision);
  std::optional<View<uint8_t>> keeps;
  if (kept) keeps.emplace(*kept);
  prism::Packs packs;
  {
    py::gil_scoped_release release;
    packs = prism::pack_trees(
        {roots.size(), roots.data(), branches.data(), starts.data(), keeps ? keeps->data() : nullptr},
        {token, attention, predicted, visions.data()}, {capacity, multiple, split_for_multiple, cost_given});
  }
  if (packs.misfit >= 0) return py::int_(packs.misfit);
  return nested(packs);
}

std::vector<std::vector<int64_t>> balance(const py::buffer& costs, int64_t num_ranks, bool equal_count) {
  const View<double> values(costs);
  py::gil_scoped_release release;
  return prism::balance(values.data(), values.size(), num_ranks, equal_count);
}

// token_bytes is read in place, entry by entry: converting a vocabulary would cost more than the search.
std::optional<std::vector<std::pair<int64_t, int64_t>>> find_tag_spans(const py::object& token_ids,
                                                                       const py::object& token_bytes,
                                                                       const std::vector<std::string>& markers) {
  for (const py::object& argument : {token_ids, token_bytes}) {
    if (!PyList_Check(argument.ptr()) && !PyTuple_Check(argument.ptr())) throw py::type_error("expected a list");
  }
  std::string text;
  std::vector<size_t> token_end;
  token_end.reserve(PySequence_Fast_GET_SIZE(token_ids.ptr()));
  // sizes are read anew in every turn: __index__ of a foreign integer type may run any code
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(token_ids.ptr()); ++i) {
    const Py_ssize_t id = PyNumber_AsSsize_t(PySequence_Fast_GET_ITEM(token_ids.ptr(), i), PyExc_IndexError);
    if (id == -1 && PyErr_Occurred()) throw py::error_already_set();
    if (id < 0 || id >= PySequence_Fast_GET_SIZE(token_bytes.ptr())) throw py::index_error("token id out of range");
    PyObject* piece = PySequence_Fast_GET_ITEM(token_bytes.ptr(), id);
    if (!PyBytes_Check(piece)) throw py::type_error("token_bytes: expected bytes");
    text.append(PyBytes_AS_STRING(piece), PyBytes_GET_SIZE(piece));
    token_end.push_back(text.size());
  }
  std::optional<py::gil_scoped_release> release;
  if (text.size() >= kLongText) release.emplace();
  return prism::find_tag_spans(text, token_end, {markers.begin(), markers.end()});
}

// Addresses of tensors arrive as integers: their owners are held by the caller.
template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
void sample_as(uintptr_t logits, int64_t rows, int64_t stride, int64_t words, double inverse, bool noisy,
               uint64_t seed, uintptr_t response, uintptr_t step, uintptr_t forbidden, int64_t num_forbidden,
               int64_t first_allowed, uintptr_t token, uintptr_t logprob, int64_t threads) {
  prism::sample_tokens(prism::Draw<T>{at<const T>(logits), rows, stride, words, static_cast<T>(inverse), noisy, seed,
                                      at<const int64_t>(response), at<const int64_t>(step),
                                      at<const int64_t>(forbidden), num_forbidden, first_allowed,
                                      at<int64_t>(token), at<float>(logprob)},
                       threads);
}

template <typename... Arguments>
void sample_tokens(bool wide, Arguments... arguments) {
  py::gil_scoped_release release;
  wide ? sample_as<double>(arguments...) : sample_as<float>(arguments...);
}

template <typename T>
void norm_of(const std::array<uintptr_t, 5>& tensors, int64_t rows, int64_t width, double eps) {
  prism::rms_norm(at<const T>(tensors[0]), at<const T>(tensors[1]), at<const T>(tensors[2]), rows, width,
                  static_cast<T>(eps), at<T>(tensors[3]), at<T>(tensors[4]));
}

void rms_norm(bool wide, const std::array<uintptr_t, 5>& tensors, int64_t rows, int64_t width, double eps) {
  py::gil_scoped_release release;
  wide ? norm_of<double>(tensors, rows, width, eps) : norm_of<float>(tensors, rows, width, eps);
}

template <typename T>
void rotate_of(const std::array<uintptr_t, 5>& tensors, const std::array<int64_t, 4>& sizes, double eps) {
  prism::norm_rotate(at<const T>(tensors[0]), sizes[0], at<const T>(tensors[1]), at<const T>(tensors[2]),
                     at<const T>(tensors[3]), sizes[1], sizes[2], sizes[3], static_cast<T>(eps), at<T>(tensors[4]));
}

void norm_rotate(bool wide, const std::array<uintptr_t, 5>& tensors, const std::array<int64_t, 4>& sizes, double eps) {
  py::gil_scoped_release release;
  wide ? rotate_of<double>(tensors, sizes, eps) : rotate_of<float>(tensors, sizes, eps);
}

void swiglu(bool wide, const std::array<uintptr_t, 3>& tensors, const std::array<int64_t, 3>& sizes) {
  py::gil_scoped_release release;
  const auto [stride, rows, width] = sizes;
  if (wide) {
    prism::swiglu(at<const double>(tensors[0]), at<const double>(tensors[1]), stride, rows, width, at<double>(tensors[2]));
  } else {
    prism::swiglu(at<const float>(tensors[0]), at<const float>(tensors[1]), stride, rows, width, at<float>(tensors[2]));
  }
}

// sizes: rows, heads, kv_heads, dim, pages, row strides of q, k and v. tensors: q, k, v, k_pages, v_pages, prompt_page,
// prompt_length, own_page, own_length, group, tile_row, out; q_weight, k_weight, cos, sin, or 0 each. tables: prompts,
// prompt_pages, own_pages, tiles, width. factors: scale, eps.
bool shared_prompt_decode(const std::array<int64_t, 8>& sizes, const std::array<uintptr_t, 16>& tensors,
                          const std::array<int64_t, 5>& tables, const std::array<double, 2>& factors, int number,
                          int64_t threads) {
  py::gil_scoped_release release;
  const auto table = [&](int i) { return at<const int32_t>(tensors[i]); };
  const auto any = [&](int i) { return at<void>(tensors[i]); };
  return prism::shared_prompt_decode(
      {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], any(0), any(1), any(2), sizes[5], sizes[6], sizes[7], any(3),
       any(4), table(5), table(6), table(7), table(8), table(9), table(10), tables[0], tables[1], tables[2], tables[3],
       tables[4], factors[0], any(11), any(12), any(13), any(14), any(15), factors[1]},
      static_cast<prism::Number>(number), threads);
}

prism::adamw::Kind kind_of(int bits) { return {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0}; }

prism::adamw::Constants constants_of(const std::array<double, 4>& c) {
  return {static_cast<float>(c[0]), static_cast<float>(c[1]), static_cast<float>(c[2]), static_cast<float>(c[3])};
}

void adamw_step(const py::buffer& rows, int kind, const std::array<double, 4>& constants, double clip, int threads,
                int bits) {
  const View<uint8_t> table(rows);
  const int64_t num_rows = table.size() / static_cast<int64_t>(sizeof(prism::adamw::Row));
  const std::vector<prism::adamw::Row> copied = [&] {  // bytes may lie anywhere
    std::vector<prism::adamw::Row> found(num_rows);
    std::memcpy(found.data(), table.data(), num_rows * sizeof(prism::adamw::Row));
    return found;
  }();
  py::gil_scoped_release release;
  prism::adamw::on_cpu(copied.data(), num_rows, kind_of(kind), constants_of(constants), static_cast<float>(clip),
                       {threads, bits});
}

#ifdef PRISM_WITH_CUDA
// Addresses on the device as integers; rows are those of adamw_step, copied there.
void adamw_step_cuda(uintptr_t rows, int64_t num_rows, int64_t num_chunks, int kind,
                     const std::array<double, 4>& constants, uintptr_t clip, uintptr_t stream) {
  const char* said = prism::adamw::on_gpu(reinterpret_cast<const prism::adamw::Row*>(rows), num_rows, num_chunks,
                                          kind_of(kind), constants_of(constants), reinterpret_cast<const float*>(clip),
                                          reinterpret_cast<void*>(stream));
  if (*said != '\0') throw std::runtime_error(std::string("adamw_step: ") + said);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("INTERFACE") = 5;  // kernels/prism_kernels/native.py expects this number
  m.def("pack_trees", &pack_trees, "Packs as nested lists, or the index of a tree that does not fit.");
  m.def("balance", &balance, "Item indices per rank.");
  m.def("sample_tokens",
        &sample_tokens<uintptr_t, int64_t, int64_t, int64_t, double, bool, uint64_t, uintptr_t, uintptr_t, uintptr_t,
                       int64_t, int64_t, uintptr_t, uintptr_t, int64_t>,
        "Tokens and log-probs, written to their addresses.");
  m.def("shared_prompt_decode", &shared_prompt_decode, "False where a table leads out of the pages.");
  m.def("rms_norm", &rms_norm, "wide; x, residual or 0, weight, y, total or 0; rows, width, eps.");
  m.def("norm_rotate", &norm_rotate, "wide; x, weight, cos, sin, y; row stride of x, rows, heads, dim; eps.");
  m.def("swiglu", &swiglu, "wide; gate, up, y; row stride of gate and up, rows, width.");
  m.def("find_tag_spans", &find_tag_spans, "Token spans per element, or None where the format is invalid.");
  m.def("adamw_step", &adamw_step, "Updates, on the host, the tensors that a table names.", py::arg("rows"),
        py::arg("kind"), py::arg("constants"), py::arg("clip"), py::arg("threads"), py::arg("bits") = 512);
  m.attr("ADAMW_CHUNK") = prism::adamw::kChunk;
#ifdef PRISM_WITH_CUDA
  m.attr("CUDA") = true;
  m.def("adamw_step_cuda", &adamw_step_cuda, "The same on a GPU, in one launch.");
#else
  m.attr("CUDA") = false;
#endif
}
