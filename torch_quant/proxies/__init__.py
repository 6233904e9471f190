"""Stand-ins for the float model: same inputs, same outputs, and they learn from what passes."""
