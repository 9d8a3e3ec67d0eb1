#!/bin/sh
# The list of families, and README's table, which is its output.
. "$2/tests/cli/lib.sh"

prints '^qwen3_moe  \(' families
prints '"model_type": "deepseek_v3"' families --json
expect 2 "one word too many" families qwen3_moe

run families --markdown
cp "$work/stdout" "$work/table"
sed -n '/^<!-- families -->$/,/^<!-- end -->$/p' "$source/README.md" | sed '1d;$d' > "$work/readme"
ok "README's table is the output of families --markdown" cmp -s "$work/table" "$work/readme"
[ -s "$work/readme" ] && ! cmp -s "$work/table" "$work/readme" && diff "$work/table" "$work/readme" | head -5
finish
