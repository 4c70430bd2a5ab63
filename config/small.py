# A model of 7.3M parameters, most of them in the embedding of GPT-2's vocabulary, for a first try with some megabytes
# of text: it takes minutes on a CPU; on a GPU increase max_steps.
data_dir = "data/mine"
out_dir = "out/mine"

family = "modern"
block_size = 256
n_layer = 4
n_head = 4
n_embd = 128
tied = True  # an untied head would be 6.4M parameters more, and did not help in short runs

tokens_per_step = 2048
batch_size = 8
max_steps = 250
warmup_steps = 10
learning_rate = 5e-3
muon_learning_rate = 0.02
decay_fraction = 0.6

eval_interval = 50
eval_tokens = 32768
log_interval = 10
checkpoint_interval = 125
