"""Build of prism_kernels._C: plain C++ (no torch at build time), CUDA part only with PRISM_BUILD_CUDA=1."""

import os
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

CSRC = Path("csrc")
CUDA_ARCHITECTURES = ("80", "90", "100")


class BuildExtension(build_ext):
    """Compiles *.cu with nvcc (one fat object per file) and links the CUDA runtime statically."""

    def build_extension(self, ext):
        if os.environ.get("PRISM_BUILD_CUDA") == "1":
            sources = sorted(CSRC.glob("*.cu"))
            if sources:
                self.add_cuda(ext, sources)
            else:
                print("PRISM_BUILD_CUDA=1: csrc/ holds no .cu file, so there is nothing to build for CUDA")
        super().build_extension(ext)

    def add_cuda(self, ext, sources):
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            raise RuntimeError("PRISM_BUILD_CUDA=1 but nvcc is not on PATH: install the CUDA toolkit, or unset it")
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
        for source in sources:
            target = objects / (source.stem + ".cu.o")
            command = [nvcc, "-O3", "-std=c++17", "-Xcompiler", "-fPIC", *codes, "-c", str(source), "-o", str(target)]
            subprocess.check_call(command)
            ext.extra_objects.append(str(target))
        ext.define_macros.append(("PRISM_WITH_CUDA", "1"))
        ext.library_dirs.append(str(Path(nvcc).resolve().parent.parent / "lib64"))
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]


ParallelCompile("PRISM_BUILD_JOBS").install()  # all cores, or as many as this variable says

setup(
    packages=[
        *find_packages(".", include=["prism_fast", "prism_fast.*"]),
        "prism_fast.recipes",  # data only, no __init__.py
        *find_packages("kernels"),
    ],
    package_dir={"prism_fast": "prism_fast", "prism_kernels": "kernels/prism_kernels"},
    package_data={
        "prism_fast.recipes": ["*.yaml"],
        "prism_fast.report": ["*.j2", "*.css"],
        "prism_kernels": ["py.typed", "*/tables/*.json"],
    },
    ext_modules=[
        Pybind11Extension(
            "prism_kernels._C",
            sorted(str(p) for p in CSRC.glob("*.cpp")),
            depends=sorted(str(p) for p in CSRC.glob("*.h")),
            include_dirs=[str(CSRC)],
            cxx_std=17,
            # without fused multiply-add, so that sums of doubles equal those of the Python references to the last bit
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wno-psabi"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    zip_safe=False,
)
