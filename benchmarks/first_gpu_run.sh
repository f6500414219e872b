#!/usr/bin/env bash
# The first run on a GPU, in a checkout, with a folder that `python -m benchmarks.gpu_pack` made:
#
#     bash benchmarks/first_gpu_run.sh correctness|speed OUT FOLDER
#
# Every step has its own time limit (330 s together) and goes on where another failed. OUT gets three files, written at
# once: steps.jsonl with a line a step, gpu.jsonl with the rows, and what was printed. The last line counts failures.
# KEYREEL_REHEARSE=1 runs the same on a CPU: the kernels emulated, PyNvVideoCodec on its stub, small sizes, fewer tests.
set -uo pipefail
[[ $# == 3 && $1 =~ ^(correctness|speed)$ ]] || { sed -n 2,4p "$0"; exit 2; }
run=$1
mkdir -p "$2"
out=$(cd "$2" && pwd) folder=$(cd "$3" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0 slower=1

step() { # name, seconds, command...
    local name=$1 limit=$(($2 * slower)) began=$SECONDS code
    shift 2
    echo "=== $name" >>"$out/$run.log"
    timeout -k 5 "$limit" "$@" >>"$out/$run.log" 2>&1
    code=$?
    ((code == 0)) || failed=$((failed + 1))
    echo "{\"step\": \"$name\", \"exit\": $code, \"seconds\": $((SECONDS - began)), \"limit\": $limit}" | tee -a "$out/steps.jsonl"
    tail -n 3 "$out/$run.log" | cut -c1-200
}

for wheel in "$folder"/wheels/*.whl; do
    [ ! -e "$wheel" ] || python3 -m zipfile -e "$wheel" "$work/site" || exit 2
done
export PYTHONPATH=$work/site:$PWD/engine:$PWD/kernels:$PWD:$PWD/tests KEYREEL_SHARED=$folder
# What is there by chance may warn, CuPy or a plugin of pytest: no reason to lose the run.
export KEYREEL_FAIL_WITHOUT_CUDA=1 PYTHONDONTWRITEBYTECODE=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
tests=(python3 -m pytest -p xdist.plugin -q -p no:cacheprovider -W default --tb=short -m needs_cuda)
kernels=(tests/test_cuda.py tests/test_parity.py)
nvdec=(tests/test_nvdec.py)
sanitizer=(compute-sanitizer --error-exitcode 66 --tool)
profiler=(ncu --clock-control none --section SpeedOfLight --section MemoryWorkloadAnalysis --section WarpStateStats)
profiler+=(--kernel-name 'regex:^(kmeans|pictures)$')
repeats=(200 600)
if [ -n "${KEYREEL_REHEARSE:-}" ]; then
    slower=8
    mkdir "$work/rehearsal"
    echo 'import sys; from cuda_on_host import HostedCupy; sys.modules["cupy"] = HostedCupy()' >"$work/rehearsal/cupy.py"
    export PYTHONPATH=$work/rehearsal:$PYTHONPATH
    tests+=(-n 1 -m "needs_cuda and not full")
    kernels=(tests/test_cuda.py "tests/test_parity.py::test_each_kernel")
    nvdec+=(-m needs_cuda -k "every_mode and bikes or damage or containers")
    sanitizer=(env --unset)  # a variable of the name of the tool
    profiler=(env)
    repeats=(2 40)
else
    tests+=(-n 8)
fi

if [ "$run" = correctness ]; then
    step probe 20 bash -c 'nvidia-smi; ldconfig -p | grep -E "nvcuvid|nvidia-encode"; python3 -c "
import sys, cupy, keyreel
from keyreel_kernels import ops_for
cupy.show_config()
print(sys.version, keyreel.__version__, ops_for(\"cuda:0\").arrays)"'
    step kernels 120 "${tests[@]}" "${kernels[@]}"
    step nvdec 60 "${tests[@]}" "${nvdec[@]}"
    step chain 30 "${tests[@]}" -m needs_cuda tests/test_engine_cuda.py -k packets_to_summary
    for tool in memcheck racecheck synccheck; do
        step $tool 25 "${sanitizer[@]}" $tool python3 -m benchmarks.gpu_checks launches cluster teams seed frame_signals
    done
    step repeat 25 python3 -m benchmarks.gpu_checks repeat "${repeats[@]}"
else
    rows=(python3 -m benchmarks.gpu --quick --limit $((40 * slower)) -o "$out/gpu.jsonl" --only)
    [ -z "${KEYREEL_REHEARSE:-}" ] || cat >"$work/rehearsal/PyNvVideoCodec.py" <<-END
	import sys, cupy
	sys.path.remove("$work/rehearsal")  # the wheel has the same name
	del sys.modules[__name__]
	from host_nvdec import HostNvdec
	sys.modules[__name__] = HostNvdec()
	END
    step rows 120 "${rows[@]}" copy barrier ": keyreel" pictures
    step decode 60 "${rows[@]}" NVDEC summary
    step flash-kmeans 50 "${rows[@]}" flash
    step sweep 40 "${rows[@]}" sweep
    step profile 60 "${profiler[@]}" python3 -m benchmarks.gpu_checks profile
fi
echo "$run: $failed steps failed; logs in $out"
exit $((failed > 0))
