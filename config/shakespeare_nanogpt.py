# The settings of nanoGPT's CPU recipe for this text (its README: 4 layers, width 128, 2,000 steps of 12 x 64 characters
# and AdamW with cosine), the baseline for config/shakespeare.py. The code is ours: with biases, bytes for characters.
data_dir = "data/shakespeare"
out_dir = "out/shakespeare_nanogpt"
tokenizer = "bytes"

family = "gpt2"
block_size = 64
n_layer = 4
n_head = 4
n_embd = 128

optimizer = "adamw"
tokens_per_step = 768
batch_size = 12
max_steps = 2000
warmup_steps = 100
schedule = "cosine"
learning_rate = 1e-3
final_lr_fraction = 0.1
weight_decay = 0.1
beta2 = 0.99

eval_interval = 250
log_interval = 250
checkpoint_interval = 1000
dtype = "float32"  # as there
