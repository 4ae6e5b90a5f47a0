#!/bin/bash
# A run on several nodes under Slurm: sbatch launch/slurm.sh
# Edit what follows. The folders must be ones that all nodes see.
#SBATCH --job-name=gpt3
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
TRAIN=${TRAIN:-"gpt3-1.3b --data /shared/tokens --out /shared/1.3b --parallel.fsdp 8"}
PROGRAM=${PROGRAM:-"-m gpt3lib.cli train"}
GPUS=${GPUS:-8}                # ranks of a node
LEAST=${LEAST:-$SLURM_NNODES}  # with so many nodes it goes on, when others are gone (and with --no-kill)
PORT=${PORT:-29500}

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TRAIN PROGRAM GPUS LEAST PORT HEAD
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a node that died may come back

srun --kill-on-bad-exit=0 bash -c '
  [ "$SLURM_NODEID" = 0 ] && host=1 || host=0
  exec torchrun --nnodes "$LEAST:$SLURM_NNODES" --nproc-per-node "$GPUS" \
    --max-restarts 100 --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$HEAD:$PORT" --rdzv-conf "is_host=$host" \
    $PROGRAM $TRAIN'
