#!/bin/sh
# Makes .venv-peers/PEER for each server to compare with that needs packages of its own: torch and
# what else the model needs in the tutorial's versions, and what requirements/PEER.txt says. An
# environment that is there stays, unless what it is made from has changed.
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
mkdir -p .venv-peers
for file in "$folder"/requirements/*.txt; do
    peer=$(basename "$file" .txt)
    there=.venv-peers/$peer
    made_from=$(cat requirements.txt "$file" | cksum)
    [ "$(cat "$there/.ready" 2>/dev/null)" != "$made_from" ] || continue
    echo "peers: making $there (torch is linked, where uv still has .venv's)"
    rm -rf "$there"
    # KServe's class holds the model, but its protocol buffers have the names of these two's.
    case $peer in mlserver | triton) kserve= ;; *) kserve='kserve|' ;; esac
    grep -E "^(${kserve}torch|torchvision|pillow|safetensors|pybase64|psutil)==" requirements.txt \
        >"$there.txt"
    uv venv --quiet --no-python-downloads --python .venv/bin/python "$there"
    uv pip install --quiet --python "$there/bin/python" $backend --compile-bytecode \
        -r "$there.txt" -r "$file" &&
        uv pip install --quiet --python "$there/bin/python" --no-deps -e . ||
        fail "the installation of $peer failed (see above)."
    rm "$there.txt"
    echo "$made_from" >"$there/.ready" # last: its being there says that all the rest is
done
touch .venv-peers/.ready
echo "peers: ready"
