#!/bin/sh
# Grains of prune other than whole experts, and --top-k: what is written, what is said, and what is refused at the start.
. "$2/tests/cli/lib.sh"
cd "$work" || exit 1
demo=$source/recipes/demo-model

expect 0 . calibrate "$demo" --text "$demo/samples.txt" --seq-len 64 --max-windows 200 --tier 1 -o one.h5
expect 0 . calibrate "$demo" --text "$demo/samples.txt" --seq-len 64 --max-windows 200 -o zero.h5

# how much, and what does not go together
expect 2 'takes --remove 50% or --keep-width' prune "$demo" --stats one.h5 --grain neurons -o out
expect 2 'takes --remove 50% or --keep-width' prune "$demo" --stats one.h5 --grain neurons --remove 50% --keep-width 48 -o out
expect 2 'takes --sparsity 50% or --pattern 2:4' prune "$demo" --stats one.h5 --grain weights -o out
expect 2 'takes --sparsity 50% or --pattern 2:4' prune "$demo" --stats one.h5 --grain weights --sparsity 50% --pattern 2:4 -o out
expect 2 'takes --remove 10% or --remove N' prune "$demo" --stats one.h5 --grain blocks -o out
expect 2 'go with --grain neurons' prune "$demo" --stats one.h5 --remove 50% --align 16 -o out
expect 2 'go with --grain weights' prune "$demo" --stats one.h5 --remove 50% --pattern 2:4 -o out
expect 2 'all of them stay' prune "$demo" --stats one.h5 --grain neurons --keep 8 --remove 50% -o out
expect 2 'expected N:M' prune "$demo" --stats one.h5 --grain weights --pattern 2x4 -o out
expect 2 'expected N:M' prune "$demo" --stats one.h5 --grain weights --pattern 4:2 -o out
expect 2 'no multiples of 7' prune "$demo" --stats one.h5 --grain weights --pattern 3:7 -o out
expect 2 'take wanda' prune "$demo" --stats one.h5 --grain weights --method owl --pattern 2:4 -o out
expect 2 'one share at a time' prune "$demo" --stats one.h5 --grain neurons --remove 25%,50% --plan-only -o out
expect 2 'zeros of --grain weights other values' prune "$demo" --stats one.h5 --grain weights --sparsity 50% --text "$demo/samples.txt" -o out
expect 2 'not with --grain blocks' prune "$demo" --stats zero.h5 --grain blocks --remove 1 --text "$demo/samples.txt" -o out
expect 2 'give --text' prune "$demo" --stats one.h5 --grain neurons --remove 50% --repair deep -o out
expect 2 'protect is for whole experts' prune "$demo" --stats one.h5 --grain neurons --remove 50% --protect super -o out
expect 2 'are for whole experts' prune "$demo" --stats one.h5 --grain neurons --remove 50% --betas -o out

# neurons
expect 2 'no neuron would be left' prune "$demo" --stats one.h5 --grain neurons --remove 100% -o out
expect 2 'align 128: the experts have 96' prune "$demo" --stats one.h5 --grain neurons --remove 50% --align 128 -o out
expect 2 'no multiple of --align 64' prune "$demo" --stats one.h5 --grain neurons --keep-width 48 --align 64 -o out
expect 2 'the experts have 96' prune "$demo" --stats one.h5 --grain neurons --keep-width 97 -o out
expect 2 'stats' prune "$demo" --grain neurons --remove 50% -o out
expect 3 'act_sq.*--tier 1 collects it' prune "$demo" --stats zero.h5 --grain neurons --remove 50% -o out
expect 3 'xin_sq.*--tier 1 collects it' prune "$demo" --stats zero.h5 --grain weights --method wanda --sparsity 50% -o out
expect 2 'of grain neurons; did you mean' prune "$demo" --stats one.h5 --grain neurons --method out-nrm --remove 50% -o out
expect 2 'reap goes with --grain experts; the methods of --grain weights are magnitude, wanda, owl' \
    prune "$demo" --stats one.h5 --grain weights --method reap --sparsity 50% -o out
expect 2 'energy goes with --grain experts' prune "$demo" --stats one.h5 --grain blocks --method energy --remove 1 -o out
expect 2 'wanda goes with --grain weights; the methods of --grain experts are frequency,.* random' \
    prune "$demo" --stats one.h5 --method wanda --remove 50% -o out
