#!/usr/bin/env bash
# Fuzzes every target for FUZZ_SECONDS (600) seconds, two at a time, from the committed corpus and what earlier runs left in build/fuzz/grown;
# then tells the speed, and how much of csrc/ all these inputs reach (llvm-cov, by replay). "make fuzz" has built the two programs.
# With "merge" instead: adds to the committed corpus what reaches more of the code than it does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

targets=(score select share gather contract)
seconds=${FUZZ_SECONDS:-600}
found=build/fuzz/found
llvm=$(dirname "$(readlink -f "$(command -v clang)")") # llvm-cov and llvm-profdata of the same release

if [ "${1:-}" = merge ]; then
    for target in "${targets[@]}"; do
        KVP_FUZZ=$target build/fuzz/fuzz -merge=1 "tests/fuzz/corpus/$target" "build/fuzz/grown/$target" 2>&1 | grep 'MERGE-OUTER: the control\|new files\|specified'
    done
    du -cb tests/fuzz/corpus/*/* | tail -1
    exit
fi

fuzz() {
    mkdir -p "build/fuzz/grown/$1" "$found"
    KVP_FUZZ=$1 build/fuzz/fuzz -len_control=0 -max_len=512 -timeout=20 -max_total_time="$seconds" -print_final_stats=1 \
        -artifact_prefix="$found/$1-" "build/fuzz/grown/$1" "tests/fuzz/corpus/$1" >"build/fuzz/$1.log" 2>&1 || touch "$found/$1-failed"
}

rm -rf "$found"
for ((i = 0; i < ${#targets[@]}; i += 2)); do
    fuzz "${targets[i]}" &
    first=$!
    [ $((i + 1)) -lt ${#targets[@]} ] && fuzz "${targets[i + 1]}"
    wait "$first"
done

for target in "${targets[@]}"; do
    awk -v target="$target" '/stat::number_of_executed_units/ {n = $2} /stat::average_exec_per_sec/ {rate = $2}
        END {printf "%-10s %9d executions, %6d a second\n", target, n, rate}' "build/fuzz/$target.log"
    LLVM_PROFILE_FILE=build/fuzz/$target.profraw KVP_FUZZ=$target build/fuzz/coverage -runs=0 "build/fuzz/grown/$target" "tests/fuzz/corpus/$target" >"build/fuzz/$target-replay.log" 2>&1
done
"$llvm/llvm-profdata" merge -o build/fuzz/all.profdata build/fuzz/*.profraw
echo "reached of csrc/ (llvm-cov, by replay on this machine's instruction sets):"
"$llvm/llvm-cov" report build/fuzz/coverage -instr-profile=build/fuzz/all.profdata -ignore-filename-regex='tests/' |
    awk '$1 ~ /[.]/ || $1 == "TOTAL" {printf "%-28s lines %8s  branches %8s\n", $1, $10, $13}'
if ls "$found"/* >/dev/null 2>&1; then
    ls "$found"
    echo "found something: the inputs are above, what they do in build/fuzz/TARGET.log; once mended, keep them in tests/fuzz/corpus/TARGET"
    exit 1
fi
