#!/bin/sh
# quantize: every format and method writes what verify accepts and of the size that was said; budgets hold; the same bytes by a plan or
# at once, with one thread or more, and whatever was interrupted; statistics are completed, taken over or refused; bad input.
. "$2/tests/cli/lib.sh"
cd "$work" || exit 1
demo=$source/recipes/demo-model
sanitized=${MOEC_SANITIZED:-}
lines=24
[ -z "$sanitized" ] || lines=12
head -n $lines "$demo/samples.txt" >text.txt
head -n 5 "$demo/samples.txt" >other.txt
text="--text text.txt --seq-len 64"
: >stderr

bytes()  # bytes FOLDER    of all files
{
    cat "$1"/* | wc -c
}

value()  # value KEY    the first number of that name in stdout
{
    sed -n "s/^ *\"$1\": *\([-+.0-9eE]*\),*\$/\1/p" stdout | head -n 1
}

quantize()  # quantize OUT ARGUMENTS...    the demo model, without a word
{
    out=$1
    shift
    checks=$((checks + 1))
    run quantize "$demo" -q -o "$out" "$@"
    [ "$code" -eq 0 ] && sane || fail "quantize -o $out $*: exit code $code"
}

same_tensors()  # same_tensors A B
{
    for file in "$1"/*.safetensors "$1"/config.json; do
        cmp -s "$file" "$2/${file#"$1"/}" || return 1
    done
}

different()
{
    ! cmp -s "$1" "$2"
}

# shellcheck disable=SC2086
{
# --- statistics: measured apart, completed, refused ------------------------------------------------------------------------
prints . stats show --help
run calibrate "$demo" $text --compute bf16 -o plain.h5 -q
ok "statistics without errors" [ "$code" -eq 0 ]
cp plain.h5 completed.h5
run calibrate "$demo" $text --compute bf16 --errors --gains -o e.h5 -q
ok "statistics with errors" [ "$code" -eq 0 ]
expect 2 'needs quantization errors, .*--text .*calibrate --errors' quantize "$demo" --stats plain.h5 --rounding clip --bits 3 -o out
expect 2 'needs statistics .*--text' quantize "$demo" --rounding clip --bits 3 -o out
expect 0 'completed.h5: has the errors of every width now' quantize "$demo" --stats completed.h5 $text --bits 2 --sweeps 0 -o of-completed
prints . quantize "$demo" --stats completed.h5 --sweep 2,3
expect 2 'text|domain' quantize "$demo" --stats plain.h5 --text other.txt --seq-len 64 --bits 3 -o out
quantize alone $text --bits 3
ok "without --stats they stay beside the output" [ -e alone.stats.h5 ]
quantize base --stats e.h5 $text --bits 3
ok "... and are those of calibrate --errors --gains" same_tensors base alone
ok "no folder of work is left" [ -z "$(find . -name '*.partial')" ]

# --- every format ----------------------------------------------------------------------------------------------------------
for format in gptq gptq-dynamic gptq-server compressed-tensors fake; do
    bits=3
    [ $format != gptq-server ] || bits=4
    prints . quantize "$demo" --stats e.h5 $text --bits $bits --format $format --dry-run --json
    said=$(value file_bytes)
    quantize of-$format --stats e.h5 $text --bits $bits --format $format
    ok "$format: as many bytes as a dry run says, beside the manifest" \
        [ "$(($(bytes of-$format) - $(wc -c <of-$format/moecompress.json)))" -eq "$said" ]
    prints '"ok": true' verify of-$format "$demo" --json
    prints '"ok": true' verify of-$format --json
    prints '"perplexity"' eval of-$format --text other.txt --seq-len 64 --json
    prints 'qwen3_moe' inspect of-$format
    case $format in
    gptq | gptq-dynamic) prints 'GPTQ' inspect of-$format ;;
    compressed-tensors) prints 'expert bits +3\.000' inspect of-$format ;;
    esac
    if [ $format = fake ]; then
        ok "fake: as large as the model" cmp "$demo/config.json" of-fake/config.json
        prints . prune of-fake --method random --keep 8 --dry-run
    else
        ok "$format: smaller" [ "$(bytes of-$format)" -lt $(($(bytes "$demo") * 6 / 10)) ]
        expect 3 'source is quantized' quantize of-$format --method rtn --bits 3 -o out
        expect 3 'source is quantized' quantize of-$format $text --bits 3 -o out
        ok "$format: nothing is measured of it" [ ! -e out.stats.h5 ]
    fi
done
ok "the default format is gptq" diff -r base of-gptq
size=$(wc -c <of-gptq/model-00001-of-00003.safetensors)
cp -r of-gptq changed
printf '\252' | dd of=changed/model-00001-of-00003.safetensors bs=1 seek=$((size - 5)) conv=notrunc 2>/dev/null
run verify changed "$demo"
ok "a changed byte is found" [ "$code" -eq 3 ]

# --- every method ----------------------------------------------------------------------------------------------------------
methods=$("$program" quantize --methods --json | sed -n 's/^ *"name": "\([^"]*\)",*$/\1/p')
ok "there are methods" [ "$(echo "$methods" | wc -w)" -ge 13 ]
[ -z "$sanitized" ] || methods="direct pmq pmq-paper frequency outlier rtn"
for method in $methods; do
    case $method in
    rtn | clip | gptq)
        expect 2 'has one width, of 2, 3, 4, 8; 2 and 3 are nearest' quantize "$demo" --stats e.h5 $text --method $method --bits 2.5 -o out
        bits=3
        ;;
    *) bits=2.5 ;;
    esac
    quantize m-$method --stats e.h5 $text --bits $bits --method $method --sweeps 0 --json
    ok "$method: so many bits and no more" awk -v got="$(value bits)" -v want=$bits 'BEGIN { exit !(got <= want && got > want - 0.1) }'
    prints '"ok": true' verify m-$method "$demo" --json
    ok "$method: the manifest says so" grep -q "\"method\": \"$method\"" m-$method/moecompress.json
done
quantize rtn --method rtn --bits 3
ok "rtn needs no text and no statistics" same_tensors rtn m-rtn
quantize clip --method clip --bits 3
quantize clip-text --method clip $text --bits 3
ok "clip looks at text where there is some" different clip/model-00001-of-00003.safetensors clip-text/model-00001-of-00003.safetensors
prints '"kl"' eval clip --base "$demo" --text other.txt --seq-len 64 --json
plain=$(value kl)
prints '"kl"' eval clip-text --base "$demo" --text other.txt --seq-len 64 --json
ok "... and few tokens do not mislead it ($plain, $(value kl))" awk -v a="$plain" -v b="$(value kl)" 'BEGIN { exit !(b < 1.5 * a) }'
quantize near --stats e.h5 --rounding nearest --bits 3
ok "errors that nobody measured are not told" [ -z "$(grep '"error"' near/moecompress.json)" ]

# --- budgets of bytes ------------------------------------------------------------------------------------------------------
targets="4200000 4777777 6000000"
[ -z "$sanitized" ] || targets=4777777
for target in $targets; do # a matrix is 2304 bytes larger with a bit more; the manifest is counted with some room
    quantize sized --stats e.h5 $text --target-size $target --sweeps 0
    got=$(bytes sized)
    ok "$target bytes: $got, no more" [ "$got" -le $target ]
    ok "$target bytes: $got, hardly less" [ "$got" -ge $((target - 6000)) ]
    rm -r sized
done
for method in frequency pmq; do
    quantize sized --stats e.h5 --target-size 4500000 --method $method --rounding nearest
    ok "$method: 4500000 bytes hold" [ "$(bytes sized)" -le 4500000 ]
    ok "$method: they are used" [ "$(bytes sized)" -ge 4475000 ]
    rm -r sized
done
expect 4 'with every routed expert at 2 bits the output has 3.8' quantize "$demo" --stats e.h5 $text --target-size 1MiB -o out
expect 4 'weights have now, 9.03 MiB' quantize "$demo" --stats e.h5 $text --target-size 1GiB -o out
expect 4 'the least that is possible is 2' quantize "$demo" --stats e.h5 $text --bits 1.5 -o out
expect 4 'the least that is possible is 4' quantize "$demo" --stats e.h5 $text --bits 3 --format gptq-server -o out
expect 2 'the widest to choose from is 3' quantize "$demo" --stats e.h5 $text --bits 3.5 --widths 2,3 -o out

# --- the curve -------------------------------------------------------------------------------------------------------------
prints '^ *2 +2\.000 .* 3\.7[0-9] MiB ' quantize "$demo" --stats e.h5 --sweep 2,2.5,3,5MiB
ok "a row for each" [ "$(wc -l <stdout)" -eq 6 ]
prints '"asked": "2.5"' quantize "$demo" --stats e.h5 --sweep 2,2.5,3,5MiB --json
ok "more bits cost less" awk -F'[:,]' '/"cost"/ { if (n++ && $2 >= last) bad = 1; last = $2 } END { exit bad || n != 4 }' stdout
prints ' - +-$' quantize "$demo" --stats e.h5 --method rtn --sweep 2,3
expect 2 'give --stats' quantize "$demo" --sweep 2,3
expect 2 "'abc' is not a size" quantize "$demo" --stats e.h5 --sweep 2,abc
prints '^ *1 not possible: .*the least that is possible' quantize "$demo" --stats e.h5 --sweep 3,1
ok "the others are there" grep -qE '^ *3 +[0-9.]+ .*optimal' stdout
prints '"error": ".*the least that is possible' quantize "$demo" --stats e.h5 --sweep 1,3 --json
ok "and in JSON" [ "$(grep -c '"cost"' stdout)" -eq 1 ]
expect 4 'the least that is possible' quantize "$demo" --stats e.h5 --sweep 1,1.5
prints '^memory ' quantize "$demo" --stats e.h5 $text --bits 3 --dry-run
ok "one figure of memory" [ "$(grep -c 'MiB at most\|of memory' stdout)" -eq 1 ]
ok "and what it takes" grep -qE '^quantize .* of disk beside the output, [0-9]+ token passes; its time is not estimated$' stdout
ok "no list of who does not load it" [ -z "$(grep 'will not' stderr)" ]
expect 0 'budget 2.55 bits, used 2.5[0-9]*$' quantize "$demo" --stats e.h5 --rounding nearest --bits 2.55 --dry-run
expect 0 'group-size 128 does not divide the 96 columns of down: groups of 32 there' \
    quantize "$demo" --method rtn --format fake --bits 3 --group-size 128 --dry-run
expect 3 'source is quantized' quantize of-gptq --stats e.h5 $text --bits 3 -o out
ok "gptq has no order of columns, the others have" [ -z "$(grep g_idx of-gptq/model.safetensors.index.json)" ]
ok "... gptq-dynamic" grep -q g_idx of-gptq-dynamic/model.safetensors.index.json
quantize points --method rtn --bits 3 --zero-points
ok "zero points are of the second form" grep -q '"auto_round:gptqmodel"' points/config.json
prints '"ok": true' verify points "$demo" --json

# --- widths, grains, protection, other matrices ------------------------------------------------------------------------------
widths_of()  # widths_of FOLDER    the lists of bits in its manifest
{
    sed -n 's/.*"layer": .*"bits": \(\[[^a-z]*\]\).*/\1/p' "$1/moecompress.json"
}
for per in expert projection layer layer-projection model; do
    bits=2.5
    [ $per != model ] || bits=3
    quantize per-$per --stats e.h5 --rounding nearest --per $per --bits $bits
    case $per in
    layer | model) ok "$per: one width a layer" sh -c '[ -z "$(echo "$1" | grep -vE "^\[(.)(, \1)*\]$")" ]' - "$(widths_of per-$per)" ;;
    expert) ok "expert: no expert has several" [ -z "$(widths_of per-expert | grep '\[[0-9], [0-9], [0-9]\]')" ] ;;
    projection) ok "projection: some have" grep -q '\[[0-9], [0-9], [0-9]\]' per-projection/moecompress.json ;;
    esac