expect 2 'base is not for method wanda' prune "$demo" --stats one.h5 --grain weights --sparsity 50% --base "$demo" -o out
ok "nothing written" [ ! -e out ]
prints 'neurons +96 -> 48' prune "$demo" --stats one.h5 --grain neurons --remove 50% -o narrow
ok "no table of kept experts" [ "$(grep -c 'most removed' "$work/stdout")" -eq 0 ]
ok "no rounding is said where there is none" [ "$(grep -c 'would leave' "$work/stderr")" -eq 0 ]
prints '"ok": true' verify narrow "$demo" --json
ok "the key of the width" grep -q '"moe_intermediate_size": 48' narrow/config.json
ok "no work is left" [ ! -e narrow.thin.partial ]
prints 'neurons +96 -> 64' prune "$demo" --stats one.h5 --grain neurons --remove 25% --align 64 --dry-run
ok "and why" grep -q 'removing 25 % of 96 would leave 72; 64 stay (33.33 %' "$work/stderr"
prints 'thin +4.50 MiB of disk beside the output; ' prune "$demo" --stats one.h5 --grain neurons --remove 25% --dry-run
expect 4 'is too little: [0-9.]+ MiB is the least' \
    prune "$demo" --stats one.h5 --grain neurons --remove 50% --max-memory 2MiB --plan-only -o small.json
expect 4 'is too little: [0-9.]+ MiB is the least' \
    prune "$demo" --stats one.h5 --grain weights --sparsity 50% --max-memory 2MiB --plan-only -o small.json
ok "nothing written" [ -z "$(find . -name 'small*')" ]
expect 3 'there already' prune "$demo" --stats one.h5 --grain neurons --remove 50% -o narrow
prints . prune "$demo" --stats one.h5 --grain neurons --remove 50% --plan-only -o plan.json
prints . apply "$demo" plan.json -o applied
ok "apply writes what prune writes" cmp narrow/model-00001-of-00003.safetensors applied/model-00001-of-00003.safetensors
prints . eval "$demo" --plan plan.json --text "$demo/samples.txt" --seq-len 64 --max-windows 20
sed 's/"rewritten": \["gate"/"rewritten": ["router_bias", "gate"/' plan.json >biased.json
cp -R plan.json.weights biased.json.weights
expect 3 'digest' \
    eval "$demo" --plan biased.json --text "$demo/samples.txt" --seq-len 64 --max-windows 20
mv plan.json.weights elsewhere
expect 3 "plan.json.weights: the folder of the plan's weights is missing" apply "$demo" plan.json -o again
expect 3 "plan.json.weights: the folder of the plan's weights is missing" \
    eval "$demo" --plan plan.json --text "$demo/samples.txt" --seq-len 64 --max-windows 20
mkdir plan.json.weights
expect 3 "plan.json.weights: the plan's weights should be in there, and none are" apply "$demo" plan.json -o again
# a plan without weights in the place of one with them
rmdir plan.json.weights
mv elsewhere plan.json.weights
prints . prune "$demo" --stats one.h5 --remove 50% --plan-only --overwrite -o plan.json
ok "weights of the older plan are gone" [ ! -e plan.json.weights ]
mkdir plan.json.weights
echo mine >plan.json.weights/notes.txt
expect 0 'were not removed: .*holds notes.txt, which was not made' \
    prune "$demo" --stats one.h5 --remove 50% --plan-only --overwrite -o plan.json
expect 3 'holds notes.txt, which was not made' \
    prune "$demo" --stats one.h5 --grain neurons --remove 50% --plan-only --overwrite -o plan.json
ok "what others made stays" [ -s plan.json.weights/notes.txt ]

# neurons, repaired
lines=400
[ -z "${MOEC_SANITIZED:-}" ] || lines=60
head -n $lines "$demo/samples.txt" >calib.txt
tail -n 100 "$demo/samples.txt" >held.txt
narrow="prune $demo --stats one.h5 --grain neurons --remove 50% --seq-len 64 --text calib.txt"
# 4 layers of 16 experts, three matrices of 48 x 192 in two bytes, and for deep the routers' rows
prints 'repair +3.38 MiB of disk beside the output, [0-9]+ token passes' $narrow --dry-run
prints '"work_disk_bytes": 3563520,' $narrow --repair deep --dry-run --json
expect 4 'max-memory' $narrow --max-memory 20MiB -o small
ok "nothing written" [ -z "$(find . -name 'small*')" ]
kl()  # kl MODEL [OPTION...]
{
    "$program" eval "$@" --base "$demo" --seq-len 64 --json -q --text held.txt |
        sed -n 's/^ *"kl": *\([-+.0-9eE]*\),*$/\1/p' | head -n 1
}
for how in ridge deep; do
    prints 'neurons +96 -> 48' $narrow --repair $how -o $how
    ok "errors of every layer are printed" [ "$(grep -cE '^ +[0-3] +[0-9.]+ +[0-9.]+ +[01][.][0-9]+$' "$work/stdout")" -eq 4 ]
    prints '"ok": true' verify $how "$demo" --json
    prints . $narrow --repair $how --threads 1 -o again
    ok "$how: as with more threads" diff -r $how again
    rm -r again
