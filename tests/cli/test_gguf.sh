#!/bin/sh
# quantize --format gguf: types by rules and by budgets, the size that was said, one file or several, the same bytes on any number of
# threads and after an interrupt; verify finds damage; bad input.
. "$2/tests/cli/lib.sh"
cd "$work" || exit 1
demo=$source/recipes/demo-model
: >stderr
lines=10
[ -z "${MOEC_SANITIZED:-}" ] || lines=4
head -n $lines "$demo/samples.txt" >text.txt

gguf()  # gguf OUT ARGUMENTS...    the demo model, without a word
{
    out=$1
    shift
    checks=$((checks + 1))
    run quantize "$demo" --format gguf -q -o "$out" "$@"
    [ "$code" -eq 0 ] && sane || fail "quantize --format gguf -o $out $*: exit code $code"
}

value()  # value KEY    the first number of that name in stdout
{
    sed -n "s/^ *\"$1\": *\([-+.0-9eE]*\),*\$/\1/p" stdout | head -n 1
}

size()  # size FILE...
{
    cat "$@" | wc -c
}

# --- by rules: no text, no statistics ---------------------------------------------------------------------------------------
rules='q4_k,ffn_down_exps=q6_k,blk\.[0,1]\..*attn=q8_0,token_embd=f16'
expect 0 'experts down: rows of 96 are not whole blocks of q6_k: q8_0 instead, in 4 tensors' quantize "$demo" --format gguf --types "$rules" -o a.gguf
ok "one line for each kind" [ "$(grep -c 'experts gate: rows' stderr)" -eq 1 ]
prints 'good; 50 tensors' verify a.gguf "$demo"
prints 'checked: the container' verify a.gguf
prints '"ok": true' verify a.gguf "$demo" --json
prints '"file_bytes": '"$(size a.gguf)"'' quantize "$demo" --format gguf --types "$rules" --dry-run --json
prints '^blk.3.ffn_down_exps.weight +16x192x96 +Q8_0 +313344$' quantize "$demo" --format gguf --types "$rules" --dry-run
gguf again.gguf --types "$rules" --threads 3
ok "three threads" cmp a.gguf again.gguf
gguf again.gguf --types q8_0 --overwrite
ok "another file now" [ "$(size a.gguf)" -ne "$(size again.gguf)" ]
gguf parts --types "$rules" --shard-size 1MiB
ok "several files" [ -f parts/parts-00001-of-00005.gguf ]
prints 'good; 50 tensors.* 5 files' verify parts "$demo"
prints 'good' verify parts/parts-00001-of-00005.gguf "$demo"
expect 3 'there already|already there' quantize "$demo" --format gguf --types q8_0 --shard-size 1MiB -o parts
gguf parts --types q8_0 --shard-size 2MiB --overwrite
ok "the folder is replaced" [ -f parts/parts-00001-of-00003.gguf ]

# --- by a budget: measured once ---------------------------------------------------------------------------------------------
prints '^bits +(4.9|5.00)' quantize "$demo" --format gguf --bits 5 --text text.txt --seq-len 64 -o b.gguf
ok "statistics are kept" [ -f b.gguf.stats.h5 ]
ok "what may be said of unseen experts" grep -q 'has the cost of every type now' stderr
prints 'good' verify b.gguf "$demo"
stats="--stats b.gguf.stats.h5"
cp b.gguf.stats.h5 before.h5
prints '"expected_kl"' quantize "$demo" --format gguf --bits 5 $stats --dry-run --json
ok "the file's size is what was said" [ "$(value file_bytes)" -eq "$(size b.gguf)" ]
ok "and its bits" awk -v b="$(value bits)" 'BEGIN { exit !(b <= 5 && b > 4.9) }'
gguf b3.gguf --bits 5 $stats --threads 3
ok "the same from the file, on three threads" cmp b.gguf b3.gguf
ok "statistics are not touched" cmp before.h5 b.gguf.stats.h5
for target in 2900000 3200001 3MiB; do
    prints '"file_bytes"' quantize "$demo" --format gguf $stats --target-size $target --json -q -o "t.$target.gguf"
    bytes=$target
    [ $target != 3MiB ] || bytes=3145728
    ok "$target: $(size "t.$target.gguf") bytes" [ "$(size "t.$target.gguf")" -le $bytes ]
    ok "$target is used" [ "$(size "t.$target.gguf")" -gt $((bytes - 20000)) ]
    prints 'good' verify "t.$target.gguf" "$demo"
