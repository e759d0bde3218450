"""Parameters in and out: PyTorch's layouts, files, run folders."""
