"""What a mixture of experts is: routed models, their experts, and operations on single experts and layers."""
