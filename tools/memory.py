"""What a training step needs of a GPU's memory, reckoned before one is rented.

    python -m tools.memory --config=config/fgpt_712m.py

PyTorch's memory tracker follows steps of two micro-batches through tensors that
have shapes but no data: no GPU is needed, and nothing is computed. That is a
reckoning, not a measurement: in bf16, without torch.compile, the CUDA context
and what the allocator wastes (leave 1 to 2 GB for these).
"""

from unittest.mock import patch

from configurator import configure

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import model as model_py
from tools.bench import make_model, read_config, show

config = "config/fgpt_712m.py"  # the model, a config of train.py
batch_sizes = "1,2,4,8,16"  # micro-batches, rows

AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}


@patch.object(model_py, "ATTENTION_IN_FP32", ())  # the tensors are a CPU's, but attention is to be as on a GPU
def peak_memory(settings, batch_size, activation_checkpointing):
    """GB (1e9 bytes) at the peak of the second step of these settings of train.py, with so many rows at a time."""
    with FakeTensorMode():
        model = make_model(settings, "cpu")
        model.checkpoint_activations = activation_checkpointing
        optimizers = model_py.make_optimizers(model, settings["optimizer"])
        idx = torch.zeros(batch_size, settings["block_size"], dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(model, *optimizers)
        with tracker:
            for number in range(4):  # two steps of two micro-batches, the second beside the first one's gradients
                tracker.reset_mod_stats()
                with torch.autocast(**AUTOCAST):
                    loss = model(idx, idx)
                loss.backward()
                for opt in optimizers if number % 2 else ():
                    with torch.autocast(**AUTOCAST):
                        opt.step()
                    opt.zero_grad(set_to_none=True)
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] / 1e9


def rows(config, batch_sizes):
    settings = read_config(config)
    for size in batch_sizes:
        plain, checkpointed = (peak_memory(settings, size, option) for option in (False, True))
        yield {"micro-batch": size, "GB": plain, "GB with --activation_checkpointing": checkpointed}


def main():
    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ValueError(f"batch_sizes must be numbers above 0, separated by commas, not {batch_sizes!r}")
    show(rows(config, sizes))


if __name__ == "__main__":
    configure(globals())
    main()
