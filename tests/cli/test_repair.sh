#!/bin/sh
# prune --repair: better than without, the same bytes whatever was interrupted and however many threads ran, by a plan file or
# at once; measured as a plan it is what it is as a model; bad input.
. "$2/tests/cli/lib.sh"

model=$source/recipes/demo-model
sanitized=${MOEC_SANITIZED:-}
cd "$work" || exit 1
lines=400
[ -z "$sanitized" ] || lines=60
head -n $lines "$model/samples.txt" >calib.txt
tail -n 120 "$model/samples.txt" >held.txt
texts="--seq-len 128 --text calib.txt"

ok "calibrate" "$program" calibrate "$model" --seq-len 128 -q -o stats.h5 --text calib.txt 2>stderr
common="$model --stats stats.h5 --method energy --remove 50%"

kl()  # kl MODEL [OPTION...]
{
    "$program" eval "$@" --base "$model" --seq-len 128 --json -q --text held.txt |
        sed -n 's/^ *"kl": *\([-+.0-9eE]*\),*$/\1/p' | head -n 1
}

# --- what it is for ----------------------------------------------------------------------------------------------------
# shellcheck disable=SC2086
{
    ok "plain" "$program" prune $common -q -o plain >stdout 2>stderr
    ok "ridge" "$program" prune $common -q -o ridge --json $texts >ridge.out 2>stderr
    ok "deep" "$program" prune $common -q -o deep --repair deep $texts >stdout 2>stderr
}
ok "errors of every layer are reported" [ "$(grep -c '"after"' ridge.out)" -eq 4 ]
ok "no folder of work is left" [ -z "$(find . -name '*.repair*')" ]
for made in plain ridge deep; do
    ok "$made verifies" "$program" verify $made "$model" >stdout 2>stderr
done
if [ -z "$sanitized" ]; then
    a=$(kl plain) b=$(kl ridge) c=$(kl deep)
    ok "ridge is better than nothing ($b, $a), deep better than ridge ($c)" \
        awk -v a="$a" -v b="$b" -v c="$c" 'BEGIN { exit !(b < 0.85 * a && c < 0.95 * b) }'
fi
ok "only up and down projections change by ridge" grep -q '"rewritten": *\["up", *"down"\]' ridge/moecompress.json
ok "the manifest has held-out errors" grep -q '"held_out"' ridge/moecompress.json

# --- the router too ----------------------------------------------------------------------------------------------------
# shellcheck disable=SC2086
{
    ok "refit" "$program" prune $common -q -o refit --repair-router refit --json $texts >refit.out 2>stderr
    ok "one thread refits" "$program" prune $common -q -o refit1 --threads 1 --repair-router refit $texts >refit1.out 2>stderr
}
ok "refit verifies" "$program" verify refit "$model" >stdout 2>stderr
ok "refit as with more threads" diff -r refit refit1
ok "what became of routers is said" [ "$(grep -c '"router_refit"' refit.out)" -eq 4 ]
ok "the manifest has the load's shift" grep -q '"load_shift"' refit/moecompress.json
ok "the largest shift is printed" grep -q '^router: fitted in [0-4] of 4 layers; at most [0-9.]* % of the load moves' refit1.out
ok "deep reports it, too" grep -q '"load_shift"' deep/moecompress.json
ok "ridge alone has none" [ -z "$(grep load_shift ridge/moecompress.json)" ]
if [ -z "$sanitized" ]; then
    d=$(kl refit)
    ok "a router is refitted" grep -q '"router_refit": *true' refit.out # the sanitizers' short text is too little for that
    ok "not worse than ridge alone ($d, $b)" awk -v d="$d" -v b="$b" 'BEGIN { exit !(d < 1.01 * b) }'
fi

# --- the same bytes ----------------------------------------------------------------------------------------------------
# shellcheck disable=SC2086
{
    ok "one thread" "$program" prune $common -q -o one --threads 1 --repair deep $texts >stdout 2>stderr
    ok "as with more" diff -r deep one
    ok "a plan" "$program" prune $common -q --plan-only -o plan.json --repair deep $texts >stdout 2>stderr
}
ok "carried out" "$program" apply "$model" plan.json -q -o applied >stdout 2>stderr
ok "as at once" diff -r deep applied
if [ -z "$sanitized" ]; then
    ok "a plan measures as its model" awk -v a="$(kl "$model" --plan plan.json)" -v b="$c" \
        'BEGIN { d = a - b; exit !(a > 0 && d < 1e-6 && d > -1e-6) }'
    start prune $common -q -o killed --repair deep $texts
    for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30; do
        [ ! -e killed.repair.partial/layer-00001.safetensors ] || break
        sleep 0.1
    done
    kill -9 $! 2>/dev/null
    wait $! 2>/dev/null
    ok "killed in between" [ ! -e killed ]
    # shellcheck disable=SC2086
    expect 0 'continuing' prune $common -o killed --repair deep $texts
    ok "as uninterrupted" diff -r deep killed
fi

