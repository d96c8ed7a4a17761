#!/usr/bin/env bash
# A model whose key bias needs outlier channels, on several GPUs: every GPU has the pages of its share of the KV heads.
#   examples/vllm_multi_gpu.sh [MODEL] [GPUS] [KV_CACHE_DTYPE]
set -euo pipefail
model=${1:-Qwen/Qwen2.5-72B-Instruct} gpus=${2:-4} cache_dtype=${3:-kvturbo_k4v4-o16}

exec vllm serve "$model" --kv-cache-dtype "$cache_dtype" --tensor-parallel-size "$gpus" --port 8000
