"""Log-probabilities and quantisation held to account."""