done
gguf tparts $stats --target-size 3MiB --shard-size 700KiB
ok "so many files fit too" [ "$(size tparts/*)" -le 3145728 ]
gguf rest.gguf $stats --bits 5.5 --types 'token_embd=q8_0' --pair-gate-up --candidates iq4_nl,q8_0
prints '^ *5,?5? *5.000|^ *5 +[45]\.' quantize "$demo" --format gguf $stats --sweep 4.5,5,3MiB
prints '"expected_kl"' quantize "$demo" --format gguf $stats --sweep 4.5,6 --json
prints '^ *1 not possible: .*below the least' quantize "$demo" --format gguf $stats --sweep 5,1
expect 4 'below the least' quantize "$demo" --format gguf $stats --sweep 1,2
prints '"expected_kl"' quantize "$demo" --format gguf $stats --candidates q8_0 --bits 8.5 --dry-run --json
one=$(value expected_kl)
prints '"expected_kl"' quantize "$demo" --format gguf $stats --bits 8.5 --dry-run --json
ok "never worse than one type for all ($one, $(value expected_kl))" awk -v a="$one" -v b="$(value expected_kl)" 'BEGIN { exit !(b <= a * 1.000001) }'

gguf plain.gguf --types iq4_nl
gguf weighed.gguf --types iq4_nl $stats
ok "statistics weigh the columns" [ "$(cmp -l plain.gguf weighed.gguf 2>/dev/null | wc -l)" -gt 10000 ]
prints 'good' verify weighed.gguf "$demo"

# --- a source that is a GGUF with embeddings in blocks: as the folder with its values -------------------------------------------
prints 'in F32' convert again.gguf --dtype f32 -o back
for model in again.gguf back; do
    expect 0 '' calibrate $model --text text.txt --seq-len 32 --max-windows 2 --gguf --gguf-tokens 32 -o from.$model.h5
    prints '"expected_kl"' quantize $model --format gguf --stats from.$model.h5 --bits 6 --dry-run --json
    value expected_kl >>kl.txt
    value tensor_bytes >>kl.txt
done
ok "both cost the same ($(paste -s -d' ' kl.txt))" [ "$(head -n 2 kl.txt)" = "$(tail -n 2 kl.txt)" ]

# --- interrupted ------------------------------------------------------------------------------------------------------------
start quantize "$demo" --format gguf -q $stats --bits 5 --threads 1 -o cut.gguf
victim=$!
sleep 0.12
kill -INT $victim 2>/dev/null
wait $victim
code=$?
ok "interrupted or done ($code)" [ $((code == 5 || code == 0 || code == 130)) -eq 1 ]
[ -f cut.gguf ] || gguf cut.gguf $stats --bits 5
ok "the same after it" cmp b.gguf cut.gguf

# --- damage -----------------------------------------------------------------------------------------------------------------
cp b.gguf bad.gguf
printf '\377\177\377\177\377\177\377\177\377\177\377\177\377\177\377\177\377\177\377\177\377\177\377\177\377\177\377\177\377\177\377\177' |
    dd of=bad.gguf bs=1 seek=$(($(size b.gguf) - 50000)) conv=notrunc 2>/dev/null
run verify bad.gguf "$demo"
ok "damage is found" [ "$code" -eq 3 ]
ok "and named" grep -q '^problem: blk.3.ffn_down_exps.weight' stdout
head -c 100000 b.gguf >cut.gguf
run verify cut.gguf "$demo"
ok "a file that is cut short" [ "$code" -eq 3 ]
# a tensor of no bytes with 2^40 experts: nothing is allocated or counted for them
printf 'GGUF\003\0\0\0\001\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\001\0\0\0\0\0\0\0a\003\0\0\0' >hollow.gguf
printf '\0\0\0\0\0\0\0\0\001\0\0\0\0\0\0\0\0\0\0\0\0\001\0\0\0\0\0\0\0\0\0\0\0\0\0\0' >>hollow.gguf
head -c 23 /dev/zero >>hollow.gguf
prints 'good; 1 tensors' verify hollow.gguf
mkfifo pipe
run verify pipe
ok "a pipe is not waited for" [ "$code" -eq 3 ]
cp -r "$demo" changed
sed -i 's/"rope_theta": *[0-9.]*/"rope_theta": 5000.0/; s/"rms_norm_eps": *[-0-9.e]*/"rms_norm_eps": 0.001/' changed/config.json
run verify b.gguf changed
ok "another config" [ "$code" -eq 3 ]
ok "is named" grep -q '^problem: key qwen3moe' stdout

