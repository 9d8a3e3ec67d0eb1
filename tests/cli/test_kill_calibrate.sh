#!/bin/sh
# calibrate killed at ten random moments and continued each time: the statistics are those of a run that nobody disturbed.
. "$2/tests/cli/lib.sh"

model=$source/recipes/demo-model
[ -f "$model/samples.txt" ] || exit 77
tokens=40000
[ -z "${MOEC_SANITIZED:-}" ] || tokens=4000

become()  # become OUT OPTIONS...    this shell turns into a calibration, so that killing it kills that
{
    out=$1
    shift
    exec "$program" calibrate "$model" --text "$model/samples.txt" --seq-len 128 --tokens $tokens --floor 1 -q \
        --checkpoint-every 0 -o "$out" "$@" 2>"$work/stderr"
}

calibrate()
{
    (become "$@")
}

# A random share of $1 nanoseconds, in seconds.
moment()
{
    od -An -N4 -tu4 /dev/urandom | awk -v span="$1" '{ printf "%.4f", span * $1 / 4294967296 / 1e9 }'
}

began=$(date +%s%N)
ok "undisturbed run" calibrate "$work/want.h5"
took=$(($(date +%s%N) - began))

# Each time less than a whole run passes, so that most kills meet a run under way; what was reached is kept.
kills=0 finished=0
while [ $kills -lt 10 ]; do
    become "$work/got.h5" --threads $((kills % 2 + 1)) &
    victim=$!
    sleep "$(moment $((took * 7 / 10)))"
    if kill -KILL $victim 2>/dev/null; then
        kills=$((kills + 1))
    fi
    wait $victim 2>/dev/null
    if [ -e "$work/got.h5" ]; then
        finished=$((finished + 1))
        ok "statistics after $kills kills" cmp -s "$work/want.h5" "$work/got.h5"
        rm -f "$work/got.h5"
    fi
done
[ -e "$work/got.h5" ] || ok "the last run" calibrate "$work/got.h5"
ok "statistics after all kills" cmp -s "$work/want.h5" "$work/got.h5"
ok "no leftovers" [ ! -e "$work/got.h5.partial" ]
echo "10 kills, $finished runs finished among them"

# A terminated run says how to go on.
rm -f "$work/got.h5"
become "$work/got.h5" &
victim=$!
sleep "$(awk -v span=$took 'BEGIN { printf "%.4f", span / 2e9 }')"
kill -TERM $victim 2>/dev/null
wait $victim
code=$?
if [ ! -e "$work/got.h5" ]; then
    ok "exit code of a terminated run is $code" [ $code -eq 5 ]
    ok "what it says" grep -q "the same command continues" "$work/stderr"
    ok "continuing" calibrate "$work/got.h5"
fi
ok "statistics after a signal" cmp -s "$work/want.h5" "$work/got.h5"
finish
