#!/bin/sh
# Measures pruning at other grains than whole experts on the demo model: neurons, zeros, layers, experts a token; neurons with repair,
# too, beside whole experts. KL divergence from the original on the other half of its text; a table in Markdown.
#      sh recipes/grains.sh [--program FILE] [--work FOLDER]
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
program=$root/build/moecompress work=$root/build/grains
while [ $# -gt 0 ]; do
    case $1 in
    --program) program=$2 ;;
    --work) work=$2 ;;
    *)
        sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
    esac
    shift 2
done
model=$root/recipes/demo-model
mkdir -p "$work"
cd "$work"
awk 'int((NR - 1) / 100) % 2 == 0' "$model/samples.txt" >calibration.txt
awk 'int((NR - 1) / 100) % 2 == 1' "$model/samples.txt" >evaluation.txt
"$program" calibrate "$model" --tier 1 --seq-len 128 -q --overwrite -o stats.h5 --text calibration.txt

kl()  # kl EVAL-ARGUMENTS...
{
    "$program" eval "$@" --seq-len 128 -q --json --text evaluation.txt |
        sed -n 's/^ *"kl": *\([-+.0-9eE]*\),*$/\1/p' | head -n 1 | awk '{ printf "%.4f", $1 }'
}

row()  # row NAME PRUNE-ARGUMENTS...
{
    name=$1
    shift
    rm -rf made
    "$program" prune "$model" --stats stats.h5 -q -o made "$@" >/dev/null
    printf '| %s | `%s` | %s |\n' "$name" "$*" "$(kl made --base "$model")"
}

printf '| what | options of prune | KL |\n|---|---|---|\n'
for method in gate-weighted out-norm mean-abs; do
    row "72 of 96 neurons" --grain neurons --method $method --keep-width 72 --align 8
    row "48 of 96 neurons" --grain neurons --method $method --keep-width 48
done
for how in ridge deep; do
    text="--repair $how --seq-len 128 --text calibration.txt"
    # shellcheck disable=SC2086
    row "72 of 96 neurons, repaired" --grain neurons --keep-width 72 --align 8 $text
    # shellcheck disable=SC2086
    row "48 of 96 neurons, repaired" --grain neurons --keep-width 48 $text
done
row "8 of 16 experts" --keep 8
for how in ridge deep; do
    row "8 of 16 experts, repaired" --keep 8 --repair $how --seq-len 128 --text calibration.txt
done
for method in wanda magnitude owl; do
    row "half of the weights 0" --grain weights --method $method --sparsity 50%
done
row "2 of 4 weights 0" --grain weights --method wanda --pattern 2:4
row "2 of 4 weights 0" --grain weights --method magnitude --pattern 2:4
row "3 of 4 layers" --grain blocks --remove 1
for k in 3 2 1; do
    row "top-$k of top-4" --top-k $k
done
