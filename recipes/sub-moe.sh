#!/bin/sh
# Sub-MoE (arXiv:2506.23266): clusters experts by the cosine of their outputs and merges each cluster in the joint subspace of
# its matrices. As published, nothing is fitted afterwards; --repair ridge fits the result, which is better.
set -eu

usage="sh recipes/sub-moe.sh --model DIR --text PATH --out DIR [--remove 25%]"
. "$(dirname "$0")/pipeline.sh"

"$program" merge "$model" --method sub-moe --remove "$share" --seq-len "$length" --repair "$repair" --tokens "$tokens" -o "$out" --text "$text"
measure "$out"
