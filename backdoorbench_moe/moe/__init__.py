"""Mixtures of experts: what routed models return, where their experts are, and layers to build them from.

- `routed`: `RoutedModel` and the `Routing` it returns.
- `structure`: optional protocols by which a model says where its experts, prunable channels and features are.
- `layers`: sparse and soft MoE layers, in separate parts: routers, dispatch, experts, losses.
- `merging`: merging experts that were tuned from one dense model, and taking the mixture apart again.
- `experts`: operations on single experts: muting, copying, reading and replacing outputs.
- `pruning`: activity of channels and pruning them.
- `norms`: measuring the running statistics of batch norms anew.
- `prefix`: evaluating the end of a model repeatedly without computing its beginning again.
- `precision`: computing in fp32 under autocast.
"""
