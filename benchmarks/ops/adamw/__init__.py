"""AdamW over many tensors, beside torch's own."""
