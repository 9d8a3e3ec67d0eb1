#!/bin/sh
# merge: every method writes what verify accepts; the same bytes by a plan file or at once, with one thread or more, and whatever
# was interrupted; tied emission, settings, protection, counts that differ between layers; bad input leaves nothing behind.
. "$2/tests/cli/lib.sh"

model=$source/recipes/demo-model
sanitized=${MOEC_SANITIZED:-}
tiny=$(dirname "$program")/tests/write_tiny
cd "$work" || exit 1
head -n 30 "$model/samples.txt" >calib.txt
tail -n 30 "$model/samples.txt" >held.txt
head -n 250 "$model/samples.txt" >long.txt
[ -z "$sanitized" ] || head -n 40 "$model/samples.txt" >long.txt
texts="--seq-len 128 --text calib.txt"
methods="adaptive m-smoe hc-smoe sub-moe ream uncurl merge-moe dern"
: >stderr

merged()  # merged OUT ARGUMENTS...    merges the demo model without a word
{
    out=$1
    shift
    # shellcheck disable=SC2086
    ok "merge $*" "$program" merge "$model" -q -o "$out" $texts "$@" >stdout 2>stderr
}

kl()  # kl MODEL [OPTION...]
{
    "$program" eval "$@" --base "$model" --seq-len 128 --json -q --text held.txt |
        sed -n 's/^ *"kl": *\([-+.0-9eE]*\),*$/\1/p' | head -n 1
}

same_loss()  # same_loss A B    arguments of eval give one loss within what the order of sums makes
{
    for at in "$1" "$2"; do
        # shellcheck disable=SC2086
        "$program" eval $at --json -q --text calib.ids | sed -n 's/^ *"cross_entropy": *\([-+.0-9eE]*\),*$/\1/p' | head -n 1
    done | awk '{ v[NR] = $1 } END { d = v[1] - v[2]; exit !(NR == 2 && v[1] > 0 && d < 1e-6 && d > -1e-6) }'
}

same_kl()  # same_kl A B    two divergences are one within what the order of sums makes
{
    awk -v a="$1" -v b="$2" 'BEGIN { d = a - b; exit !(a > 0 && b > 0 && d < 1e-6 && d > -1e-6) }'
}

# --- every method ------------------------------------------------------------------------------------------------------
for method in $methods; do
    for share in 50 25; do
        [ -z "$sanitized" ] || [ $share = 50 ] || continue
        merged "$method-$share" --method "$method" --remove $share% --repair none
        ok "$method $share %: verifies" "$program" verify "$method-$share" "$model" >stdout 2>stderr
        ok "$method $share %: so many experts" \
            grep -q "\"num_local_experts\": *$((16 - 16 * share / 100))" "$method-$share/config.json"
        rm -rf "$method-25"
    done
    ok "$method: the manifest says the verb" grep -q '"verb": *"merge"' "$method-50/moecompress.json"
