#!/usr/bin/env bash
# From a checkpoint to the hub: convert, uptrain, evaluate, report, push.
#
#   examples/end_to_end.sh OUT                          the embedded model; `push` only shows what it would send
#   examples/end_to_end.sh OUT USER/REPO                the same, published (needs `hf auth login` or HF_TOKEN)
#   MODEL=org/model KV_HEADS=4 TEXT="corpus/ more.jsonl" TOKENS=50M examples/end_to_end.sh OUT USER/REPO
set -euo pipefail

OUT=${1:?give a folder to write, and USER/REPO to publish}
REPO=${2:-}
MODEL=${MODEL:-$(python -c 'from upfit.demo import embedded_model; print(embedded_model())')}
LIBRARY=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
TEXT=${TEXT:-$LIBRARY/email $LIBRARY/http $LIBRARY/asyncio}
HELD_OUT=${HELD_OUT:-$LIBRARY/json $LIBRARY/logging}
KV_HEADS=${KV_HEADS:-2}
TOKENS=${TOKENS:-40k}
LENGTH=${LENGTH:-512}
CALIBRATION_TOKENS=${CALIBRATION_TOKENS:-16k}
WINDOWS=${WINDOWS:-16}
data=()
for text in $HELD_OUT; do data+=(--data "$text"); done

mkdir -p "$OUT"
# shellcheck disable=SC2086  # TEXT is a list of files and folders
upfit calibrate "$MODEL" $TEXT "$OUT/statistics.safetensors" --calibration-tokens "$CALIBRATION_TOKENS" --overwrite
upfit convert gqa "$MODEL" "$OUT/converted" --kv-heads "$KV_HEADS" --calibration "$OUT/statistics.safetensors" --overwrite
upfit evaluate "$OUT/converted" --against "$MODEL" "${data[@]}" --length "$LENGTH" --windows "$WINDOWS" --record
# shellcheck disable=SC2086
upfit prepare $TEXT "$OUT/tokens" --tokenizer "$MODEL" --overwrite
upfit uptrain "$OUT/converted" "$OUT/tokens" "$OUT/uptrained" --tokens "$TOKENS" --length "$LENGTH" --overwrite
upfit evaluate "$OUT/uptrained" --against "$MODEL" "${data[@]}" --length "$LENGTH" --windows "$WINDOWS" --record
upfit compare "$OUT/converted" "$OUT/uptrained"
upfit report "$OUT/uptrained" "$OUT/report.html" --overwrite
if [ -n "$REPO" ]; then
  upfit push "$OUT/uptrained" "$REPO"
else
  upfit push "$OUT/uptrained" you/small-model --dry-run
fi
