#!/bin/sh
# Builds everything and runs every test, on a Debian 12 that has nothing but this folder.
#   sh tests/run.sh [--fast] [--no-interop]
#     --fast         the release build's tests only: no sanitizers, no fuzzing, no Python clients
#     --no-interop   without the Python clients (torch and transformers, a large download)
# Environment: MOEC_FUZZ_SECONDS (5) for each fuzz target, PYTHON (python3).
# The last line is "N passed, M failed", counted in test programs. Exit code 0 only when none failed.
set -u

sanitize=yes interop=yes
for option in "$@"; do
    case $option in
    --fast) sanitize=no interop=no ;;
    --no-interop) interop=no ;;
    *)
        sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
    esac
done

cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
jobs=$(nproc 2>/dev/null || echo 2)
began=$(date +%s)
passed=0 failed=0 skipped=0 failures=
export OPENBLAS_NUM_THREADS=1 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

section()
{
    printf '\n=== %s (%s s)\n' "$1" $(($(date +%s) - began))
}

count()  # count passed|failed|skipped NAME
{
    case $1 in
    passed) passed=$((passed + 1)) ;;
    skipped) skipped=$((skipped + 1)) ;;
    failed)
        failed=$((failed + 1))
        failures="$failures
  $2"
        ;;
    esac
}

finish()
{
    section summary
    [ "$skipped" -eq 0 ] || echo "$skipped skipped (said above)"
    [ -z "$failures" ] || echo "failed:$failures"
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
    exit
}

build()  # build FOLDER NAME cmake-options...
{
    folder=$1 name=$2
    shift 2
    generator=
    if [ ! -e "$folder/CMakeCache.txt" ] && command -v ninja >/dev/null 2>&1; then
        generator="-G Ninja"
    fi
    # shellcheck disable=SC2086
    if cmake -S . -B "$folder" $generator -DMOEC_TESTS=ON "$@" >"$folder.log" 2>&1 &&
        cmake --build "$folder" -j "$jobs" >>"$folder.log" 2>&1; then
        tail -n 1 "$folder.log"
        return 0
    fi
    tail -n 60 "$folder.log"
    count failed "$name: the build"
    return 1
}

run_ctest()  # run_ctest FOLDER NAME LABELS
{
    ctest --test-dir "$1" -L "$3" -j "$jobs" --output-on-failure --no-tests=error 2>&1 | tee "$1.ctest.log"
    tests=$(sed -n 's/^ *[0-9]*\/[0-9]* Test *#[0-9]*: \([^ ]*\) [. ]*\(.*[A-Za-z]\) *[0-9.]* sec.*/\1|\2/p' "$1.ctest.log")
    [ -n "$tests" ] || count failed "$2: no tests were found"
    for test in $(printf '%s\n' "$tests" | tr ' ' '_'); do
        case ${test#*|} in
        Passed) count passed ;;
        *Skipped*) count skipped ;;
        *) count failed "$2: ${test%%|*}" ;;
        esac
    done
}

# LeakSanitizer needs ptrace, which some containers forbid; then it fails on a program that does nothing.
asan_options()
{
    echo 'int main(void) { return 0; }' >build/probe.c
    if cc -fsanitize=address build/probe.c -o build/probe 2>/dev/null && build/probe 2>/dev/null; then
        echo detect_leaks=1:allocator_may_return_null=1
    else
        echo "run.sh: no leak detection on this machine" >&2
        echo detect_leaks=0:allocator_may_return_null=1
    fi
}

make_venv()
{
    want=$("$python" --version 2>&1 && cksum <tests/interop/requirements.txt)
    if [ -x build/venv/bin/python ] && [ "$(cat build/venv/ready 2>/dev/null)" = "$want" ]; then
        return 0
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        sudo=
        [ "$(id -u)" -eq 0 ] || sudo=sudo
        $sudo apt-get -q update && $sudo apt-get -q install -y python3-venv || return 1
    fi
    rm -rf build/venv
    "$python" -m venv build/venv &&
        build/venv/bin/pip install --quiet --disable-pip-version-check -r tests/interop/requirements.txt &&
        printf '%s' "$want" >build/venv/ready
}

# One client, its output in build/NAME.log, its exit code and seconds in build/NAME.code. A shell of its own, as xargs starts it.
run_client='
    name=$(basename "$1" .py)
    start=$(date +%s)
    timeout 900 build/venv/bin/python "$1" --build build >"build/$name.log" 2>&1
    code=$?
    seconds=$(($(date +%s) - start))
    echo "$code" >"build/$name.code"
    case $code in 0) word=passed ;; 77) word=skipped ;; *) word=FAILED ;; esac
    printf "%-40s %s %s s\n" "$name" $word $seconds
'

# As many at a time as there are cores, each in one thread; the longest scripts first, as they take longest as a rule.
run_interop()
{
    scripts=$(ls -S tests/interop/test_*.py)
    rm -f build/test_*.code
    printf '%s\n' $scripts | OMP_NUM_THREADS=1 xargs -n 1 -P "$jobs" sh -c "$run_client" -
    for script in $scripts; do
        name=$(basename "$script" .py)
        case $(cat "build/$name.code") in
        0) count passed ;;
        77)
            count skipped
            echo "$name: $(tail -n 1 "build/$name.log")"
            ;;
        *)
            count failed "interop: $name"
            printf '\n--- %s\n' "$name"
            tail -n 40 "build/$name.log"
            ;;
        esac
    done
}

mkdir -p build
section "packages"
if ! sh recipes/setup.sh --tests; then
    count failed "packages"
    finish
fi

section "build, release"
build build release -DCMAKE_BUILD_TYPE=Release -DMOEC_WERROR=ON || finish
section "tests, release"
run_ctest build release 'unit|cli|layers'

if [ $sanitize = yes ]; then
    section "build, address and undefined-behaviour sanitizers"
    if build build/asan sanitizers -DCMAKE_BUILD_TYPE=Debug -DCMAKE_C_FLAGS=-O1 -DMOEC_FUZZ=ON \
        -DMOEC_SANITIZE=address,undefined -DMOEC_FUZZ_SECONDS="${MOEC_FUZZ_SECONDS:-5}" \
        -DMOEC_ASAN_OPTIONS="$(asan_options)"; then
        section "tests, sanitizers"
        run_ctest build/asan sanitizers 'unit|cli|fuzz'
    fi
fi

if [ $interop = yes ]; then
    section "clients"
    if make_venv; then
        run_interop
    else
        count failed "interop: the Python environment"
    fi
fi
finish
