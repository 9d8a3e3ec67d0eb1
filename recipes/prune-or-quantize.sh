#!/bin/sh
# Which is better at the same size: few bits for all experts, or more bits for fewer of them? For each mean width the model quantized
# at that width sets the size; then experts are pruned (with repair) and what is left is quantized to that size. Prints perplexity and KL
# divergence from the original on held-out text as a table in Markdown. By default: the demo model and the two halves of its text.
#   sh recipes/prune-or-quantize.sh [--program FILE] [--work FOLDER] [--model DIR] [--calib PATH] [--eval PATH] [--seq-len N]
#                                   [--tokens N] [--windows N] [--bits LIST] [--shares LIST] [--repair none|ridge|deep]
#     --work      where models are kept (build/prune-or-quantize); what is there is used again
#     --shares    of the experts that are pruned, in per cent ("12.5 25 50")
set -eu

bits='2 2.5 3' shares='12.5 25 50' repair=deep own='bits shares repair'
. "$(dirname "$0")/measuring.sh"
text="--seq-len $seq_len --tokens $tokens"
reference

# shellcheck disable=SC2086
quantized()  # quantized MODEL OUT --bits B | --target-size SIZE
{
    from=$1 out=$2
    shift 2
    [ -e "$out" ] || "$program" quantize "$from" --stats "$from.stats.h5" "$@" -q --json $text -o "$out" --text "$calib" >"$out.json"
}

bytes_of()  # bytes_of FOLDER    of all its files
{
    find "$1" -type f -exec cat {} + | wc -c
}

row()  # row SIZE SHARE FOLDER
{
    evaluate "$3" --reference "$work/original.ref" >"$work/kl"
    printf '%s %s %s %s %s %s\n' "$1" "$2" "$(number bits "$3.json")" "$(bytes_of "$3")" "$(number perplexity "$work/kl")" \
        "$(number kl "$work/kl")" | awk '{ printf "| %s bits | %s %% | %.2f | %d | %.3f | %.4f |\n", $1, $2, $3, $4, $5, $6 }'
}

for share in 0 $shares; do
    from=$work/pruned-$share
    if [ ! -e "$from" ] && [ "$share" = 0 ]; then
        ln -s "$model" "$from"
    elif [ ! -e "$from" ]; then
        # shellcheck disable=SC2086
        "$program" prune "$model" --stats "$work/pruned-0.stats.h5" --remove "$share%" --repair "$repair" -q $text -o "$from" \
            --text "$calib" >/dev/null
    fi
    # shellcheck disable=SC2086
    [ -e "$from.stats.h5" ] || "$program" calibrate "$from" --errors --gains --group-size 64 -q $text -o "$from.stats.h5" --text "$calib"
done
printf '| size of | pruned | bits | bytes of the files | perplexity | KL |\n|---|---|---|---|---|---|\n'
for b in $bits; do
    quantized "$work/pruned-0" "$work/all-$b" --bits "$b"
    row "$b" 0 "$work/all-$b"
    size=$(bytes_of "$work/all-$b")
    for share in $shares; do
        quantized "$work/pruned-$share" "$work/pruned-$share-$b" --target-size "$size"
        row "$b" "$share" "$work/pruned-$share-$b"
    done
done