done
quantize wide --stats e.h5 --rounding clip --widths 1,2,8,16 --bits 4 --format fake
ok "widths: of these alone" [ -z "$(widths_of wide | tr -d '[] ' | tr , '\n' | grep -vE '^(1|2|8|16)$')" ]
printf '0 3\n2 5\n' >guarded
quantize guarded-out --stats e.h5 --rounding nearest --bits 2.5 --protect guarded
ok "they are in the plan" grep -q '"layer": 2,.*"protected": \[5\]' guarded-out/moecompress.json
ok "protected experts have the largest width" [ "$(widths_of guarded-out | awk -F', *' 'NR == 1 || NR == 3' | grep -c '[[ ]8[],]')" -eq 2 ]
prints . quantize "$demo" --stats e.h5 --rounding nearest --bits 2.5 --protect super --dry-run
expect 4 'the least that is possible with the experts that are protected' \
    quantize "$demo" --stats e.h5 --rounding nearest --bits 2 --protect guarded -o out
quantize attention --stats e.h5 $text --bits 3 --attention-bits 4
ok "attention has codes" grep -q 'layers.0.self_attn.q_proj.qweight' attention/model.safetensors.index.json
ok "routers, norms and embeddings have not" [ -z "$(grep -E '(mlp.gate|norm|embed_tokens|lm_head)\.qweight' attention/model.safetensors.index.json)" ]
ok "smaller for it" [ "$(bytes attention)" -lt "$(bytes base)" ]
prints '"ok": true' verify attention "$demo" --json
quantize shared --stats e.h5 $text --bits 3 --shared-bits 4 --dense-bits 4
ok "a model without shared experts has none to round" same_tensors base shared
quantize power --stats e.h5 $text --bits 3 --weight-power 0 --no-act-order --no-original-target --sweeps 1 --damp 0.05
ok "options of rounding do something" different power/model-00001-of-00003.safetensors base/model-00001-of-00003.safetensors
quantize zeros --stats e.h5 $text --bits 3 --format fake --zero-points --dtype f32 --group-size 32
prints '"ok": true' verify zeros "$demo" --json
quantize grouped --stats e.h5 $text --bits 3 --group-size 32
ok "smaller groups take more" [ "$(bytes grouped)" -gt "$(bytes base)" ]

