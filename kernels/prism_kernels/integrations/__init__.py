"""These kernels inside other libraries; each module imports its library, so none is imported by default."""
