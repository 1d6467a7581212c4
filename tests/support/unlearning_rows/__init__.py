"""One file for each forget loss: its row in the contract, and its plain loss."""
