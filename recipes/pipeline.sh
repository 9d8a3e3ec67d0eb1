# Options of the recipes that run a paper's pipeline; sourced by them, which set $usage first. Leaves: program, model, text, out,
# share, length, tokens, repair, eval, bits, format.
root=$(cd "$(dirname "$0")/.." && pwd)
usage="usage: $usage
    [--seq-len 2048] [--tokens 0: all] [--repair none|ridge|deep] [--eval PATH] [--program FILE]"
program=$root/build/moecompress model='' text='' out='' share=25% length=2048 tokens=0 repair=none eval='' bits=2.5 format=fake
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || { model='' && break; }
    case $1 in
    --program) program=$2 ;;
    --model) model=$2 ;;
    --text) text=$2 ;;
    --out) out=$2 ;;
    --remove) share=$2 ;;
    --seq-len) length=$2 ;;
    --tokens) tokens=$2 ;;
    --eval) eval=$2 ;;
    --repair) repair=$2 ;;
    --bits) bits=$2 ;;
    --format) format=$2 ;;
    *) model='' && break ;;
    esac
    shift 2
done
if [ -z "$model" ] || [ -z "$text" ] || [ -z "$out" ]; then
    sed -n '2,/^set -eu$/s/^# \{0,1\}//p' "$0" >&2
    printf '%s\n' "$usage" >&2
    exit 2
fi
if ! command -v "$program" >/dev/null 2>&1; then
    echo "$program: is not built; cmake -S $root -B $root/build && cmake --build $root/build -j, or give --program" >&2
    exit 1
fi

measure()  # measure FOLDER [OPTIONS]    says what it cost, where there is --eval
{
    [ -z "$eval" ] || "$program" eval "$@" --base "$model" --seq-len "$length" --text "$eval"
}
