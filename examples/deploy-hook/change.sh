#!/usr/bin/env bash
# Tells Flyball of a deploy, so that it stands in every alert of the next hour. For the last step of a pipeline.
#
#   bash change.sh KIND SUMMARY [LABEL=VALUE ...]
#   bash change.sh deploy "checkout-bot 4.2.0" app=checkout-bot
#   bash change.sh prompt "greeting v3 to v4" app=checkout-bot prompt=greeting@4
#
# FLYBALL_URL is its address, FLYBALL_TOKEN a token with the role `ingest` where one is needed.
set -euo pipefail
text() { printf '"%s"' "$(printf '%s' "$1" | tr '\n\t' '  ' | sed 's/[\\"]/\\&/g')"; }

kind="$1" summary="$2" labels=""
shift 2
for pair in "$@"; do labels+="${labels:+, }$(text "${pair%%=*}"): $(text "${pair#*=}")"; done

curl -fsS --max-time 10 "${FLYBALL_URL:-http://127.0.0.1:4390}/v1/events" \
  -H "Content-Type: application/x-ndjson" ${FLYBALL_TOKEN:+-H "Authorization: Bearer $FLYBALL_TOKEN"} \
  -d '{"type": "change", "at": '"$(date +%s)"', "kind": '"$(text "$kind")"', "summary": '"$(text "$summary")"', "labels": {'"$labels"'}}'
echo
