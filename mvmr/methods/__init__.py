"""What is learnt, and by which loss."""