# --- a plan: measured, applied; the record -----------------------------------------------------------------------------------
quantize plan.json --stats e.h5 $text --bits 3 --plan-only --record record
ok "its weights" [ -d plan.json.weights ]
ok "a line for every matrix" [ "$(wc -l <record)" -eq 192 ]
ok "of such form" [ "$(grep -cE '^\{"module": ?"model.layers.[0-3].mlp.experts.[0-9]+.(gate|up|down)_proj", ?"layer": ?[0-3],.*"bits": ?[2348],.*"tokens": ?[0-9]+, ?"method": ?"(gptq|clip|nearest)", ?"loss": ?[0-9.e-]+,' record)" -eq 192 ]
ok "no loss is above that of rounding to nearest" sh -c \
    'sed "s/.*\"loss\": *\([^,]*\), *\"loss_nearest\": *\([^,]*\),.*/\1 \2/" record | awk "\$1 > \$2 * 1.0001 { bad = 1 } END { exit bad }"'
prints '"perplexity"' eval "$demo" --plan plan.json $text --json
of_plan=$(value cross_entropy)
prints '"perplexity"' eval base $text --json
ok "the plan measures what the model does ($of_plan, $(value cross_entropy))" awk -v a="$of_plan" -v b="$(value cross_entropy)" \
    'BEGIN { d = a - b; exit !(a > 0 && d < 1e-6 && d > -1e-6) }'
