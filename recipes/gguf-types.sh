#!/bin/sh
# Measures GGUF files: for each number of bits a weight, one type for all tensors against the types that the integer program chooses at the
# same size, and half of the experts removed (with repair) at that size. Prints a table in Markdown: bytes of the file, bits a weight,
# perplexity and KL divergence from the original on held-out text. By default: the demo model and the two halves of its text.
#   sh recipes/gguf-types.sh [--program FILE] [--work FOLDER] [--model DIR] [--calib PATH] [--eval PATH] [--seq-len N] [--tokens N]
#                            [--windows N] [--types LIST] [--remove SHARE] [--repair none|ridge|deep]
#     --work      where files are kept (build/gguf-types); what is there is used again
#     --types     uniform types ("q2_k q3_k q4_k q5_k q6_k" where rows are multiples of 256); each sets a size
set -eu

types='iq4_nl q5_0 q5_1 q8_0' remove=50 repair=deep own='types remove repair'
. "$(dirname "$0")/measuring.sh"
text="--seq-len $seq_len --tokens $tokens"

# shellcheck disable=SC2086
measured()  # measured MODEL    its statistics, with what types cost
{
    [ -e "$1.stats.h5" ] || "$program" calibrate "$1" --gguf -q $text -o "$1.stats.h5" --text "$calib"
}

row()  # row SIZE WHAT FILE
{
    evaluate "$3.gguf" --reference "$work/original.ref" >"$work/kl"
    printf '%s;%s;%s;%s;%s;%s\n' "$1" "$2" "$(wc -c <"$3.gguf")" "$(number bits "$3.json")" "$(number perplexity "$work/kl")" \
        "$(number kl "$work/kl")" | awk -F ';' '{ printf "| %s | %s | %d | %.2f | %.3f | %.4f |\n", $1, $2, $3, $4, $5, $6 }'
}

made()  # made MODEL FILE OPTIONS..    false: there is nothing as small as that
{
    from=$1 file=$2
    shift 2
    [ -e "$file.gguf" ] || "$program" quantize "$from" --format gguf --stats "$from.stats.h5" "$@" -q --json -o "$file.gguf" >"$file.json"
}

[ -e "$work/all" ] || ln -s "$model" "$work/all"
measured "$work/all"
if [ ! -e "$work/fewer" ]; then
    # shellcheck disable=SC2086
    "$program" prune "$model" --stats "$work/all.stats.h5" --remove "$remove%" --repair "$repair" -q $text -o "$work/fewer" --text "$calib" \
        >/dev/null
fi
measured "$work/fewer"
reference
printf '| size of | what | bytes | bits a weight | perplexity | KL |\n|---|---|---|---|---|---|\n'
for type in $types; do
    made "$work/all" "$work/all-$type" --types "$type"
    row "$type" "all $type" "$work/all-$type"
    size=$(wc -c <"$work/all-$type.gguf")
    ! made "$work/all" "$work/program-$type" --target-size "$size" || row "$type" "types by the program" "$work/program-$type"
    ! made "$work/fewer" "$work/fewer-$type" --target-size "$size" ||
        row "$type" "$remove % of the experts removed, types by the program" "$work/fewer-$type"
done