done
ok "no folder of work is left" [ -z "$(find . -name '*.repair*')" ]
ok "m-smoe merged some" grep -q '"merged": \[\[' m-smoe-50/moecompress.json
ok "dern passes neurons on instead" grep -q '"merged": \[\]' dern-50/moecompress.json
ok "dern writes rows of the router" grep -q '"rewritten": \["gate", "up", "down", "router"\]' dern-50/moecompress.json
ok "m-smoe leaves them" [ -z "$(grep '"router"\]' m-smoe-50/moecompress.json)" ]
same_tensors()  # same_tensors A B
{
    for file in "$1"/*.safetensors; do
        cmp -s "$file" "$2/${file#"$1"/}" || return 1
    done
}
differ()
{
    ! same_tensors "$@"
}
ok "methods differ" differ m-smoe-50 hc-smoe-50

# --- the same by a plan ------------------------------------------------------------------------------------------------
for method in m-smoe dern; do
    merged $method.json --method $method --remove 50% --repair none --plan-only
    ok "$method: apply" "$program" apply "$model" $method.json -q -o $method-applied >stdout 2>stderr
    ok "$method: as at once" diff -r $method-50 $method-applied
    ok "$method: a plan measures as its model" same_kl "$(kl "$model" --plan $method.json)" "$(kl $method-50)"
done
merged repaired --remove 50% --json
ok "errors of every layer are reported" [ "$(grep -c '"after"' stdout)" -eq 4 ]
ok "the method is the default one" grep -q '"method": "adaptive"' stdout
merged repaired.json --remove 50% --plan-only
ok "repaired: apply" "$program" apply "$model" repaired.json -q -o repaired-applied >stdout 2>stderr
ok "repaired: as at once" diff -r repaired repaired-applied
ok "repaired: a plan measures as its model" same_kl "$(kl "$model" --plan repaired.json)" "$(kl repaired)"
merged merge-moe.json --method merge-moe --remove 50% --plan-only
ok "rows are fitted, and what that does to the load is said" grep -q '"load_shift": [0-9.e-]*, "router_refit": true' merge-moe.json

# --- merged or pruned, whichever helps -----------------------------------------------------------------------------------
first_error()  # of layer 0 with fitted weights, on held-out windows, of the plan that was made last
{
    sed -n 's/.*"layer": 0,.*"held_out": \[[^,]*, \([0-9.e-]*\)\].*/\1/p' decided.json
}
if [ -z "$sanitized" ]; then
    head -n 150 "$model/samples.txt" >decide.txt
    : >errors
    for settings in decide=on decide=off "decide=off grouping=pruning"; do
        # shellcheck disable=SC2086
        ok "adaptive, $settings" "$program" merge "$model" --remove 50% -q --overwrite --plan-only -o decided.json --seq-len 128 \
            --text decide.txt --set $settings >stdout 2>stderr
        first_error >>errors
    done
    ok "it is not worse than either" awk '{ e[NR] = $1 } END { exit !(NR == 3 && e[1] <= 1.01 * e[2] && e[1] <= 1.01 * e[3]) }' errors
fi

