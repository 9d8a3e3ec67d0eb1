#!/bin/sh
# Patterns of tasks in a store, what removed experts served, weights of texts, thresholds of dynamic skipping: on the demo model
# as users do it, and whatever they may get wrong.
. "$2/tests/cli/lib.sh"
cd "$work" || exit 1
demo=$source/recipes/demo-model

head -n 700 "$demo/samples.txt" >a.txt
tail -n 700 "$demo/samples.txt" >b.txt
expect 0 '' calibrate "$demo" --text first=a.txt last=b.txt --seq-len 128 --tokens 1600 -o stats.h5
expect 0 '' calibrate "$demo" --text b.txt --seq-len 128 --tokens 400 -o prompt.h5

# --- building ---------------------------------------------------------------------------------------------------------
expect 2 'give --task NAME, or --by-domain' stats store add tasks.json stats.h5
expect 2 'give --task NAME, or --by-domain' stats store add tasks.json stats.h5 --task x --by-domain
expect 2 'did you mean first' stats store add tasks.json stats.h5 --task x --domain frist
expect 2 'cannot be called nearest' stats store add tasks.json stats.h5 --task nearest
expect 2 'none of add, show and query' stats store list tasks.json
expect 2 'takes STORE FILE' stats store add tasks.json --task x
expect 2 'does not take --task' stats store show tasks.json --task x
expect 2 'are for stats store' stats show stats.h5 --by-domain
expect 2 'takes no -o' stats store add tasks.json stats.h5 --task x -o other
expect 2 'a word is missing' stats store
expect 1 'missing.h5' stats store add tasks.json missing.h5 --task x
ok "nothing written" [ ! -e tasks.json ]
expect 0 '2 tasks added, 2 in all' stats store add tasks.json stats.h5 --by-domain
prints '"added"' stats store add tasks.json stats.h5 --task both --json
prints '"tasks": 3' stats store add tasks.json stats.h5 --task both --json --overwrite
cp tasks.json before.json
expect 3 'task first is already there; --overwrite' stats store add tasks.json stats.h5 --by-domain
ok "as it was" cmp tasks.json before.json
expect 0 '' stats store add again/tasks.json stats.h5 --by-domain
expect 0 '' stats store add again/tasks.json stats.h5 --task both
ok "the same bytes" cmp tasks.json again/tasks.json
expect 3 'not a pattern store' stats store add stats.h5 stats.h5 --task x
prints 'both: [0-9]+ tokens' stats store show tasks.json
prints '"top_k": 4' stats store show tasks.json --json

# --- asking -----------------------------------------------------------------------------------------------------------
prints '^ +0  last  .nearest.' stats store query tasks.json stats.h5 --domain last
prints '"nearest": "last"' stats store query tasks.json prompt.h5 --json
expect 1 'no.json' stats store query no.json prompt.h5

# --- models out of it ---------------------------------------------------------------------------------------------------
prints . prune "$demo" --patterns tasks.json --task first --remove 50% -o first --json
prints '"ok": true' verify first "$demo" --json
expect 0 'nearest task: last' prune "$demo" --patterns tasks.json --task nearest --stats prompt.h5 --keep 6 --plan-only -o near.json
ok "the plan says which" grep -qE '"options": .*"task": "last", "distance": ' near.json
ok "and how" grep -q '"method": "tcess"' near.json
for keep in 4 8 12; do
    prints . prune "$demo" --patterns tasks.json --task both --keep $keep --plan-only -o both-$keep.json
done
prints . prune "$demo" --patterns tasks.json --task both --remove 25% --plan-only -o both-25.json
ok "any number out of one entry" cmp both-12.json both-25.json
expect 2 'did you mean first' prune "$demo" --patterns tasks.json --task frist --keep 8 -o none
expect 2 'needs the statistics of a prompt' prune "$demo" --patterns tasks.json --task nearest --keep 8 -o none
expect 2 'belong together' prune "$demo" --patterns tasks.json --keep 8 -o none
expect 2 'belong together' prune "$demo" --task first --stats stats.h5 --keep 8 -o none
expect 2 'takes the place of --method energy' prune "$demo" --patterns tasks.json --task first --method energy \
    --keep 8 -o none
