#!/bin/sh
# prune is killed without warning at random moments and started again until it gets through; the output is the same, byte for
# byte, as that of a run nobody disturbed, and nothing ever has the final name before it is whole.
# Usage: test_kill_prune.sh MOECOMPRESS SOURCE_DIR
set -eu
moec=$1
model=$2/recipes/demo-model
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM

fail() { echo "FAIL: $*" >&2; exit 1; }

# A larger model than the demo has, so that there is something to be killed in: its shards, blown up with tensors of no role.
python3 - "$model" "$work/model" <<'PY' || exit 77
import json, os, shutil, struct, sys
src, dst = sys.argv[1:3]
shutil.copytree(src, dst)
index = json.load(open(dst + "/model.safetensors.index.json"))
for i, name in enumerate(sorted(set(index["weight_map"].values()))):
    with open(f"{dst}/{name}", "rb") as f:
        n = struct.unpack("<Q", f.read(8))[0]
        head, data = json.loads(f.read(n)), f.read()
    extra = f"extra.{i}.weight"
    rows = 24 << 10
    head[extra] = {"dtype": "BF16", "shape": [rows, 1024], "data_offsets": [len(data), len(data) + rows * 2048]}
    index["weight_map"][extra] = name
    index["metadata"]["total_size"] += rows * 2048
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    block = bytes((7 * j + i) % 251 for j in range(1 << 16))
    with open(f"{dst}/{name}", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)
        for _ in range(rows * 2048 // len(block)):
            f.write(block)
json.dump(index, open(dst + "/model.safetensors.index.json", "w"))
PY

run() { "$moec" prune "$work/model" --method random --seed 3 --remove 50% -q -o "$1"; }

run "$work/want" > /dev/null
kills=0
rounds=0
while [ $rounds -lt 6 ]; do
    rm -rf "$work/out" "$work/out.partial"
    tries=0
    while [ ! -e "$work/out" ]; do
        run "$work/out" > /dev/null 2>&1 &
        pid=$!
        # at first anywhere in a run; later tries wait longer, so that one gets through on a slow machine too
        pause=$(awk -v r=$rounds -v t=$tries 'BEGIN { srand(r * 1000 + t); printf "%.3f", rand() * (t < 5 ? 0.1 : 0.1 * t) }')
        sleep "$pause"
        if kill -9 $pid 2>/dev/null; then kills=$((kills + 1)); fi
        wait $pid 2>/dev/null || true
        tries=$((tries + 1))
        [ $tries -lt 200 ] || fail "never got through"
    done
    diff -r "$work/want" "$work/out" > /dev/null || fail "round $rounds: the output differs after kills"
    [ ! -e "$work/out.partial" ] || fail "round $rounds: a partial folder was left"
    rounds=$((rounds + 1))
done
[ $kills -gt 0 ] || fail "no run was killed"

# A signal that can be caught: exit code 5, and the next run continues.
rm -rf "$work/out"
"$moec" prune "$work/model" --method random --seed 3 --remove 50% -q -o "$work/out" > /dev/null 2> "$work/err" &
pid=$!
sleep 0.05
kill -INT $pid 2>/dev/null || true
code=0
wait $pid || code=$?
case $code in
    0 | 5) ;;
    130) ;; # it came before the program could catch it
    *) fail "interrupted: exit code $code: $(cat "$work/err")" ;;
esac
[ $code -eq 0 ] || run "$work/out" > /dev/null
diff -r "$work/want" "$work/out" > /dev/null || fail "the output differs after an interrupt"

# Two at once on the same output: one of them is told, the output is whole.
rm -rf "$work/out"
run "$work/out" > /dev/null 2> "$work/err1" & a=$!
run "$work/out" > /dev/null 2> "$work/err2" & b=$!
ca=0; wait $a || ca=$?
cb=0; wait $b || cb=$?
[ $ca -eq 0 ] || [ $cb -eq 0 ] || fail "both of two runs at once failed: $(cat "$work/err1" "$work/err2")"
diff -r "$work/want" "$work/out" > /dev/null || fail "two runs at once spoilt the output"
echo "ok: $kills kills in $rounds rounds"
