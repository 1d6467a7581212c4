#!/bin/bash
# Several nodes by torchrun. Run the same command on every node:
#
#     HEAD=node-1 NODES=2 GPUS=4 examples/cluster/torchrun.sh examples/cluster/run.yaml
#
# If a process dies, torchrun starts all of them again, RESTARTS times; each start goes on from the last checkpoint, the
# first one from the beginning. What follows the config is given to `lightning-cl fit`.
set -euo pipefail

: "${HEAD:?the name or address of one node, the same on all}"
NODES=${NODES:-2}
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
config=${1:?the config, a file that every node sees}

# Otherwise processes that are started again may read the addresses of those that died, a fault of torchrun.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Where a node has several networks, name the interface that reaches the others:
# export GLOO_SOCKET_IFNAME=eth1 NCCL_SOCKET_IFNAME=eth1

exec torchrun \
    --nnodes="$NODES" \
    --nproc-per-node="$GPUS" \
    --max-restarts="${RESTARTS:-3}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$HEAD:${PORT:-29400}" \
    --rdzv-id="${JOB:-lightning-cl}" \
    -m lightning_cl.cli.main fit \
    --config "$config" "${@:2}" \
    --trainer.num_nodes "$NODES" \
    --trainer.devices "$GPUS" \
    --ckpt_path last
