"""How the losses of the end task and of the sampled objectives are weighed, one file a method."""
