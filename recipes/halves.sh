# Makes $work, and where $calib or $eval is empty, that half of $model/samples.txt in it: by hundreds of lines, in turn. Sourced by the
# recipes that measure.
mkdir -p "$work"
if [ -z "$calib" ]; then
    awk 'int((NR - 1) / 100) % 2 == 0' "$model/samples.txt" >"$work/calibration.txt"
    calib=$work/calibration.txt
fi
if [ -z "$eval" ]; then
    awk 'int((NR - 1) / 100) % 2 == 1' "$model/samples.txt" >"$work/evaluation.txt"
    eval=$work/evaluation.txt
fi
