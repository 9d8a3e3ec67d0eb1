#!/bin/sh
# DERN (arXiv:2509.10377): drops experts by router statistics and hands their neurons to the kept experts that have neurons like
# them. As published, nothing is fitted afterwards; --repair ridge fits the result, which is better.
set -eu

usage="sh recipes/dern.sh --model DIR --text PATH --out DIR [--remove 25%]"
. "$(dirname "$0")/pipeline.sh"

"$program" merge "$model" --method dern --remove "$share" --seq-len "$length" --repair "$repair" --tokens "$tokens" -o "$out" --text "$text"
measure "$out"
