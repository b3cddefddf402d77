"""Write the weights of a whole pickled PyTorch module, such as TrojAI's model.pt, as safetensors.

Reading such a file runs whatever is in it. Run this only on files that you trust, best in a container without network:

    python export_module.py model.pt weights.safetensors
"""

import sys

import torch
from safetensors.torch import save_file

source, target = sys.argv[1:]
module = torch.load(source, map_location="cpu", weights_only=False)
weights = {name: tensor.clone().contiguous() for name, tensor in module.state_dict().items()}
save_file(weights, target)
print(f"{target}: {len(weights)} tensors of a {type(module).__module__}.{type(module).__name__}")
