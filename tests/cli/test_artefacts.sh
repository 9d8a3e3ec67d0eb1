#!/bin/sh
# What offloading runtimes ask: nested codes, copies that share what is not expert, files of thresholds. What is in nested codes is
# compared by tests/interop/test_nested.py, thresholds by tests/unit/test_thresholds.c.
. "$2/tests/cli/lib.sh"
cd "$work" || exit 1
demo=$source/recipes/demo-model
head -n 60 "$demo/samples.txt" >a.txt
tail -n 30 "$demo/samples.txt" >b.txt

# --- nested ---
prints 'nested' quantize --formats
expect 0 '' quantize "$demo" --method clip --bits 3 --format nested --group-size 32 -o nested
prints 'nested codes of few bits' inspect nested
prints 'nested: good' verify nested
prints 'checked byte by byte' verify nested "$demo"
prints '"read_bits": 2' eval nested --text b.txt --seq-len 64 --max-windows 1 --read-bits 2 --json
expect 2 'nested codes have 2 to 8 bits' eval nested --text b.txt --read-bits 1
expect 2 'no matrix is nested' eval "$demo" --text b.txt --read-bits 2
expect 2 'has no 1-bit codes' quantize "$demo" --method clip --bits 1 --format nested --widths 1 -o no
expect 2 'no zero points' quantize "$demo" --method clip --bits 3 --format nested --zero-points -o no
expect 3 'reads no nested codes' quantize "$demo" --method clip --bits 3 --format nested --compat transformers -o no
expect 0 '' quantize "$demo" --method clip --bits 3 --format nested --group-size 32 --threads 1 -o again
ok 'the same bytes on one thread' cmp nested/model-00002-of-00003.safetensors again/model-00002-of-00003.safetensors
expect 0 '' quantize "$demo" --method gptq --bits 3 --format nested --group-size 32 --text a.txt --seq-len 64 --tokens 256 -o rounded
prints 'rounded: good' verify rounded

# --- copies ---
expect 0 '' quantize "$demo" --method clip --bits 4 --group-size 32 --expert-shards -o low
expect 0 'high: 3 of 6 shards .* are one file' quantize "$demo" --method clip --bits 8 --group-size 32 --share-with low -o high
expect 0 'whole: 3 of 6 shards .* are one file' quantize "$demo" --bits 16 --share-with low -o whole
inode() { ls -i "$1" | awk '{print $1}'; }
for shard in 1 2 3; do
    for folder in high whole; do
        ok "$folder: shard $shard is that of low" [ "$(inode low/model-0000$shard-of-00003.safetensors)" = \
            "$(inode $folder/model-0000$shard-of-00003.safetensors)" ]
        ok "$folder: its experts are its own" [ "$(inode low/model-experts-0000$shard-of-00003.safetensors)" != \
            "$(inode $folder/model-experts-0000$shard-of-00003.safetensors)" ]
        ok "$folder: the index has both" [ "$(grep -c "model-0000$shard-of-00003" $folder/model.safetensors.index.json)" -gt 0 ]
    done
done
ok 'experts alone are in shards of experts' sh -c '! grep -h model-experts low/*.index.json | grep -v "\.experts\."'
ok 'and in no others' sh -c '! grep -h "\.experts\." whole/*.index.json | grep -v model-experts'
for folder in low high whole; do
    prints "$folder: good" verify "$folder"
    prints 'checked byte by byte' verify "$folder" "$demo"
