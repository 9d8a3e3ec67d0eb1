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

bits='2 2.25 2.5 3 4' group_size=64 attention_bits=16 own='bits methods group_size attention_bits' format=gptq
methods='rtn gptq pmq pmq:1,2,3 pmq-global direct direct:1,2,3,4,8'
. "$(dirname "$0")/measuring.sh"

if [ ! -e "$work/stats.h5" ]; then
    "$program" calibrate "$model" --errors --gains --group-size "$group_size" --seq-len "$seq_len" --tokens "$tokens" -q -o "$work/stats.h5" \
        --text "$calib"
fi
reference

row()  # row METHOD[:WIDTHS] BITS
{
    name=${1%%:*} widths=
    case $name-$2 in rtn-*.* | clip-*.* | gptq-*.*) return ;; esac # one width for all, and there is none between two
    case $1 in *:*) widths=${1#*:} ;; esac
    kind=$format
    case ,$widths, in *,1,*) kind=fake ;; esac # no format that loads has 1-bit codes
    base=$work/$(printf '%s' "$1" | tr ':,' '--')-$2
    if [ ! -e "$base.json" ] && ! "$program" quantize "$model" --stats "$work/stats.h5" --method "$name" ${widths:+--widths "$widths"} \
        --bits "$2" --group-size "$group_size" --attention-bits "$attention_bits" --format "$kind" --seq-len "$seq_len" --tokens "$tokens" \
        --plan-only --json -q -o "$base.json" --text "$calib" >/dev/null 2>"$work/log"; then
        sed "s/^/$1 at $2 bits: /" "$work/log" >&2
        return
    fi
    "$program" quantize "$model" --stats "$work/stats.h5" --method "$name" ${widths:+--widths "$widths"} --bits "$2" --group-size "$group_size" \
        --attention-bits "$attention_bits" --format "$kind" --dry-run --json -q >"$work/size" 2>"$work/log" || sed "s/^/$1: /" "$work/log" >&2
    evaluate "$model" --plan "$base.json" --reference "$work/original.ref" >"$work/kl"
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
