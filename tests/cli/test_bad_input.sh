#!/bin/sh
# Bad input of every kind ends in exit code 3 (4 when the disk is full) and one line that says where and what was expected;
# nothing appears under a final name, and the source is never touched.
. "$2/tests/cli/lib.sh"
cd "$work" || exit 1
demo=$source/recipes/demo-model

tiny_model good
prints '"model_type": "qwen3_moe"' inspect good --json
prints '"routed_experts": 384' inspect good --json

# --- the safetensors container ----------------------------------------------------------------------------------------
expect_st()  # expect_st PATTERN    what inspect says of the model in bad/
{
    expect 3 "$1" inspect bad
    rm -rf bad
}

tiny_model bad && : >bad/model.safetensors
expect_st 'model.safetensors: '
tiny_model bad && printf '\10\0\0' >bad/model.safetensors
expect_st 'model.safetensors: '
tiny_model bad && head -c 500 good/model.safetensors >bad/model.safetensors
expect_st 'model.safetensors: .*header'
tiny_model bad && { little_endian 2000000000 && tiny_header; } >bad/model.safetensors
expect_st 'model.safetensors: .*header'
tiny_model bad && printf '\377\377\377\377\377\377\377\377{}' >bad/model.safetensors
expect_st 'model.safetensors: .*header'
tiny_model bad && { little_endian 200000000 && truncate -s 300000000 bad/model.safetensors; } 1<>bad/model.safetensors
expect_st 'model.safetensors: .*header'
tiny_model bad && truncate -s -10 bad/model.safetensors # data cut short
expect_st 'model.safetensors: '
tiny_model bad && printf 'xxxx' >>bad/model.safetensors # bytes that belong to nobody
expect_st 'model.safetensors: '
tiny_model bad && safetensors bad/model.safetensors '[1,2]' 0
expect_st 'model.safetensors: '
tiny_model bad && safetensors bad/model.safetensors "$(tiny_header)}" $tiny_bytes
expect_st 'model.safetensors: '

# One edit of a good header each.
while IFS='|' read -r pattern script; do
    [ -n "$pattern" ] || continue
    tiny_damaged bad "$script"
    expect_st "$pattern"
