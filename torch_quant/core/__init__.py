"""Numbers and plain facts: specs, grids, the arithmetic of quantization, metrics, the plan."""
