# Continue the training of existing weights, such as GPT-2's, on your own text (for conversations, use finetune.py):
#   python -m tools.convert_hf import --model=openai-community/gpt2 --out=gpt2.pt
#   python prepare_fineweb.py --source=mine.txt --split_blank_lines=True --val_fraction=0.1 --out_dir=data/mine
#   python train.py config/finetune_text.py --init_from=gpt2.pt --data_dir=data/mine
# Batch size and learning rate are taken from nanoGPT's config/finetune_shakespeare.py.
out_dir = "out/finetune_text"

optimizer = "adamw"  # as in nanoGPT
tokens_per_step = 32768
batch_size = 4
max_steps = 100
learning_rate = 3e-5
warmup_steps = 5

eval_interval = 10
eval_tokens = 65536
log_interval = 1
checkpoint_interval = 50
