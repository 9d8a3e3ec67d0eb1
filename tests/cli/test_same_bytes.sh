#!/bin/sh
# The same bytes from any number of threads, and from a plan carried out later.
. "$2/tests/cli/lib.sh"
cd "$work" || exit 1
demo=$source/recipes/demo-model
tokens=6000
[ -z "${MOEC_SANITIZED:-}" ] || tokens=1500

for threads in 1 2 5; do
    expect 0 '' calibrate "$demo" --text "$demo/samples.txt" --seq-len 128 --tokens $tokens -o $threads.h5 --threads $threads
    ok "statistics of $threads threads" cmp 1.h5 $threads.h5
    expect 0 '' prune "$demo" --stats 1.h5 --method reap --remove 50% -o pruned-$threads --threads $threads
    ok "pruned by $threads threads" diff -r pruned-1 pruned-$threads
    prints '"perplexity"' eval pruned-1 --base "$demo" --text "$demo/samples.txt" --seq-len 128 --tokens 1000 --json \
        --threads $threads
    grep -vE '"(seconds|peak_memory_bytes)"' stdout >eval-$threads
    ok "evaluated by $threads threads" cmp eval-1 eval-$threads
done

# A statistics file is the sum of its parts.
head -n 1000 "$demo/samples.txt" >a.txt
tail -n 1000 "$demo/samples.txt" >b.txt
for part in a b; do
    expect 0 '' calibrate "$demo" --text $part.txt --seq-len 128 --tokens $tokens -o $part.h5
done
expect 0 '' stats merge a.h5 b.h5 -o ab.h5
expect 0 '' stats merge b.h5 a.h5 -o ba.h5
ok "merged in either order: the same totals" [ "$("$program" stats show ab.h5 | sed -n '/^coverage/,$p')" = \
    "$("$program" stats show ba.h5 | sed -n '/^coverage/,$p')" ]

expect 0 '' prune "$demo" --stats 1.h5 --method reap --remove 50% --plan-only -o plan.json
expect 0 '' apply "$demo" plan.json -o applied
for file in pruned-1/*.safetensors pruned-1/config.json pruned-1/model.safetensors.index.json; do
    ok "apply writes what prune writes: $file" cmp "$file" "applied/${file#pruned-1/}"
done
prints '"ok": true' verify applied "$demo" --json
run verify "$demo" pruned-1
ok "verify of something else: exit code 3" [ "$code" -eq 3 ]
finish