# --- work that is left -------------------------------------------------------------------------------------------------
# A plan's weights are the folder of work under another name.
cp -r plan.json.weights finished.repair.partial
# shellcheck disable=SC2086
expect 0 'continuing' prune $common -o finished --repair deep $texts
ok "as computed" diff -r deep finished
cp -r plan.json.weights finished.repair.partial
# shellcheck disable=SC2086
expect 3 'is there already' prune $common -o finished --repair deep $texts
ok "what a finished run left is gone" [ ! -e finished.repair.partial ]
cp -r plan.json.weights finished.repair.partial
# shellcheck disable=SC2086
expect 0 'what a finished run left; removed' prune $common -o finished --overwrite $texts
ok "and does not stand in the way of another" diff -r ridge finished
cp -r plan.json.weights finished.repair.partial
# shellcheck disable=SC2086
expect 3 'is there already' prune $common -o finished $texts
ok "work of another output stays" [ -s finished.repair.partial/layer-00000.safetensors ]
# shellcheck disable=SC2086
expect 3 'layers of another model, text or options; --no-resume' prune $common -o finished --overwrite $texts
ok "and is there still" [ -s finished.repair.partial/layer-00000.safetensors ]
cp -r plan.json.weights hashed.repair.partial
printf x | dd of=hashed.repair.partial/layer-00002.safetensors bs=1 seek=70000 conv=notrunc 2>/dev/null
# shellcheck disable=SC2086
expect 3 'layer-00002.safetensors: is not what was written there' prune $common -o hashed --repair deep $texts
ok "nothing written" [ ! -e hashed ]
rm -r hashed.repair.partial finished.repair.partial

# --- what is said ------------------------------------------------------------------------------------------------------
head -n 6 calib.txt >little.txt
expect 0 'of 32 experts that were fitted [0-9]+ saw fewer of the [0-9]+ tokens than they have neurons .96.' \
    prune "$model" --stats stats.h5 --remove 50% --seq-len 128 -o few --text little.txt
expect 0 'windows of 64 tokens, the statistics were collected with --seq-len 128' \
    prune "$model" --stats stats.h5 --remove 50% --seq-len 64 --dry-run --text little.txt
prints 'repair +2.25 MiB of disk beside the output, [0-9]+ token passes' \
    prune "$model" --stats stats.h5 --remove 50% --seq-len 128 --dry-run --text little.txt
ok "nothing to note" [ "$(grep -c 'were collected with' "$work/stderr")" -eq 0 ]
# 4 layers of 8 experts, three matrices of 96 x 192, and the router's rows, in two bytes
prints '"work_disk_bytes": 3551232,' prune "$model" --stats stats.h5 --remove 50% --repair deep --dry-run --json --text little.txt

mkdir lone.json.weights
# --- bad input ---------------------------------------------------------------------------------------------------------
# shellcheck disable=SC2086
{
    expect 2 'give --text' prune $common -o x --repair
    expect 2 'say how --text is read' prune $common -o x --seq-len 128
    expect 2 'say how --text is read' prune $common -o x --tokens 128
    expect 2 'repair none was given' prune $common -o x --repair none --text calib.txt
    expect 2 'goes with --repair deep' prune $common -o x --repair ridge --repair-epochs 3 --text calib.txt
    expect 2 'repair-router refit goes with' prune $common -o x --repair none --repair-router refit
    expect 3 'is there already' prune $common -o plain $texts
    expect 4 'max-memory' prune $common -o x --max-memory 20MiB $texts
    expect 3 'weights: is there already' prune $common --plan-only -o lone.json $texts
    expect 2 'is none of' prune $common -o x --repair=best $texts
}
# weights fitted for one expert must not become another's
cp -r plan.json.weights edited.json.weights
awk '/"layer": / && !done {
    match($0, /"keep": *[[][^]]*/)
    head = substr($0, 1, RSTART - 1); list = substr($0, RSTART, RLENGTH); tail = substr($0, RSTART + RLENGTH)
    n = split(substr(list, index(list, "[") + 1), e, /, */)
    for (i = 1; i <= n && !done; i++) # one expert gives way to the next one, which is not kept
        if (e[i] < 15 && (i == n || e[i + 1] > e[i] + 1)) { e[i]++; done = 1 }
    list = "\"keep\": ["
    for (i = 1; i <= n; i++) list = list (i > 1 ? ", " : "") e[i]
    $0 = head list tail
} { print }' plan.json >edited.json
ok "the plan was edited" [ -n "$(cmp plan.json edited.json 2>&1)" ]
expect 3 'keep lists were edited' apply "$model" edited.json -o x
cp -r plan.json.weights moved.json.weights
cp plan.json moved.json
printf x | dd of=moved.json.weights/layer-00002.safetensors bs=1 seek=70000 conv=notrunc 2>/dev/null
expect 3 'digest' apply "$model" moved.json -o x
expect 3 'digest' eval "$model" --plan moved.json --seq-len 128 --text held.txt
rm -r moved.json.weights
expect 3 'moved.json.weights: the folder of the plan.s weights is missing' apply "$model" moved.json -o x
ok "nothing is left behind" [ -z "$(find . -maxdepth 1 -name "x*")" ]
finish
