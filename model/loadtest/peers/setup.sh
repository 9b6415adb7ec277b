#!/bin/sh
# Makes .venv-peers/PEER for each server that is named, or for all that have a file in requirements:
# torch and what else the model needs in the tutorial's versions, and what requirements/PEER.txt
# says. An environment that is there stays, unless what it is made from has changed. Of those that
# are not named, one that cannot be installed here is left out.
set -eu
cd "$(dirname "$0")/../../.."

fail() {
    echo "peers: $*" >&2
    exit 1
}

[ -s .venv/.ready ] || fail "there is no .venv yet: run make lint, which makes it, and try again."
torch=$(cat .venv/.ready) # where .venv has its torch from
if [ "$torch" = default ]; then backend=; else backend="--torch-backend $torch"; fi
PATH="$PWD/.uv/bin:$PATH"
command -v uv >/dev/null || fail "there is no uv: run sh setup.sh, which gets it, and try again."

folder=model/loadtest/peers
named=$*
[ -n "$named" ] || named=$(basename -s .txt "$folder"/requirements/*.txt)
[ -d .venv-peers ] && [ ! -e .venv-peers/pyvenv.cfg ] || rm -rf .venv-peers # of earlier versions
mkdir -p .venv-peers
for peer in $named; do
    there=.venv-peers/$peer
    # KServe's class holds the model, but where it cannot be imported (without_kserve.py says why).
    case $peer in mlserver | triton) kserve= ;; *) kserve='kserve|' ;; esac
    packages=$(grep -E "^(${kserve}torch|torchvision|pillow|safetensors|pybase64|psutil)==" \
        requirements.txt && cat "$folder/requirements/$peer.txt")
    made_from="$torch $(.venv/bin/python --version) $(echo "$packages" | cat - "$folder/setup.sh" | cksum)"
    [ "$(cat "$there/.ready" 2>/dev/null)" != "$made_from" ] || continue
    echo "peers: making $there (torch is linked, where uv still has .venv's)"
    rm -rf "$there"
    uv venv --quiet --no-python-downloads --python .venv/bin/python "$there"
    if echo "$packages" | uv pip install --quiet --python "$there/bin/python" $backend \
        --compile-bytecode -r - &&
        uv pip install --quiet --python "$there/bin/python" --no-deps -e .; then
        echo "$made_from" >"$there/.ready" # last: its being there says that all the rest is
    else
        rm -rf "$there"
        [ $# -eq 0 ] || fail "the installation of $peer failed (see above)."
        echo "peers: $peer cannot be installed here (see above), and is left out"
    fi
done
echo "peers: ready"
