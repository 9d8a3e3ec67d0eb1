#!/bin/sh
# Measures methods of prune, merge and factor on a model: KL divergence from the original on held-out text, without repair, with ridge and
# with deep repair, for each share of experts removed. No smaller model is written: plans are measured as they are. Prints a table
# in Markdown. By default: the demo model and the two halves of its text.
#   sh recipes/methods.sh [--program FILE] [--work FOLDER] [--model DIR] [--calib PATH] [--eval PATH] [--seq-len N]
#                         [--tokens N] [--windows N] [--shares LIST] [--methods LIST] [--repairs LIST]
#     --work      where statistics and plans are kept (build/methods); what is there is used again
#     --tokens    of calibration and repair, at most (65536); --windows: of each evaluation text, at most (30)
#     --shares    of the experts, in per cent ("25 50"); --repairs: of none, ridge, deep ("none ridge deep")
#     --methods   names from prune --methods (those that need one model and one text), or with merge: or factor: in front from those
#                 of these verbs; a setting may follow, as in merge:m-smoe,align=none. Factored experts lose the same share of their
#                 bytes; they are not repaired
set -eu

shares='25 50' repairs='none ridge deep' own='shares methods repairs'
methods='frequency gate ean-sum ean-mean msan reap weighted-ean energy easy-ep unified seuf tcess tcess-prob nllb lu stun
    router-row weight-norm aimer random merge:adaptive merge:m-smoe merge:dern merge:hc-smoe merge:sub-moe merge:ream
    merge:merge-moe merge:uncurl factor:pivot factor:svd factor:base-delta factor:mc-smoe factor:mpo factor:width'
. "$(dirname "$0")/measuring.sh"

if [ ! -e "$work/stats.h5" ]; then
    "$program" calibrate "$model" --seq-len "$seq_len" --tokens "$tokens" -q -o "$work/stats.h5" --text "$calib"
fi
reference

make_plan()  # make_plan METHOD SHARE REPAIR PLAN
{
    method=$1 share=$2 repair=$3 plan=$4
    set -- --repair "$repair" --seq-len "$seq_len" --tokens "$tokens" --text "$calib"
    case $method in
    merge:*,*) # merge:NAME,KEY=VALUE
        settings=${method#*,} method=${method%%,*}
        set -- --set "$settings" "$@" ;;
    esac
    case $method in
    factor:*)
        shift 2 # no --repair
        ratio=$(awk "BEGIN { print 100 - $share }")
        "$program" factor "$model" --method "${method#factor:}" --ratio "$ratio%" -q --plan-only -o "$plan" "$@" ;;
    merge:*)
        "$program" merge "$model" --method "${method#merge:}" --remove "$share%" -q --plan-only -o "$plan" "$@" ;;
    *)
        [ "$repair" != none ] || [ "$method" = lu ] || set -- # lu looks at tokens also when nothing is repaired
        "$program" prune "$model" --stats "$work/stats.h5" --method "$method" --remove "$share%" -q --plan-only -o "$plan" "$@" ;;
    esac
}

kl()  # kl METHOD SHARE REPAIR    makes the plan and prints its KL, or "-"
{
    case $1-$3 in
    factor:*-none) ;;
    factor:*) printf '%s' - && return ;;
    esac
    plan=$work/$(printf '%s' "$1" | tr ':,=' '---')-$2-$3.json
    if { [ ! -e "$plan" ] && ! make_plan "$1" "$2" "$3" "$plan" >/dev/null; } 2>"$work/log" ||
        ! evaluate "$model" --plan "$plan" --reference "$work/original.ref" >"$work/kl" 2>"$work/log"; then
        sed "s/^/$1 $2 % $3: /" "$work/log" >&2
        printf '%s' -
        return
    fi
    printf %.4f "$(number kl "$work/kl")"
}

head='| method |' rule='|---|'
for share in $shares; do
    for repair in $repairs; do
        head="$head $share % $repair |" rule="$rule---|"
    done
done
printf '%s\n%s\n' "$head" "$rule"
for method in $methods; do
    row="| $(printf '%s' "$method" | sed 's/:/ /; s/,/, /') |"
    for share in $shares; do
        for repair in $repairs; do
            row="$row $(kl "$method" "$share" "$repair") |"
        done
    done
    printf '%s\n' "$row"
done
