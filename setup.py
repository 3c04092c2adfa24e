"""Build the compiled parts of `lib/` in place: `python setup.py build_ext --inplace`.

- `lib/ops/_C.so`: the operators (TORCH_LIBRARY, loaded with `torch.ops.load_library`; no Python
  API, so one build serves any Python). With nvcc and a visible GPU, or with FORCE_CUDA=1, it holds
  CPU and CUDA kernels, the latter for the visible GPUs' architectures plus PTX, or for
  TORCH_CUDA_ARCH_LIST.
- `lib/ops/cython_*.so`: for numpy callers; left out, with a line saying so, where Python's own
  headers are not installed.

Objects are kept in `build/` and reused while their sources, flags and torch stay the same.
Environment: CXX, CUDA_HOME, FORCE_CUDA, TORCH_CUDA_ARCH_LIST, MAX_JOBS.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPS = ROOT / "lib" / "ops"
BUILD = ROOT / "build" / "ops"
NEEDS = "the GPU build needs nvcc and a visible GPU (or FORCE_CUDA=1)"


def fail(message: str) -> None:
    raise SystemExit(f"error: {message}")


# ---- what is installed ----


def find_torch() -> tuple[Path, dict]:
    """Torch's folder and the variables of its version.py, without the seconds of importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        fail("torch is not installed in this environment; run ./make.sh or pip install torch")
    folder = Path(spec.origin).parent
    return folder, runpy.run_path(str(folder / "version.py"))


def cxx11_abi(version: str) -> int:
    """Only torch 2.6 still came in both ABIs."""
    if tuple(int(part) for part in version.split(".")[:2]) >= (2, 7):
        return 1
    import torch

    return int(torch._C._GLIBCXX_USE_CXX11_ABI)


def cxx_standard(torch_folder: Path) -> str:
    """The standard that this torch compiles extensions with."""
    text = (torch_folder / "utils" / "cpp_extension.py").read_text()
    flags = re.findall(r"cuda_flags(?:\.append\(| = cuda_flags \+ \[)'(-std=c\+\+\d+)'", text)
    return flags[0] if flags else "-std=c++17"


def find_compiler() -> str:
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["g++", "c++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    fail(
        f"no C++ compiler found{f' (CXX={chosen})' if chosen else ''}; install one"
        " (Debian, Ubuntu: apt-get install g++) or set CXX to the one to use"
    )


def find_nvcc() -> Path | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    if on_path := shutil.which("nvcc"):
        candidates.insert(sum(map(bool, homes[:2])), Path(on_path))
    return next((c for c in candidates if c.is_file()), None)


def toolkit_folder(nvcc: Path) -> Path:
    """CUDA's own folder; nvcc on the PATH may be a wrapper, so nvcc itself is asked."""
    result = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", result.stderr, re.MULTILINE)
    return Path(top.group(1).strip()).resolve() if top else nvcc.resolve().parent.parent


def visible_architectures() -> list[str]:
    """Compute capabilities of the GPUs that CUDA programs see here, asked of the driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = set()
    for ordinal in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # COMPUTE_CAPABILITY_MINOR
        found.add((major.value, minor.value))
    return [f"{major}.{minor}" for major, minor in sorted(found)]


def gencode_flags() -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST ("8.0 9.0+PTX"), else for the visible GPUs plus PTX."""
    listed = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    listed = [item for item in listed if item]
    if not listed:
        listed = visible_architectures()
        if not listed:
            fail(
                "FORCE_CUDA=1 without a visible GPU: set TORCH_CUDA_ARCH_LIST,"
                " for example to 9.0 for an H100"
            )
        listed[-1] += "+PTX"
    flags = []
    for item in listed:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        if match is None:
            fail(f"TORCH_CUDA_ARCH_LIST: {item!r} is not like 9.0 or 9.0+PTX")
        arch = match.group(1) + match.group(2)
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if match.group(3):
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


def nvidia_folders(torch_folder: Path, cuda_version: str, kind: str) -> list[Path]:
    """Folders named `kind` of the CUDA packages that came with torch: nvidia/cu13 or nvidia/*/."""
    nvidia = torch_folder.parent / "nvidia"
    unified = nvidia / f"cu{cuda_version.split('.')[0]}" / kind
    return [unified] if unified.is_dir() else sorted(nvidia.glob(f"*/{kind}"))


