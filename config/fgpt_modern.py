# The modern family at the size of fgpt_712m (720,833,024 parameters): fewer and wider layers in sizes that suit GPUs,
# heads of 128, a head of its own for the output. The weights load into Qwen3ForCausalLM. Not yet trained to the end with this code.
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

# not yet tried at this size; config/fgpt_712m.py explains these values
learning_rate = 3e-3  # 1e-2 sqrt(128 / 1536) = 2.9e-3
muon_learning_rate = 0.02
weight_decay = 0.1
warmup_steps = 200
decay_fraction = 0.7

eval_interval = 250
checkpoint_interval = 200  # at 40% of its peak, 20 minutes on an H100 and two hours on an RTX 4090
hellaswag_interval = 1000
sample_interval = 1000
