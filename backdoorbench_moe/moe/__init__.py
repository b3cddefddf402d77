"""Mixtures of experts: routed models, protocols for their experts, and MoE layers.

- `routed`: `RoutedModel` and the `Routing` it returns.
- `structure`: optional protocols by which a model describes its experts, prunable channels and features.
- `layers`: sparse and soft MoE layers, in separate parts: routers, dispatch, experts, losses.
- `merging`: merging experts that were fine-tuned from one dense model, and extracting experts from a mixture.
- `experts`: operations on single experts: muting, copying, reading and replacing outputs.
- `pruning`: activity of channels, and pruning them.
- `norms`: recomputing the running statistics of batch norms.
- `prefix`: evaluating the end of a model repeatedly without recomputing its beginning.
- `precision`: computing in fp32 under autocast.
"""