run apply "$demo" plan.json -o applied -q
ok "apply writes the same" diff -r base applied
run apply of-gptq plan.json -o out -q
ok "not to another model" [ "$code" -eq 3 ]
expect 3 'there already' quantize "$demo" --stats e.h5 $text --bits 2 --plan-only -o plan.json
quantize plan.json --stats e.h5 $text --bits 2 --plan-only --overwrite
expect 3 'there already' quantize "$demo" --stats e.h5 $text --bits 3 -o base
quantize again/ --stats e.h5 $text --bits 3 --threads 1 --record record-1
quantize thrice --stats e.h5 $text --bits 3 --threads 3 --record record-3
ok "one thread" diff -r base again
ok "three threads" diff -r base thrice
ok "their records" cmp record-1 record-3
ok "a plan's record is a run's" cmp record record-1
quantize little --stats e.h5 $text --bits 3 --threads 1 --max-memory 120MiB
ok "little memory" diff -r base little

# --- interrupted -------------------------------------------------------------------------------------------------------------
# As slow as needed for a signal to meet it; all in one thread.
slow="--stats e.h5 $text --bits 3 --threads 1 --sweeps 12"
began=$(date +%s%N)
quantize want $slow
took=$(($(date +%s%N) - began))
kills=0 tries=0
while [ ! -e got ] && [ $tries -lt 40 ]; do
    start quantize "$demo" -q -o got $slow
    victim=$!
    sleep "$(awk -v t=$took -v n=$tries 'BEGIN { srand(n); printf "%.3f", t / 1e9 * (0.25 + 0.35 * rand() + 0.05 * n) }')"
    ! kill -KILL $victim 2>/dev/null || kills=$((kills + 1))
    wait $victim 2>/dev/null
    tries=$((tries + 1))
