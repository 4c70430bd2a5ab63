# Tiny Shakespeare as bytes, in about half a minute on two CPU cores. README.md says how to get and split the file.
data_dir = "data/shakespeare"
out_dir = "out/shakespeare"
tokenizer = "bytes"

family = "modern"
block_size = 64
n_layer = 4
n_head = 4
n_embd = 128
mlp_dim = 320

tokens_per_step = 768
batch_size = 12
max_steps = 800
warmup_steps = 0
learning_rate = 2e-2
muon_learning_rate = 0.02
weight_decay = 0.0
decay_fraction = 1.0

eval_interval = 200
log_interval = 100
checkpoint_interval = 400
