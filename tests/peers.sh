#!/usr/bin/env bash
# Makes the environment of the real peers that tests talk to (LiteLLM proxy, OpenAI SDK with two instrumentations), outside the repository:
# some 800 MB, made once per content of requirements/peers.txt. Prints the path of its python on the last line.
set -euo pipefail
cd "$(dirname "$0")/.."
key=$(cksum < requirements/peers.txt | cut -d' ' -f1)
home="${FLYBALL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/flyball}/peers-$key"
if [ ! -e "$home/.ready" ]; then
  "${PYTHON:-python3}" -m venv "$home" >&2
  "$home/bin/python" -m pip install -q --disable-pip-version-check -r requirements/peers.txt >&2
  touch "$home/.ready"
fi
echo "$home/bin/python"
