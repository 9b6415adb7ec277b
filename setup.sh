#!/bin/sh
# Makes .venv and installs everything into it. The Makefile runs this when .venv is missing or
# stale; nothing lands outside this folder but the caches of uv and pip.
#
# By hand, if you must (`make clean` first, where .venv exists already):
#   TORCH_BACKEND=…   cpu, cu130, auto, … (as for uv's --torch-backend) takes torch from PyTorch's
#                     own index; default takes it from the default package index
#   PYTHON=…          the Python to use: a version (3.12) or a path
#   NO_DISK_CHECK=1   installs even where the disk looks too small
set -eu
cd "$(dirname "$0")"

say() { echo "setup: $*"; }
fail() {
    echo "setup: $*" >&2
    exit 1
}

# check_space FOLDER GB: leave now, with one sentence, rather than half way with a full disk.
check_space() {
    free=$(df -Pk "$1" | awk 'NR == 2 { print int($4 / 1000000) }')
    [ -n "${NO_DISK_CHECK:-}" ] || [ "${free:-$2}" -ge "$2" ] ||
        fail "the disk of $(cd "$1" && pwd) has $free GB free and $2 GB are needed: make room and" \
            "try again (or set NO_DISK_CHECK=1, if uv's cache holds the packages already)."
}

case "$(uname -sm)" in
"Linux x86_64" | "Linux aarch64" | "Darwin arm64") ;;
*) fail "this is $(uname -sm), and Linux, macOS on Apple silicon or WSL2 is needed." ;;
esac

# An environment that was finished once is brought up to date with the torch it has; an unfinished
# one is made again, since nobody knows what it holds.
chosen=${TORCH_BACKEND:-${UV_TORCH_BACKEND:-}}
unset UV_TORCH_BACKEND # from here on only what we pass counts
fresh=yes
if [ -s .venv/.ready ] && .venv/bin/python -c "" 2>/dev/null; then
    before=$(cat .venv/.ready)
    if [ "${chosen:-$before}" = "$before" ]; then
        fresh=no
        chosen=$before
    fi
fi
if [ $fresh = yes ]; then
    say "making .venv, once; this takes minutes where the packages have to be downloaded"
    check_space . 2
else
    say "bringing .venv up to date"
fi

# --- uv: the one on PATH if it is new enough, else one of our own in .uv -------------------------
knows_torch() { "$1" pip install --help 2>/dev/null | grep -q -e --torch-backend; }
if knows_torch uv; then
    uv=uv
else
    uv=.uv/bin/uv
fi
if ! knows_torch $uv; then
    # Any Python from 3.8 on will do for this, by venv or, where Debian left that out, by pip.
    best=none
    for python in "${PYTHON:-python3}" python3 python3.13 python3.12 python3.11 python; do
        how=$("$python" -c 'if True:
            import sys
            from importlib.util import find_spec
            has = [name for name in ("ensurepip", "pip") if find_spec(name)] + ["neither"]
            print("old" if sys.version_info < (3, 8) else has[0])' 2>/dev/null) || continue
        best=$how
        case $how in ensurepip | pip) break ;; esac
    done
    rm -rf .uv
    case $best in
    ensurepip)
        say "getting uv, which installs the rest"
        "$python" -m venv .uv && .uv/bin/python -m pip install --quiet --disable-pip-version-check uv
        ;;
    pip)
        say "getting uv, which installs the rest"
        "$python" -m pip install --quiet --disable-pip-version-check --target .uv uv
        ;;
    neither) fail "the Python here has neither venv nor pip: install one (on Debian and Ubuntu:" \
        "sudo apt install python3-venv), or install uv." ;;
    old) fail "the Python here is older than 3.8: install Python 3.11, 3.12 or 3.13, or uv." ;;
    none) fail "there is no python3 here: install Python 3.11, 3.12 or 3.13, or uv." ;;
    esac || fail "uv could not be installed (see above): is there a network?"
fi

