// prism_kernels._C: arguments arrive checked (kernels/prism_kernels/*/api.py); here they become pointers, and results
// become Python objects. Work that can be long runs without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "balance.h"
#include "packing.h"
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
                      const std::optional<py::buffer>& kept, double token, double attention, const py::buffer& vision,
                      int64_t capacity, int64_t multiple, bool split_for_multiple, bool cost_given) {
  const View<int64_t> roots(root), branches(branch), starts(start);
  const View<double> visions(vision);
  std::optional<View<uint8_t>> keeps;
  if (kept) keeps.emplace(*kept);
  prism::Packs packs;
  {
    py::gil_scoped_release release;
    packs = prism::pack_trees(
        {roots.size(), roots.data(), branches.data(), starts.data(), keeps ? keeps->data() : nullptr},
        {token, attention, visions.data()}, {capacity, multiple, split_for_multiple, cost_given});
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("INTERFACE") = 1;  // kernels/prism_kernels/native.py expects this number
  m.def("pack_trees", &pack_trees, "Packs as nested lists, or the index of a tree that does not fit.");
  m.def("balance", &balance, "Item indices per rank.");
  m.def("find_tag_spans", &find_tag_spans, "Token spans per element, or None where the format is invalid.");
}