# --- all stay ----------------------------------------------------------------------------------------------------------
ok "prune of nothing" "$program" prune "$model" --method random --keep 16 -q -o nothing >stdout 2>stderr
for method in m-smoe merge-moe dern; do
    merged all --method $method --keep 16 --repair none
    ok "$method: that is said" grep -q 'no expert is removed' stderr
    for file in nothing/*.safetensors nothing/*.json; do
        [ "$file" = nothing/moecompress.json ] || ok "$method: $file is as it was" cmp "$file" "all/${file#nothing/}"
    done
    rm -r all
done

# --- tied --------------------------------------------------------------------------------------------------------------
merged tied --method m-smoe --remove 50% --repair none --emit tied
ok "tied: nothing untrue is said" [ ! -s stderr ]
ok "tied verifies" "$program" verify tied "$model" >stdout 2>stderr
ok "tied: all experts are there" cmp "$model/config.json" tied/config.json
merged tied.json --method m-smoe --remove 50% --repair none --emit tied --plan-only
ok "tied: apply" "$program" apply "$model" tied.json -q -o tied-applied >stdout 2>stderr
ok "tied: as at once" diff -r tied tied-applied
ok "tied: the groups are those of the first layer, which is native" \
    [ "$(grep -o '"merged": [^"]*' tied.json | head -n 1)" = "$(grep -o '"merged": [^"]*' m-smoe.json | head -n 1)" ]
ok "tied: a plan measures as its model" same_kl "$(kl "$model" --plan tied.json)" "$(kl tied)"

# --- map ---------------------------------------------------------------------------------------------------------------
bytes()  # bytes FOLDER    of all tensors
{
    "$program" verify "$1" --json | sed -n 's/^ *"bytes": *\([0-9]*\),*$/\1/p'
}
merged map --method m-smoe --remove 50% --repair none --emit map
ok "map: who cannot load it is said" grep -q 'vllm, sglang, llama.cpp: the source loads there, the output will not .map.' stderr
ok "map verifies" "$program" verify map "$model" >stdout 2>stderr
ok "map: transformers loads it" grep -qE '^transformers +loads: .*trust_remote_code' stdout
ok "map: vllm does not" grep -qE '^vllm +does not load: .*--emit native' stdout
ok "map verifies without its source" "$program" verify map >stdout 2>stderr
ok "map: the modelling file" cmp map/modeling_moecompress.py "$source/lib/run/modeling_moecompress.py"
ok "map: config.json says which" grep -qE '"moecompress_map": ."0": .([0-7], ){15}[0-7].,' map/config.json
ok "map: config.json counts the router's rows" grep -q '"num_local_experts": *16' map/config.json
ok "map: as large as native and its rows" [ "$(bytes map)" -eq $(($(bytes m-smoe-50) + 4 * 8 * 192 * 2)) ]
merged map.json --method m-smoe --remove 50% --repair none --emit map --plan-only
ok "map: apply" "$program" apply "$model" map.json -q -o map-applied >stdout 2>stderr
ok "map: as at once" diff -r map map-applied
ok "map: groups are those of tied" [ "$(grep -o '"merged": [^"]*' map.json)" = "$(grep -o '"merged": [^"]*' tied.json)" ]
ok "map: a plan measures as tied" [ "$(kl "$model" --plan map.json)" = "$(kl tied)" ]
prints 'experts +8 a layer, shared by the 16 rows of its router' inspect map
prints '"router_rows": 16' inspect map --json
expect 3 'rows of its routers share experts .merge --emit map., which transformers runs' eval map --text held.txt
expect 3 'rows of its routers share experts' prune map --method router-row --keep 4 -o x
merged map-two --remove 50% --emit map --threads 2
ok "map: every group is merged" [ "$(grep -o '"merged": \[\[' map-two/moecompress.json | wc -l)" -eq 4 ]
merged map-one --remove 50% --emit map --threads 1
ok "map: one thread as two" diff -r map-one map-two
ok "map: fitted, it verifies" "$program" verify map-two "$model" >stdout 2>stderr
size=$(wc -c <map-two/model-00002-of-00003.safetensors)
printf 'x' | dd of=map-two/model-00002-of-00003.safetensors bs=1 seek=$((size - 5)) conv=notrunc 2>/dev/null
run verify map-two "$model"
ok "map: a changed byte is found" [ "$code" -eq 3 ]
sed -i 's/"moecompress_map": {"0": \[/&1, /' map-one/config.json
run verify map-one "$model"
ok "map: a changed map is found" [ "$code" -eq 3 ]
sed '/"emit": "map"/d' map.json >unmapped.json && cp -r map.json.weights unmapped.json.weights
expect 3 'fitted weights have digest' apply "$model" unmapped.json -o x
rm -r map-one map-two unmapped.json.weights

# --- settings ----------------------------------------------------------------------------------------------------------
merged set --method hc-smoe --remove 50% --repair none --set distance=logits grouping=nearest align=plain
ok "--set: rows of one engine" same_tensors set m-smoe-50
ok "--set is in the manifest" grep -q '"distance": "logits", "grouping": "nearest"' set/moecompress.json
common="$model --remove 50% -o x $texts"
# shellcheck disable=SC2086
{
    expect 2 '^moecompress: error: --set foo: there is no such setting; merge --methods lists them$' merge $common --set foo=1
    expect 2 '--set distanc: there is no such setting; did you mean distance;' merge $common --set distanc=logits
    expect 2 '--set distance: is not KEY=VALUE' merge $common --set distance
    expect 2 '--set : there is no such setting' merge $common --set =3
    expect 2 'distance=none: is none of logits, centred-logits, mean-output, ' merge $common --set distance=none
    expect 2 'distance=: is none of logits' merge $common --set distance=
    expect 2 'decide=yes: is none of off, on' merge $common --set decide=yes
    expect 2 'rank=2: is no number from 0 to 1' merge $common --set rank=2
    expect 2 'rank=nan: is no number' merge $common --set rank=nan
    expect 2 'rank=0.5x: is no number' merge $common --set rank=0.5x
    expect 2 'restarts=1.5: is no whole number from 1 to 10000' merge $common --set restarts=1.5
    expect 2 'restarts=99999999999999999999: is no whole number' merge $common --set restarts=99999999999999999999
    expect 2 'group-size=1: is no whole number from 2' merge $common --set group-size=1
    # before any token is run, as --dry-run shows
    expect 2 'segments: gate, up and down all have weight 0.* segment-up=0.5' merge $common --dry-run --set fill=segments
    expect 2 'rank=0: nothing would be left' merge $common --dry-run --method sub-moe --set rank=0
    expect 2 'layer 0: 2 groups of up to 3 do not hold 16 experts' \
        merge "$model" --keep 2 -o x $texts --dry-run --method ream --set group-size=3
    expect 2 '--remove 3%: is less than one expert of a layer.s 16; the smallest step is 6.25%' \
        merge "$model" --remove 3% -o x $texts --dry-run
    for unused in restarts=5/grouping=kmeans group-size=4/grouping=pseudo rank=0.5/fill=subspace whiten=on/fill=subspace \
        alpha=0.2/fill=segments segment-up=1/fill=segments segment-rounds=3/fill=segments; do
        expect 2 "--set ${unused%/*}: changes nothing here, it belongs to ${unused#*/}" merge $common --set "${unused%/*}"
    done
    expect 2 '--set distance=output: changes nothing here, it belongs to groupings other than pruning' \
        merge $common --method dern --set distance=output
    expect 2 '--set align=plain: changes nothing here, it belongs to fill=average and subspace' \
        merge $common --method dern --set align=plain
    expect 2 '--set rank=0.5: changes nothing' merge $common --method sub-moe --set rank=0.5 fill=average
    expect 0 '' merge $common --dry-run --set rank=0.5 fill=subspace
}

# --- how many ----------------------------------------------------------------------------------------------------------
expect 0 'a token will use 3 instead of 4' merge "$model" --keep 3 -o three --repair none --method m-smoe --seq-len 128 --text calib.txt
ok "keep below top-k verifies" "$program" verify three "$model" >stdout 2>stderr
merged one --keep 1 --repair none --method m-smoe
ok "one expert: verifies" "$program" verify one "$model" >stdout 2>stderr
awk 'BEGIN { srand(7); for (i = 0; i < 12; i++) { s = ""; for (j = 0; j < 40; j++) s = s int(rand() * 60) " "; print s } }' >calib.ids
ok "a tiny model whose router has groups" "$tiny" deepseek_v3 groups
expect 2 '3 experts do not fit the router.s 2 groups.*Counts that work: 4, 6; or --groups drop' \
    merge groups --keep 3 -o x --text calib.ids
expect 2 '2 experts do not fit the router.s 2 groups' merge groups --keep 2 -o x --text calib.ids
for method in $methods; do
    ok "groups: $method" "$program" merge groups --method "$method" --keep 4 -q -o "groups-$method" --text calib.ids >stdout 2>stderr
    ok "groups: $method verifies" "$program" verify "groups-$method" groups >stdout 2>stderr
    ok "groups: $method merges inside them" awk '/"layer": / && /"keep"/ {
        n = split($0, part, "\"keep\": "); split(part[2], list, "]"); sub(/^\[/, "", list[1])
        low = 0; k = split(list[1], e, /, */)
        for (i = 1; i <= k; i++) low += e[i] < 4
        if (low != 2 || k != 4) exit 1
        if (split($0, part, "\"merged\": \\[") < 2) next
        split(part[2], list, "]]"); n = split(list[1], group, /\], */)
        for (g = 1; g <= n; g++) {
            gsub(/\[/, "", group[g]); k = split(group[g], e, /, */)
            for (i = 2; i <= k; i++) if ((e[i] < 4) != (e[1] < 4)) exit 1
        }
    }' "groups-$method/moecompress.json"
