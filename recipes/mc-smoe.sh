#!/bin/sh
# MC-SMoE (arXiv:2310.01334): merges experts by their router logits after aligning their neurons (M-SMoE), then factors the merged
# ones into low rank and rows that stay. As published, but without its fine-tuning; --repair ridge fits the merged experts. The factored
# model is loaded by transformers with trust_remote_code.
set -eu

usage="sh recipes/mc-smoe.sh --model DIR --text PATH --out DIR [--remove 25%] [--seq-len 2048] [--repair ridge] [--eval PATH] [--program FILE]"
. "$(dirname "$0")/pipeline.sh"

"$program" merge "$model" --method m-smoe --remove "$share" --seq-len "$length" ${more:---repair none} -o "$out-merged" --text "$text"
measure "$out-merged"
"$program" factor "$out-merged" --method mc-smoe --ratio 50% --emit factored --seq-len "$length" -o "$out" --text "$text"
