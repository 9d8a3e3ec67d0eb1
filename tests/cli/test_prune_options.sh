#!/bin/sh
# Options of prune beyond how many: what a model's form does not allow is refused at the start with a reason, and a plan that
# went through a file makes the same.
. "$2/tests/cli/lib.sh"
cd "$work" || exit 1

tiny_model plain
prints '"sglang"' inspect plain --json
prints '"expert_weights": "BF16"' inspect plain --json
prints 'expert storage +one tensor each' inspect plain
expect 2 'multi-token' prune plain --method random --keep 3 --mtp drop -o out
expect 2 'no groups' prune plain --method random --keep 3 --groups drop -o out
expect 2 'no bias' prune plain --method random --keep 3 --pad-to 4 -o out
expect 2 '2 experts|3 experts' prune plain --method random --keep 3 --pad-to 2 -o out
expect 2 'mtp' prune plain --method random --keep 3 --mtp some -o out
expect 2 'dtype' prune plain --method random --keep 3 --dtype int4 -o out
expect 2 'did you mean vllm' prune plain --method random --keep 3 --compat transformers,vlm -o out
expect 3 'llama.cpp will not load.*tokenizer' prune plain --method random --keep 3 --compat all -o out
expect 3 'llama.cpp will not load.*tokenizer' prune plain --method random --keep 3 --compat llama.cpp --dry-run
ok "nothing written" [ ! -e out ]
expect 0 'multiple of 8' prune plain --method random --keep 3 --compat vllm,sglang -o out
printf '{}' >plain/tokenizer.json
prints . prune plain --method random --keep 3 --compat all --dtype f32 -o wide
prints '"ok": true' verify wide plain --json
prints '"expert_weights": "F32"' inspect wide --json
ok "the key of the dtype follows" grep -q '"torch_dtype": "float32"' wide/config.json
prints . prune plain --method random --keep 3 --dtype f32 --plan-only -o plan.json
ok "the plan says so" grep -q '"dtype": "f32"' plan.json
prints . apply plain plan.json --compat transformers -o applied
ok "apply writes what prune writes" cmp wide/model.safetensors applied/model.safetensors
sed 's/"layers"/"pad": 4, "layers"/' plan.json >pad.json
expect 3 'padding' apply plain pad.json -o padded
sed 's/"layers"/"mtp": "keep", "layers"/' plan.json >mtp.json
expect 3 'no multi-token-prediction' apply plain mtp.json -o padded
sed 's/"dtype": "f32"/"dtipe": "f32"/' plan.json >misspelt.json
expect 3 'unknown key dtipe' apply plain misspelt.json -o padded
ok "nothing written" [ ! -e padded ]

# --- scores -----------------------------------------------------------------------------------------------------------
demo=$source/recipes/demo-model
printf '1 2 3 4\n5 6 7\n' >w.ids
expect 0 '7 tokens' calibrate plain --text w.ids --seq-len 8 -o plain.h5
prints '"name": "nllb"' prune --methods --json
prints 'needs selected rank gate_top1_sum' prune --methods
prints '^methods ' prune --help
prints 'arXiv:2603.18492' prune --help
expect 2 'method nllb needs statistics' prune plain --method nllb --keep 3 -o nothing
expect 2 'did you mean tcess-k' prune plain --method tces-k --keep 3 -o nothing
expect 0 'no calibration token selected' prune plain --stats plain.h5 --method seuf --keep 3 --dry-run
tiny_model routed && sed -i 's/"norm_topk_prob": true/"norm_topk_prob": false/' routed/config.json
expect 3 'plain.h5: statistics of another model: router rule' prune routed --stats plain.h5 --method nllb --keep 3 -o nothing
expect 3 'plain.h5: statistics of another model' prune "$demo" --stats plain.h5 --method energy --keep 8 -o nothing
for method in router-row weight-norm aimer; do
    expect 0 'all scores are the same in 1 layer, the first is layer 0' prune plain --method $method --keep 3 --dry-run