done
expect 0 . calibrate "$demo" --text held.txt --seq-len 64 --max-windows 2 --tier 1 -o few.h5
prints '^unseen +[1-9]' prune "$demo" --stats few.h5 --grain neurons --remove 50% -o unseen
said=$(grep '^unseen ' "$work/stdout")
prints . prune "$demo" --stats few.h5 --grain neurons --remove 50% --seq-len 64 --repair ridge --text calib.txt -o unseen --overwrite
ok "as many unseen experts as without repair" [ "$(grep '^unseen ' "$work/stdout")" = "$said" ]
ok "no work is left" [ -z "$(find . -name '*.partial')" ]
ok "gate, up and down are anew" grep -q '"rewritten": *\["gate", *"up", *"down"\]' ridge/moecompress.json
ok "and their errors are there" [ "$(grep -c '"held_out"' ridge/moecompress.json)" -eq 4 ]
prints . $narrow --repair deep --plan-only -o deep.json
prints . apply "$demo" deep.json -o applied --overwrite
ok "a plan makes what was made at once" diff -r deep applied
if [ -z "${MOEC_SANITIZED:-}" ]; then
    a=$(kl narrow) b=$(kl ridge) c=$(kl deep) d=$(kl "$demo" --plan deep.json)
    ok "ridge is better than nothing ($b, $a), deep better than ridge ($c)" \
        awk -v a="$a" -v b="$b" -v c="$c" 'BEGIN { exit !(b < 0.7 * a && c < 0.95 * b) }'
    ok "a plan measures as its model ($d)" awk -v a="$d" -v b="$c" 'BEGIN { d = a - b; exit !(a > 0 && d < 1e-6 && d > -1e-6) }'
    start $narrow --repair deep -o killed
    for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30; do
        [ ! -e killed.repair.partial/layer-00001.safetensors ] || break
        sleep 0.1
    done
    kill -9 $! 2>/dev/null
    wait $! 2>/dev/null
    ok "killed in between" [ ! -e killed ]
    expect 0 'continuing' $narrow --repair deep -o killed
    ok "as uninterrupted" diff -r deep killed
fi
cp -r deep.json.weights mixed.repair.partial
expect 3 'layers of another model, text or options; --no-resume' $narrow --repair ridge -o mixed
rm -r mixed.repair.partial

# weights
prints 'zeros +1769472 of 3538944 weights of experts .50.00 %.; a dense file is not smaller' prune "$demo" --stats one.h5 --grain weights --pattern 2:4 -o sparse
ok "zeros of each layer" [ "$(grep -c ' 884736 *442368  50.00 %' "$work/stdout")" -eq 4 ]
prints '"zeros": 1769472' prune "$demo" --grain weights --method magnitude --sparsity 50% --overwrite --json -o sparse
prints '"ok": true' verify sparse "$demo" --json

# layers
prints 'layers +4 -> 3' prune "$demo" --stats zero.h5 --grain blocks --remove 1 -o short
ok "the layer and its similarity" [ "$(grep -cE '^ +[0-3] +0[.][0-9]+   dropped$' "$work/stdout")" -eq 1 ]
ok "no table of kept experts" [ "$(grep -c 'most removed' "$work/stdout")" -eq 0 ]
prints '"ok": true' verify short "$demo" --json
prints 'layers +4 -> 2' prune "$demo" --stats zero.h5 --grain blocks --remove 50% --dry-run
expect 2 'the model has 4' prune "$demo" --stats zero.h5 --grain blocks --remove 4 -o none
prints . prune "$demo" --stats zero.h5 --grain blocks --remove 1 --plan-only -o blocks.json
prints . apply "$demo" blocks.json -o short2
ok "apply writes what prune writes" cmp short/config.json short2/config.json
sed 's/"drop_layers": \[[0-9]*\]/"drop_layers": [0, 1, 2, 3]/' blocks.json >all.json
expect 3 'no layer with experts' apply "$demo" all.json -o none
sed 's/"drop_layers": \[[0-9]*\]/"drop_layers": [4]/' blocks.json >beyond.json
expect 3 'the model has 4' apply "$demo" beyond.json -o none
expect 2 'cannot be measured before' eval "$demo" --plan blocks.json --text "$demo/samples.txt"

# top-k
prints 'top-k +4 -> 2' prune "$demo" --top-k 2 -o fewer
ok "the key" grep -q '"num_experts_per_tok": 2' fewer/config.json
prints '"ok": true' verify fewer "$demo" --json
prints 'top-k +4 -> 3' prune "$demo" --stats zero.h5 --remove 50% --top-k 3 -o both
expect 2 'a token uses 4 experts' prune "$demo" --top-k 5 -o none
expect 2 'a token uses 2 experts after the removal' prune "$demo" --stats zero.h5 --keep 2 --top-k 3 -o none
ok "nothing written" [ ! -e none ]

prints 'grain neurons' prune --methods
prints 'energy .the default.' prune --methods
prints '"grain": "blocks"' prune --methods --json
finish
