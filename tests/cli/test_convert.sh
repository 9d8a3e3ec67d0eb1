#!/bin/sh
# convert: a GGUF becomes a folder that the other verbs take; what users may get wrong; which verbs take the file itself. Tensors,
# config and tokenizers are compared by tests/interop/test_gguf_convert.py.
. "$2/tests/cli/lib.sh"
cd "$work" || exit 1
small=$source/tests/fuzz/corpus/gguf/qwen3-moe.gguf

prints 'FILE.gguf -o OUT' help convert
expect 2 '-o OUT is missing' convert "$small"
expect 2 'dtype' convert "$small" -o out --dtype int4
expect 1 'none.gguf' convert none.gguf -o out
expect 2 'a folder already' convert "$source/recipes/demo-model" -o out
prints '"dtype": "F32"' convert "$small" --dry-run --json
ok 'nothing was written' [ ! -e out ]

prints '"tokenizer": true' convert "$small" -o out --json
for file in config.json model.safetensors tokenizer.json tokenizer_config.json generation_config.json; do
    ok "$file is there" [ -s "out/$file" ]
done
expect 3 'out: is already there; --overwrite' convert "$small" -o out
prints 'qwen3_moe' convert "$small" -o out --overwrite --threads 1
prints 'qwen3_moe' convert "$small" -o again
ok 'the same bytes again' cmp out/model.safetensors again/model.safetensors
prints 'qwen3_moe' convert "$small" -o half --dtype bf16 --shard-size 1kB
ok 'shards and an index' [ -s half/model.safetensors.index.json ]
prints 'qwen3_moe' inspect out
prints 'stacked in three tensors a layer' inspect "$small"

# the file itself as MODEL: the same numbers as the folder's
echo '0 1 2 3 0 2 4 1 2 2' >t.ids
prints 'perplexity' eval "$small" --text t.ids --seq-len 8 --json
sed 's/"seconds[^,]*,//; s/"model": "[^"]*"//' stdout >a
prints 'perplexity' eval out --text t.ids --seq-len 8 --json
sed 's/"seconds[^,]*,//; s/"model": "[^"]*"//' stdout >b
ok 'eval gives the same' [ "$(grep -o '"nll[^,]*\|"perplexity[^,]*' a)" = "$(grep -o '"nll[^,]*\|"perplexity[^,]*' b)" ]
expect 0 '' calibrate "$small" --text t.ids --seq-len 8 -o s.h5
expect 3 'moecompress convert' prune "$small" --stats s.h5 --keep 1 -o pruned

# damaged
head -c 2000 "$small" >cut.gguf
expect 3 'cut.gguf' convert cut.gguf -o bad
sed 's/qwen3moe/qwen9moe/g' "$small" >arch.gguf
expect 3 'qwen9moe, which is not read' convert arch.gguf -o bad
sed 's/general.architecture/general.architectura/' "$small" >none.gguf
expect 3 'general.architecture is missing: no model' inspect none.gguf
sed 's/expert_used_count/expert_usex_count/' "$small" >key.gguf
expect 3 'expert_used_count is missing' inspect key.gguf
echo 'no model' >text.gguf
expect 3 'only GGUF is read' inspect text.gguf
ok 'nothing of them is left' [ ! -e bad ] && [ ! -e bad.partial ]

finish
