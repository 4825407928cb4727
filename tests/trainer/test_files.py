"""Places to write to: tried before the work, never overwritten; what is written aside leaves nothing where it fails."""

import errno
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from prism_fast.files import system_reason, try_folder, try_new, write_aside, writing
from prism_fast.records import DataError


@pytest.fixture
def here(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    return tmp_path


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", ["file", "folder", "dangling", "."])
def test_what_is_there_is_not_a_place_for_a_result(name, here):
    before = everything(here)
    with pytest.raises(DataError, match="exists already; choose another out, or remove it"):
        try_new(here / name)
    assert everything(here) == before and (here / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["file/x.json", "file/a/b/x.json", "x" * 300, "x" * 300 + "/x.json", "a\0b", "é" * 130]
)
def test_a_place_that_cannot_be_is_one_line(name, here):
    before = everything(here)
    for tried in (try_new, lambda path: try_folder(path / "run", "run.out")):
        with pytest.raises(DataError, match=r"cannot be written \(.+\); choose another (out|run\.out)") as refused:
            tried(here / name)
        assert "\n" not in str(refused.value)
    assert everything(here) == before


@pytest.mark.parametrize("name", ["x.json", "new/deeper/x.json", "folder/x"])
def test_a_new_place_is_left_as_it_was(name, here):
    before = everything(here)
    try_new(here / name)
    assert everything(here) == before


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_refuses_says_why(code, here, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("prism_fast.files.tempfile.NamedTemporaryFile", refuse)
    for tried in (try_new, lambda path: try_folder(path, "run.out")):
        with pytest.raises(DataError, match=os.strerror(code)):
            tried(here / "new")


@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_may_be_read_by_whom_their_folder_lets_in(umask, rights, tmp_path):
    before = os.umask(umask)
    try:
        write_aside(tmp_path / "made", lambda folder: save_file({"x": torch.ones(2)}, folder / "x.safetensors"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "made" / "x.safetensors").stat().st_mode) == rights


def test_a_failed_write_leaves_the_old_and_no_rest(tmp_path):
    target = tmp_path / "final"
    write_aside(target, lambda path: (path / "weights").write_text("old"))

    def fail(path):
        (path / "weights").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_aside(target, fail)
    assert everything(tmp_path) == ["final", "final/weights"] and (target / "weights").read_text() == "old"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), Exception("No space left (os error 28)")])
def test_what_the_system_refuses_names_the_place(error):
    with (
        pytest.raises(DataError, match=r"^moe: could not be written \(No space left\); free space there"),
        writing("moe"),
    ):
        raise error
    for other in (ValueError("a bug"), DataError("a.json: missing")):
        with pytest.raises(type(other), match=str(other)), writing("moe"):
            raise other


@pytest.mark.parametrize(
    "error,reason",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (Exception("File too large (os error 27)"), "File too large"),  # tokenizers
        (RuntimeError("while serializing: I/O error: No space left (os error 28)"), "No space left"),
        (OSError("[Errno 28] Error writing bytes to file"), "[Errno 28] Error writing bytes to file"),  # pyarrow
        (ValueError("no"), None),
        (DataError("a.json: missing"), None),
    ],
)  # fmt: skip
def test_the_reasons_of_all_libraries_are_told(error, reason):
    assert system_reason(error) == reason
