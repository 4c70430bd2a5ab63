# runs/quickstart.sh: the small model learns to answer, at a third of its pretraining's rate.
rows_per_step = 16
batch_size = 16
epochs = 5
learning_rate = 1e-3
eval_interval = 100
log_interval = 50
hellaswag_items = 240  # all of the world's
hellaswag_source = "out/quickstart/world/hellaswag_val.jsonl"