done
ok "groups: padded" "$program" merge groups --method dern --keep 4 --pad-to 8 -q -o padded --text calib.ids >stdout 2>stderr
ok "groups: padded verifies" "$program" verify padded groups >stdout 2>stderr
ok "groups: dropped" "$program" merge groups --keep 3 --groups drop -q -o dropped --text calib.ids >stdout 2>stderr
ok "groups: dropped verifies" "$program" verify dropped groups >stdout 2>stderr
ok "a tiny model whose experts have biases" "$tiny" gpt_oss biased
for method in $methods; do
    ok "biases: $method" "$program" merge biased --method "$method" --keep 4 -q -o "biased-$method" --text calib.ids >stdout 2>stderr
    ok "biases: $method verifies" "$program" verify "biased-$method" biased >stdout 2>stderr
done
for way in "m-smoe --repair none" "dern --repair none" "m-smoe --repair none --emit tied" "adaptive"; do
    # shellcheck disable=SC2086
    ok "biases: $way, a plan" "$program" merge biased --method $way --keep 4 -q --overwrite --plan-only -o biased.json --text calib.ids \
        >stdout 2>stderr
    ok "biases: $way, apply" "$program" apply biased biased.json -q --overwrite -o biased-applied >stdout 2>stderr
    ok "biases: $way, verifies" "$program" verify biased-applied biased >stdout 2>stderr
    ok "biases: $way, the plan measures as its model" same_loss "biased --plan biased.json" biased-applied
