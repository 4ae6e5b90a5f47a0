#!/bin/bash
# A run on several nodes under Slurm: sbatch launch/slurm.sh
# Edit what follows, down to the line. The folders must be ones that all nodes see.
##SBATCH --partition=...
##SBATCH --account=...
#SBATCH --job-name=gpt3
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
# one torchrun on each node starts its ranks, which share its processors and all of its memory
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
# torchrun and gpt3lib must be there on every node: source /shared/gpt3/.venv/bin/activate
# no spaces inside an option; fsdp 8 keeps the shards inside a node of 8 GPUs
TRAIN=${TRAIN:-"gpt3-1.3b --data /shared/tokens --out /shared/1.3b --bf16 --parallel.fsdp 8"}
PROGRAM=${PROGRAM:-"-m gpt3lib.cli train"}
GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-8}}  # ranks of a node
LEAST=${LEAST:-$SLURM_NNODES}  # with so many nodes it goes on, when others are gone (and with --no-kill)
PORT=${PORT:-29500}
# ---- nothing below needs an edit ----

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TRAIN PROGRAM GPUS LEAST PORT HEAD
CPUS=${SLURM_CPUS_PER_TASK:-$((8 * GPUS))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((CPUS + GPUS - 1) / GPUS))}
export SRUN_CPUS_PER_TASK=$CPUS  # srun does not look at what sbatch was told
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a node that died may come back

srun --kill-on-bad-exit=0 bash -c '
  [ "$SLURM_NODEID" = 0 ] && host=1 || host=0
  exec torchrun --nnodes "$LEAST:$SLURM_NNODES" --nproc-per-node "$GPUS" \
    --max-restarts 100 --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$HEAD:$PORT" --rdzv-conf "is_host=$host" \
    $PROGRAM $TRAIN'
