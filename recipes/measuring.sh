# What the recipes that measure have in common: their options, the model and the two halves of its text, the original's reference.
# Sourced. `own` names the options that only the recipe has, as variables that are set already (--seq-len is seq_len); --help, or an option
# that is none, prints the comment that the recipe begins with.
root=$(cd "$(dirname "$0")/.." && pwd)
program=$root/build/moecompress work=$root/build/$(basename "$0" .sh) model=$root/recipes/demo-model calib='' eval='' seq_len=128
tokens=65536 windows=30

usage()  # usage STATUS
{
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
    exit "$1"
}

while [ $# -gt 0 ]; do
    option=$(printf '%s' "$1" | sed -n 's/^--//p' | tr - _)
    case " program work model calib eval seq_len tokens windows $own " in
    *" $option "*) [ -n "$option" ] && [ $# -gt 1 ] || usage 2 ;;
    *) [ "$1" != --help ] || usage 0; usage 2 ;;
    esac
    eval "$option=\$2"
    shift 2
done

# Of a text that is not given: that half of the model's samples, by hundreds of lines in turn.
mkdir -p "$work"
if [ -z "$calib" ]; then
    calib=$work/calibration.txt
    awk 'int((NR - 1) / 100) % 2 == 0' "$model/samples.txt" >"$calib"
fi
if [ -z "$eval" ]; then
    eval=$work/evaluation.txt
    awk 'int((NR - 1) / 100) % 2 == 1' "$model/samples.txt" >"$eval"
fi

evaluate()  # evaluate MODEL OPTIONS..    as JSON
{
    "$program" eval "$@" --seq-len "$seq_len" --max-windows "$windows" -q --json --text "$eval"
}

reference()  # makes $work/original.ref, for evaluate MODEL --reference
{
    [ -e "$work/original.ref" ] || evaluate "$model" --save-reference "$work/original.ref" >/dev/null
}

number()  # number KEY FILE    the first number of that key
{
    sed -n "s/^ *\"$1\": *\([-+.0-9eE]*\),*\$/\1/p" "$2" | head -n 1
}