expect 2 'takes the place of --method frequency' prune "$demo" --patterns tasks.json --task first --method frequency --keep 8 -o none
tiny_model tiny
expect 3 'patterns of another model: MoE layers is 4 there, 1 here' prune tiny --patterns tasks.json --task first --keep 2 -o none
sed 's/"model": "./"model": "x/' tasks.json >other.json
expect 3 'patterns of another model: fingerprint' prune "$demo" --patterns other.json --task first --keep 8 -o none
expect 3 'patterns of another model' stats store query other.json prompt.h5
expect 3 'patterns of another model' stats store add other.json prompt.h5 --task x
sed 's/"tasks": .*/"tasks": []}/' tasks.json >empty.json
expect 3 'the store is empty' prune "$demo" --patterns empty.json --task first --keep 8 -o none
expect 3 'the store is empty' stats store query empty.json prompt.h5
head -c 2000 tasks.json >cut.json
expect 3 'cut.json: JSON' prune "$demo" --patterns cut.json --task first --keep 8 -o none
sed 's/"ranking": \[\[\([0-9]*\), \([0-9]*\)/"ranking": [[\2, \1/' tasks.json >swapped.json
expect 3 'tasks.0.: ranking.0.: expert' prune "$demo" --patterns swapped.json --task first --keep 8 -o none
expect 3 'the store: unknown key moecompress_plan' prune "$demo" --patterns near.json --task first --keep 8 -o none
ok "nothing written" [ ! -e none ]

# --- what removed experts served, weights of texts ------------------------------------------------------------------------
prints 'what the removed experts served' prune "$demo" --stats stats.h5 --remove 50% --dry-run
prints '^ +last +[0-9.]+ % +[0-9.]+ %$' prune "$demo" --stats stats.h5 --remove 50% --dry-run
prints '"lost_by_domain"' prune "$demo" --stats stats.h5 --remove 50% --dry-run --json
ok "each removed expert" [ "$(grep -c '"most"' stdout)" -eq 32 ]
prints . prune "$demo" --stats stats.h5 --remove 50% --method frequency --domain-weight last=0 --plan-only -o w.json
ok "recorded" grep -q '"domain_weights": {"first": 1.0, "last": 0.0}' w.json
expect 0 '' calibrate "$demo" --text first=a.txt --seq-len 128 --tokens 800 -o first.h5
prints . prune "$demo" --stats first.h5 --remove 50% --method frequency --plan-only -o f.json
kept()
{
    grep -oE '"keep": \[[^]]*\]' "$1"
}
ok "as without the text" [ "$(kept w.json)" = "$(kept f.json)" ]
expect 2 'did you mean last' prune "$demo" --stats stats.h5 --keep 8 --domain-weight lust=2 -o none
expect 2 'not a weight' prune "$demo" --stats stats.h5 --keep 8 --domain-weight last=-2 -o none
expect 2 'are 0' prune "$demo" --stats stats.h5 --keep 8 --domain-weight last=0,first=0 -o none
expect 2 'needs --stats' prune "$demo" --method random --keep 8 --domain-weight last=2 -o none

# --- betas ------------------------------------------------------------------------------------------------------------
prints '"betas"' stats show stats.h5 --json
expect 2 'top-k is 4' prune "$demo" --stats stats.h5 --keep 8 --betas -o none
expect 2 'needs --stats' prune "$demo" --method random --keep 8 --betas -o none
ok "nothing written" [ ! -e none ]
cp -r "$demo" two
sed -i 's/"num_experts_per_tok": 4/"num_experts_per_tok": 2/' two/config.json
expect 0 '' calibrate two --text a.txt --seq-len 128 --tokens 800 -o two.h5
prints . prune two --stats two.h5 --keep 8 --betas -o skipping
prints '"ok": true' verify skipping two --json
ok "in config.json" grep -qE '^  "betas": \{"0": 0\.[0-9]+, "1": 0\.[0-9]+, "2": 0\.[0-9]+, "3": 0\.[0-9]+\},$' skipping/config.json
prints . prune two --stats two.h5 --keep 8 --betas --plan-only -o betas.json
expect 0 '' apply two betas.json -o applied
ok "apply writes what prune writes" cmp skipping/config.json applied/config.json
expect 2 "the output's 1" prune two --stats two.h5 --keep 1 --betas -o none
finish
