"""What a machine with one GPU can run of the dispatch fabrics, each part in a process of its own with a deadline."""
