#!/usr/bin/env bash
# All stages on built-in data: no GPU, no network, a few minutes on two CPU cores.
# Writes everything into out/quickstart (or the folder given first, relative to the repository), and starts over each
# time.
# Further arguments go to train.py, finetune.py and dpo.py: bash runs/quickstart.sh out/short --max_minutes=1
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${1:-out/quickstart}
if [[ $dir == -* ]]; then
    echo "usage: bash runs/quickstart.sh [FOLDER [--name=value ...]]" >&2
    exit 2
fi
# on Ctrl-C a stage saves and ends without an error, but the next ones must not continue with half a model
trap 'echo "quickstart.sh: stopped, $dir is not complete" >&2; exit 130' INT TERM
more=("${@:2}")
if [ -n "$(ls -A "$dir" 2>/dev/null)" ] && [ ! -f "$dir/seconds.txt" ]; then
    echo "quickstart.sh: $dir holds something else: choose another folder" >&2
    exit 1
fi
rm -rf "$dir"
mkdir -p "$dir"
: >"$dir/seconds.txt"

stage() { # stage NAME COMMAND...: print the command, run it, note its seconds
    local name=$1 began=$SECONDS
    shift
    printf '\n\033[1m$ %s\033[0m\n' "$(printf '%q ' "$@")"
    "$@"
    echo "$name $((SECONDS - began))" >>"$dir/seconds.txt"
}

stage toyworld python -m tools.toyworld --out_dir="$dir/world"
stage prepare_fineweb python prepare_fineweb.py --source="$dir/world/docs.parquet" --tokenizer=bytes \
    --val_fraction=0.02 --out_dir="$dir/tokens"
stage train python train.py config/quickstart.py --data_dir="$dir/tokens" --out_dir="$dir/base" \
    --hellaswag_source="$dir/world/hellaswag_val.jsonl" "${more[@]}"
stage prepare_instruct python prepare_instruct.py --source="$dir/world/instruct.json" --tokenizer=bytes \
    --max_tokens=129 --out_dir="$dir/instruct" --show=2
stage finetune python finetune.py config/quickstart_chat.py --checkpoint="$dir/base/best.pt" \
    --data_dir="$dir/instruct" --out_dir="$dir/chat" --hellaswag_source="$dir/world/hellaswag_val.jsonl" "${more[@]}"
stage prepare_instruct python prepare_instruct.py --source="$dir/world/preferences.json" --tokenizer=bytes \
    --max_tokens=129 --out_dir="$dir/preferences" --show=1
stage dpo python dpo.py config/quickstart_dpo.py --checkpoint="$dir/chat/best.pt" \
    --data_dir="$dir/preferences" --out_dir="$dir/dpo" "${more[@]}"
stage sample python sample.py --checkpoint="$dir/dpo/best.pt" --prompt="What is the capital of Japan?" --temperature=0
picture="none, pip install -e '.[plot]' draws it"
if python -c "import matplotlib" 2>/dev/null; then
    picture=$dir/loss.png
    stage plot python -m tools.plot --runs="$dir/base" --out="$picture"
fi
stage summary python -m tools.summary --dir="$dir"
echo "checkpoints: best.pt in $dir/base, $dir/chat and $dir/dpo; answers before and after: samples.md there"
echo "picture: $picture"
echo "talk to it: python sample.py --checkpoint=$dir/dpo/best.pt"
