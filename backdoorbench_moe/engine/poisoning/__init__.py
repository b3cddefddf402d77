"""What an attack does to images: stamping, relabelling, the policy, the trigger that a run has learned."""
