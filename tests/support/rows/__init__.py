"""The contract's rows, each file with its methods' plain loops."""