done <<'END'
model.norm.weight|s/\[256,272\]/[256,288]/
model.norm.weight|s/\[256,272\]/[240,256]/
model.norm.weight|s/\[256,272\]/[272,256]/
model.norm.weight|s/\[256,272\]/[-256,272]/
model.safetensors: .*too big|s/\[256,272\]/[256,18446744073709551615]/
model.safetensors: .*too big|s/\[256,272\]/[256,99999999999999999999]/
model.norm.weight|s/\[256,272\]/[256]/
model.norm.weight|s/\[256,272\]/[256.0,272.0]/
model.norm.weight|s/\[256,272\]/"256"/
model.norm.weight|s/"shape":\[8\],"data_offsets":\[256,272\]/"data_offsets":[256,272]/
model.norm.weight|s/"dtype":"BF16","shape":\[8\],"data_offsets":\[256,272\]/"dtype":"BF17","shape":[8],"data_offsets":[256,272]/
BF17|s/"dtype":"BF16","shape":\[8\],"data_offsets":\[256,272\]/"dtype":"BF17","shape":[8],"data_offsets":[256,272]/
model.norm.weight|s/"shape":\[8\],"data_offsets":\[256,272\]/"shape":[4294967296,4294967296,8],"data_offsets":[256,272]/
model.norm.weight|s/"shape":\[8\],"data_offsets":\[256,272\]/"shape":[9223372036854775807],"data_offsets":[256,272]/
model.norm.weight|s/"shape":\[8\],"data_offsets":\[256,272\]/"shape":[-8],"data_offsets":[256,272]/
model.norm.weight|s/"shape":\[8\],"data_offsets":\[256,272\]/"shape":[1,1,1,1,1,1,1,1,8],"data_offsets":[256,272]/
model.safetensors: .*duplicate|s/model.norm.weight/model.embed_tokens.weight/
model.safetensors: |s/^{/{"__metadata__":{"format":1},/
model.safetensors: |s/^{/{{/
END

# --- folder, index, shards --------------------------------------------------------------------------------------------
expect 1 "no/such/model" inspect no/such/model
mkdir bad && expect_st 'config.json'
mkdir bad && tiny_config >bad/config.json
expect_st 'safetensors'
expect 3 "model.safetensors" inspect good/model.safetensors

index()  # index SHARD_NAME    a sharded bad/ whose index puts every tensor into SHARD_NAME
{
    tiny_model bad
    mv bad/model.safetensors bad/a.safetensors
    tiny_header | sed -e 's/{"dtype"[^}]*}/"SHARD"/g' -e 's/^/{"metadata":{"total_size":1536},"weight_map":/' -e 's/$/}/' \
        -e "s#SHARD#$1#g" >bad/model.safetensors.index.json
}
index a.safetensors
prints '"shards": 1' inspect bad --json
rm -rf bad
index ../good/model.safetensors && expect_st 'outside the folder'
index "$work/good/model.safetensors" && expect_st 'outside the folder'
index .. && expect_st 'outside the folder'
index b.safetensors && expect_st 'b.safetensors'
index a.safetensors && sed -i 's/model.norm.weight/model.norm.wait/' bad/model.safetensors.index.json
expect_st 'model.norm.wait'
index a.safetensors && echo '{"weight_map":[1]}' >bad/model.safetensors.index.json
expect_st 'model.safetensors.index.json'
index a.safetensors && echo '{' >bad/model.safetensors.index.json
expect_st 'model.safetensors.index.json'
index a.safetensors && ln -sf /etc/passwd bad/a.safetensors
expect_st 'a.safetensors'

# --- tensors ----------------------------------------------------------------------------------------------------------
tiny_damaged bad 's/layers.0.mlp.experts.3.up_proj.weight/layers.0.mlp.experts.9.up_proj.weight/'
expect_st 'model.layers.0.mlp.experts.3.up_proj.weight'
tiny_damaged bad 's/layers.0.self_attn.k_norm.weight/layers.1.post_attention_layernorm.weight/'
expect_st 'model.layers.0.self_attn.q_norm.weight is there, its counterpart'
tiny_damaged bad 's/layers.0.mlp.experts.3/layers.0.mlp.experts.7/g'
sed -i 's/"num_experts": 4/"num_experts": 3/; s/"num_experts_per_tok": 2/"num_experts_per_tok": 1/' bad/config.json
expect_st 'mlp.gate.weight is .4, 8., expected .3, 8.'
tiny_damaged bad 's/\(mlp.gate.weight":{"dtype":"BF16","shape":\)\[4,8\]/\1[8,4]/'
expect_st 'mlp.gate.weight.*\[8, 4\].*\[4, 8\]'
tiny_damaged bad 's/\(experts.2.down_proj.weight":{"dtype":"BF16","shape":\)\[8,4\]/\1[32]/'
expect_st 'experts.2.down_proj.weight.*\[32\].*\[8, 4\]'
tiny_damaged bad 's/\(mlp.gate.weight":{"dtype":"\)BF16/\1I16/'
expect_st 'mlp.gate.weight.*I16'

# --- config.json ------------------------------------------------------------------------------------------------------
config()  # config PATTERN SED_SCRIPT
{
    tiny_model bad
    sed -i "$2" bad/config.json
    expect_st "$1"
}
config 'llama is no Mixture-of-Experts family that is read.*moecompress families' 's/qwen3_moe/llama/'
config 'model_type' '/model_type/d'
config 'model_type' 's/"qwen3_moe"/7/'
config 'num_experts_per_tok|top-k|top_k' 's/"num_experts_per_tok": 2/"num_experts_per_tok": 5/'
config 'num_experts_per_tok|top-k|top_k' 's/"num_experts_per_tok": 2/"num_experts_per_tok": 0/'
config 'num_experts' 's/"num_experts": 4/"num_experts": -4/'
config 'num_experts' 's/"num_experts": 4/"num_experts": "4"/'
config 'num_experts' 's/"num_experts": 4/"num_experts": 4.5/'
config 'hidden_size' 's/"hidden_size": 8/"hidden_size": 9223372036854775807/'
config 'hidden_size' 's/"hidden_size": 8, //'
config 'num_hidden_layers|layers.1' 's/"num_hidden_layers": 1/"num_hidden_layers": 2/'
config 'scoring_func is sigmoid' 's/"num_hidden_layers": 1/"num_hidden_layers": 1, "scoring_func": "sigmoid"/'
config 'text_config is not an object' 's/"num_hidden_layers": 1/"num_hidden_layers": 1, "text_config": []/'
config 'num_attention_heads|heads' 's/"num_attention_heads": 2/"num_attention_heads": 0/'
config 'rope' 's/"rope_theta": 10000.0/"rope_scaling": {"rope_type": "wobbly", "factor": 2.0}/'
config 'config.json' 's/8/8,,/'
config 'config.json' 's/qwen3_moe/qwen3_\xff\xfe/'
config 'config.json.*duplicate|config.json' 's/"num_experts": 4/"num_experts": 4, "num_experts": 4/'
config 'config.json.*NUL' 's/"num_experts": 4,/"num_experts": 4\x00,/'

tiny_model bad && : >bad/config.json
expect_st 'config.json'
tiny_model bad && echo '[]' >bad/config.json
expect_st 'config.json'
tiny_model bad && { printf '{"x":' && head -c 100000 /dev/zero | tr '\0' '[' && printf '}'; } >bad/config.json
expect_st 'config.json'
tiny_model bad && { printf '{"x":"' && head -c 150000000 /dev/zero | tr '\0' 'x' && printf '"}'; } >bad/config.json
expect_st 'config.json'

# --- text -------------------------------------------------------------------------------------------------------------
echo '0 1 2 3 4 5 6 7' >ids.ids
prints 'overall' eval good --text ids.ids
: >empty.txt && : >empty.ids
expect 3 'empty.ids' eval good --text empty.ids
expect 3 'empty.txt' eval "$demo" --text empty.txt
echo '1 2 16' >high.ids
expect 3 'high.ids' eval good --text high.ids
echo '1 two 3' >word.ids
expect 3 'word.ids.*two' eval good --text word.ids
expect 1 'nothing.txt' eval "$demo" --text nothing.txt
expect 2 'text is missing' eval good
expect 3 'tokenizer.json: is not there; give token ids instead' eval good --text "$source/README.md" # text for a model without a tokenizer
printf 'The king said \377\376 to the people of the land, and \300\257 they went up to the city.\n' >latin.txt
expect 0 'latin.txt: [34] ' eval "$demo" --text latin.txt

# --- weights that are not numbers -------------------------------------------------------------------------------------
poison()  # poison TENSOR BYTES    the first value of TENSOR in bad/
{
    tiny_model bad
    header=$(tiny_header)
    at=$(printf '%s' "$header" | sed 's/.*"'"$1"'":{[^}]*"data_offsets":\[\([0-9]*\),.*/\1/')
    # shellcheck disable=SC2059
    printf "$2" | dd of=bad/model.safetensors bs=1 seek=$((8 + ${#header} + at)) conv=notrunc status=none
}
for tensor in model.embed_tokens.weight model.layers.0.mlp.gate.weight model.layers.0.mlp.experts.1.down_proj.weight \
    model.layers.0.self_attn.q_proj.weight model.norm.weight; do
    for bits in '\300\177' '\200\177'; do # a NaN, an infinity
        poison $tensor "$bits"
        expect 3 "$tensor.*(NaN|finite)" eval bad --text ids.ids
        if [ $tensor != model.norm.weight ]; then # calibration has no use for the last one
            expect 3 "$tensor.*(NaN|finite)" calibrate bad --text ids.ids -o bad.h5
            ok "no statistics of $tensor" [ ! -e bad.h5 ]
        fi
    done
done
rm -rf bad

# --- statistics -------------------------------------------------------------------------------------------------------
run calibrate good --text ids.ids -o good.h5
ok "calibrate" [ "$code" -eq 0 ]
expect 3 'good.h5.*already|exists' calibrate good --text ids.ids -o good.h5
tiny_model other && sed -i 's/"num_experts_per_tok": 2/"num_experts_per_tok": 1/' other/config.json
run calibrate other --text ids.ids -o other.h5
prints '"model_type": "qwen3_moe"' stats show good.h5 --json
prints 'coverage' stats show good.h5
expect 3 'other.h5' stats merge good.h5 other.h5 -o both.h5
ok "nothing written" [ ! -e both.h5 ]
expect 0 '' stats merge good.h5 good.h5 -o twice.h5
expect 3 'twice.h5' stats merge good.h5 good.h5 -o twice.h5
expect 2 'none of show, merge, export, super and store' stats shwo good.h5
expect 3 'ids.ids' stats show ids.ids
head -c 2000 good.h5 >cut.h5
expect 3 'cut.h5' stats show cut.h5
expect 1 'no.h5' stats show no.h5
head -c 100000 /dev/urandom >noise.h5
expect 3 'noise.h5' stats show noise.h5

# --- writing ----------------------------------------------------------------------------------------------------------
before=$(cd good && cksum ./*)
expect 3 'another model' prune "$demo" --stats good.h5 --method frequency --remove 50% -o out
ok "nothing written" [ ! -e out ]
mkdir out
expect 3 'out' prune good --stats good.h5 --method frequency --remove 25% -o out
rmdir out
expect 2 'no-such-method|method' prune good --stats good.h5 --method no-such-method --remove 25% -o out
expect 2 'remove' prune good --stats good.h5 --method frequency --remove 250% -o out
expect 1 'no.h5' prune good --stats no.h5 --method frequency --remove 25% -o out
chmod -R a-w good
expect 0 '' prune good --stats good.h5 --method frequency --remove 25% -o out
ok "written" [ -e out/config.json ]
chmod -R u+w good
ok "the source is as it was" [ "$before" = "$(cd good && cksum ./*)" ]
echo '{"moecompress_plan": 1, "kind": "prune"}' >short.json
expect 3 'short.json' apply good short.json -o out2
ok "nothing written" [ ! -e out2 ]

# --- outputs that would destroy something -----------------------------------------------------------------------------
before=$(cd good && cksum ./* ../ids.ids)
expect 3 'config.json.*not replaced' calibrate good --text ids.ids -o good/config.json --overwrite
expect 3 'ids.ids.*not replaced' calibrate good --text ids.ids -o ids.ids --overwrite
expect 3 'config.json.*not replaced' calibrate good --text ids.ids -o new.h5 --trace good/config.json --overwrite
expect 3 'config.json.*not replaced' stats merge good.h5 good.h5 -o good/config.json --overwrite
expect 3 'config.json.*not replaced' prune good --method random --keep 2 --plan-only -o good/config.json --overwrite
mkfifo pipe
expect 3 'pipe.*not a regular file' calibrate good --text ids.ids -o pipe --overwrite
expect 2 'same file' calibrate good --text ids.ids -o new.h5 --trace ./new.h5
expect 2 'empty name' calibrate good --text ids.ids -o ''
ok "nothing written" [ ! -e new.h5 ]
ok "the inputs are as they were" [ "$before" = "$(cd good && cksum ./* ../ids.ids)" ]
expect 0 '' calibrate good --text ids.ids -o good.h5 --overwrite
prints . prune good --method random --keep 2 --plan-only -o new/folder/plan.json
prints . prune good --method random --keep 3 --plan-only -o new/folder/plan.json --overwrite
prints . eval good --text ids.ids --save-reference new/er/reference
expect 3 'reference.*already' eval good --text ids.ids --save-reference new/er/reference
cp -r good latin && : >"latin/$(printf 'l\377.txt')"
expect 3 'not UTF-8' prune latin --method random --keep 2 -o latin-out
ok "nothing written" [ ! -e latin-out ]
expect 2 'bash only' completion zsh

# --- names that would drive the terminal ------------------------------------------------------------------------------
run calibrate good --text "$(printf 'x\n\033[31m=ids.ids')" -o escape.h5
prints . stats show escape.h5
ok "no control characters" [ -z "$(tr -d '[:print:]\n' <"$work/stdout")" ]
prints . prune good --method random --keep 2 -o stray
: >"stray/$(printf 'x\n\033[31m')"
run verify stray
ok "the stray file is found" [ "$code" -eq 3 ]
ok "no control characters" [ -z "$(tr -d '[:print:]\n' <"$work/stdout")" ]

# --- a full disk ------------------------------------------------------------------------------------------------------
full_disk()  # full_disk FOLDER
{
    expect 4 'No space left|too large|free|fit' calibrate "$demo" --text "$demo/samples.txt" --seq-len 128 --tokens 2000 -o "$1/s.h5"
    ok "nothing written" [ ! -e "$1/s.h5" ]
    expect 4 'No space left|too large|free|fit' prune "$demo" --stats demo.h5 --method frequency --remove 25% -o "$1/out"
    ok "nothing written" [ ! -e "$1/out" ]
}
run calibrate "$demo" --text "$demo/samples.txt" --seq-len 128 --tokens 2000 -o demo.h5
ok "calibrate the demo model" [ "$code" -eq 0 ]
mkdir small
if [ "$(id -u)" -eq 0 ] && mount -t tmpfs -o size=16k tmpfs small 2>/dev/null; then
    full_disk small
    umount small
elif [ "$(id -u)" -eq 0 ] && command -v mkfs.ext2 >/dev/null 2>&1 && truncate -s 256k disk &&
    mkfs.ext2 -q -F disk && mount -o loop disk small 2>/dev/null; then
    full_disk small
    umount small
else
    echo "no small file system can be mounted here: a limit on file sizes stands in for a full disk"
    trap '' XFSZ
    ulimit -f 32
    full_disk small
    ulimit -f unlimited 2>/dev/null
fi
finish
