#!/bin/sh
# factor: what is written, what is said, and what is refused at the start.
. "$2/tests/cli/lib.sh"
cd "$work" || exit 1
demo=$source/recipes/demo-model
text="--text $demo/samples.txt --seq-len 64 --max-windows 40"

# how much, and what does not go together
expect 2 'MODEL is missing' factor --ratio 50% -o out
expect 2 'give --ratio 50% or --rank N' factor "$demo" -o out
expect 2 'say the same thing' factor "$demo" --ratio 50% --rank 4 -o out
# shellcheck disable=SC2086
{
expect 2 'OUT is missing' factor "$demo" $text --ratio 50%
expect 2 'give --text FILE' factor "$demo" --ratio 50% -o out
expect 2 'no such method; did you mean svd' factor "$demo" $text --method svt --ratio 50% -o out
expect 2 'keep-rows goes with --method mc-smoe' factor "$demo" $text --keep-rows 5% --ratio 50% -o out
expect 2 'cores goes with --method mpo' factor "$demo" $text --cores 3 --ratio 50% -o out
expect 2 'a train of one tensor' factor "$demo" --method mpo --cores 1 --ratio 50% -o out
expect 2 'width takes --ratio' factor "$demo" $text --method width --rank 3 -o out
expect 2 'leaves no rank for matrices .96, 192.: 1.57% is the least' factor "$demo" $text --ratio 1% -o out
expect 2 'beside the kept rows' factor "$demo" $text --method mc-smoe --keep-rows 50% --ratio 50% -o out
expect 2 'beside the base' factor "$demo" $text --method base-delta --ratio 5% -o out
expect 2 'as large as they are' factor "$demo" $text --rank 64 -o out
expect 1 'nothing.txt' factor "$demo" --text nothing.txt --ratio 50% -o out
expect 3 'compat: vllm will not load the output .factors.' factor "$demo" $text --ratio 50% --emit factored --compat vllm -o out
expect 4 'max-memory 1.00 MiB: writing needs|is too little' factor "$demo" $text --ratio 50% --max-memory 1MiB -o out
ok "nothing written" [ ! -e out ]
prints 'rank 32' factor "$demo" $text --ratio 50% --dry-run
prints '"factors": 3538944' factor "$demo" $text --ratio 50% --dry-run --json
prints '^factor .* of disk beside the output, [0-9]+ token passes; its time is not estimated$' \
    factor "$demo" $text --ratio 50% --dry-run
prints '"work_disk_bytes": 10616832,' factor "$demo" $text --ratio 50% --dry-run --json # 4 x 16 experts of 3 x 96 x 192, BF16, and half of that
prints '"token_passes": 0,' factor "$demo" --method mpo --ratio 50% --dry-run --json
prints 'neurons +96 -> 48' factor "$demo" $text --method width --ratio 50% --dry-run
prints 'bonds' factor "$demo" --method mpo --ratio 50% --dry-run
prints 'base-delta' factor --methods
prints '"arxiv": "2502.17298"' factor --methods --json

# dense: as large as before, for every client
prints 'NOT smaller' factor "$demo" $text --ratio 50% -o dense
prints '"ok": true' verify dense "$demo" --json
ok "no work is left" [ ! -e dense.factor.partial ]
expect 3 'there already' factor "$demo" $text --ratio 50% -o dense
prints . eval dense --base "$demo" $text

# factored: small, and not for this program
prints 'modeling_moecompress' factor "$demo" $text --ratio 50% --emit factored -o small
prints '"ok": true' verify small "$demo" --json
prints '"ok": true' verify small --json
ok "the modelling file" cmp small/modeling_moecompress.py "$source/lib/run/modeling_moecompress.py"
ok "config names it" grep -q '"AutoModelForCausalLM": "modeling_moecompress.CompressedForCausalLM"' small/config.json
prints 'experts +their matrices are factors: svd' inspect small
prints '"emit": "factored"' inspect small --json
expect 3 'its experts are factors, which transformers runs' eval small --text "$demo/samples.txt"
expect 3 'its experts are factors' prune small --method router-row --keep 8 -o out
ok "smaller" [ "$(du -sk small | cut -f1)" -lt "$(du -sk dense | cut -f1)" ]
size=$(wc -c <small/model-00002-of-00003.safetensors)
printf 'x' | dd of=small/model-00002-of-00003.safetensors bs=1 seek=$((size - 5)) conv=notrunc 2>/dev/null
run verify small "$demo"
ok "a changed byte is found" [ "$code" -eq 3 ]

# what the source has under the modelling file's name does not take its place; a slash behind OUT changes nothing
cp -r "$demo" named && echo 'x = 1' >named/modeling_moecompress.py
expect 2 'the output is the source' factor named $text --ratio 50% --overwrite -o named
ok "no work is left" [ ! -e named.factor.partial ]
prints . factor named $text --ratio 50% --emit factored -o ours/
ok "the modelling file is ours" cmp ours/modeling_moecompress.py "$source/lib/run/modeling_moecompress.py"
prints '"ok": true' verify ours named --json

# a plan: measured, applied, the same bytes
prints . factor "$demo" $text --ratio 50% --emit factored --plan-only -o plan.json
ok "its weights" [ -d plan.json.weights ]
prints . eval "$demo" --plan plan.json $text
cp stdout of-plan
prints . eval dense --base "$demo" $text
ok "the plan measures what dense is" cmp stdout of-plan
prints . apply "$demo" plan.json -o applied
prints . factor "$demo" $text --ratio 50% --emit factored --threads 3 -o again
ok "apply writes the same" diff -r applied again

# what another run left is replaced where that is asked for, and only then
expect 3 'there already' factor "$demo" $text --ratio 40% --plan-only -o plan.json
prints . factor "$demo" $text --ratio 40% --plan-only --overwrite -o plan.json
cp -r plan.json.weights left.factor.partial
expect 3 'finished layers of another model, text or options' factor "$demo" $text --ratio 50% -o left
prints . factor "$demo" $text --ratio 50% --no-resume -o left
ok "nothing of it is left" [ ! -e left.factor.partial ]
mkdir taken
expect 3 'there already' factor "$demo" $text --method width --ratio 50% -o taken
ok "before anything is run" [ ! -e taken.stats.h5 ]

# what is continued is what was written
prints . factor "$demo" $text --method pivot --ratio 50% --plan-only -o pivot.json
sed 's/"kind": "pivot"/"kind": "svd"/' pivot.json >svd.json && cp -r pivot.json.weights svd.json.weights
expect 3 'fitted weights have digest' apply "$demo" svd.json -o applied-svd
mv pivot.json.weights changed.factor.partial
printf '\377\377\377\377' | dd of=changed.factor.partial/layer-00001-factors.safetensors bs=1 seek=20000 conv=notrunc 2>/dev/null
expect 3 'is not what was written there' factor "$demo" $text --method pivot --ratio 50% -o changed

# neurons instead, by the same bytes
prints 'neurons +96 -> 48' factor "$demo" $text --method width --ratio 50% -o narrow
prints '"ok": true' verify narrow "$demo" --json
ok "no statistics are left" [ ! -e narrow.stats.h5 ]
}
finish
