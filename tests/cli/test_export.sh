#!/bin/sh
# stats export: an importance matrix from statistics of tier 1, in both forms, and whatever users may get wrong. What is in it is
# compared by tests/interop/test_gguf.py.
. "$2/tests/cli/lib.sh"
cd "$work" || exit 1
demo=$source/recipes/demo-model

head -n 40 "$demo/samples.txt" >a.txt
tail -n 40 "$demo/samples.txt" >b.txt
expect 0 '' calibrate "$demo" --text first=a.txt last=b.txt --seq-len 128 --tokens 400 --tier 1 -o stats.h5
expect 0 '' calibrate "$demo" --text a.txt --seq-len 128 --tokens 200 -o tier0.h5

expect 2 'imatrix FILE is missing' stats export stats.h5
expect 2 'takes one file' stats export stats.h5 stats.h5 --imatrix m.gguf
expect 2 'are for stats export' stats show stats.h5 --imatrix m.gguf
expect 2 'are for stats export' stats show stats.h5 --imatrix-format dat
expect 2 'calibrate with --tier 1' stats export tier0.h5 --imatrix m.gguf
expect 2 'did you mean first' stats export stats.h5 --imatrix m.gguf --domain-weights frist=2
expect 1 'missing.h5' stats export missing.h5 --imatrix m.gguf
ok 'nothing was written' [ ! -e m.gguf ]

expect 0 'm.gguf: [0-9]+ matrices' stats export stats.h5 --imatrix m.gguf
ok 'it is a GGUF' [ "$(head -c 4 m.gguf)" = GGUF ]
expect 3 'm.gguf: is already there; --overwrite' stats export stats.h5 --imatrix m.gguf
prints '"entries": [0-9]+' stats export stats.h5 --imatrix m.gguf --overwrite --json
expect 3 'not an importance matrix of moecompress' stats export stats.h5 --imatrix a.txt --overwrite
expect 3 'not an importance matrix of moecompress' stats export stats.h5 --imatrix stats.h5 --overwrite
echo 'notes about the imatrix of blk.0.ffn_gate_exps.weight' >notes.txt
expect 3 'not an importance matrix of moecompress' stats export stats.h5 --imatrix notes.txt --overwrite

expect 0 '' stats export stats.h5 --imatrix again.gguf --threads 1
ok 'the same bytes again' cmp m.gguf again.gguf
expect 0 '' stats export stats.h5 --imatrix only.gguf --domain-weights last=0
ok 'weights of texts count' sh -c '! cmp -s m.gguf only.gguf'

expect 0 '' stats export stats.h5 --imatrix m.dat --imatrix-format dat
expect 0 '' stats export stats.h5 --imatrix m.dat --imatrix-format dat --overwrite
ok 'names in the old form' grep -q 'blk\.0\.ffn_gate_exps\.weight' m.dat

finish
