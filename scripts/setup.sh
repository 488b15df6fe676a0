#!/bin/sh
# Makes .venv and installs Pellucid into it: sh scripts/setup.sh EXTRA
#
# First looks whether this machine can run it at all, and says the exact fix where it cannot. It is
# plain sh because it must work before any Python does. A second run with nothing changed ends at
# once. PYTHON=/path/to/python chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."
extra=${1:?usage: sh scripts/setup.sh serve|dev|docs|parity}

say() { printf '%s\n' "$*" >&2; }
die() {
    say "cannot set up Pellucid: $1"
    shift
    for line in "$@"; do say "  $line"; done
    exit 1
}

# What the installation depends on. The folder is part of it: a moved .venv does not work.
state=$(
    pwd
    cat pyproject.toml constraints/*.txt scripts/setup.sh | cksum
)
stamp=.venv/.installed-$extra
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && [ -z "${PYTHON:-}" ] \
    && .venv/bin/python -c '' 2>/dev/null; then
    exit 0
fi

# --- Platform: the ones that the JAX project builds for, less Windows, whose locks differ.
case "$(uname -s)-$(uname -m)" in
Linux-x86_64 | Linux-aarch64 | Darwin-arm64) ;;
Darwin-x86_64) die "JAX has no builds for Macs with an Intel processor." \
    "A Linux virtual machine or container on this Mac works." ;;
*) die "this is $(uname -s) on $(uname -m)." \
    "It runs on Linux (x86_64, aarch64) and on macOS (Apple silicon)." \
    "On Windows, use WSL 2: wsl --install, then clone and run make there." ;;
esac

# --- Python: the first that is 3.11, 3.12 or 3.13 and 64-bit.
suits='import struct, sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 13)
                                         and struct.calcsize("P") == 8))'
python=
seen=
for candidate in ${PYTHON:-python3 python3.12 python3.13 python3.11 python}; do
    if version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
    then
        seen="$seen $candidate is $version;"
        if "$candidate" -c "$suits"; then
            python=$candidate
            break
        fi
    elif [ -n "${PYTHON:-}" ]; then
        die "PYTHON=$PYTHON is not a Python that runs."
    fi
done
if [ -z "$python" ]; then
    case "$(uname -s)" in
    Darwin) fix="brew install python@3.12" ;;
    *) if [ -f /etc/debian_version ]; then
        fix="sudo apt-get install python3.12 python3.12-venv   (or 3.11, 3.13: what your release has)"
    elif [ -f /etc/redhat-release ]; then
        fix="sudo dnf install python3.12"
    else
        fix="install Python 3.12 with your package manager"
    fi ;;
    esac
    die "it needs a 64-bit Python 3.11, 3.12 or 3.13; found:${seen:- none}" "$fix" \
        "or name one: make serve PYTHON=/path/to/python3.12"
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    if [ -f /etc/debian_version ]; then
        die "$python ($version) comes without venv." "sudo apt-get install python$version-venv"
    fi
    die "$python ($version) comes without the modules venv and ensurepip." \
        "Install a complete Python $version, or name another: make serve PYTHON=/path/to/python"
fi
if [ "$(uname -s)" = Linux ]; then
    "$python" - <<'END' || die "this Linux has no glibc 2.27 or newer (Alpine has musl instead)." \
        "JAX has no builds for it: use Debian, Ubuntu, Fedora or another one, also in a container."
import os, sys
try:
    name, version = os.confstr("CS_GNU_LIBC_VERSION").split()
except (ValueError, OSError, AttributeError):
    sys.exit(1)
sys.exit(tuple(map(int, version.split(".")[:2])) < (2, 27))
END
fi

# --- Disk: measured sizes of .venv, plus the downloads while pip unpacks them.
case $extra in
serve | docs) needs=1500 ;;
parity) needs=4000 ;;
*) needs=2500 ;;
esac
if [ ! -d .venv ]; then
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')
    [ "$free" -ge "$needs" ] || die "this folder's disk has $free MB left; .venv needs $needs MB." \
        "Make room, or clone into a folder on another disk."
fi

# --- Install.
wanted=$("$python" -c 'import sys; print(sys.version.split()[0])')
if [ -d .venv ]; then
    has=$(.venv/bin/python -c 'import sys; print(sys.version.split()[0])' 2>/dev/null) || has=
    made_in=$(cat .venv/.made-in 2>/dev/null) || made_in=
    why=
    if [ -z "$has" ]; then
        why="its Python is gone"
    elif [ "$made_in" != "$(pwd)" ]; then
        why="it was made in another folder, and its scripts name that"
    elif [ -n "${PYTHON:-}" ] && [ "$has" != "$wanted" ]; then
        why="it has Python $has, not $wanted"
    fi
    if [ -n "$why" ]; then
        say "making .venv again: $why"
        rm -rf .venv
    fi
fi
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then
    exit 0 # PYTHON= was given, and is what .venv has
fi
if [ ! -d .venv ]; then
    say "making .venv with $python ($wanted)"
    "$python" -m venv .venv || {
        rm -rf .venv
        die "$python -m venv failed, for the reason above."
    }
    pwd >.venv/.made-in
fi
version=$(.venv/bin/python -c 'import sys; print("%d%d" % sys.version_info[:2])')
[ "$version" = 311 ] && constraints=constraints/py311.txt || constraints=constraints/py312.txt
log=.venv/install.log
say "installing Pellucid and what it needs into .venv (a few minutes the first time)"
# sh has no pipefail: the exit status takes the way over a file.
{
    code=0
    .venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off \
        -c "$constraints" -e ".[$extra]" || code=$?
    echo "$code" >.venv/.pip-status
} 2>&1 | tee "$log" | awk '
    /^ *Downloading .* \([0-9.]+ [MG]B\)/ { sub(/^ */, "  "); sub(/-(cp|py)[^ ]*/, ""); say($0) }
    /^Collecting / && ++found % 25 == 0 { say("  " found " packages found") }
    /^Installing collected packages/ { say("  unpacking " split($0, all, ",") " packages") }
    function say(line) { print line; fflush() }
' >&2
if [ "$(cat .venv/.pip-status)" != 0 ]; then
    grep -E '^ *(ERROR|error):' "$log" | tail -n 5 >&2 || tail -n 15 "$log" >&2
    die "pip failed; all it said is in $log." \
        "If it could not reach its package index, check the network and pip's settings" \
        "(.venv/bin/pip config list), then run make again: it goes on where it stopped."
fi
# dev holds all of serve, parity all of them.
case $extra in
serve) stamps="serve" ;;
dev) stamps="serve dev" ;;
parity) stamps="serve dev docs parity" ;;
*) stamps=$extra ;;
esac
for one in $stamps; do printf '%s\n' "$state" >".venv/.installed-$one"; done
say "installed"