done
expect 0 'a token will use 1 instead of 2' prune plain --method router-row --keep 1 --dry-run
expect 2 'is not for method energy' prune plain --stats plain.h5 --base plain --keep 3 -o nothing
expect 2 'is not for method aimer' prune plain --method aimer --stun-lambda2 1 --keep 3 -o nothing
expect 2 'stun-lambda2 needs statistics' prune plain --method stun --stun-lambda2 1 --keep 3 -o nothing
expect 2 'one must be above' prune plain --method stun --stun-lambda1 0 --keep 3 -o nothing
expect 2 'one number of experts' prune plain --method stun --allocation mass --keep 3 -o nothing
prints '"method": "stun"' prune plain --method stun --keep 3 --dry-run --json
expect 2 'base DIR is missing' prune plain --method router-norm --keep 3 -o nothing
expect 3 'router was frozen' prune plain --method router-norm --base plain --keep 3 -o nothing
expect 3 'base: layers: it has 4, the model has 1' prune plain --method router-change --base "$demo" --keep 3 -o nothing
expect 1 '[-][-]base: .*none' prune plain --method router-change --base none --keep 3 -o nothing
ok "nothing written" [ ! -e nothing ]

# --- how many each layer keeps ----------------------------------------------------------------------------------------
expect 2 'min-experts' prune "$demo" --method random --keep 8 --min-experts 4 -o nothing
expect 2 'layers would keep .* no client|layers would keep .* clients load one count' \
    prune "$demo" --method random --keep 8 --allocation global -o nothing
expect 2 'only 8 are kept in the mean' prune "$demo" --method random --keep 8 --allocation mass --min-experts 9 -o nothing
expect 2 'top-k 4' prune "$demo" --method random --keep 3 --allocation global -o nothing
expect 3 'vllm will not load the output .one-count.' \
    prune "$demo" --method random --keep 8 --allocation global --compat vllm --plan-only -o uneven.json
ok "nothing written" [ ! -e uneven.json ]
expect 0 'no client loads that' prune "$demo" --method random --keep 8 --allocation global --dry-run
prints '"loads": false' prune "$demo" --method random --keep 8 --allocation global --dry-run --json
expect 0 'no client loads that' prune "$demo" --method random --keep 8 --allocation mass --plan-only -o uneven.json
expect 3 'clients load one count' apply "$demo" uneven.json -o nothing
ok "nothing written" [ ! -e nothing ]

# --- nested plans -----------------------------------------------------------------------------------------------------
expect 2 'several plans' prune "$demo" --method random --remove 10%,25% -o plans
expect 2 'several plans' prune "$demo" --method random --remove 10%,25% --plan-only
expect 2 'one share at a time' prune plain --stats plain.h5 --betas --remove 25%,50% --plan-only -o plans
expect 2 'must ascend' prune "$demo" --method random --remove 25%,10% --plan-only -o plans
expect 2 'is not a share' prune "$demo" --method random --remove 25%, --plan-only -o plans
expect 2 'is not in 0% .. 100%' prune "$demo" --method random --remove 25%,110% --plan-only -o plans
expect 2 'no expert would be left' prune "$demo" --method random --remove 25%,100% --plan-only -o plans
expect 2 'less than one expert of a layer.s 16; the smallest step is 6.25%' prune "$demo" --method random --remove 6% -o out
expect 2 'makes no ranking' prune "$demo" --method stun --remove 25%,50% --plan-only -o plans
ok "nothing written" [ ! -e plans ]
prints '"plans"' prune "$demo" --method random --remove 12.5%,0.25,50% --plan-only -o plans --json
ok "a file for each share" [ -s plans/remove-12.5.json ] && [ -s plans/remove-25.json ] && [ -s plans/remove-50.json ]
prints . prune "$demo" --method random --remove 25% --plan-only -o alone.json
ok "the plan of one share is the same" cmp alone.json plans/remove-25.json
rm plans/remove-12.5.json
expect 3 'remove-25.json: is already there' prune "$demo" --method random --remove 12.5%,0.25 --plan-only -o plans
ok "nothing written" [ ! -e plans/remove-12.5.json ]

# --- super experts ----------------------------------------------------------------------------------------------------
prints 'super expert.*largest output above' stats super plain.h5
prints '"percentile_99_5"' stats super plain.h5 --top 0 --json
expect 3 'alone.json' stats super alone.json
expect 2 'takes one file' stats super plain.h5 plain.h5
finish
