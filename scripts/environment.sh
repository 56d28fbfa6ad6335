#!/usr/bin/env bash
# Builds the environment that the README's two commands use; does nothing when it is up to date.
#   scripts/environment.sh [folder]            default: .venv
# PYTHON=python3.12 takes another Python; PATCHFASTRL_DEVICE=cpu|gpu overrides the search for an NVIDIA GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${1:-.venv}
python=${PYTHON:-python3}
torch_cpu_index=https://download.pytorch.org/whl/cpu

say() { printf 'patchfastrl: %s\n' "$*"; }
die() { printf 'patchfastrl: %s\n' "$@" >&2; exit 1; }

device=${PATCHFASTRL_DEVICE:-}
if [ -z "$device" ]; then
    device=cpu
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null; then device=gpu; fi
fi
case $device in cpu|gpu) ;; *) die "PATCHFASTRL_DEVICE is '$device'; expected cpu or gpu." ;; esac
requirements=requirements/$device.txt

# --- what the machine itself must have: all that is missing in one message ------------------------------------------
lacks=() packages=()
need() { lacks+=("  - $1"); packages+=("$2"); }
if ! command -v "$python" >/dev/null; then
    need "$python: Python 3.11, 3.12 or 3.13" "python3 python3-venv"
else
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    case $version in
        3.11|3.12|3.13) ;;
        *) die "$(command -v "$python") is Python $version; the pinned TRL and vLLM run on 3.11, 3.12 and 3.13." \
               "Install one of these and say which: PYTHON=python3.11 make demo" ;;
    esac
    "$python" -c 'import ensurepip, venv' 2>/dev/null || need "Python's venv module" "python$version-venv"
    headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    if [ $device = gpu ] && [ ! -e "$headers/Python.h" ]; then
        need "Python.h, against which Triton compiles its launchers" "python$version-dev"
    fi
fi
if [ $device = cpu ]; then
    "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null \
        || PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null | grep 'libnuma\.so\.1 ' >/dev/null \
        || need "libnuma.so.1, which vLLM's CPU build loads" libnuma1
fi
command -v gcc >/dev/null || need "gcc" gcc
command -v g++ >/dev/null || need "g++, with which torch.compile builds CPU kernels" g++
command -v git >/dev/null || need "git" git
command -v lscpu >/dev/null || need "lscpu, which vLLM asks for the processor's cores" util-linux
if [ ${#lacks[@]} -gt 0 ]; then
    die "this machine lacks what the set-up needs:" "${lacks[@]}" "On Debian or Ubuntu: sudo apt-get install ${packages[*]}"
fi
machine=$(uname -sm)
[ "$machine" = "Linux x86_64" ] || die "this machine is $machine; the pinned vLLM build is for Linux x86_64 only."

# --- up to date? ----------------------------------------------------------------------------------------------------
# Two commands started together must not build into one folder.
exec 9>"$venv.lock"
flock 9
# The folder is part of the key: an environment does not survive being moved.
built=$({ pwd; "$python" -VV; cat "$requirements"; } | sha256sum)
project=$(sha256sum <pyproject.toml)
# pip's own environment variables and configuration stay in force (indexes, find-links, certificates), except those
# that make it install elsewhere.
pip=(env PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install --no-deps -qq)

if [ "$(cat "$venv/built.sha256" 2>/dev/null)" != "$built" ]; then
    start=$SECONDS
    say "building $venv for $device from $requirements (some minutes, once)"
    rm -rf "$venv"
    "$python" -m venv "$venv"

    # PyTorch first and by itself: asked for by another package, pip would take the build it likes best, and on a
    # machine without a GPU that is gigabytes of CUDA.
    pin=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' "$requirements")
    if [ $device = gpu ]; then
        "${pip[@]}" "$pin,!=${pin#torch==}+cpu"
    elif log=$("${pip[@]}" "$pin" 2>&1); then
        say "PyTorch's CPU build ($pin) came from where this machine's pip looks"
    else
        say "pip's configuration offers no $pin; trying $torch_cpu_index"
        "${pip[@]}" --index-url "$torch_cpu_index" "$pin" || die \
            "$pin was found neither where this machine's pip looks nor at $torch_cpu_index (above)." \
            "The first attempt said:" "$log" "Next: make the wheel available to pip, e.g. PIP_FIND_LINKS=folder make demo"
    fi
    # The list is complete, so dependencies need not be followed: vLLM's CPU build asks for CUDA's torchvision, with
    # which transformers does not import.
    "${pip[@]}" --no-compile -r "$requirements"
    printf '%s\n' "$built" >"$venv/built.sha256"
    say "environment ready after $((SECONDS - start)) s"
fi

if [ "$(cat "$venv/project.sha256" 2>/dev/null)" != "$project" ]; then
    "${pip[@]}" --no-build-isolation -e .
    printf '%s\n' "$project" >"$venv/project.sha256"
fi

if [ $device = gpu ] && ! "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    die "PyTorch sees no GPU, though nvidia-smi does: its driver is probably older than the installed CUDA needs:" \
        "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>&1)" \
        "installed: $("$venv/bin/python" -c 'import torch; print("torch", torch.__version__, "for CUDA", torch.version.cuda)')" \
        "Next: update the driver, or run on the CPU: PATCHFASTRL_DEVICE=cpu make demo"
fi
