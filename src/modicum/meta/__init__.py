"""Meta-training: inner and outer rules, and the loop around them."""