done
ok "a tiny model whose weights are on the input" "$tiny" llama4_text inputs
expect 2 'the router.s weights multiply the input of experts.*choose a distance .logits, ' merge inputs --keep 4 -o x --text calib.ids --dry-run
ok "inputs: m-smoe" "$program" merge inputs --method m-smoe --keep 4 -q -o inputs-half --text calib.ids >stdout 2>stderr
ok "inputs: verifies" "$program" verify inputs-half inputs >stdout 2>stderr

# --- counts of layers that differ ---------------------------------------------------------------------------------------
ok "calibrate" "$program" calibrate "$model" --seq-len 128 -q -o stats.h5 --text calib.txt 2>stderr
# shellcheck disable=SC2086
{
    expect 2 'allocation global and mass count how often experts are selected; give --stats FILE' merge $common --allocation global
    expect 2 'layers would keep [0-9]+ to [0-9]+ experts.*--plan-only writes the plan' merge $common --allocation global --stats stats.h5
    expect 2 'min-experts is for an --allocation other than uniform' merge $common --min-experts 3
}
merged uneven.json --method m-smoe --allocation global --stats stats.h5 --remove 50% --repair none --plan-only
ok "what is not yet known is not said" [ -z "$(grep -E 'removed [0-9]+, kept' stderr)" ]
expect 3 'clients load one count' apply "$model" uneven.json -o x
prints 'overall' eval "$model" --plan uneven.json --seq-len 128 --text held.txt
merged uneven --method m-smoe --allocation global --stats stats.h5 --remove 50% --repair none --emit tied
ok "tied they load" "$program" verify uneven "$model" >stdout 2>stderr
ok "there, layers have unequal numbers of groups" [ "$(grep -o '"merged": [^"]*' uneven/moecompress.json | wc -l)" -eq 4 ]

merged uneven-map --method m-smoe --allocation global --stats stats.h5 --remove 50% --repair none --emit map
ok "map: so they load, too" "$program" verify uneven-map "$model" >stdout 2>stderr
ok "map: and that is no secret" [ -z "$(grep 'no client loads' stderr)" ]
prints 'experts +[0-9]+ to [0-9]+ a layer, shared by the 16 rows' inspect uneven-map

# by what merging loses, of two layers together, or three and the one that is left
kept()  # kept PLAN    numbers of experts that layers keep, in a line
{
    grep -o '"keep": \[[^]]*\]' "$1" | awk '{ printf "%d ", NF - 1 }'
}
shared()  # shared LAYERS KEEP LEAST    of the numbers on standard input: sums of so many layers, and the floor
{
    awk -v g="$1" -v k="$2" -v least="$3" '{ ok = NF == 4; for (i = 1; i <= NF; i++) { ok = ok && $i >= least && $i <= 16
        sum += $i; n++; if (n == g || i == NF) { ok = ok && sum == k * n; sum = n = 0 } } exit !ok }'
}
for settings in "2 sub-moe 50 4" "3 hc-smoe 25 4" "2 sub-moe 50 7" "9 hc-smoe 50 4"; do
    # shellcheck disable=SC2086
    set -- $settings
    merged loss.json --method "$2" --allocation loss --allocation-layers "$1" --min-experts "$4" --remove "$3%" --repair none \
        --plan-only --overwrite
    kept loss.json >counts.txt
    ok "loss, $settings: numbers of experts" shared "$1" $((16 - 16 * $3 / 100)) "$4" <counts.txt
    [ "$settings" != "9 hc-smoe 50 4" ] || ok "they are uneven" [ "$(kept loss.json)" != "8 8 8 8 " ]
done
ok "loss: in the plan" grep -q '"allocation": "loss", "min_experts": 4, "allocation_layers": 9' loss.json
prints 'overall' eval "$model" --plan loss.json --seq-len 128 --text held.txt
merged uniform --method hc-smoe --remove 50% --repair none
merged alone --method hc-smoe --remove 50% --repair none --allocation loss --allocation-layers 1
ok "loss, every layer by itself: as uniform" same_tensors uniform alone
merged loss-one.json --method sub-moe --allocation loss --remove 50% --plan-only --threads 1
merged loss-two.json --method sub-moe --allocation loss --remove 50% --plan-only --threads 2
ok "loss: one thread as two" cmp loss-one.json loss-two.json
ok "loss: one thread as two, weights" diff -r loss-one.json.weights loss-two.json.weights
loss="$model --method sub-moe --allocation loss --remove 50% --plan-only --seq-len 128 --text long.txt"
# shellcheck disable=SC2086
{
    ok "loss: undisturbed" "$program" merge $loss -q -o loss-whole.json >stdout 2>stderr
    start merge $loss -q -o loss-killed.json
}
pid=$! tries=0
while [ ! -e loss-killed.json.repair.partial/layer-00001.json ] && [ $tries -lt 3000 ] && kill -0 $pid 2>/dev/null; do
    sleep 0.02
    tries=$((tries + 1))
