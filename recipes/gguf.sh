#!/bin/sh
# From a model folder to a GGUF file of at most a given size, for llama.cpp: calibrates, removes experts if asked (with repair), measures
# what each type costs each tensor, writes the file with the types that an integer program chooses, verifies it, and measures it on other
# text if there is some.
#   sh recipes/gguf.sh MODEL SIZE OUT.gguf [--text PATH] [--eval PATH] [--remove SHARE] [--repair none|ridge|deep] [--seq-len N]
#                      [--tokens N] [--program FILE]
#     SIZE        of the file: 12GiB, 600MB
#     --text      calibration text; without it the two halves of MODEL/samples.txt are --text and --eval
#     --remove    so many experts before quantizing: 25%
#     --tokens    of calibration, at most (0: all)
# OUT.gguf.stats.h5 keeps the statistics: another size takes seconds. OUT.gguf.pruned is the folder of the smaller model, if there is one.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
usage()
{
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
[ $# -ge 3 ] || usage
model=$1 size=$2 out=$3
shift 3
program=$root/build/moecompress text='' eval='' share='' repair=deep length=2048 tokens=0
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || usage
    case $1 in
    --text) text=$2 ;;
    --eval) eval=$2 ;;
    --remove) share=$2 ;;
    --repair) repair=$2 ;;
    --seq-len) length=$2 ;;
    --tokens) tokens=$2 ;;
    --program) program=$2 ;;
    *) usage ;;
    esac
    shift 2
done
if [ -z "$text" ]; then
    [ -e "$model/samples.txt" ] || usage
    work=$out.text calib=''
    . "$root/recipes/halves.sh"
    text=$calib
fi

step()
{
    printf '\n--- %s\n' "$1"
}

"$program" quantize "$model" --format gguf --types q8_0 --dry-run -q >/dev/null  # is it of a family and config that a GGUF can hold?
from=$model
if [ -n "$share" ]; then
    from=$out.pruned
    step "prune $share"
    [ -e "$out.all.h5" ] || "$program" calibrate "$model" --seq-len "$length" --tokens "$tokens" -o "$out.all.h5" --text "$text"
    [ -e "$from" ] || "$program" prune "$model" --stats "$out.all.h5" --remove "$share" --repair "$repair" --seq-len "$length" \
        --tokens "$tokens" -o "$from" --text "$text"
fi
step "measure what each type costs each tensor, and quantize"
"$program" quantize "$from" --format gguf --target-size "$size" --stats "$out.stats.h5" --compute f32 --seq-len "$length" \
    --tokens "$tokens" -o "$out" --text "$text"
step "verify"
"$program" verify "$out" "$from"
if [ -n "$eval" ]; then
    step "evaluate"
    "$program" eval "$out" --base "$model" --seq-len "$length" --text "$eval"
fi
