# The learning race of tools/bench.py at 124M parameters with GPT-2's tokenizer, for a GPU: one epoch of 30M tokens, so
# that no recipe overfits (with more data raise max_steps). Not yet run: the learning rates are those of gpt2_124m.py.
tokenizer = "gpt2"

block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
mlp_dim = 2048 if family == "modern" else 3072  # as many parameters in both families

tokens_per_step = 65536
batch_size = 32
max_steps = 450

if optimizer == "adamw":  # nanoGPT's schedule, with the learning rate that the race finds best
    schedule = "cosine"
    final_lr_fraction = 0.1
    warmup_steps = 50
else:
    warmup_steps = 0
    learning_rate = 3e-3
    muon_learning_rate = 0.02
    decay_fraction = 0.7

eval_interval = 25
eval_tokens = 131072
log_interval = 25
checkpoint_interval = 450
