#!/bin/sh
# The demo runs through, twice in the same folder, and its table has five complete rows with the order one would expect.
. "$2/tests/cli/lib.sh"

if [ -n "${MOEC_SANITIZED:-}" ]; then
    echo "skipped: minutes long under sanitizers, and the other tests run the same code on less text"
    exit 77
fi
for round in first second; do
    ok "demo, $round time" sh "$source/recipes/demo.sh" --program "$program" --work "$work/demo" >"$work/stdout" 2>"$work/stderr"
done
ok "five rows" [ "$(grep -cE '^(original|-25 %|-50 %|-25 %, repaired|-50 %, repaired) +[0-9]+ +[0-9.]+ MiB +[0-9.]+ +[0-9.]+ +[0-9.]+ %$' "$work/stdout")" -eq 5 ]
ok "smaller and worse with every step, but not broken" awk '
    / MiB .* %$/ { size[++n] = $(NF - 5); ppl[n] = $(NF - 3); kl[n] = $(NF - 2); top1[n] = $(NF - 1) }
    END { exit !(n == 5 && size[1] > size[2] && size[2] == size[3] && size[3] > size[4] && ppl[4] < 2 * ppl[1] &&
                 kl[1] == 0 && kl[3] > 0 && kl[2] > kl[3] && kl[5] > kl[2] && kl[4] > 2 * kl[5] && top1[1] == 100 &&
                 top1[2] > top1[5] && top1[3] > top1[5] && top1[5] > top1[4] && top1[4] > 50) }' "$work/stdout"
tail -n 6 "$work/stdout"
finish
