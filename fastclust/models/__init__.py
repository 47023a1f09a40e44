"""The two networks as thin ``torch.nn`` modules, and the training-free embedding."""
