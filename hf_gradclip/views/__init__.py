"""Where the gradients live: a view measures them and applies a plan. One file per kind of memory."""
