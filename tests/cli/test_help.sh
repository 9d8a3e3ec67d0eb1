#!/bin/sh
# Help, version, man page, completion, and what happens to words the program does not know.
. "$2/tests/cli/lib.sh"

verbs=$("$program" help | sed -n '/^verbs:/,/^$/s/^  \([a-z]*\) .*/\1/p' | grep -v '^help$')
ok "there are verbs" [ -n "$verbs" ]
for verb in $verbs; do
    prints "^usage: moecompress $verb " "$verb" --help
    prints '^examples:$' "$verb" --help
    prints "^  moecompress $verb" help "$verb"
    prints '^      --json ' "$verb" -h
    expect 2 "no option --no-such-option" "$verb" --no-such-option
    # one line of at most 100 columns, none of them with blanks at the end
    ok "width of $verb --help" sh -c '[ -z "$(sed -n "/^examples:/q;p" "$1" | grep -E ".{101}| $")" ]' - "$work/stdout"
done

prints '^moecompress [0-9]+\.[0-9]+\.[0-9]+$' --version
prints '^usage: moecompress VERB' help
prints '^usage: moecompress VERB' --help
ok "README has every verb" sh -c 'for v in $1; do grep -q "^| $v |" "$2/README.md" || exit 1; done' - "$verbs" "$source"

expect 2 "no verb 'inspcet'; did you mean inspect\?" inspcet
expect 2 "no verb 'xyzzy'; see moecompress --help" xyzzy
expect 2 "did you mean stats" help stat
expect 2 "did you mean --json\?" inspect --jsno .
expect 2 "a word is missing; usage: moecompress inspect MODEL" inspect
expect 2 "one word too many" inspect a b
expect 2 "is not in 0 .. 1024" inspect --threads 5000 .
expect 2 "exclude each other" inspect -q -v .

run
ok "no arguments: usage on stderr, exit code 2" sh -c '[ "$1" -eq 2 ] && grep -q "^usage:" "$2/stderr" && [ ! -s "$2/stdout" ]' \
    - "$code" "$work"

if [ -w /dev/full ]; then # a full disk shows when the last buffer is written
    "$program" help >/dev/full 2>"$work/stderr"
    code=$?
    ok "full standard output" [ "$code" -eq 4 ]
    ok "full standard output is said" grep -q 'error: standard output: No space left' "$work/stderr"
fi

"$program" man >"$work/page.1" || fail "man"
if command -v groff >/dev/null 2>&1; then
    groff -man -Tascii -ww -rLL=100n "$work/page.1" >"$work/page.txt" 2>"$work/stderr"
    ok "groff finds nothing wrong with the man page" [ ! -s "$work/stderr" ]
    for verb in $verbs; do
        ok "man page has $verb" grep -q "moecompress $verb" "$work/page.txt"
    done
else
    echo "groff is not here: the man page was not rendered"
fi

if command -v bash >/dev/null 2>&1; then
    "$program" completion bash >"$work/completion"
    complete()
    {
        bash -c '. "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _moecompress; echo "${COMPREPLY[*]}"' - \
            "$work/completion" "$@"
    }
    ok "completion of a verb" [ "$(complete moecompress insp)" = inspect ]
    ok "completion of an option" [ "$(complete moecompress inspect --js)" = --json ]
fi
finish
