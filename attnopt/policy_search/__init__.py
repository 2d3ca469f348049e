"""The best choice for each attention under a budget of time, arithmetic or memory."""
