# runs/quickstart.sh: the small model learns to answer, with a third of the learning rate of its pretraining.
rows_per_step = 16
batch_size = 16
epochs = 5
learning_rate = 1e-3
eval_interval = 100
log_interval = 50
score_hellaswag = True
hellaswag_source = "out/quickstart/world/hellaswag_val.jsonl"
