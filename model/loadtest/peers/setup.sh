#!/bin/sh
# Makes .venv-peers, beside .venv: the tutorial's own packages in the same versions, so that every
# server runs the same model on the same libraries, and those of requirements.txt here.
set -eu
cd "$(dirname "$0")/../../.."

fail() {
    echo "peers: $*" >&2
    exit 1
}

[ -s .venv/.ready ] || fail "there is no .venv yet: run make lint, which makes it, and try again."
torch=$(cat .venv/.ready) # where .venv has its torch from
PATH="$PWD/.uv/bin:$PATH"
command -v uv >/dev/null || fail "there is no uv: run sh setup.sh, which gets it, and try again."

echo "peers: making .venv-peers (nearly nothing to download, where uv still has .venv's packages)"
rm -rf .venv-peers
uv venv --quiet --no-python-downloads --python .venv/bin/python .venv-peers
if [ "$torch" = default ]; then backend=; else backend="--torch-backend $torch"; fi
uv pip install --quiet --python .venv-peers/bin/python $backend --compile-bytecode \
    -r requirements.txt -r model/loadtest/peers/requirements.txt &&
    uv pip install --quiet --python .venv-peers/bin/python --no-deps -e . ||
    fail "the installation failed (see above)."
touch .venv-peers/.ready # last: its being there says that all the rest is
echo "peers: ready"
