#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under ten minutes: build, tests, sanitizer, ceilings,
# every kernel beside its peers, whole trainings, and what Nsight Compute says of the main kernels.
#
#   benchmarks/gpu.sh OUT [PART ...]   on a machine with an NVIDIA GPU, torch with CUDA, nvcc, ninja,
#                                      pybind11, cupy, pytest, hypothesis and what fastclust needs
#                                      (pooch and platformdirs, for downloads, may be missing);
#                                      no network is used
#   benchmarks/gpu.sh --dry-run OUT    the same parts on CPU tensors of tiny shapes, nothing built
#
# FASTCLUST_DATA may name the folder of benchmark graphs; without it graphs of the same shapes are
# made up. At most eight small files appear in OUT: one JSON per subject and log.txt. A part that fails
# or outlasts its time leaves what it had, and the next part runs. GPU_SH_SECONDS (570) is the whole
# allowance; parts that find no time left can be named in another call. FASTCLUST_COMMIT names the
# commit where there is no git. Afterwards: python benchmarks/gpu_table.py OUT [OUT ...] puts the main
# figures into README.md and all of them into benchmarks/results/gpu.md.
set -uo pipefail

dry=
if [ "${1:-}" = --dry-run ]; then dry=--tiny; shift; fi
if [ $# -lt 1 ]; then echo "usage: $0 [--dry-run] OUT [PART ...]" >&2; exit 2; fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
if [ -d "${FASTCLUST_DATA:-}" ]; then FASTCLUST_DATA=$(cd "$FASTCLUST_DATA" && pwd); export FASTCLUST_DATA; fi
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
log=$out/log.txt
: >"$log"

if [ -z "$dry" ]; then
  # One architecture, that of this card: a third of the compile time.
  arch=$("$python" -c 'import torch
c = torch.cuda.get_device_capability()
print("9.0a" if c == (9, 0) else f"{c[0]}.{c[1]}")') || { echo "torch sees no GPU" | tee -a "$log"; exit 1; }
  stamp=$(mktemp)
  if ! TORCH_CUDA_ARCH_LIST=$arch FASTCLUST_CUDA=1 timeout "${GPU_SH_BUILD_SECONDS:-240}" "$python" -m pip install \
    --no-build-isolation --no-deps --no-index --disable-pip-version-check . >>"$log" 2>&1; then
    tail -n 30 "$log"
    if [ ! fastclust/libfastclust_cuda.so -nt "$stamp" ]; then
      echo "build: FAILED after ${SECONDS} s"
      exit 1
    fi
    # Built, also beside the sources, and not installed: site-packages that may not be written to.
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
    echo "install: FAILED, the build in this folder is used" | tee -a "$log"
  fi
  rm -f "$stamp"
  echo "build: ok, ${SECONDS} s, for ${arch}" | tee -a "$log"
fi
"$python" -m fastclust.info 2>&1 | tee -a "$log"
exec "$python" benchmarks/gpu $dry --out "$out" \
  --seconds $((${GPU_SH_SECONDS:-570} - SECONDS)) "$@"
