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
finish