done
kill -9 $pid 2>/dev/null
wait $pid 2>/dev/null
ok "loss: killed in between" [ ! -e loss-killed.json ]
# shellcheck disable=SC2086
expect 0 'continuing' merge $loss -o loss-killed.json
ok "loss: as undisturbed" cmp loss-killed.json loss-whole.json
ok "loss: as undisturbed, weights" diff -r loss-killed.json.weights loss-whole.json.weights
ok "loss: groups" "$program" merge groups --method hc-smoe --keep 4 --allocation loss -q -o groups-loss --text calib.ids >stdout 2>stderr
ok "loss: groups, padded where they are uneven" "$program" verify groups-loss groups >stdout 2>stderr
# shellcheck disable=SC2086
{
    expect 2 'allocation loss gives layers unequal numbers.*--plan-only writes the plan' merge $common --method sub-moe --allocation loss
    expect 2 'grouping=nearest has no objective.*average, ward, complete, single, kmeans' merge $common --plan-only --allocation loss
    expect 2 'every layer keeps at least 9 experts' merge $common --plan-only --method sub-moe --allocation loss --min-experts 9
    expect 2 'allocation-layers goes with --allocation loss' merge $common --allocation-layers 3
}

# --- texts ---------------------------------------------------------------------------------------------------------------
cp calib.txt a.txt
sed -n 31,60p "$model/samples.txt" >b.txt
weighted()  # weighted OUT WEIGHT
{
    ok "a text of weight $2" "$program" merge "$model" -q -o "$1" --method m-smoe --remove 50% --repair none --plan-only --overwrite \
        --seq-len 128 --text a.txt "b.txt:$2" >stdout 2>stderr
}
weighted light.json 1
weighted heavy.json 40
ok "weights of texts count" [ -n "$(cmp light.json heavy.json 2>&1)" ]
weighted again.json 40
ok "and are the same again" cmp heavy.json again.json

# --- protection ----------------------------------------------------------------------------------------------------------
printf '0 5\n0 11\n' >protect.txt
for method in $methods; do
    merged p.json --method "$method" --remove 50% --protect protect.txt --repair none --plan-only
    ok "$method: protected experts stay, and nobody joins them" awk '/"layer": 0,/ {
        ok = /"keep": \[[^]]*\<?5, [^]]*11[,\]]/ && /"protected": \[5, 11\]/
        split($0, part, "\"merged\": "); split(part[2], list, "]]")
        exit !ok || (" " list[1]) ~ /[^0-9](5|11)([^0-9]|$)/
    }' p.json
    rm -r p.json p.json.weights
done
printf '0 1\n0 2\n0 3\n0 4\n0 5\n' >many.txt
# shellcheck disable=SC2086
{
    expect 2 'layer 0: 5 experts are protected, only 4 are kept' merge "$model" --keep 4 -o x $texts --protect many.txt
    expect 2 'layer 0: .*none is left for the others; keep more or protect fewer' merge "$model" --keep 5 -o x $texts --protect many.txt
    expect 2 'protect super needs statistics' merge $common --protect super
    expect 1 'nosuch.txt: No such file' merge $common --protect nosuch.txt
}

# --- what is said ------------------------------------------------------------------------------------------------------
prints '^adaptive \(the default\)$' merge --methods
ok "all methods are listed" [ "$(grep -c '^    [a-z]*=.* router=' stdout)" -eq 8 ]
ok "with what matters to them" [ "$(grep -c '^    distance=' stdout)" -eq 7 ]
ok "and the settings" grep -q '^fill=average|subspace|segments$' stdout
prints '"settings": \{' merge --methods --json
ok "all of them" [ "$(grep -c '"arxiv"' stdout)" -eq 8 ]
expect 0 'layer 3: 8 experts merged, [0-8] aligned .gain [0-9.e-]*.; 0 neurons passed on, 0 thrown away' \
    merge "$model" --method m-smoe --remove 50% --repair none -v --overwrite -o three --seq-len 128 --text calib.txt