def find_cudart(torch_folder: Path, cuda_version: str, toolkit: Path) -> Path:
    """The CUDA runtime that torch itself uses; its packages have no libcudart.so for -lcudart."""
    folders = nvidia_folders(torch_folder, cuda_version, "lib")
    folders += [toolkit / "lib64", toolkit / "lib", toolkit / "targets" / "x86_64-linux" / "lib"]
    for folder in [*folders, torch_folder / "lib", Path(sys.prefix) / "lib"]:
        if libraries := sorted(folder.glob("libcudart*.so*")):
            return libraries[0]
    fail(f"libcudart of CUDA {cuda_version} found neither beside torch nor under {toolkit}")


def find_libstdcxx() -> list[str]:
    """The C++ library that torch is going to run with, for the linker.

    Some compilers would put a second one into ours, and what is printed by one to a stream of the
    other (the shapes in an error's sentence) is lost or crashes.
    """
    try:
        ctypes.CDLL("libstdc++.so.6")
    except OSError:
        return []
    loaded = Path("/proc/self/maps").read_text()
    return re.findall(r"(/.*/libstdc\+\+\.so\.6.*)$", loaded, re.MULTILINE)[:1]


# ---- what to build ----


@dataclass
class Toolchain:
    compile_cpp: list[str]
    cuda_flags: list[str]  # of the C++ files that know of CUDA: the others build alike without it
    compile_cuda: list[str] | None
    link: list[str]
    libraries: list[str]
    key: list[str] = field(default_factory=list)  # what else decides what comes out


def choose_cuda(version: dict) -> Path | None:
    """nvcc if CUDA is to be built; else a line says why (with FORCE_CUDA=1, an error) and None."""
    forced = os.environ.get("FORCE_CUDA", "0") not in ("", "0")
    nvcc = find_nvcc()
    if version.get("cuda") is None:
        reason = "this torch has no CUDA; install a CUDA build of torch"
    elif nvcc is None:
        reason = "nvcc not found; install the CUDA toolkit or set CUDA_HOME"
    elif not forced and not visible_architectures():
        reason = "no GPU visible"
    else:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", text)
        if release and release.group(1) == version["cuda"].split(".")[0]:
            return nvcc
        found = release.group(1) if release else "of an unknown version"
        reason = f"{nvcc} is CUDA {found}, torch's is CUDA {version['cuda']}"
    if forced:
        fail(f"FORCE_CUDA=1, but {reason}")
    print(f"Building the operators for the CPU only ({reason}); {NEEDS}.")
    return None