done
ok "some were killed" [ $kills -gt 0 ]
ok "the same after $kills kills" diff -r want got
rm -rf got
start quantize "$demo" -q -o got $slow
victim=$!
sleep "$(awk -v t=$took 'BEGIN { printf "%.3f", t / 1e9 * 0.6 }')"
kill -INT $victim 2>/dev/null
wait $victim
code=$?
if [ ! -e got ] && [ $code -ne 130 ]; then # not before the program could catch it
    ok "exit code of an interrupted run is $code" [ $code -eq 5 ]
    ok "what it says" grep -q 'the same command continues there' stderr
    if [ -d got.quantize.partial ]; then
        expect 3 'finished layers of another model, text or options' quantize "$demo" -q -o got $slow --damp 0.1
    fi
fi
[ -e got ] || quantize got $slow
ok "the same after an interrupt" diff -r want got
ok "no work is left" [ -z "$(find . -name '*.partial')" ]

# Statistics that an interrupted run measured are found again; those of other text are not.
mv alone.stats.h5 found.stats.h5
touch -d '2001-01-01' found.stats.h5
quantize found $text --bits 3
ok "statistics of the same text are taken over" [ found.stats.h5 -ot text.txt ]
ok "... for the same output" diff -r alone found
cp found.stats.h5 lost.stats.h5
expect 3 'lost.stats.h5: is already there' quantize "$demo" --text other.txt --seq-len 64 --bits 3 -o lost

# A folder of work that was left: of another run, damaged.
run quantize "$demo" --stats e.h5 $text --bits 3 --plan-only -q -o left.json
cp -r left.json.weights other.quantize.partial
expect 3 'finished layers of another model, text or options' quantize "$demo" --stats e.h5 $text --bits 3 --damp 0.1 -o other
quantize other --stats e.h5 $text --bits 3 --no-resume
ok "--no-resume begins anew" diff -r base other
ok "nothing of it is left" [ ! -e other.quantize.partial ]
for damage in layer-00001.safetensors layer-00001.json; do
    rm -rf hurt.quantize.partial
    cp -r left.json.weights hurt.quantize.partial
    printf '\377\377\377\377' | dd of=hurt.quantize.partial/$damage bs=1 seek=2000 conv=notrunc 2>/dev/null
    expect 3 '' quantize "$demo" --stats e.h5 $text --bits 3 -o hurt
    ok "$damage: nothing is written" [ ! -e hurt ]
done
rm -rf hurt.quantize.partial
cp -r left.json.weights hurt.quantize.partial
dd if=left.json.weights/layer-00001.safetensors of=hurt.quantize.partial/layer-00001.safetensors bs=1000 count=2 2>/dev/null
expect 3 '; --no-resume begins anew' quantize "$demo" --stats e.h5 $text --bits 3 -o hurt
cp left.json.weights/layer-00001.safetensors hurt.quantize.partial/
rm hurt.quantize.partial/layer-00001.json
expect 3 'is missing; --no-resume begins anew' quantize "$demo" --stats e.h5 $text --bits 3 -o hurt
quantize hurt --stats e.h5 $text --bits 3 --no-resume
ok "and then it is whole" diff -r base hurt

