#!/usr/bin/env bash
# An OpenAI-compatible server with a packed cache, and one request to it.
#   examples/vllm_server.sh [MODEL] [KV_CACHE_DTYPE]
set -euo pipefail
model=${1:-Qwen/Qwen3-8B} cache_dtype=${2:-turboquant}

vllm serve "$model" --kv-cache-dtype "$cache_dtype" --port 8000 &
server=$!
trap 'kill $server' EXIT
until curl --silent --fail http://localhost:8000/health; do
    kill -0 $server
    sleep 2
done
curl --silent http://localhost:8000/v1/completions -H 'Content-Type: application/json' \
    -d "{\"model\": \"$model\", \"prompt\": \"The key-value cache of a language model\", \"max_tokens\": 32, \"temperature\": 0}"
echo
