# The learning race of tools/bench.py: a size at which two CPU cores do its runs in half an hour. The recipe depends on
# the command line before it: python train.py --family=gpt2 --optimizer=adamw config/race.py
tokenizer = "bytes"

block_size = 128
n_layer = 4
n_head = 4
n_embd = 128
mlp_dim = 320 if family == "modern" else 512  # 0.84M parameters with modern's untied head, 0.85M in gpt2

tokens_per_step = 1024
batch_size = 8
max_steps = 2000

if optimizer == "adamw":  # nanoGPT's schedule, with the learning rate that the race finds best
    schedule = "cosine"
    final_lr_fraction = 0.1
    warmup_steps = 100
    weight_decay = 0.1
else:
    warmup_steps = 0
    learning_rate = 2e-2
    muon_learning_rate = 0.02
    decay_fraction = 1.0
    weight_decay = 0.0

eval_interval = 100
eval_tokens = 65536
log_interval = 200
checkpoint_interval = 2000