def make_toolchain() -> Toolchain:
    torch_folder, version = find_torch()
    cxx = shlex.split(find_compiler())
    include = torch_folder / "include"
    includes = [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    common = [
        cxx_standard(torch_folder),
        "-O3",
        f"-D_GLIBCXX_USE_CXX11_ABI={cxx11_abi(version['__version__'])}",
    ]
    # Contraction is off everywhere: the CPU and the GPU must agree on every comparison.
    host = ["-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    lib = torch_folder / "lib"
    chain = Toolchain(
        compile_cpp=[*cxx, *common, *host, *includes],
        cuda_flags=[],
        compile_cuda=None,
        link=[*cxx, "-shared", "-fopenmp", f"-L{lib}"],
        libraries=[*find_libstdcxx(), "-lc10", "-ltorch_cpu"],
        key=[version["__version__"], sys.platform],
    )
    if nvcc := choose_cuda(version):
        toolkit = toolkit_folder(nvcc)
        pip_headers = nvidia_folders(torch_folder, version["cuda"], "include")
        headers = [f"-I{folder}" for folder in (toolkit / "include", *pip_headers)]
        chain.cuda_flags = ["-DWITH_CUDA", *headers]
        chain.compile_cuda = [
            *(str(nvcc), "-ccbin", next(c for c in cxx if not c.endswith("ccache"))),
            *(*common, "-Xcompiler", "-fPIC", "-fmad=false", "--expt-relaxed-constexpr"),
            *gencode_flags(),
        ]
        cudart = find_cudart(torch_folder, version["cuda"], toolkit)
        chain.libraries += ["-lc10_cuda", "-ltorch_cuda", str(cudart)]
    return chain


# ---- building it ----


def digest(command: list[str], files: list[Path], key: list[str]) -> str:
    state = hashlib.sha256("\0".join([*command, *key]).encode())
    for file in files:
        state.update(file.read_bytes())
    return state.hexdigest()


def with_headers(source: Path) -> list[Path]:
    """A source with those of our headers that it includes, also through each other."""
    files = [source]
    for file in files:  # it grows
        names = re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE)
        files += [h for h in (file.parent / name for name in names) if h not in files]
    return files


def run_if_changed(command: list[str], inputs: list[Path], output: Path, key: list[str]) -> bool:
    """Run `command`, which writes `output`, unless it last ran with the same inputs: then False."""
    stamp = BUILD / (output.name + ".sha256")
    wanted = digest(command, inputs, key)
    if output.is_file() and stamp.is_file() and stamp.read_text() == wanted:
        return False
    stamp.unlink(missing_ok=True)
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.stderr.write(result.stdout + result.stderr)
        fail(f"compiling {inputs[0].name} failed; the command was: {shlex.join(command)}")
    stamp.write_text(wanted)
    return True


def number_of_jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def build_operators() -> None:
    chain = make_toolchain()
    sources = sorted((OPS / "csrc").glob("*_cpu.cpp")) + [OPS / "csrc" / "library.cpp"]
    sources += sorted((OPS / "csrc").glob("*_autograd.cpp"))
    if chain.compile_cuda:
        sources += sorted((OPS / "csrc").glob("*_launch.cpp"))
        sources += sorted((OPS / "csrc").glob("*_cuda.cu"))
    sources.sort(key=lambda path: path.suffix)  # .cpp before .cu is the longest-first order
    BUILD.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> tuple[Path, bool]:
        output = BUILD / (source.name + ".o")
        if source.suffix == ".cu":
            command = chain.compile_cuda
        elif source.name.endswith("_cpu.cpp"):
            command = chain.compile_cpp
        else:
            command = chain.compile_cpp + chain.cuda_flags
        command = [*command, "-c", str(source), "-o", str(output)]
        return output, run_if_changed(command, with_headers(source), output, chain.key)

    with ThreadPoolExecutor(number_of_jobs()) as pool:
        objects = list(pool.map(compile_one, sources))
    target = OPS / "_C.so"
    # Linked elsewhere and moved over the old one: a running program keeps the file it has mapped.
    fresh = BUILD / "_C.so"
    files = [path for path, _ in objects]
    command = [*chain.link, *map(str, files), "-o", str(fresh), *chain.libraries]
    if run_if_changed(command, files, fresh, chain.key) or not target.is_file():
        temporary = OPS / "_C.so.tmp"
        shutil.copy2(fresh, temporary)
        os.replace(temporary, target)
        kind = "CPU and CUDA" if chain.compile_cuda else "CPU"
        print(f"Built {target.relative_to(ROOT)} ({kind})")


def build_cython(source: Path) -> None:
    name = source.stem
    python_headers = Path(sysconfig.get_path("include"))
    if not (python_headers / "Python.h").is_file():
        print(f"Skipping {name} (numpy callers only): no Python.h in {python_headers}")
        return
    generated = BUILD / f"{name}.c"
    translate = [sys.executable, "-m", "cython", "-3", str(source), "-o", str(generated)]
    target = OPS / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if not shutil.which(compiler[0]):
        compiler = [*shlex.split(find_compiler()), "-x", "c"]
    flags = ["-O3", "-fPIC", "-shared", "-ffp-contract=off", f"-I{python_headers}"]
    run_if_changed(translate, [source], generated, [sys.version])
    command = [*compiler, *flags, str(generated), "-o", str(target)]
    if run_if_changed(command, [generated], target, [sys.version]):
        print(f"Built {target.relative_to(ROOT)}")


class BuildInPlace(build_ext):
    """`build_ext`, always in place: the project is run from its checkout, not installed."""

    def run(self) -> None:
        build_operators()
        for source in sorted(OPS.glob("cython_*.pyx")):
            build_cython(source)


if __name__ == "__main__":
    setup(
        name="detectron-ops",
        packages=[],
        # named so that `python setup.py build` knows there is something to compile
        ext_modules=[Extension("ops._C", [])],
        cmdclass={"build_ext": BuildInPlace},
    )
