# The recommended config of the real run: the modern family at the size of fgpt_712m (720,833,024 parameters), with
# fewer and wider layers in sizes that suit GPUs, heads of 128 and an untied output head. The weights load into
# Qwen3ForCausalLM. 19,073 steps of 524,288 tokens are 10 billion tokens. Not yet trained to the end with this code.
data_dir = "data/fineweb"
out_dir = "out/fgpt_modern"

family = "modern"
block_size = 1024
n_layer = 20
n_head = 12
n_embd = 1536
mlp_dim = 4096

tokens_per_step = 524288
batch_size = 16
max_steps = 19073

# None of these was tried at this size: docs/experiments.md says where each number comes from, and what others use.
learning_rate = 3e-3  # falls with 1 / sqrt(width): others' tuned rate for a head at width 768 is 4e-3
muon_learning_rate = 0.02  # the same at every width, because a step is scaled by the shape of the matrix
weight_decay = 0.01  # others' tuned runs have muon_learning_rate x weight_decay x steps of 3 to 4: here 3.8
warmup_steps = 200
decay_fraction = 0.7

eval_interval = 250
checkpoint_interval = 200  # at the computed speeds 18 minutes on an H100 and 80 on an RTX 4090
hellaswag_interval = 1000
sample_interval = 1000
