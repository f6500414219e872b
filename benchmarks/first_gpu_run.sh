#!/usr/bin/env bash
# The first run on a GPU, from a folder that `python -m benchmarks.gpu_pack` made:
#
#     bash first_gpu_run.sh correctness|speed OUT
#
# Every step has its own time limit and writes its log and its rows to OUT at once; the last line counts the failures.
# KEYREEL_REHEARSE=1 runs the same on a CPU: the kernels emulated, PyNvVideoCodec on its stub, fewer tests.
set -uo pipefail
run=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

step() { # name, seconds, command...
    local name=$1 limit=$2 began=$SECONDS code
    shift 2
    [ -z "${KEYREEL_REHEARSE:-}" ] || limit=$((limit * 8))
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    ((code == 0)) || failed=$((failed + 1))
    echo "{\"step\": \"$name\", \"exit\": $code, \"seconds\": $((SECONDS - began)), \"limit\": $limit}" | tee -a "$out/steps.jsonl"
    tail -n 3 "$out/$name.log" | cut -c1-200
}

tar -xJf "$here/keyreel.tar.xz" -C "$work"
for wheel in "$here"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$work/site"; done
cd "$work/keyreel" || exit 2
export PYTHONPATH=$work/site:$PWD/engine:$PWD/kernels:$PWD:$PWD/tests KEYREEL_SHARED=$work/shared
export KEYREEL_FAIL_WITHOUT_CUDA=1 PYTHONDONTWRITEBYTECODE=1
tests=(python3 -m pytest -q -p no:cacheprovider --tb=short -m needs_cuda)
kernels=(tests/test_cuda.py tests/test_parity.py)
sanitizer=(compute-sanitizer --error-exitcode 66 --tool)
repeats=(200 600)
if [ -n "${KEYREEL_REHEARSE:-}" ]; then
    mkdir "$work/rehearsal"
    echo 'import sys; from cuda_on_host import HostedCupy; sys.modules["cupy"] = HostedCupy()' >"$work/rehearsal/cupy.py"
    export PYTHONPATH=$work/rehearsal:$PYTHONPATH
    tests+=(-m "needs_cuda and not full")
    kernels=(tests/test_cuda.py "tests/test_parity.py::test_each_kernel")
    sanitizer=(env)
    repeats=(2 40)
else
    tests+=(-n 8)
fi

if [ "$run" = correctness ]; then
    step probe 20 bash -c 'nvidia-smi; ldconfig -p | grep -E "nvcuvid|nvidia-encode"; python3 -c "
import sys, keyreel
from keyreel_kernels import ops_for
print(sys.version, keyreel.__version__, ops_for(\"cuda:0\").arrays)"'
    step kernels 120 "${tests[@]}" "${kernels[@]}"
    if [ -n "${KEYREEL_REHEARSE:-}" ]; then
        step nvdec 120 "${tests[@]}" -m needs_cuda tests/test_nvdec.py -k "every_mode and bikes or damage or containers"
    else
        step nvdec 70 "${tests[@]}" tests/test_nvdec.py
    fi
    step chain 40 "${tests[@]}" -m needs_cuda tests/test_engine_cuda.py -k packets_to_summary
    for tool in memcheck racecheck synccheck; do
        step $tool 25 "${sanitizer[@]}" ${KEYREEL_REHEARSE:+TOOL=}$tool python3 -m benchmarks.gpu_checks launches cluster seed frame_signals
    done
    step repeat 40 python3 -m benchmarks.gpu_checks repeat "${repeats[@]}"
else
    step rows 180 python3 -m benchmarks.gpu --quick --only k-means pictures NVDEC summary -o "$out/gpu.jsonl"
    step profile 60 ncu --clock-control none --section SpeedOfLight --section MemoryWorkloadAnalysis --section WarpStateStats \
        --launch-count 4 python3 -m benchmarks.gpu_checks launches cluster frames_from_surfaces
    step sweep 40 python3 -m benchmarks.gpu_checks sweep
fi
echo "$run: $failed steps failed; logs in $out"
exit $((failed > 0))
