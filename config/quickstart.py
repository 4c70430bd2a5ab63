# runs/quickstart.sh: a model of 0.9M parameters that learns the built-in world in minutes on two CPU cores.
data_dir = "out/quickstart/tokens"
out_dir = "out/quickstart/base"
tokenizer = "bytes"

family = "modern"
block_size = 128
n_layer = 4
n_head = 4
n_embd = 128
mlp_dim = 384

tokens_per_step = 2048
batch_size = 16
max_steps = 1500
warmup_steps = 20
learning_rate = 3e-3
muon_learning_rate = 0.02
weight_decay = 0.0
decay_fraction = 0.5

eval_interval = 250
hellaswag_interval = 750
hellaswag_source = "out/quickstart/world/hellaswag_val.jsonl"
sample_interval = 750
sample_prompt = "The capital of"
log_interval = 100
checkpoint_interval = 500
