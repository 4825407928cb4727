"""`pip wheel .` in an environment that holds torch alone: prism_kernels with its native extension works there."""

import os
import subprocess
import sys
import venv
import zipfile

from dev.environments import ROOT, TORCH

USE = """
import sys, time
import torch
before, start = set(sys.modules), time.process_time()
import prism_kernels
seconds = time.process_time() - start
loaded = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert loaded <= {"prism_kernels", "triton", "numpy"}, loaded
assert not {"pydantic", "transformers"} & set(sys.modules)

ran = prism_kernels.which_impl()
assert ran["pack_trees"][0] == "native", ran["pack_trees"]
assert prism_kernels.pack_trees([(3, [2, 1])], 8) == [[(0, [0, 1])]]
hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
targets = torch.randint(20, (6,))
loss = prism_kernels.linear_cross_entropy(hidden, weight, targets)
loss.backward()
assert torch.allclose(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, targets), atol=1e-5)
scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
group = torch.tensor([0, 0, 1, 1])  # a CPU's own implementation takes numpy, which is not there
assert prism_kernels.multi_reward_advantage(scores, scores, group, impl="reference").isfinite().all()
try:
    import prism_fast.config
except ModuleNotFoundError as error:
    assert error.name != "prism_fast"  # it is there, its needs are not
print(f"{seconds:.2f}")
"""


def test_the_wheel_works_beside_torch_alone(tmp_path, report):
    def run(*command, **options):
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, capture_output=True, text=True, env=environ, **options)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        return done.stdout

    source = tmp_path / "source"  # a build leaves its folders beside what it builds
    run("git", "clone", "--quiet", str(ROOT), str(source))
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("prism_fast-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("prism_kernels/_C.") for name in names)
    assert not any(name.split("/")[0] in ("tests", "benchmarks", "dev", "examples") for name in names)
    venv.create(tmp_path / "bare", with_pip=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", TORCH)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel))
    held = run(python, "-m", "pip", "list", "--format=freeze").lower().split()
    assert not any(line.startswith(("transformers", "pydantic", "safetensors")) for line in held)
    seconds = run(python, "-c", USE, cwd=tmp_path).strip()
    report.add("the wheel beside torch alone: import prism_kernels, CPU seconds after torch's", seconds, "runs")