expect 0 'layer 0: [0-9]+ of [0-9]+ groups gain by merging, the others are pruned' \
    merge "$model" --remove 50% -v --overwrite -o three --seq-len 128 --text calib.txt
expect 0 'layer 0: [0-8] experts merged, 0 aligned .gain 0.; [0-9]+ neurons passed on, [0-9]+ thrown away' \
    merge "$model" --method dern --remove 50% --repair none -v --overwrite -o three --seq-len 128 --text calib.txt
expect 0 'decided while the layers run: the experts listed here mean nothing' merge "$model" --remove 50% --dry-run --json --text calib.txt
expect 0 'decided while the layers run$' merge "$model" --remove 50% --dry-run --text calib.txt
ok "dry run: how many groups" grep -qE '^ +3 +16 +8 +0$' stdout
ok "dry run: the cost" grep -qE '^merge .* of disk beside the output, [0-9]+ token passes' stdout
prints '"work_disk_bytes": 3538944,' merge "$model" --remove 50% --dry-run --json --text calib.txt # 4 x 8 experts of 3 x 96 x 192, BF16

# --- the same bytes ----------------------------------------------------------------------------------------------------
for method in adaptive sub-moe; do
    merged "$method-two" --method $method --remove 50% --threads 2
    merged "$method-one" --method $method --remove 50% --threads 1
    ok "$method: one thread as two" diff -r "$method-one" "$method-two"
