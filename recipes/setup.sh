#!/bin/sh
# Installs the Debian packages that building moecompress needs, and those that its tests need with --tests. Does nothing
# when all are there.      sh recipes/setup.sh [--tests]
set -eu

packages="gcc libc6-dev cmake pkg-config libhdf5-dev libopenblas-dev liblapacke-dev libjansson-dev libpcre2-dev
    libutf8proc-dev libxxhash-dev"
root=$(cd "$(dirname "$0")/.." && pwd)
[ ! -e "$root/lib/num/lp.c" ] || packages="$packages libglpk-dev"
command -v ninja >/dev/null 2>&1 || packages="$packages make"
[ "${1:-}" != --tests ] || packages="$packages libcmocka-dev"

if ! command -v dpkg-query >/dev/null 2>&1; then
    echo "setup: this is no Debian; these packages' counterparts are needed:" $packages >&2
    exit 0
fi
missing=
for package in $packages; do
    case $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true) in
    *" installed") ;;
    *) missing="$missing $package" ;;
    esac
done
[ -n "$missing" ] || exit 0

sudo=
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null 2>&1; then
        echo "setup: these packages are missing, and installing them needs root or sudo:$missing" >&2
        exit 1
    fi
    sudo=sudo
fi
echo "setup: installing$missing"
$sudo apt-get -q update
$sudo env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $missing
