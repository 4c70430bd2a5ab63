#!/usr/bin/env bash
# The real run, from start to end: FineWeb-Edu, a model of 712M parameters, HellaSwag, an assistant. Needs a GPU, the
# Hub, GitHub, about 70 GB of disk, and days: run it in tmux. Not yet run to the end.
#
#   bash runs/fgpt_712m.sh                              one GPU, 10 billion tokens, config/fgpt_modern.py
#   GPUS=8 bash runs/fgpt_712m.sh                       eight GPUs (or 2, 4, 16 ...)
#   bash runs/fgpt_712m.sh --max_tokens=30000000000 --weight_decay=0.003       three epochs of the same 10 billion
#   CONFIG=config/fgpt_712m.py bash runs/fgpt_712m.sh   GPT-2's architecture, the one with published reference points
#
# Whatever stopped it, the same command resumes. All downloads come first, so that they fail before the GPU has worked
# for hours. Arguments go to train.py: --activation_checkpointing=True for small GPUs, or --max_minutes=600 to train for
# ten hours at most, and then score and finetune the result.
set -euo pipefail
cd "$(dirname "$0")/.."
config=${CONFIG:-config/fgpt_modern.py} gpus=${GPUS:-1}
name=$(basename "$config" .py) # of the folders in out
if [[ ! $gpus =~ ^[1-9][0-9]*$ ]] || ((512 % gpus)); then # rows of a step
    echo "fgpt_712m.sh: GPUS=$gpus does not divide the 512 rows of a step: use 1, 2, 4, 8 ..." >&2
    exit 2
fi
trap 'echo "fgpt_712m.sh: stopped, the same command resumes" >&2; exit 130' INT TERM
trap 'echo "fgpt_712m.sh: a command failed; nothing is lost, the same command resumes" >&2' ERR

stage() { # print the command, and run it
    printf '\n\033[1m$ %s\033[0m\n' "$(printf '%q ' "$@")"
    "$@"
}

run() { # a stage on all GPUs
    if [ "$gpus" = 1 ]; then stage python "$@"; else stage torchrun --standalone --nproc_per_node="$gpus" "$@"; fi
}

if [ ! -e data/fineweb/meta.json ]; then # it is written last
    stage python prepare_fineweb.py --out_dir=data/fineweb
fi
if [ ! -e data/fgpt_instruct/meta.json ]; then
    stage python prepare_instruct.py --source=raschka,alpaca,smoltalk:50000 --max_tokens=1025 --val_fraction=0.02 \
        --out_dir=data/fgpt_instruct
fi
run train.py "$config" --batch_size=0 --out_dir="out/$name" --init_from=resume "$@"
run hellaswag.py --checkpoint="out/$name/best.pt"
run hellaswag.py --checkpoint="out/$name/best.pt" --style=harness
start=(--init_from=resume)
if [ "out/$name/best.pt" -nt "out/${name}_chat/ckpt.pt" ]; then start=(--overwrite=True); fi # new, or trained further
run finetune.py --checkpoint="out/$name/best.pt" --batch_size=0 --eval_interval=1000 --score_hellaswag \
    --hellaswag_limit=1000 --data_dir=data/fgpt_instruct --out_dir="out/${name}_chat" "${start[@]}"
if python -c "import matplotlib" 2>/dev/null; then
    stage python -m tools.plot --runs="out/$name" --out="out/$name/loss.png"
fi
printf '\nThe GPU is no longer needed: out/%s and out/%s_chat have all results.\n' "$name" "$name"
echo "Talk to it: python sample.py --checkpoint=out/${name}_chat/best.pt"
