# Options of the recipes that run a paper's pipeline; sourced by them, which set $usage first. Leaves: program, model, text, out,
# share, length, eval.
root=$(cd "$(dirname "$0")/.." && pwd)
program=$root/build/moecompress model='' text='' out='' share=25% length=2048 eval='' more=''
while [ $# -gt 0 ]; do
    case $1 in
    --program) program=$2 ;;
    --model) model=$2 ;;
    --text) text=$2 ;;
    --out) out=$2 ;;
    --remove) share=$2 ;;
    --seq-len) length=$2 ;;
    --eval) eval=$2 ;;
    --repair) more="--repair $2" ;;
    *) model='' && break ;;
    esac
    shift 2
done
if [ -z "$model" ] || [ -z "$text" ] || [ -z "$out" ]; then
    printf '%s\n' "$usage" >&2
    exit 2
fi

measure()  # measure OUTPUT    says what it cost, where there is --eval
{
    [ -z "$eval" ] || "$program" eval "$1" --base "$model" --seq-len "$length" --text "$eval"
}