done
prints '"kl": 0.0' eval whole --base "$demo" --text b.txt --seq-len 64 --max-windows 1 --json
expect 2 'is not in 0 .. 8; 16 leaves' quantize "$demo" --bits 16 -o no
expect 2 'is not in 0 .. 8' quantize "$demo" --bits 9 --share-with low -o no
expect 2 '.-attention-bits means nothing with --bits 16' quantize "$demo" --bits 16 --attention-bits 4 --expert-shards -o no
expect 2 '.-dtype means nothing with --bits 16' quantize "$demo" --bits 16 --dtype f32 --share-with low -o no
expect 2 'no such folder' quantize "$demo" --bits 16 --share-with nowhere -o no
expect 2 'is the output' quantize "$demo" --bits 16 --share-with low -o low --overwrite
expect 0 'no shard is the same' quantize "$demo" --bits 16 --share-with nested -o apart
prints 'low: good' verify low
ok 'nothing else was written' [ ! -e no ]

# A model of one file gets an index.
tiny_model tiny
expect 0 '' quantize tiny --bits 16 --expert-shards -o tiny-low
expect 0 '2 of 2 shards' quantize tiny --method clip --bits 4 --format fake --share-with tiny-low -o tiny-fake
prints 'tiny-fake: good' verify tiny-fake
prints 'checked byte by byte' verify tiny-low tiny
ok 'no file is taken for the whole' [ ! -e tiny-low/model.safetensors ]
ok "there are two" [ -e tiny-low/model-others.safetensors -a -e tiny-low/model-experts.safetensors ]

# --- thresholds ---
cp -r "$demo" two
sed 's/"num_experts_per_tok": 4/"num_experts_per_tok": 2/' "$demo/config.json" >two/config.json
expect 0 '' calibrate two --text code=a.txt prose=b.txt --seq-len 64 --tokens 256 -o two.h5
expect 0 '' calibrate "$demo" --text b.txt --seq-len 64 --tokens 128 -o four.h5
for kind in odp hobbit premoe; do
    expect 0 "moecompress-$kind" stats export two.h5 --thresholds $kind -o $kind.json
    ok "$kind says what it is" grep -q "\"format\": \"moecompress-$kind\"" $kind.json
    expect 3 'is already there' stats export two.h5 --thresholds $kind -o $kind.json
    prints '"source": ' stats export four.h5 --thresholds $kind -o $kind.json --overwrite --json
done
printf '0,46.7\n1,17.3\n2,5\n3,0.2\n' >sens.csv
expect 3 'lack quant_kl; give --sensitivities' stats export two.h5 --thresholds adapmoe -o adapmoe.json
prints '"cache_size": [0-9]' stats export two.h5 --thresholds adapmoe --sensitivities sens.csv --cache-experts 20 -o adapmoe.json --json
ok 'a threshold is sqrt(0.005 / 0.2)' grep -q '"threshold": 0.158113883008' adapmoe.json
expect 2 'two experts a token, the model has 4' stats export four.h5 --thresholds adapmoe --sensitivities sens.csv -o a4.json
expect 2 '0 to 64 are possible' stats export two.h5 --thresholds adapmoe --sensitivities sens.csv --cache-experts 65 -o no.json
expect 1 'nowhere.csv' stats export two.h5 --thresholds adapmoe --sensitivities nowhere.csv -o no.json
expect 0 '' stats export two.h5 --thresholds hobbit --shares 0.67,0.3 -o shares.json
expect 2 'is two numbers' stats export two.h5 --thresholds hobbit --shares 0.67 -o no.json
expect 2 'is two numbers' stats export two.h5 --thresholds hobbit --cuts nan,nan -o no.json
expect 2 'T1 <= T2' stats export two.h5 --thresholds hobbit --cuts 0.9,0.6 -o no.json
expect 2 'give one' stats export two.h5 --thresholds hobbit --cuts 0.6,0.9 --shares 0.6,0.3 -o no.json
expect 2 'experts a layer: 2' stats export two.h5 --thresholds premoe --keep 1 -o no.json
expect 2 'takes one file, -o FILE' stats export two.h5 --thresholds odp
expect 2 'is for stats export' stats show two.h5 --thresholds odp
expect 3 'not a file of thresholds' stats export two.h5 --thresholds odp -o a.txt --overwrite
ok 'nothing was written' [ ! -e no.json ]

finish
