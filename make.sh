#!/usr/bin/env bash
# Set-up in one command; the demo and the tests set up first.
#
#   ./make.sh             make the environment and compile lib/ops
#   ./make.sh demo        train, test and look at a small Mask R-CNN (minutes, no GPU needed)
#   ./make.sh test [ARG]  lint and tests; ARGs go to pytest
#
# An active virtual environment or conda environment is used as it is; otherwise .venv/ is made.
# PYTHON=python3.12 picks the interpreter for .venv/. FORCE_CUDA=1, TORCH_CUDA_ARCH_LIST and others
# are explained in setup.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly MIN_PYTHON=3.10

say() { printf '== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

usage() { sed -n '2,10s/^# \{0,1\}//p' make.sh; }

runs() { "$1" -c '' 2>/dev/null; }

is_new_enough() {
    "$1" -c "import sys; sys.exit(sys.version_info < (${MIN_PYTHON/./, }))" 2>/dev/null
}

find_python() {
    local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
    if [[ -n $active ]]; then
        PY="$active/bin/python"
        runs "$PY" || die "the active environment $active has no working bin/python"
        is_new_enough "$PY" ||
            die "the active environment $active has $("$PY" -V); Python $MIN_PYTHON or newer is needed"
    else
        PY="$PWD/.venv/bin/python"
        # A .venv that was interrupted, moved or lost its interpreter is made again.
        if ! "$PY" -m pip --version >/dev/null 2>&1; then make_venv; fi
    fi
    "$PY" -m pip --version >/dev/null 2>&1 ||
        die "$PY has no pip; run: $PY -m ensurepip"
}

make_venv() {
    local candidate base="" found
    for candidate in ${PYTHON:-python3 python python3.13 python3.12 python3.11 python3.10}; do
        if is_new_enough "$candidate"; then
            base="$candidate"
            break
        fi
    done
    if [[ -z $base ]]; then
        found="$("${PYTHON:-python3}" -V 2>/dev/null || echo none)"
        die "Python $MIN_PYTHON or newer is needed (found: $found); install it, or set PYTHON=/path/to/python"
    fi
    "$base" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$("$base" -V) lacks its venv module; install it (Debian, Ubuntu: apt install python3-venv)"
    say "making .venv with $("$base" -V)"
    rm -rf .venv
    "$base" -m venv .venv
}

check_compiler() {
    local cxx="${CXX:-}"
    for cxx in ${cxx:-c++ g++ clang++}; do
        if command -v "${cxx%% *}" >/dev/null; then return; fi
    done
    die "no C++ compiler (looked for ${CXX:-c++, g++, clang++}); install one (Debian, Ubuntu: apt install g++) or set CXX"
}

# is_done STAMP KEY: was the step last done for this KEY? mark_done STAMP KEY: now it was.
is_done() { [[ -f $1 && $(<"$1") == "$2" ]]; }
mark_done() { printf '%s\n' "$2" >"$1"; }

install_requirements() {
    local key stamp constraints
    key="$("$PY" -V) $(cat requirements.txt constraints.txt | sha256sum)"
    # Kept in the environment itself, so that a new one at the same place is filled again.
    stamp="$("$PY" -c 'import sys; print(sys.prefix)')/detectron-requirements.stamp"
    if is_done "$stamp" "$key"; then return; fi
    say "installing requirements.txt (torch is large: minutes on a slow line)"
    mkdir -p build
    constraints=build/constraints.txt
    # An installed torch that is new enough stays: it is then the one constraint on torchvision.
    "$PY" - >"$constraints" <<'PYTHON'
import importlib.metadata as metadata
import re
from pathlib import Path

def numbers(version):
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3])

bound = re.search(r"^torch>=(\S+)", Path("requirements.txt").read_text(), re.M).group(1)
try:
    installed = metadata.version("torch")
except metadata.PackageNotFoundError:
    installed = "0"
keep = numbers(installed) >= numbers(bound)
for line in Path("constraints.txt").read_text().splitlines():
    if not (keep and re.match(r"torch(vision)?==", line)):
        print(line)
if keep:
    print(f"torch=={installed}")
PYTHON
    "$PY" -m pip install --disable-pip-version-check -r requirements.txt -c "$constraints" ||
        die "pip could not install requirements.txt (its own words are above)"
    mark_done "$stamp" "$key"
}

compile() {
    # setup.py itself compiles only what changed.
    "$PY" setup.py --quiet build_ext --inplace ||
        die "setup.py could not build lib/ops (its own words are above)"
}

set_up() {
    check_compiler
    find_python
    install_requirements
    compile
}

run_tests() {
    say "ruff"
    "$PY" -m ruff check .
    "$PY" -m ruff format --check .
    say "pytest"
    # A process a core, each of one thread: most tests are too small to share out.
    local cores
    cores=$(nproc)
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$PY" -m pytest -n $((cores < 8 ? cores : 8)) \
        --dist loadfile "$@"
}

run_demo() {
    local config=configs/demo/e2e_mask_rcnn_R-50-FPN_gn_demo.yaml
    local data=data/demo out=Outputs/demo start=$SECONDS
    local dataset=$data/demo.yaml checkpoint pictures
    # GNU's OpenMP lets a thread that waits spin for many milliseconds. Where other programs run, that takes
    # away the cores which the work needs: a step took three to five times as long.
    export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"
    say "demo 1/4: drawing a data set of shapes"
    "$PY" tools/make_demo_data.py --output_dir "$data"
    say "demo 2/4: training a small Mask R-CNN on it"
    rm -rf "$out"
    "$PY" tools/train_net_step.py --dataset "$dataset" --cfg "$config" --output_dir "$out" --device cpu
    checkpoint="$(ls -t "$out"/ckpt/model_step*.pth | head -n 1)"
    say "demo 3/4: evaluating it on images it has not seen"
    "$PY" tools/test_net.py --dataset "$dataset" --cfg "$config" --load_ckpt "$checkpoint" \
        --output_dir "$out/test" --device cpu
    say "demo 4/4: drawing its detections"
    pictures=("$data"/images/val/*.jpg)
    "$PY" tools/infer_simple.py --dataset "$dataset" --cfg "$config" --load_ckpt "$checkpoint" \
        --images "${pictures[@]:0:16}" --output_dir "$out/pictures" --format png --device cpu
    say "done in $((SECONDS - start)) s"
    cat <<END
pictures     $out/pictures/*.png
precision    above, under 3/4; the detections it counts are in $out/test/
log          $out/log.txt
checkpoint   $checkpoint
config       $config
data         $data/ (annotations in COCO's format; $dataset names them)

Your own data: write a file like $dataset and run the same three scripts.
END
}

case "${1:-}" in
    "")
        set_up
        say "ready: $PY"
        ;;
    demo)
        set_up
        run_demo
        ;;
    test)
        shift
        set_up
        run_tests "$@"
        ;;
    -h | --help | help) usage ;;
    *)
        usage >&2
        die "unknown command: $1"
        ;;
esac
