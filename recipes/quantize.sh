#!/bin/sh
# Measures ways of quantizing a model: for each method and each mean width of the routed experts, bits and bytes on disk, and perplexity
# and KL divergence from the original on held-out text. No model is written: plans are measured as they are. Prints a table in Markdown.
# By default: the demo model and the two halves of its text.
#   sh recipes/quantize.sh [--program FILE] [--work FOLDER] [--model DIR] [--calib PATH] [--eval PATH] [--seq-len N] [--tokens N]
#                          [--windows N] [--bits LIST] [--methods LIST] [--group-size N] [--attention-bits N]
#     --work      where statistics and plans are kept (build/quantize); what is there is used again
#     --tokens    of calibration, at most (65536); --windows: of each evaluation text, at most (30)
#     --methods   names from quantize --methods; a list of widths may follow, as in pmq:1,2,3
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
program=$root/build/moecompress work=$root/build/quantize model=$root/recipes/demo-model calib='' eval='' length=128
tokens=65536 windows=30 bits='2 2.25 2.5 3 4' group=64 attention=16 format=gptq
methods='rtn gptq pmq pmq:1,2,3 pmq-global direct direct:1,2,3,4,8'
while [ $# -gt 0 ]; do
    case $1 in
    --program) program=$2 ;;
    --work) work=$2 ;;
    --model) model=$2 ;;
    --calib) calib=$2 ;;
    --eval) eval=$2 ;;
    --seq-len) length=$2 ;;
    --tokens) tokens=$2 ;;
    --windows) windows=$2 ;;
    --bits) bits=$2 ;;
    --methods) methods=$2 ;;
    --group-size) group=$2 ;;
    --attention-bits) attention=$2 ;;
    *)
        sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
    esac
    shift 2
done
. "$root/recipes/halves.sh"

if [ ! -e "$work/stats.h5" ]; then
    "$program" calibrate "$model" --errors --gains --group-size "$group" --seq-len "$length" --tokens "$tokens" -q -o "$work/stats.h5" \
        --text "$calib"
fi
if [ ! -e "$work/original.ref" ]; then
    "$program" eval "$model" --seq-len "$length" --max-windows "$windows" -q --save-reference "$work/original.ref" \
        --text "$eval" >/dev/null
fi

number()  # number KEY FILE    the first number of that key
{
    sed -n "s/^ *\"$1\": *\\([-+.0-9eE]*\\),*\$/\\1/p" "$2" | head -n 1
}

row()  # row METHOD[:WIDTHS] BITS
{
    name=${1%%:*} widths=
    case $name-$2 in rtn-*.* | clip-*.* | gptq-*.*) return ;; esac # one width for all, and there is none between two
    case $1 in *:*) widths=${1#*:} ;; esac
    kind=$format
    case ,$widths, in *,1,*) kind=fake ;; esac # no format that loads has 1-bit codes
    base=$work/$(printf '%s' "$1" | tr ':,' '--')-$2
    if [ ! -e "$base.json" ] && ! "$program" quantize "$model" --stats "$work/stats.h5" --method "$name" ${widths:+--widths "$widths"} \
        --bits "$2" --group-size "$group" --attention-bits "$attention" --format "$kind" --seq-len "$length" --tokens "$tokens" \
        --plan-only --json -q -o "$base.json" --text "$calib" >/dev/null 2>"$work/log"; then
        sed "s/^/$1 at $2 bits: /" "$work/log" >&2
        return
    fi
    "$program" quantize "$model" --stats "$work/stats.h5" --method "$name" ${widths:+--widths "$widths"} --bits "$2" --group-size "$group" \
        --attention-bits "$attention" --format "$kind" --dry-run --json -q >"$work/size" 2>"$work/log" || sed "s/^/$1: /" "$work/log" >&2
    "$program" eval "$model" --plan "$base.json" --reference "$work/original.ref" --seq-len "$length" --max-windows "$windows" -q --json \
        --text "$eval" >"$work/kl"
    printf '%s %s %s %s %s %s\n' "$1" "$2" "$(number bits_on_disk "$work/size")" "$(number file_bytes "$work/size")" \
        "$(number perplexity "$work/kl")" "$(number kl "$work/kl")" |
        awk '{ printf "| %s | %s | %.3f | %d | %.3f | %.4f |\n", $1, $2, $3, $4, $5, $6 }'
}

printf '| method | bits | on disk | bytes of the files | perplexity | KL |\n|---|---|---|---|---|---|\n'
for b in $bits; do
    for method in $methods; do
        row "$method" "$b"
    done
done
