# prism_fast on NVIDIA GPUs. No engine has built it yet: hadolint and tests/test_install_page.py read it (docs/install.md).
#   docker build -t prism-fast .
#   docker build -t prism-fast --build-arg EXTRAS=train,cluster,vllm --build-arg TRANSFORMERS=5.19.0 .
#   docker run --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD:/work" prism-fast doctor
# With nvcc, as Triton and DeepSpeed compile at run time: the CUDA that torch 2.13.0 is built with.
FROM nvidia/cuda:13.0.3-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HOME=/home/prism \
    PATH=/opt/prism/bin:$PATH

# Versions are those of the base image's Ubuntu.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/prism \
    && useradd --create-home --uid 10001 prism \
    && install --directory --mode 1777 /work \
    && chmod 1777 /home/prism

# What changes least comes first: torch, then what the package needs, by pyproject.toml alone, then the package.
WORKDIR /src
COPY constraints.txt ./
RUN pip install --constraint constraints.txt torch pybind11==3.1.0 setuptools==80.10.2

ARG EXTRAS=train,cluster
ARG TRANSFORMERS=5.24.0
COPY pyproject.toml ./
RUN python -c 'import sys, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
    extras = [project["optional-dependencies"][name] for name in sys.argv[1].split(",")]; \
    print(*project["dependencies"], *sum(extras, []), sep="\n")' "$EXTRAS" > requirements.txt \
    && pip install --constraint constraints.txt "transformers==$TRANSFORMERS" --requirement requirements.txt

COPY setup.py MANIFEST.in README.md LICENSE ./
COPY csrc csrc
COPY kernels kernels
COPY prism_fast prism_fast
RUN PRISM_BUILD_CUDA=1 pip install --no-deps --no-build-isolation . \
    && rm -rf /src/build

USER 10001
WORKDIR /work
ENTRYPOINT ["prism-fast"]
CMD ["doctor"]
