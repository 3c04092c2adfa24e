"""setup.py and the loading of what it builds: what a user reads when something is missing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def build(folder, **environment):
    """Run a copy of the build where PATH has nothing but what the test puts there."""
    shutil.copy(ROOT / "setup.py", folder)
    (folder / "bin").mkdir(exist_ok=True)
    clean = {
        k: v for k, v in os.environ.items() if k not in ("CXX", "CC", "CUDA_HOME", "CUDA_PATH")
    }
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env=clean | {"PATH": str(folder / "bin")} | environment,
        capture_output=True,
        text=True,
    )


def test_without_a_compiler_one_line_says_what_to_install(tmp_path):
    result = build(tmp_path)
    assert result.returncode != 0
    assert result.stderr.count("\n") == 1
    assert "no C++ compiler found; install one (" in result.stderr


def test_forced_cuda_that_cannot_be_built_is_one_error(tmp_path):
    result = build(tmp_path, PATH=os.environ["PATH"], FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="hopper")
    assert result.returncode != 0
    # the second where there is no nvcc, or a torch without CUDA
    assert re.search("'hopper' is not like 9.0|FORCE_CUDA=1, but", result.stderr)
    assert "Traceback" not in result.stderr


def test_the_cpp_library_is_torchs_even_with_a_compiler_that_brings_its_own(tmp_path):
    source = tmp_path / "lib" / "ops" / "csrc" / "library.cpp"
    source.parent.mkdir(parents=True)
    source.write_text("#include <iostream>\nvoid print(long number) { std::cout << number; }\n")
    compiler = f"{os.environ.get('CXX', 'g++')} -static-libstdc++"
    result = build(tmp_path, PATH=os.environ["PATH"], CXX=compiler)
    assert "Built lib/ops/_C.so" in result.stdout, result.stderr
    assert b"libstdc++.so" in (tmp_path / "lib" / "ops" / "_C.so").read_bytes()


def test_a_changed_header_rebuilds_what_includes_it(tmp_path):
    csrc = tmp_path / "lib" / "ops" / "csrc"
    csrc.mkdir(parents=True)
    (csrc / "number.h").write_text("constexpr int number = 1;\n")
    (csrc / "between.h").write_text('#include "number.h"\n')
    (csrc / "library.cpp").write_text('#include "between.h"\nint one() { return number; }\n')
    (csrc / "other_cpu.cpp").write_text("int two() { return 2; }\n")
    objects = [tmp_path / "build" / "ops" / f"{name}.cpp.o" for name in ("library", "other_cpu")]
    build(tmp_path, PATH=os.environ["PATH"])
    before = [file.read_bytes() for file in objects]
    for file in objects:
        file.write_bytes(b"kept")
    (csrc / "number.h").write_text("constexpr int number = 3;\n")
    build(tmp_path, PATH=os.environ["PATH"])
    assert objects[0].read_bytes() not in (b"kept", before[0])
    assert objects[1].read_bytes() == b"kept"


def test_a_missing_library_names_the_command_that_builds_it(tmp_path):
    shutil.copytree(ROOT / "lib" / "ops", tmp_path / "ops", ignore=shutil.ignore_patterns("*.so"))
    result = subprocess.run(
        [sys.executable, "-c", "import ops"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the compiled operators")
    assert "run ./make.sh" in last