done
merged seeded --method sub-moe --remove 50% --seed 99
ok "k-means from another seed verifies" "$program" verify seeded "$model" >stdout 2>stderr
for method in adaptive merge-moe "m-smoe --emit map"; do
    long="$model --method $method --remove 50% -q --seq-len 128 --text long.txt"
    # shellcheck disable=SC2086
    {
        ok "$method: undisturbed" "$program" merge $long -o whole >stdout 2>stderr
        start merge $long -o killed
    }
    pid=$! tries=0
    while [ ! -e killed.repair.partial/layer-00001.json ] && [ $tries -lt 3000 ] && kill -0 $pid 2>/dev/null; do
        sleep 0.02
        tries=$((tries + 1))
    done
    kill -9 $pid 2>/dev/null
    wait $pid 2>/dev/null
    ok "$method: killed in between" [ ! -e killed ]
    ok "$method: with a layer done" [ -e killed.repair.partial/layer-00001.json ]
    # shellcheck disable=SC2086
    expect 3 'finished layers of another model, text or options; --no-resume' merge $long --set router=mean -o killed
    [ "$method" = "${method% map}" ] || expect 3 'finished layers of another' merge ${long%%--emit map *}${long#*--emit map } -o killed
    # shellcheck disable=SC2086
    expect 0 'continuing' merge "$model" --method $method --remove 50% --seq-len 128 --text long.txt -o killed
    ok "$method: as undisturbed" diff -r whole killed
    ok "$method: its work is gone" [ ! -e killed.repair.partial ]
    rm -r whole killed
done
# what a run leaves when it is asked to stop: nothing as long as no layer is done, else a folder that goes on
start merge "$model" --remove 50% -q --seq-len 128 --text long.txt -o stopped
pid=$! tries=0
while [ ! -e stopped.repair.partial/layer-00000.json ] && [ $tries -lt 3000 ] && kill -0 $pid 2>/dev/null; do
    sleep 0.02
    tries=$((tries + 1))
done
kill -INT $pid 2>/dev/null
wait $pid
code=$?
ok "interrupted: exit code $code" [ $code -eq 5 ]
ok "interrupted: it says how to go on" grep -q 'interrupted after [0-3] of 4 layers; the same command continues there' stderr
expect 0 'continuing' merge "$model" --remove 50% --seq-len 128 --text long.txt -o stopped

# --- a plan that was edited --------------------------------------------------------------------------------------------
edited()  # edited SED_SCRIPT    into edited.json; the weights are those of m-smoe.json
{
    sed -e "$1" m-smoe.json >edited.json
    ok "the plan was edited" [ -n "$(cmp m-smoe.json edited.json 2>&1)" ]
}
cp -r m-smoe.json.weights edited.json.weights
gone=$(awk '/"layer": 0,/ { sub(/.*"keep": \[/, ""); sub(/\].*/, ""); n = split($0, e, /, */)
    for (i = 1; i <= n; i++) kept[e[i]] = 1
    for (i = 0; i < 16; i++) if (!(i in kept)) { print i; exit } }' m-smoe.json)
edited "s/\"merged\": \[\[[0-9]*, /\"merged\": [[$gone, /"
expect 3 'merged: (an entry is not an expert from 0 to 15, each once|expert [0-9]+, into which [0-9]+ went, is not kept)' \
    apply "$model" edited.json -o x
edited 's/"merged": \[\[[^]]*\]/"merged": [['"$gone"', '"$gone"']/'
expect 3 'merged: an entry is not an expert from 0 to 15, each once' apply "$model" edited.json -o x
edited "s/\"merged\": \[\[[^]]*\].*\]\], \"rewritten\"/\"merged\": [[$gone]], \"rewritten\"/"
expect 3 "merged: expert $gone, into which $gone went, is not kept" apply "$model" edited.json -o x
expect 3 "merged: expert $gone, into which" eval "$model" --plan edited.json --seq-len 128 --text held.txt
edited 's/"merged": \[\[\([0-9]*\), /"merged": [[\1, 16, /'
expect 3 'merged: an entry is not an expert from 0 to 15' apply "$model" edited.json -o x
edited 's/"merged": \[\[/"merged": [["0", /'
expect 3 'merged: an entry is not an expert' apply "$model" edited.json -o x
edited 's/"merged": \[.*\]\], "rewritten"/"merged": 7, "rewritten"/'
expect 3 'merged is not a list of groups' apply "$model" edited.json -o x
edited 's/"merged":/"megred":/'
expect 3 'megred' apply "$model" edited.json -o x

# --- bad input ---------------------------------------------------------------------------------------------------------
mkdir there
# shellcheck disable=SC2086
{
    expect 2 'give --text FILE' merge "$model" --remove 50% -o x
    expect 2 'give --text FILE' merge "$model" --remove 50% -o x --repair none
    expect 2 'how much\? give --remove 25% or --keep N' merge "$model" -o x $texts
    expect 2 'MODEL is missing' merge --remove 50% -o x $texts
    expect 2 'give one' merge $common --keep 4
    expect 2 'OUT is missing: the folder to write' merge "$model" --remove 50% $texts
    expect 2 'OUT is missing: the plan file' merge "$model" --remove 50% $texts --plan-only
    expect 2 'the model has 16 experts' merge "$model" --keep 17 -o x $texts
    expect 2 'no expert would be left of 16' merge "$model" --remove 100% -o x $texts
    expect 2 'emit tied goes with --repair none' merge $common --emit tied --repair ridge
    expect 2 'tied keeps the original router' merge $common --emit tied --repair-router refit
    expect 2 'is none of native, tied, map' merge $common --emit both
    expect 2 'emit map keeps the original router' merge $common --emit map --repair-router refit
    expect 2 'emit map: dern prunes experts, whose rows of the router would lead nowhere; --emit native, or' merge $common --emit map --method dern
    expect 2 'emit map needs no --pad-to' merge $common --emit map --pad-to 16
    expect 3 'compat: vllm will not load the output .map.' merge $common --emit map --compat vllm
    expect 2 'emit map: gpt_oss: .*--emit native loads in every client' merge biased --keep 4 -o x --text calib.ids --emit map
    expect 2 'method nosuch: no such method' merge $common --method nosuch
    expect 2 'method reap: no such method' merge $common --method reap
    expect 2 'repair-epochs goes with --repair deep' merge $common --repair-epochs 2
    expect 2 'repair-router refit goes with' merge $common --repair none --repair-router refit
    expect 1 'nosuch.txt' merge "$model" --remove 50% -o x --text nosuch.txt
    expect 1 'nosuch' merge nosuch --remove 50% -o x $texts
    expect 1 'nosuch.h5' merge $common --stats nosuch.h5
    expect 3 'is there already' merge "$model" --remove 50% -o tied $texts
    expect 4 'max-memory' merge $common --max-memory 20MiB
    expect 1 'calib.txt' merge "$model" --remove 50% -o calib.txt/x $texts
}
ok "nothing is left behind" [ -z "$(find . -maxdepth 1 \( -name 'x*' -o -name '*.partial' \))" ]
finish
