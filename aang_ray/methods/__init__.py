"""Methods that weight the losses or gradients of the end task and of the sampled objectives."""
