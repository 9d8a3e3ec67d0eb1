#!/bin/sh
# MC-SMoE (arXiv:2310.01334): merges experts by their router logits after aligning their neurons (M-SMoE), then factors the merged
# ones into low rank and rows that stay, in half their bytes. As published, but without its fine-tuning; --repair ridge fits the
# merged experts. OUT-merged is the merged model, OUT the factored one, which transformers loads with trust_remote_code; OUT.json and
# OUT.json.weights can be deleted.
set -eu

usage="sh recipes/mc-smoe.sh --model DIR --text PATH --out DIR [--remove 25%]"
. "$(dirname "$0")/pipeline.sh"

"$program" merge "$model" --method m-smoe --remove "$share" --seq-len "$length" --repair "$repair" --tokens "$tokens" -o "$out-merged" --text "$text"
measure "$out-merged"
# A plan first: factored models run in transformers only, their plan can be measured here.
"$program" factor "$out-merged" --method mc-smoe --ratio 50% --emit factored --seq-len "$length" --tokens "$tokens" --plan-only \
    -o "$out.json" --text "$text"
measure "$out-merged" --plan "$out.json"
"$program" apply "$out-merged" "$out.json" -o "$out"
