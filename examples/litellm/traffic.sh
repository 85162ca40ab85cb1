#!/usr/bin/env bash
# Calls of four tenants through a LiteLLM proxy with config.yaml: some that succeed, then some that fail. Takes half a minute.
#
#   bash traffic.sh [PROXY]
set -euo pipefail
proxy="${1:-http://127.0.0.1:4000}"

call() {  # call MODEL NUMBER
  curl -s -o /dev/null "$proxy/v1/chat/completions" \
    -H "Authorization: Bearer ${LITELLM_MASTER_KEY:?set it as for the proxy}" -H "Content-Type: application/json" \
    -d '{"model": "'"$1"'", "user": "tenant-'"$(($2 % 4))"'", "metadata": {"app": "checkout-bot"},
         "messages": [{"role": "user", "content": "hello"}]}'
}

until curl -s -o /dev/null "$proxy/health/liveliness"; do sleep 1; done
for n in $(seq 60); do call fine "$n"; done
echo "60 calls to the model that answers"
for n in $(seq 60); do call broken "$n" & sleep 0.3; done
wait
echo "60 calls to the model that fails"
