"""What is changed inside one call of the model: blocks, attention, weights, convolutions, compiled code."""
