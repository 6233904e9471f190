"""From a plan to a quantized model, whatever runtime its graphs run on."""