# --- bad input -----------------------------------------------------------------------------------------------------------------
expect 2 'MODEL is missing' quantize --bits 3 -o out
expect 2 'how small. give --bits 2.5 or --target-size' quantize "$demo" $text -o out
expect 2 'say the same thing' quantize "$demo" $text --bits 3 --target-size 5MiB -o out
expect 2 'OUT is missing' quantize "$demo" $text --bits 3
expect 2 'give --text FILE, or --rounding clip' quantize "$demo" --stats e.h5 --bits 3 -o out
expect 2 'give --text FILE, or --rounding clip' quantize "$demo" --method rtn --rounding gptq --bits 3 -o out
expect 2 'did you mean direct' quantize "$demo" $text --method direkt --bits 3 -o out
expect 2 'no format gptk; did you mean gptq' quantize "$demo" $text --format gptk --bits 3 -o out
expect 2 'did you mean compressed-tensors' quantize "$demo" $text --format compressed-tensor --bits 3 -o out
expect 2 'is none of|one of|did you mean' quantize "$demo" $text --per experts --bits 3 -o out
expect 2 'gptq has no 1-bit codes' quantize "$demo" $text --widths 1,2,3 --bits 2 -o out
expect 2 'gptq-server has no 3-bit codes' quantize "$demo" $text --format gptq-server --widths 3,4 --bits 4 -o out
expect 2 'fake has no 12-bit|from 1 to 8, or 16, ascending' quantize "$demo" $text --format fake --widths 4,12 --bits 4 -o out
expect 2 'from 1 to 8, or 16, ascending' quantize "$demo" $text --widths 3,2 --bits 3 -o out
expect 2 'from 1 to 8, or 16, ascending' quantize "$demo" $text --widths 2,x --bits 3 -o out
expect 2 'is not in 0 .. 8' quantize "$demo" $text --bits 9 -o out
expect 2 'clients load one width for all routed experts' quantize "$demo" $text --format compressed-tensors --per expert --bits 3 -o out
expect 2 'clients load one width for the experts of a layer' quantize "$demo" $text --format gptq-server --per expert --bits 4 -o out
expect 2 'pmq knows errors of whole experts' quantize "$demo" --stats e.h5 $text --method pmq --per projection --bits 3 -o out
expect 2 'no zero points' quantize "$demo" $text --zero-points --format gptq-dynamic --bits 3 -o out
expect 3 'another --group-size, or --format fake' quantize "$demo" $text --group-size 1 --bits 3 -o out
expect 2 'reads no weights: calibrate --errors' quantize "$demo" $text --bits 3 --dry-run
echo precious >foreign
expect 3 'foreign: is' quantize "$demo" --stats e.h5 $text --bits 3 --record foreign -o out
expect 3 'foreign: is' quantize "$demo" --stats e.h5 $text --bits 3 --record foreign --overwrite -o out
ok "and what was there stays" grep -q precious foreign
expect 2 '--attention-bits 5: format gptq has no such codes' quantize "$demo" --stats e.h5 $text --bits 3 --attention-bits 5 -o out
expect 3 'vllm will not load the output' quantize "$demo" --stats e.h5 $text --bits 3 --compat vllm -o out
expect 1 'nothing.h5' quantize "$demo" --stats nothing.h5 $text --bits 3 -o out
expect 2 'no domain nope' quantize "$demo" --stats e.h5 --domain-weight nope=2 --rounding nearest --bits 3 -o out
head -c 5000 e.h5 >short.h5
expect 3 'short.h5' quantize "$demo" --stats short.h5 $text --bits 3 -o out
tiny_model tiny
expect 3 'statistics of another model' quantize tiny --stats e.h5 --rounding clip --bits 3 -o out
expect 3 'rows are a multiple of 32' quantize tiny --method rtn --bits 3 -o out
prints . quantize tiny --method rtn --bits 3 --format fake -o tiny-fake
expect 4 'max-memory' quantize "$demo" --stats e.h5 $text --bits 3 --max-memory 1MiB -o out
ok "nothing is written" [ -z "$(find . -name 'out*')" ]
ok "no work is left of any" [ -z "$(find . -name '*.partial')" ]

# --- what there is -------------------------------------------------------------------------------------------------------------
prints '^direct \(the default\)$' quantize --methods
prints '"arxiv": "2410.06270"' quantize --methods --json
prints '^compressed-tensors$' quantize --formats
prints '"per": "layer"' quantize --formats --json
prints 'direct' quantize --help
"$program" man >page && "$program" completion bash >rows
ok "the man page has its options" grep -q 'target.*size' page
ok "completion has them" grep -q -- '--target-size' rows
}
finish
