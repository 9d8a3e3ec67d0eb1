#!/bin/sh
# The whole way on a small trained model, in about a minute: installs what is missing, builds the program, looks at the model,
# observes it on one half of a text, removes 25 % and 50 % of its experts, without and with repair, verifies the results, and
# measures them on the other half of the text against the original.
#   sh recipes/demo.sh [--program FILE] [--work FOLDER]
#     --program   use this moecompress instead of building one
#     --work      where the results go (build/demo)
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
program='' work=$root/build/demo
while [ $# -gt 0 ]; do
    case $1 in
    --program) program=$2 ;;
    --work) work=$2 ;;
    *)
        sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
    esac
    shift 2
done
model=$root/recipes/demo-model

step()
{
    printf '\n--- %s\n' "$1"
}

if [ -z "$program" ]; then
    step "build"
    sh "$root/recipes/setup.sh"
    generator=
    if [ ! -e "$root/build/CMakeCache.txt" ] && command -v ninja >/dev/null 2>&1; then
        generator=Ninja
    fi
    cmake -S "$root" -B "$root/build" ${generator:+-G "$generator"} -DCMAKE_BUILD_TYPE=Release -DMOEC_TESTS=OFF >/dev/null
    cmake --build "$root/build" -j "$(nproc)" --target moecompress
    program=$root/build/moecompress
fi
mkdir -p "$work"
cd "$work"

step "inspect"
"$program" inspect "$model"

# Calibration and evaluation must not share text. Blocks of lines alternate, so that both halves hold every kind of it.
awk 'int((NR - 1) / 100) % 2 == 0' "$model/samples.txt" >calibration.txt
awk 'int((NR - 1) / 100) % 2 == 1' "$model/samples.txt" >evaluation.txt

step "calibrate"
"$program" calibrate "$model" --text calibration.txt --seq-len 128 -o stats.h5 --overwrite
"$program" stats show stats.h5

for share in 25 50; do
    step "prune $share %"
    "$program" prune "$model" --stats stats.h5 --remove $share% -o pruned-$share --overwrite
    step "prune $share %, repaired"
    "$program" prune "$model" --stats stats.h5 --remove $share% -o repaired-$share --overwrite --repair deep --seq-len 128 \
        --text calibration.txt
    step "verify"
    "$program" verify pruned-$share "$model"
    "$program" verify repaired-$share "$model"
done

step "evaluate"
"$program" eval "$model" --text evaluation.txt --seq-len 128 --json >original.json
for share in 25 50; do
    for made in pruned-$share repaired-$share; do
        "$program" eval $made --base "$model" --text evaluation.txt --seq-len 128 --json >$made.json
    done
done

value()  # value FILE KEY    the first number of that name: "overall" comes first
{
    sed -n 's/^ *"'"$2"'": *\([-+.0-9eE]*\),*$/\1/p' "$1" | head -n 1
}

row()  # row NAME FOLDER EVAL_JSON
{
    "$program" inspect "$2" --json >inspect.json
    experts=$(value inspect.json experts)
    bytes=$(sed -n '/"bytes"/,/}/s/^ *"total": *\([0-9]*\).*/\1/p' inspect.json)
    kl=$(value "$3" kl)
    top1=$(value "$3" top1)
    awk -v name="$1" -v experts="$experts" -v bytes="$bytes" -v ppl="$(value "$3" perplexity)" -v kl="${kl:-0}" \
        -v top1="${top1:-1}" 'BEGIN {
            printf "%-16s %8d %10.2f MiB %11.3f %9.4f %12.1f %%\n", name, experts, bytes / 1048576, ppl, kl, 100 * top1
        }'
}

step "result: $work"
printf '%-16s %8s %14s %11s %9s %14s\n' model experts weights perplexity KL 'top-1 the same'
row original "$model" original.json
for share in 25 50; do
    row "-$share %" pruned-$share pruned-$share.json
    row "-$share %, repaired" repaired-$share repaired-$share.json
done
