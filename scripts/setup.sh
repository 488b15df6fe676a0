#!/bin/sh
# Create .venv and install Pellucid into it: sh scripts/setup.sh EXTRA
#
# The script first checks the prerequisites and tells how to install missing ones. It is written in
# POSIX sh because it runs before a Python is found. A second run without changes exits immediately.
# PYTHON=/path/to/python selects the interpreter.
set -eu
cd "$(dirname "$0")/.."
extra=${1:?usage: sh scripts/setup.sh serve|dev|docs|clients|parity}

say() { printf '%s\n' "$*" >&2; }
die() {
    say "cannot set up Pellucid: $1"
    shift
    for line in "$@"; do say "  $line"; done
    exit 1
}

# The inputs of the installation. The folder is one, because a moved .venv does not work.
state=$(
    pwd
    cat pyproject.toml constraints/*.txt scripts/setup.sh | cksum
)
stamp=.venv/.installed-$extra
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && [ -z "${PYTHON:-}" ] \
    && .venv/bin/python -c '' 2>/dev/null; then
    exit 0
fi

# --- Platform: those with builds of JAX, except Windows, which has different file locks.
case "$(uname -s)-$(uname -m)" in
Linux-x86_64 | Linux-aarch64 | Darwin-arm64) ;;
Darwin-x86_64) die "JAX has no builds for Macs with an Intel processor." \
    "Use a Linux virtual machine or container on this Mac." ;;
*) die "$(uname -s) on $(uname -m) is not supported." \
    "Supported are Linux (x86_64, aarch64) and macOS (Apple silicon)." \
    "On Windows, use WSL 2: wsl --install, then clone and run make there." ;;
esac

# --- Python: the first 64-bit Python 3.11, 3.12 or 3.13.
check_version='import struct, sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 13)
                                         and struct.calcsize("P") == 8))'
python=
versions=
for candidate in ${PYTHON:-python3 python3.12 python3.13 python3.11 python}; do
    if version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
    then
        versions="$versions $candidate is $version;"
        if "$candidate" -c "$check_version"; then
            python=$candidate
            break
        fi
    elif [ -n "${PYTHON:-}" ]; then
        die "PYTHON=$PYTHON does not run." "Set PYTHON to the path of a Python 3.11, 3.12 or 3.13."
    fi
done
if [ -z "$python" ]; then
    case "$(uname -s)" in
    Darwin) fix="brew install python@3.12" ;;
    *) if [ -f /etc/debian_version ]; then
        fix="sudo apt-get install python3.12 python3.12-venv   (or 3.11 or 3.13, depending on your release)"
    elif [ -f /etc/redhat-release ]; then
        fix="sudo dnf install python3.12"
    else
        fix="install Python 3.12 with your package manager"
    fi ;;
    esac
    die "it needs a 64-bit Python 3.11, 3.12 or 3.13; found:${versions:- none}" "$fix" \
        "or set PYTHON: make serve PYTHON=/path/to/python3.12"
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    if [ -f /etc/debian_version ]; then
        die "$python ($version) has no module venv." "sudo apt-get install python$version-venv"
    fi
    die "$python ($version) has no modules venv and ensurepip." \
        "Install a complete Python $version, or set PYTHON: make serve PYTHON=/path/to/python"
fi
if [ "$(uname -s)" = Linux ]; then
    "$python" - <<'END' || die "this Linux has no glibc 2.27 or newer (Alpine has musl instead)." \
        "JAX has no builds for it. Use Debian, Ubuntu or Fedora, for example in a container."
import os, sys
try:
    name, version = os.confstr("CS_GNU_LIBC_VERSION").split()
except (ValueError, OSError, AttributeError):
    sys.exit(1)
sys.exit(tuple(map(int, version.split(".")[:2])) < (2, 27))
END
fi

# --- Disk: measured sizes of .venv, plus the downloads during the installation.
case $extra in
serve | docs) needs=1500 ;;
parity) needs=4000 ;;
*) needs=2500 ;;
esac
if [ ! -d .venv ]; then
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')
    [ "$free" -ge "$needs" ] || die "the disk has $free MB free; .venv needs $needs MB." \
        "Free some space, or clone into a folder on another disk."
fi

# --- Install.
new_version=$("$python" -c 'import sys; print(sys.version.split()[0])')
if [ -d .venv ]; then
    old_version=$(.venv/bin/python -c 'import sys; print(sys.version.split()[0])' 2>/dev/null) ||
        old_version=
    old_folder=$(cat .venv/.made-in 2>/dev/null) || old_folder=
    reason=
    if [ -z "$old_version" ]; then
        reason="its Python no longer exists"
    elif [ "$old_folder" != "$(pwd)" ]; then
        reason="it was created in another folder, whose path its scripts contain"
    elif [ -n "${PYTHON:-}" ] && [ "$old_version" != "$new_version" ]; then
        reason="it has Python $old_version, not $new_version"
    fi
    if [ -n "$reason" ]; then
        say "recreating .venv: $reason"
        rm -rf .venv
    fi
fi
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then
    exit 0 # PYTHON is set to the version of .venv
fi
if [ ! -d .venv ]; then
    say "creating .venv with $python ($new_version)"
    "$python" -m venv .venv || {
        rm -rf .venv
        die "$python -m venv failed; see the error above."
    }
    pwd >.venv/.made-in
fi
version=$(.venv/bin/python -c 'import sys; print("%d%d" % sys.version_info[:2])')
[ "$version" = 311 ] && constraints=constraints/py311.txt || constraints=constraints/py312.txt
log=.venv/install.log
say "installing Pellucid and its dependencies into .venv (a few minutes the first time)"
# sh has no pipefail, so the exit status is passed in a file.
{
    code=0
    .venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off \
        -c "$constraints" -e ".[$extra]" || code=$?
    echo "$code" >.venv/.pip-status
} 2>&1 | tee "$log" | awk '
    /^ *Downloading .* \([0-9.]+ [MG]B\)/ { sub(/^ */, "  "); sub(/-(cp|py)[^ ]*/, ""); say($0) }
    /^Collecting / && ++count % 25 == 0 { say("  " count " packages collected") }
    /^Installing collected packages/ { say("  unpacking " split($0, all, ",") " packages") }
    function say(line) { print line; fflush() }
' >&2
if [ "$(cat .venv/.pip-status)" != 0 ]; then
    grep -E '^ *(ERROR|error):' "$log" | tail -n 5 >&2 || tail -n 15 "$log" >&2
    die "pip failed; its output is in $log." \
        "If it could not reach its package index, check the network and pip's settings" \
        "(.venv/bin/pip config list), then run make again, which continues the installation."
fi
# dev includes serve, clients includes dev, and parity includes serve, dev and docs.
case $extra in
serve) stamps="serve" ;;
dev) stamps="serve dev" ;;
clients) stamps="serve dev clients" ;;
parity) stamps="serve dev docs parity" ;;
*) stamps=$extra ;;
esac
for name in $stamps; do printf '%s\n' "$state" >".venv/.installed-$name"; done
say "installed"
