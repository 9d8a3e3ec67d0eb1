#!/bin/sh
# PMQ of MC-MoE (arXiv:2410.06270): widths of 1, 2 and 3 bits by an integer program for each layer (frequency, router weight and block
# error of every expert), attention at 4 bits, GPTQ in groups of 128. The dequantized model is OUT, which every client loads and which is
# as large as the model: 1-bit codes are in no format that loads. With --format gptq the widths are 2, 3 and 4, and OUT is small.
# OUT.stats.h5 keeps the measured errors: other budgets are solved from it.
set -eu

usage="sh recipes/mc-moe.sh --model DIR --text PATH --out DIR [--bits 2.5] [--format fake|gptq]"
. "$(dirname "$0")/pipeline.sh"

case $format in
fake) widths=1,2,3 sweep=1.5,2,2.25,2.5 ;;
gptq) widths=2,3,4 sweep=2.25,2.5,3,3.5 ;;
*)
    echo "mc-moe: --format $format: fake or gptq" >&2
    exit 2
    ;;
esac
if [ ! -e "$out.stats.h5" ]; then
    "$program" calibrate "$model" --errors --group-size 128 --seq-len "$length" --tokens "$tokens" -o "$out.stats.h5" --text "$text"
fi
"$program" quantize "$model" --stats "$out.stats.h5" --sweep "$sweep" --method pmq --widths "$widths" --attention-bits 4 --group-size 128 \
    --format "$format"
"$program" quantize "$model" --stats "$out.stats.h5" --method pmq --widths "$widths" --bits "$bits" --attention-bits 4 --group-size 128 \
    --format "$format" --weight-power 0 --sweeps 0 --no-act-order --seq-len "$length" --tokens "$tokens" -o "$out" --text "$text"
measure "$out"