# --- the environment -----------------------------------------------------------------------------
if [ $fresh = yes ]; then
    rm -rf .venv
    wanted=${PYTHON:->=3.11,<3.14}
    if ! $uv venv --quiet --no-python-downloads --python "$wanted" .venv 2>/dev/null; then
        say "no Python $wanted found, uv tries to fetch one"
        UV_PYTHON_INSTALL_DIR="$PWD/.uv/python" $uv venv --quiet --python "$wanted" .venv ||
            fail "no Python $wanted here, and uv could not fetch one: install Python 3.11, 3.12 or 3.13."
    fi
    .venv/bin/python -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" ||
        fail "$(.venv/bin/python --version) is not supported: take Python 3.11, 3.12 or 3.13."
    say "$(.venv/bin/python --version)"
fi

# --- which torch ---------------------------------------------------------------------------------
# The default index has one build for Linux, with gigabytes of CUDA packages. PyTorch's own index
# has a CPU build too, but not every network reaches it. torch and torchvision come in one call,
# so always from the same index: mixed, they do not import.
index_answers() {
    grep -E "^torch(vision)?==" requirements.txt |
        UV_HTTP_TIMEOUT=5 UV_HTTP_CONNECT_TIMEOUT=5 UV_HTTP_RETRIES=0 timeout 20 \
            $uv pip install --quiet --dry-run --no-deps --python .venv/bin/python \
            --torch-backend "$1" -r - >/dev/null 2>&1
}
if [ $fresh = no ]; then
    torch=$chosen
    say "torch: as before ($torch)"
elif [ -n "$chosen" ]; then
    torch=$chosen
    say "torch: $torch, as TORCH_BACKEND says"
elif [ "$(uname -s)" = Darwin ]; then
    torch=default
    say "torch: from the default package index, which has the build for macOS"
else
    # Not uv's auto alone: that takes an Intel or AMD GPU too, which this tutorial does not use.
    if nvidia-smi -L >/dev/null 2>&1; then torch=auto; else torch=cpu; fi
    if ! index_answers $torch; then
        torch=default
        say "torch: from the default package index, as PyTorch's own does not answer: it brings CUDA" \
            "(3 GB to download, 6.5 GB on disk) and runs on the CPU too"
    elif [ $torch = cpu ]; then
        say "torch: the CPU build of PyTorch's own index (2 GB on disk in all), as there is no NVIDIA GPU"
    else
        say "torch: the CUDA build of PyTorch's own index, as there is an NVIDIA GPU"
    fi
    say "       (to choose by hand: make clean, then TORCH_BACKEND=cpu, cu130, default, … make)"
fi

# --- install -------------------------------------------------------------------------------------
case $torch-$(uname -s) in
cpu-* | *-Darwin) gigabytes=3 ;; # measured: 2 GB, and 6.5 GB with CUDA
*) gigabytes=7 ;;
esac
if [ $fresh = yes ]; then
    check_space . $gigabytes
    # uv links files from its cache; only a cache on another disk takes its own room.
    cache=$($uv cache dir)
    mkdir -p "$cache"
    check_space "$cache" $gigabytes
fi
if [ $torch = default ]; then backend=; else backend="--torch-backend $torch"; fi

rm -f .venv/.ready
# Bytecode now, as every process of Ray would otherwise compile what it imports, for seconds.
say "installing the packages of requirements.txt, with their bytecode"
$uv pip install --python .venv/bin/python $backend --compile-bytecode -r requirements.txt &&
    $uv pip install --python .venv/bin/python --quiet --no-deps -e . ||
    fail "the installation failed (see above); the next try starts again."
if [ $fresh = yes ]; then
    # No question about news in front of the first notebook; the setting lies in .venv.
    .venv/bin/jupyter labextension disable "@jupyterlab/apputils-extension:announcements" \
        >/dev/null 2>&1 || say "(JupyterLab will ask about its news)"
fi
echo "$torch" >.venv/.ready # last: its being there says that all the rest is
say "ready"
