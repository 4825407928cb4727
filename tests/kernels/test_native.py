"""The C++ extension: it is built, needs no torch, and its absence is said, with the remedy."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from prism_kernels import native

ROOT = Path(__file__).parents[2]


def python(code):
    """Runs code in a new process with this one's import path; -> its output."""
    setup = f"import sys; sys.path[:] = {sys.path!r}\n"
    done = subprocess.run([sys.executable, "-c", setup + textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_built():
    assert native.need_native() is None, native.need_native()
    assert native.library().INTERFACE == native.INTERFACE


def test_it_loads_without_torch():
    found = python(f"""
        import importlib.machinery, importlib.util
        sys.modules["torch"] = None
        loader = importlib.machinery.ExtensionFileLoader("_C", {native.library().__file__!r})
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
        loader.exec_module(module)
        print(module.balance(memoryview(bytes(8)).cast("d"), 2, False), sys.modules["torch"])
    """)
    assert found == "[[0], []] None\n"


def test_where_it_is_absent_the_reason_and_the_remedy_are_said():
    python("""
        sys.modules["prism_kernels._C"] = None
        from prism_kernels import balance, find_tag_spans, pack_trees, which_impl
        for op in ("balance", "find_tag_spans", "pack_trees"):
            chosen, reason = which_impl("cpu")[op]
            assert chosen == "reference" and "is not built" in reason and "pip install -e ." in reason, (chosen, reason)
        assert pack_trees([(1, [2, 3])], 10) == [[(0, [0, 1])]]
        assert balance([1.0, 2.0], 2) == [[1], [0]]
        assert find_tag_spans([0], [b"<a></a>"], ("a",)) == [(0, 1)]
        try:
            pack_trees([(1, [2, 3])], 10, impl="native")
        except RuntimeError as error:
            assert "python setup.py build_ext --inplace" in str(error) and "use impl='reference'" in str(error), error
        else:
            raise AssertionError("an explicit choice that cannot run must raise")
    """)


def test_an_extension_from_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    native._load.cache_clear()
    try:
        assert "from other sources" in native.need_native()
        with pytest.raises(RuntimeError, match="from other sources"):
            native.library()
    finally:
        native._load.cache_clear()


def test_every_source_is_in_the_source_distribution():
    pattern, *suffixes = (ROOT / "MANIFEST.in").read_text().split()[1:]
    assert pattern == "csrc"
    assert {f"*{path.suffix}" for path in (ROOT / "csrc").iterdir() if path.is_file()} <= set(suffixes)