cp a.gguf parts/other.gguf
expect 2 'more than one GGUF' verify parts
expect 0 'is quantized already, and errors add up' quantize a.gguf --format gguf --types q4_0 --dry-run

# --- bad input --------------------------------------------------------------------------------------------------------------
g="quantize $demo --format gguf"
expect 2 'MODEL is missing' quantize --format gguf --types q8_0 -o x.gguf
expect 2 'how small. give --bits 4.5' $g -o x.gguf
expect 2 'say the same thing' $g $stats --bits 5 --target-size 3MiB -o x.gguf
expect 2 'OUT is missing' $g --types q8_0
expect 2 'give --text FILE to measure' $g --bits 5 -o x.gguf
expect 2 'reads no weights' $g --bits 5 --text text.txt --dry-run
expect 2 'did you mean q4_k' $g --types q4_kk -o x.gguf
expect 2 'matches no tensor' $g --types 'q8_0,ffn_exps=q4_0' -o x.gguf
expect 2 'no rule of --types names it' $g --types 'ffn=q4_0' -o x.gguf
expect 2 'no type .q7' $g $stats --bits 5 --candidates q4_0,q7 -o x.gguf
expect 2 '.-widths means nothing with --format gguf' $g --types q8_0 --widths 2,3 -o x.gguf
expect 2 '.-attention-bits means nothing with --format gguf' $g --types q8_0 --attention-bits 4 -o x.gguf
expect 2 '.-expert-shards means nothing with --format gguf' $g --types q8_0 --expert-shards -o x.gguf
expect 2 '.-share-with means nothing with --format gguf' $g --types q8_0 --share-with changed -o x.gguf
expect 2 '.-types means nothing with --format gptq' quantize "$demo" --types q8_0 --bits 3 -o x
gguf half.gguf --types f16
expect 3 'half.gguf: a GGUF is read but not rewritten' quantize half.gguf --text text.txt --bits 3 -o x
expect 3 'half.gguf: a GGUF is read but not rewritten' quantize half.gguf --bits 16 --expert-shards -o x
expect 2 'is not in 0 .. 8' quantize "$demo" --bits 9 --text text.txt -o x
expect 4 'is below the least that these candidates and rules take, [0-9]+ bytes' $g $stats --target-size 1MiB -o x.gguf
expect 4 'is below the least.*4.250' $g $stats --bits 3 -o x.gguf
expect 4 'above the model at F16' $g $stats --target-size 1GiB -o x.gguf
expect 4 'max-memory' $g --types q8_0 --max-memory 1MiB -o x.gguf
expect 4 'max-memory' calibrate "$demo" --gguf --text text.txt --seq-len 64 --max-memory 50MiB -o x.h5
expect 4 'max-memory' $g --bits 5 --text text.txt --seq-len 64 --max-memory 50MiB -o x.gguf
expect 3 'already there' $g --types q8_0 -o a.gguf
expect 3 'not a GGUF file; it is not replaced' $g --types q8_0 --overwrite -o text.txt
expect 2 'lies inside the source' $g --types q8_0 -o "$demo/x.gguf"
expect 1 'nothing.h5' $g --stats nothing.h5 --types q8_0 -o x.gguf
tiny_model tiny
expect 3 'statistics of another model' quantize tiny --format gguf $stats --bits 5 -o x.gguf
sed -e 's/"merges": *\[/"other": [/' "$demo/tokenizer.json" >changed/tokenizer.json
expect 3 'tokenizer.json' quantize changed --format gguf --types q8_0 -o x.gguf
ok "nothing is written" [ -z "$(find . -name 'x*')" ]
ok "no work is left" [ -z "$(find . -name '*.partial')" ]
prints '^gguf$' quantize --formats
prints '"iq4_nl"' quantize --formats --json
finish
