"""What people share of their work: a network or a data set as a folder for Hugging Face's hub, with its card."""
