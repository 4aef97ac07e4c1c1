"""Many runs side by side: the paper's ablations, their table and their picture."""
