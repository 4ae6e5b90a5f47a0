#!/bin/bash
# GPT-3 on several nodes under Slurm: sbatch launch/slurm.sh
# Edit these; --requeue and --signal let a job go on where its time was up.
#SBATCH --job-name=gpt3
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
TRAIN=${TRAIN:-"gpt3-1.3b --data /shared/tokens --out /shared/runs/1.3b --parallel.fsdp 8"}
GPUS=${GPUS:-8}            # ranks of a node
LEAST=${LEAST:-$SLURM_NNODES}  # fewer nodes than SLURM_NNODES will do, if you say so

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a node that died may come back
export GPUS LEAST TRAIN
export HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=0 bash -c '
  [ "$SLURM_NODEID" = 0 ] && host=1 || host=0
  exec torchrun --nnodes "$LEAST:$SLURM_NNODES" --nproc-per-node "$GPUS" \
    --max-restarts 100 --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
    --rdzv-endpoint "$HEAD:29500" --rdzv-conf "is_host=$host" \
    -m gpt3lib.cli train $TRAIN'
