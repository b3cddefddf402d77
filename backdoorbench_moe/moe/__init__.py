"""Mixtures of experts: routed models, protocols for their experts, and MoE layers.

- `routed`: `RoutedModel` and the `Routing` it returns.
- `structure`: optional protocols by which a model describes its experts, prunable channels and features.
- `layers`: sparse and soft MoE layers, in separate parts: routers, dispatch, experts, losses.
- `merging`: merging experts that were fine-tuned from one dense model, and extracting experts from a mixture.
- `mlp_forms`: the kinds of MLPs that can become experts.
- `experts`: operations on single experts: muting, copying, reading and replacing outputs.
- `expert_tuning`: fine-tuning an expert to answer marked images or refused texts in a given way.
- `capture`: losses and metrics of the experts that the patches changed by a trigger are sent to.
- `units`: masking and pruning channels of norms, experts, and gates.
- `pruning`: activity of channels, and pruning them.
- `norms`: recomputing the running statistics of batch norms.
- `pairing`: finding the convolutions that each batch norm normalises.
- `feature_maps`: finding and collecting feature maps.
- `prefix`: evaluating the end of a model repeatedly without recomputing its beginning.
- `temporary`: changes that are undone at the end of a block: hooks, evaluation mode, frozen weights, restored values.
- `trial`: running a model on noise.
- `precision`: computing in bf16, or in fp32 under autocast.
"""
